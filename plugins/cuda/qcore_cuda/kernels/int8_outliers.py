"""LLM.int8 in CUDA C++ (native/int8_outliers.cuh): columns of inputs with outliers are kept, and meet the weight's codes in float32; what is left is int8 x int8
(qcore_cuda.kernels.int8). The order of operations is that of qcore.kernels.llm_int8, but for scales, which are multiplied one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcore_cuda.cpp import CppProgram
from qcore_cuda.kernels.int8 import DotsLinear, product

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.platform import Target
    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors

_THREADS = 256
"""Of every block."""
_MARKED_ROWS = 32
"""Rows of x of a block that marks columns."""
_ROWS, _OUTPUTS = 8, 32
"""Rows of x and of the weight of a block that adds outliers."""
_TURNS = 32
"""Such blocks at most that take turns at rows of x."""


def _program(name: str, parameters: str, function: str) -> CppProgram:
    return CppProgram.calling(name, "int8_outliers.cuh", parameters, function, _THREADS)


_MARK = _program("int8_mark", "const u16* x, u8* kept, int M, int K, int stride, int least", "mark")
_ROUND = _program(
    "int8_round_inside",
    "const u16* x, const u8* kept, u8* codes, float* scales, int K, int stride, int vectors, int least",
    "round_inside<Half>",
)
_ADD = _program(
    "int8_add_outliers",
    "const u16* x, const Vector* kept, const u8* weight, const float* scales, u16* out, int M, int N, int stride, int vectors",
    "add_outliers<Half>",
)


def split(x: torch.Tensor, columns: int, least: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x: float16 [M, K] of unit stride along K, M 1 at least. columns: K and more, a multiple of 16. least: the threshold's bits in float16.

    Codes int8 [M, columns], zeros where columns are kept and behind column K; their scales, float32 [M]; uint8 [columns], 1 where a column is kept."""
    rows, width = x.shape
    kept = torch.zeros(columns, dtype=torch.uint8, device=x.device)
    codes, scales = x.new_empty(rows, columns, dtype=torch.int8), x.new_empty(rows, dtype=torch.float32)
    _MARK.run((-(-width // _THREADS), -(-rows // _MARKED_ROWS), 1), x, kept, rows, width, x.stride(0), least)
    _ROUND.run((rows, 1, 1), x, kept, codes, scales, width, x.stride(0), columns // 16, least)
    return codes, scales, kept


@torch.library.custom_op("qcore::cuda_llm_int8", mutates_args=())
def llm_int8(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, least: int, unit: str) -> torch.Tensor:
    """float16 [M, N]. x, least: as `split` takes them. weight, scales, unit: as qcore::cuda_int8 does."""
    rows, (outputs, columns) = len(x), weight.shape
    if not rows:
        return x.new_empty(0, outputs)
    codes, inputs, kept = split(x, columns, least)
    out: torch.Tensor = product(codes, inputs, weight, scales, unit)
    grid = (-(-outputs // _OUTPUTS), min(_TURNS, -(-rows // _ROWS)), 1)
    _ADD.run(grid, x, kept, weight, scales, out, rows, outputs, x.stride(0), columns // 16)
    return out


@llm_int8.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, least: int, unit: str) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


class DotsOutliersLinear(DotsLinear):
    """The layer of int8 x int8, with a threshold for magnitudes of its inputs."""

    least: int

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        made, given = super().from_layer(layer, dtype), layer.weight.scheme.input
        assert given is not None and given.outliers is not None, "the row takes no other inputs"
        made.least = int(torch.tensor(given.outliers, dtype=torch.float16).view(torch.int16))
        return made

    @classmethod
    def programs(cls, scheme: Scheme, dtype: str, target: Target) -> list[CppProgram]:
        return [_MARK, _ROUND, *cls.of_product(), _ADD]

    def product(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = llm_int8(x, self.codes, self.scales, self.least, self.unit)
        return out


class TensorsOutliersLinear(DotsOutliersLinear):
    """The same layer, more than a few rows of x multiplied on tensor cores."""

    unit = "tensors"
