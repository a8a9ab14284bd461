"""A Triton kernel compiled for a GPU that need not be here, by the compilers in Triton's own wheel, and what they made of it.

That a kernel compiles does not say that the GPU's matrix unit multiplies: where an instruction is missing, Triton makes products one by one. So
the code is searched for the instruction. Triton must have been imported without its interpreter (TRITON_INTERPRET).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_MATRIX = re.compile(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_s?mfma|v_wmma|v_swmmac)[\w.:]*")
"""Instructions of matrix units, in PTX and in AMD's assembly."""


@dataclass(frozen=True)
class Program:
    """function: a `triton.jit`. signature: Triton's type of each argument that is no constant (`*bf16`, `i32`). aligned: those among them that are
    multiples of 16, which widens loads."""

    name: str
    function: Any
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    aligned: frozenset[str] = frozenset()
    options: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """matrix: the matrix unit's instruction that occurs most often; empty where products are made one by one. registers: of a thread. spilled:
    bytes of a thread's registers that are kept in memory. shared: bytes of a block."""

    matrix: str
    registers: int
    spilled: int
    shared: int


def compile_program(program: Program, backend: str, architecture: int | str, warp: int) -> Compiled:
    """backend, architecture: Triton's names. warp: threads of one. Raises whatever the compiler does not take."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [*program.signature, *program.constants]
    source = ASTSource(
        fn=program.function,
        signature=dict(program.signature) | dict.fromkeys(program.constants, "constexpr"),
        constexprs=dict(program.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in program.aligned},
    )
    made = triton.compile(source, target=GPUTarget(backend, architecture, warp), options=dict(program.options))
    found = _MATRIX.findall(made.asm["ptx"] if "ptx" in made.asm else made.asm["amdgcn"])
    registers, spilled = _of_cubin(made.asm["cubin"]) if "cubin" in made.asm else _of_amdgcn(made.asm["amdgcn"])
    return Compiled(max(set(found), key=found.count) if found else "", registers, spilled, made.metadata.shared)


def _of_cubin(binary: bytes) -> tuple[int, int]:
    """Registers, and bytes of the stack, which Triton's programs use for nothing but spilled ones."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
    usage = dict(re.findall(r"(REG|STACK):(\d+)", said))
    return int(usage["REG"]), int(usage["STACK"])


def _of_amdgcn(text: str) -> tuple[int, int]:
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)
    assert registers and scratch, "the assembly has no resource usage"
    return int(registers[1]), int(scratch[1])
