"""A mixture's experts on the kernels of Marlin's (native/wide.cuh): weights stacked, each row of x by that of its own, in one launch however many rows an expert has."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from qcore_cuda.cpp import CppProgram
from qcore_cuda.kernels.marlin_product import CHUNK, Form, _limits, adding

if TYPE_CHECKING:
    from qcore.kernels.triton.program import Program

_BLOCKS = (1, 8, 64)
"""Rows of x of a block: for few rows of each expert one by one, or eight, which is the matrix unit's least; for many, as wide.cuh has at most."""
_DEEP = {8: 4, 64: 1}
"""Chunks of a step of a block that has so many rows, at most: few rows are for many blocks."""
_ROWS = 256
"""Rows of the weight of a block where a step is one chunk."""
_THREADS = 256


def can_route() -> bool:
    """Whether the table of blocks can be made: Triton makes it (qcore.kernels.triton.routing)."""
    return find_spec("triton") is not None


def experts_program(form: Form, block: int, shared: int) -> tuple[CppProgram, int]:
    """The one for blocks of so many rows, and the chunks of its step. shared: bytes of it that a block may have."""
    rows = max(8, block)
    return form.wide_in(rows // 8, _DEEP[rows], shared, routed=True)


def experts_programs(form: Form, shared: int) -> list[CppProgram | Program]:
    """All that experts may run, but for what adds shares."""
    from qcore.kernels.triton.routing import routing_programs

    return [*(experts_program(form, block, shared)[0] for block in _DEEP), *routing_programs(_BLOCKS)]


@torch.library.custom_op("qcore::cuda_marlin_experts", mutates_args=())
def experts_product(
    x: torch.Tensor, experts: torch.Tensor, weight: torch.Tensor, records: torch.Tensor, table: torch.Tensor | None, outputs: int, code: str, group: int,
    scales: torch.dtype, zeros: bool, center: int, shared: int,
) -> torch.Tensor:  # fmt: skip
    """[M, N] of contiguous x [M, K]. experts: int32 [M], ascending. weight, records: stacked, [E, ..]. shared: bytes of shared memory that a block may have; 0:
    as much as there is. The rest as qcore::cuda_marlin."""
    from qcore.kernels.triton.routing import blocks_of, routed_block

    (rows, columns), count = x.shape, len(weight)
    if not rows:
        return x.new_empty(0, outputs)
    if x.data_ptr() % 16:  # programs read it in vectors
        x = x.clone()
    form = Form(code, group, zeros, x.dtype, scales)
    chunks, (processors, most, _) = columns // CHUNK, _limits(x.device)
    block = routed_block(_BLOCKS, rows, count)
    blocks = blocks_of(experts, count, block)
    program, deep = experts_program(form, block, shared or most)
    across = len(blocks) * -(-outputs * deep // _ROWS)
    shares = max(1, min(2 * processors // across, chunks // (4 * deep)))
    parts = x.new_empty(shares, rows, outputs, dtype=torch.float32 if shares > 1 else x.dtype)
    program.run(
        (across, shares, 1), x, weight, records, table, parts, rows, outputs, chunks, center, blocks, int(block == 1)
    )
    if shares == 1:
        return parts[0]
    out = x.new_empty(rows, outputs)
    adding(x.dtype).run((-(-out.numel() // (2 * _THREADS)), 1, 1), parts, out, shares, out.numel())
    return out


@experts_product.register_fake
def _(
    x: torch.Tensor, experts: torch.Tensor, weight: torch.Tensor, records: torch.Tensor, table: torch.Tensor | None, outputs: int, code: str, group: int,
    scales: torch.dtype, zeros: bool, center: int, shared: int,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], outputs)
