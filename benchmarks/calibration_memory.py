"""Peak memory of a calibrated run beside what it may take, at 8, 16 and 32 blocks: python benchmarks/calibration_memory.py TEXT [--hidden 1024] [--inner 4096] [--scheme W4A16-g128-sym] [--algorithm gptq]

The bound: twice a block's parameters in float32, what a window's activations take, and 500 MB. Of activations are counted a window's states before and behind the block, and what its attention and its
MLP hold at once: for each token, the hidden states four times, queries, keys and values, and the inner states three times. Models have random weights in bfloat16, made by tools/make_model.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from quality import ran

ROOT = Path(__file__).parent.parent


def peak_mib(command: list[str | Path], log: Path) -> float:
    """Of a process that succeeds."""
    ended = ran(command, log)
    if ended.code:
        raise SystemExit(ended.complained)
    return ended.peak_mib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    for name, value in (
        ("hidden", 1024),
        ("inner", 4096),
        ("heads", 16),
        ("kv-heads", 4),
        ("samples", 8),
        ("seqlen", 512),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--scheme", default="W4A16-g128-sym")
    parser.add_argument("--algorithm", default="gptq")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "tests" / "golden" / "base")
    given = parser.parse_args()
    hidden, inner = given.hidden, given.inner
    kept = hidden * given.kv_heads // given.heads
    block = 2 * hidden * hidden + 2 * hidden * kept + 3 * hidden * inner
    activations = given.seqlen * (4 * hidden + hidden + 2 * kept + 3 * inner)
    bound = (8 * block + 4 * activations + 500e6) / 2**20
    print("| blocks | peak, MiB | bound, MiB |\n|---|---|---|")
    for layers in (8, 16, 32):
        with tempfile.TemporaryDirectory() as folder:
            model, out = Path(folder) / "model", Path(folder) / "out"
            made = [sys.executable, ROOT / "tools" / "make_model.py", model, "--tokenizer", given.tokenizer.resolve(), "--layers", layers,
                    "--hidden", hidden, "--inner", inner, "--heads", given.heads, "--kv-heads", given.kv_heads]  # fmt: skip
            log = Path(folder) / "log"
            peak_mib(made, log)
            run = [sys.executable, "-m", "qcore", "quantize", model, "--scheme", given.scheme, "--algorithm", given.algorithm, "--calibration", given.text.resolve(),
                   "--samples", given.samples, "--seqlen", given.seqlen, "--out", out]  # fmt: skip
            print(f"| {layers} | {peak_mib(run, log):,.0f} | {bound:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
