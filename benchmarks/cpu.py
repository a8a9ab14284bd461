"""The CPU plugin's goals, measured beside every tool that is installed: python benchmarks/cpu.py [--threads N] [--shape NxK] [FAMILY ...]

Runs `qcore bench linear --peers` once for each family and prints the tables of docs/benchmarks.md: our speed, how many times the
fastest other tool's and dense bfloat16's it is, and the goal where it was missed. Tools that cannot share an environment (vLLM) are
measured by running this again in theirs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHAPES = ("4096x4096", "11008x4096", "4096x11008")
"""N x K."""
THREADS = (1, 2)
OWN = ("native_", "dense ")
"""How the names of contenders begin that are no other tool's: this plugin's other kernels, and torch's layer without quantization."""


@dataclass(frozen=True)
class Times:
    """How many times as fast a kernel is to be; None: no goal."""

    as_others: float | None = None
    """As the fastest other tool."""
    as_dense: float | None = None
    """As torch's bfloat16 layer."""


@dataclass(frozen=True)
class Family:
    """Schemes with one goal for each number of rows."""

    name: str
    activations: str
    schemes: tuple[str, ...]
    goals: Mapping[int, Times]


INT4 = ("W4A16-g128-sym", "W4A16-g32-sym")
K_QUANTS = tuple(f"W{bits}A16-gguf:{kind}" for bits, kind in
                 ((4, "q4_0"), (4, "q4_1"), (4, "q4_k"), (5, "q5_k"), (6, "q6_k"), (8, "q8_0")))  # fmt: skip
I_QUANTS = tuple(f"W{bits}A16-gguf:{kind}" for bits, kind in
                 ((4, "iq4_nl"), (4, "iq4_xs"), (3, "iq3_s"), (3, "iq3_xxs"), (2, "iq2_s"), (2, "iq2_xs"), (2, "iq2_xxs"),
                  (1, "iq1_m"), (1, "iq1_s")))  # fmt: skip
FAMILIES = (
    Family("int4-int8", "int8", INT4, {1: Times(1.2), 16: Times(2), 512: Times(1.8)}),
    Family("int4-exact", "exact", INT4, {1: Times(1.5), 16: Times(2), 512: Times(None, 1.3)}),
    Family("int8", "exact", ("W8A16-channel-sym",), {1: Times(), 16: Times(2), 512: Times(None, 1.3)}),
    Family("w8a8", "exact", ("W8A8-int8-dyn",), {1: Times(), 16: Times(1.2), 512: Times()}),
    Family("fp4", "exact", ("W4A16-nf4-g64", "W4A16-fp4-g64"), {1: Times(1.5), 16: Times(5), 512: Times(10, 1.2)}),
    Family("gguf", "int8", K_QUANTS, {1: Times(1.2), 16: Times(2), 512: Times(4)}),
    Family("gguf-iq", "int8", I_QUANTS, {1: Times(1), 16: Times(1.5), 512: Times(4)}),
    Family("float", "exact", ("W8A16-fp8-channel", "W4A16-mxfp4", "W4A16-nvfp4"),
           {1: Times(), 16: Times(1.5), 512: Times(None, 1.2)}),
)  # fmt: skip


def measured(family: Family, threads: int, shape: str) -> list[dict[str, Any]]:
    """The rows of one run; each scheme's stand together, in the order of the goals' rows."""
    command = [sys.executable, "-m", "qcore", "bench", "linear", "--peers", "--json", "--threads", str(threads)]
    command += ["--shape", shape, "--activations", family.activations]
    command += [part for scheme in family.schemes for part in ("--scheme", scheme)]
    command += [part for batch in family.goals for part in ("--m", str(batch))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)  # the command has said why
    return list(json.loads(done.stdout)["rows"])


def cell(row: Mapping[str, Any], goal: Times) -> str:
    """One measurement as it stands in a table."""
    others = {name: peer["seconds"] for name, peer in row["peers"].items() if not name.startswith(OWN)}
    speed = f"{row['gbps']:.1f} GB/s" if row["m"] == 1 else f"{row['tops'] * 1e3:.0f} G/s"
    parts = [speed]
    if others:
        fastest = min(others, key=others.__getitem__)
        parts.append(_times(others[fastest] / row["seconds"], fastest, goal.as_others))
    if goal.as_dense or not others:
        parts.append(_times(row["vs_bf16"], "dense bfloat16", goal.as_dense))
    return ", ".join(parts)


def _times(ratio: float, of: str, goal: float | None) -> str:
    return f"{ratio:.2f} x {of}" + (f" (goal {goal:g})" if goal and ratio < goal else "")


def main(families: Sequence[str], threads: Sequence[int], shapes: Sequence[str]) -> None:
    for count in threads:
        for shape in shapes:
            for family in FAMILIES:
                if families and family.name not in families:
                    continue
                heads = [f"M = {batch}" for batch in family.goals]
                print(f"\n{family.name}: activations {family.activations}, {shape}, threads {count}\n")
                print("| scheme | " + " | ".join(heads) + " |\n|---|" + "---|" * len(heads), flush=True)
                rows = measured(family, count, shape)
                for scheme in family.schemes:
                    cells = [cell(row, family.goals[row["m"]]) for row in rows if row["scheme"] == scheme]
                    print(f"| {scheme} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(family.name for family in FAMILIES))
    parser.add_argument("--threads", type=int, action="append")
    parser.add_argument("--shape", action="append")
    given = parser.parse_args()
    if unknown := set(given.families) - {family.name for family in FAMILIES}:
        parser.error(f"no family is called {' or '.join(sorted(unknown))}")
    main(given.families, given.threads or THREADS, given.shape or SHAPES)
