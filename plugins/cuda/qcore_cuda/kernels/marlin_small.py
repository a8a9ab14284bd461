"""Marlin where a block has no more than 64 KiB of shared memory (Turing): steps of fewer columns, of which two at least have their places."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcore_cuda.cpp import CppProgram
from qcore_cuda.kernels.marlin import MarlinLinear
from qcore_cuda.kernels.marlin_product import (
    CHUNK,
    TOKENS,
    Form,
    _by_dense,
    _limits,
    adding,
    vector_grid,
    wide_split,
)

if TYPE_CHECKING:
    from qcore.kernels.triton.program import Program
    from qcore.platform import Target
    from qcore.scheme import Scheme

_SHARED = 64 << 10
_SUMMING = 4 << 10
"""Bytes that vector.cuh has for its sums."""
_DEEP = (4, 2, 1)
"""Chunks of a step."""
_MOST = 256
"""Rows of x up to which the weight is decoded for each product."""
_BLOCK_ROWS, _THREADS = 256, 256
"""Rows of the weight of a block of wide.cuh where a step is one chunk, and threads of every block."""


def wide_program(form: Form, tokens: int, deep: int) -> CppProgram:
    """The one of wide.cuh for blocks of 8 times `tokens` rows of x, and steps of up to `deep` chunks, of which two fit."""
    return next(
        program
        for program in (form.wide(tokens, fewer, _SHARED) for fewer in _DEEP if fewer <= deep)
        if program.name.rpartition("_")[2] > "1"
    )


def vector_program(form: Form, columns: int) -> CppProgram | None:
    """The one of vector.cuh for so many columns, where it fits."""
    program = form.vector(columns)
    return program if program.shared + _SUMMING <= _SHARED else None


def deep_of(program: CppProgram) -> int:
    """Chunks of a step of one of wide.cuh's."""
    return int(program.name.split("_")[-2])


@torch.library.custom_op("qcore::cuda_marlin_small", mutates_args=())
def product(
    x: torch.Tensor, weight: torch.Tensor, records: torch.Tensor, table: torch.Tensor | None, outputs: int, code: str, group: int, scales: torch.dtype, zeros: bool, center: int
) -> torch.Tensor:  # fmt: skip
    """As qcore::cuda_marlin."""
    rows, columns = x.shape
    form = Form(code, group, zeros, x.dtype, scales)
    if not rows:
        return x.new_empty(0, outputs)
    if x.data_ptr() % 16:  # programs read it in vectors
        x = x.clone()
    if rows > _MOST:
        return _by_dense(x, weight, records, table, outputs, form, center)
    chunks, (processors, *_) = columns // CHUNK, _limits(x.device)
    given: tuple[int, ...] = (rows, outputs, chunks, center)
    grid = vector_grid(outputs // 16, chunks, processors, _SHARED)
    program = vector_program(form, -(-columns // grid[1])) if rows == 1 else None
    if program is not None:
        given = given[1:]
    else:
        tokens = next((tokens for tokens in TOKENS if rows <= 8 * tokens), TOKENS[-1])
        blocks = -(-rows // (8 * tokens))
        deep, shares = wide_split(outputs // 16, chunks, blocks, processors)
        program = wide_program(form, tokens, deep)
        grid = (-(-outputs * deep_of(program) // _BLOCK_ROWS) * blocks, shares, 1)
    parts = x.new_empty(grid[1], rows, outputs, dtype=torch.float32 if grid[1] > 1 else x.dtype)
    program.run(grid, x, weight, records, table, parts, *given)
    if grid[1] == 1:
        return parts[0]
    out = x.new_empty(rows, outputs)
    adding(x.dtype).run((-(-out.numel() // (2 * _THREADS)), 1, 1), parts, out, grid[1], out.numel())
    return out


@product.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, records: torch.Tensor, table: torch.Tensor | None, outputs: int, code: str, group: int, scales: torch.dtype, zeros: bool, center: int
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], outputs)


class SmallMarlinLinear(MarlinLinear):
    """The same layer."""

    SHARED = _SHARED

    @classmethod
    def programs(cls, scheme: Scheme, dtype: str, target: Target) -> list[CppProgram | Program]:
        return [program for program in super().programs(scheme, dtype, target) if _fits(program)]

    def product(self, x: torch.Tensor) -> torch.Tensor:
        form = self.form
        out: torch.Tensor = product(
            x, self.weight, self.records, self.table, self.outputs, form.code, form.group, form.scales, form.zeros, self.center
        )  # fmt: skip
        return out


def _fits(program: CppProgram | Program) -> bool:
    """Whether it is one that a layer may run."""
    if not isinstance(program, CppProgram):
        return True
    if program.source == "wide.cuh":
        return program.name.removesuffix("_true").rpartition("_")[2] > "1"
    return program.source != "vector.cuh" or program.shared + _SUMMING <= _SHARED
