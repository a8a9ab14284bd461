"""Fuzzes a reader with atheris (libFuzzer), guided by the coverage of qcore alone.

    python tools/fuzz.py READER [--seconds 60] [--executions N] [--seed S] [--findings FOLDER]
    python tools/fuzz.py READER --replay FILE
    python tools/fuzz.py all --seconds 60

A finding is anything raised that is not a Refused, an input that takes more than SECONDS of the processor, or one that
raises the process's peak of memory by more than MEMORY. It is written to FOLDER, and --replay runs it again. Readers of bytes
(safetensors, gguf, json, index, imatrix, measurements, schemes) are fed bytes; those of whole checkpoints, one a method, are
fed what tests/mutations.py makes of the fuzzer's bytes (tools/fuzz_targets.py). `all` runs every reader in a process of its own and prints a table.
Needs `pip install atheris` on a Python that it has wheels for (3.11), beside qcore's extra `test`.
"""

from __future__ import annotations

import argparse
import pkgutil
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from fuzz_targets import LONGEST, TARGETS, TESTS, Run

SECONDS, MEMORY = 1.0, 64 << 20
"""What an input may take: of the processor, and beyond the memory that all inputs before it took."""


def bounded(run: Run) -> Run:
    """`run`, which fails where an input takes too long or too much memory."""

    def one_input(data: bytes) -> None:
        began, before = time.process_time(), _peak()
        run(data)
        if (spent := time.process_time() - began) > SECONDS:
            raise TimeoutError(f"{spent:.1f} s")
        if (more := _peak() - before) > MEMORY:
            raise MemoryError(f"{more >> 20} MiB more than ever before")

    return one_input


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def instrumented() -> Any:
    """atheris, once qcore is imported with its coverage counted."""
    atheris: Any = import_module("atheris")
    sys.path.insert(0, str(TESTS))
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    with atheris.instrument_imports(include=["qcore"]):
        for part in ("checkpoint", "methods", "layouts", "gguf", "blocks", "model"):
            package = import_module(f"qcore.{part}")
            for module in pkgutil.iter_modules(package.__path__):
                import_module(f"qcore.{part}.{module.name}")
    return atheris


def fuzz(reader: str, seconds: int, executions: int, seed: int, findings: Path, replay: Path | None) -> None:
    """Runs until the time or the executions are over, or something is found; does not return, but exits."""
    atheris = instrumented()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        work, corpus = Path(place, "work"), Path(place, "corpus")
        work.mkdir()
        corpus.mkdir()
        run, seeds = TARGETS[reader](work)
        if replay is not None:
            bounded(run)(replay.read_bytes())
            return
        for data in seeds[:2]:  # what is imported or made once is no input's fault
            run(data)
        for i, data in enumerate(seeds):
            (corpus / str(i)).write_bytes(data)
        findings.mkdir(parents=True, exist_ok=True)
        options = [f"-max_total_time={seconds}", f"-seed={seed}", f"-max_len={max(LONGEST, *map(len, seeds))}", "-timeout=20",
                   "-rss_limit_mb=4096", "-print_final_stats=1", f"-artifact_prefix={findings}/{reader}-", "-len_control=0"]  # fmt: skip
        if executions:
            options.append(f"-runs={executions}")
        atheris.Setup([sys.argv[0], str(corpus), *options], bounded(run))
        atheris.Fuzz()


def every(readers: Sequence[str], arguments: Sequence[str]) -> Iterator[tuple[str, str, str, str]]:
    """Reader, executions, edges covered and what was found, each from a process of its own."""
    for reader in readers:
        done = subprocess.run([sys.executable, __file__, reader, *arguments], capture_output=True, text=True)
        log = done.stdout + done.stderr
        edges = re.findall(r"cov: (\d+)", log)
        runs = re.search(r"number_of_executed_units: (\d+)", log) or re.search(r"#(\d+)(?!.*#\d)", log, re.DOTALL)
        found = [
            line
            for line in log.splitlines()
            if re.match(r"\w+(\.\w+)*(Error|Exception)\b|ERROR: libFuzzer|ALARM", line.strip(" ="))
        ]
        outcome = "nothing" if done.returncode == 0 else "; ".join(islice(found, 2)) or log[-300:]
        yield reader, runs[1] if runs else "?", edges[-1] if edges else "?", outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=["all", *TARGETS])
    parser.add_argument("--seconds", type=int, default=60, help="how long a reader is fuzzed")
    parser.add_argument("--executions", type=int, default=0, help="stop after so many inputs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--findings", type=Path, default=Path("findings"), help="where inputs go that were not refused")
    parser.add_argument("--replay", type=Path, help="run this input once")
    given = parser.parse_args()
    if given.reader != "all":
        fuzz(given.reader, given.seconds, given.executions, given.seed, given.findings.absolute(), given.replay)
        return
    arguments = [f"--seconds={given.seconds}", f"--executions={given.executions}", f"--seed={given.seed}",
                 f"--findings={given.findings.absolute()}"]  # fmt: skip
    print(f"{'reader':20}{'executions':>12}{'edges':>8}  found", flush=True)
    for row in every(list(TARGETS), arguments):
        print(f"{row[0]:20}{row[1]:>12}{row[2]:>8}  {row[3]}", flush=True)


if __name__ == "__main__":
    main()
