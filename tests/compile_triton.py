"""Compiles a Triton kernel for GPUs that are not here: python compile_triton.py SCHEME DTYPE TARGET..., as JSON. In a process of its own, for
the interpreter that other tests run in has no compiler. TARGET: backend:architecture:warp."""

import dataclasses
import json
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

from qcore.kernels.triton.integers import IntegerLinear
from qcore.kernels.triton.program import compile_program
from qcore.scheme import Scheme


def main(scheme: str, dtype: str, targets: list[str]) -> None:
    rows = []
    for target in targets:
        backend, architecture, warp = target.split(":")
        name = int(architecture) if architecture.isdigit() else architecture
        for program in IntegerLinear.programs(Scheme.parse(scheme), dtype):
            made = compile_program(program, backend, name, int(warp))
            rows.append({"target": target, "program": program.name, **dataclasses.asdict(made)})
    print(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
