"""One decoding step of attention to a kv cache: python benchmarks/gpu_kv.py [--tokens N] [--texts N] [--json FILE]

Rows in 8 bits that attention reads (qcore.kernels.triton.attention), beside torch's attention to a cache in bfloat16, and to one in 8 bits that is made
dense before. 32 query heads share 8 heads of keys and values of 128 numbers. Times are taken as benchmarks/gpu.py says; where there is no GPU, those of Triton's
interpreter, of few tokens, say that it runs and no more.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    import qcore.testing.interpreter  # noqa: F401  the first to import Triton

from gpu import ROTATED, Call, limits, seconds

from qcore.elements import Element, Float, Int
from qcore.kernels.triton.attention import AttendedKvCache

TOKENS, TEXTS = (1 << 10, 1 << 13, 1 << 15), (1, 8)
HEADS, GROUP, SIZE = 8, 4, 128
CACHES: Mapping[str, tuple[Element, float | None]] = {
    "int8-token-dyn": (Int(8, signed=True), None),
    "fp8-tensor": (Float("e4m3fn"), 0.01),
}
"""Elements and stored scales; none: of run time."""
GOAL = 0.7
"""Of a copy's bandwidth, from 8192 tokens on."""


def contenders(
    element: Element, scale: float | None, texts: int, tokens: int, place: str
) -> dict[str, tuple[int, Call]]:
    """Bytes of keys and values, and the step, by name. Caches are rotated through more memory than a processor keeps."""
    shape = (texts, HEADS, tokens, SIZE)
    rounding = AttendedKvCache(element, None if scale is None else torch.tensor([scale])).to(place)
    query = torch.randn(texts, HEADS * GROUP, 1, SIZE, device=place, dtype=torch.bfloat16)
    states = [torch.randn(shape, device=place, dtype=torch.bfloat16) for _ in range(2)]
    rows = [rounding.encode(part) for part in states]
    held, dense = (sum(part.nbytes for part in parts) for parts in (rows, states))
    copies = max(1, ROTATED // held) if place == "cuda" else 1
    all_rows = [[part.clone() for part in rows] for _ in range(copies)]
    all_states = [[part.clone() for part in states] for _ in range(max(1, copies * held // dense))]

    def read(number: int) -> torch.Tensor:
        keys, values = all_rows[number % copies]
        return rounding.attention(query, keys, values, rounding, None, SIZE**-0.5, False)

    def whole(number: int) -> torch.Tensor:
        return attended(all_states[number % len(all_states)])

    def made_dense(number: int) -> torch.Tensor:
        return attended([rounding.decode(part, torch.bfloat16) for part in all_rows[number % copies]])

    def attended(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        # As transformers has it for one token: the query heads of a head of keys are its queries.
        grouped = query.view(texts, HEADS, GROUP, SIZE)
        return torch.nn.functional.scaled_dot_product_attention(grouped, parts[0], parts[1])

    return {"rows": (held, read), "bfloat16": (dense, whole), "made dense": (held, made_dense)}


def measured(texts: Sequence[int], tokens: Sequence[int], place: str) -> Iterator[dict[str, Any]]:
    for name, (element, scale) in CACHES.items():
        for count in texts:
            for length in tokens:
                made = contenders(element, scale, count, length, place)
                calls = [call for _, call in made.values()]
                times = seconds(calls) if place == "cuda" else [_once(call) for call in calls]
                yield {"cache": name, "texts": count, "tokens": length, "bytes": {key: size for key, (size, _) in made.items()},
                       "seconds": dict(zip(made, times, strict=True))}  # fmt: skip


def _once(call: Call) -> float:
    call(0)
    began = time.perf_counter()
    call(0)
    return time.perf_counter() - began


def line(row: Mapping[str, Any], copied: float | None) -> str:
    """One row as it stands in a table. copied: bytes a second; None: not known."""
    times, own = row["seconds"], row["seconds"]["rows"]
    part = row["bytes"]["rows"] / own / copied if copied else 0.0
    missed = copied and row["tokens"] >= 1 << 13 and part < GOAL
    cells = [row["cache"], str(row["texts"]), str(row["tokens"]), f"{own * 1e6:.1f} us", f"{part:.0%}" if copied else "-",
             *(f"{times[name] / own:.2f}" for name in ("bfloat16", "made dense")), f"goal missed: copy {GOAL:.2f}" if missed else ""]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


@torch.inference_mode()
def table(texts: Sequence[int], tokens: Sequence[int], copied: float | None) -> list[dict[str, Any]]:
    """Prints it, and gives its rows."""
    print(
        "\n| cache | texts | tokens | rows read | of a copy | bfloat16, times that | made dense, times that | |\n|"
        + "---|" * 8
    )
    rows = []
    for row in measured(texts, tokens, "cuda" if torch.cuda.is_available() else "cpu"):
        rows.append(row)
        print(line(row, copied), flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, action="append")
    parser.add_argument("--texts", type=int, action="append")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    here = torch.cuda.is_available()
    found = table(
        given.texts or TEXTS, given.tokens or (TOKENS if here else (64,)), limits()["bytes"] if here else None
    )
    if given.json:
        Path(given.json).write_text(json.dumps({"rows": found}, indent=1) + "\n")
