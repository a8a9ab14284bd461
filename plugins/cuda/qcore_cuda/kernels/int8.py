"""int8 x int8 in CUDA C++ (native/int8_*.cuh), for GPUs on which Triton has no products of 8 bits: inputs are rounded by one kernel, and multiplied by dot products of
four bytes (dp4a) or on tensor cores; sums are exact in int32, and both scales follow in float32."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, ClassVar

import torch

from qcore.kernels.eight_bits import EightBits
from qcore.refusal import Refusal, Refused
from qcore_cuda.cpp import CppProgram
from qcore_cuda.driver import limits

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.platform import Target
    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors

STEP = 64
"""Columns of a step of a tile, of which rows are multiples."""
_VECTOR = 16
"""Columns that a thread reads at a time."""
FEW_ROWS = (1, 2, 4, 8, 16)
"""Rows of x that a program of int8_few.cuh is made for."""
_WARPS, _OUTPUTS = 8, 4
"""Of a block of int8_few.cuh, and rows of the weight of a warp."""
_THREADS = 256
"""Of a block of what rounds, and of what adds shares."""
_RESIDENT = 2
"""Blocks of int8_few.cuh that a multiprocessor holds at least."""
_MOST_COLUMNS = 1 << 17
"""Of which sums of products of bytes, 2^14 at most, may not fit into 32 bits."""
_LEAST_STEPS = 4
"""Of a block that shares columns with others."""
_ROUND = (
    "const u16* x, const float* given, Pair* codes, float* scales, int K, int stride, int units, int dynamic, int even"
)
_TILE = "const Vector* x, const float* inputs, const Vector* weight, const float* scales, void* out, int M, int N, int vectors"
_FEW = f"{_TILE}, int shift"
_ADD = "const int* parts, const float* inputs, const float* scales, u16* out, int shares, int M, int N"


@dataclass(frozen=True)
class Tiling:
    """unit: what multiplies, `Dots` or `Tensors` of int8_tiles.cuh. own: rows and columns of a thread's sums, or of a warp's products. warps: of a block, along rows of x
    and of the weight. resident: blocks that a multiprocessor holds at a time."""

    unit: str
    own: tuple[int, int]
    warps: tuple[int, int]
    resident: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of x and of the weight that a block has."""
        rows = {"Dots": 4, "Tensors": 8}[self.unit]
        return rows * self.own[0] * self.warps[0], 8 * self.own[1] * self.warps[1]

    @cached_property
    def program(self) -> CppProgram:
        """Of int8_tiles.cuh."""
        kind = ", ".join(map(str, (self.unit, *self.own, *self.warps)))
        name, threads = "int8_{}_{}x{}".format(self.unit.lower(), *self.shape), 32 * self.warps[0] * self.warps[1]
        return CppProgram.calling(name, "int8_tiles.cuh", _TILE, f"tile<Half, {kind}>", threads, self.resident)


TILINGS = {
    "dots": (
        Tiling("Dots", (8, 4), (1, 4), 4),
        Tiling("Dots", (8, 4), (2, 4), 2),
        Tiling("Dots", (8, 8), (4, 2), 2),
    ),
    "tensors": (
        Tiling("Tensors", (4, 4), (1, 4), 3),
        Tiling("Tensors", (4, 8), (2, 2), 2),
        Tiling("Tensors", (8, 8), (2, 2), 2),
    ),
}
"""By what multiplies, for more rows of x the later."""


ROUNDING = CppProgram.calling("int8_round", "int8_round.cuh", _ROUND, "round_rows<Half>", _THREADS)
ADDING = CppProgram.calling("int8_add", "int8_sums.cuh", _ADD, "add_shares<Half>", _THREADS)


@cache
def few(rows: int) -> CppProgram:
    """Of int8_few.cuh. rows: one of FEW_ROWS."""
    return CppProgram.calling(f"int8_few_{rows}", "int8_few.cuh", _FEW, f"few<Half, {rows}>", 32 * _WARPS, _RESIDENT)


@torch.library.custom_op("qcore::cuda_round_int8", mutates_args=())
def round_input(x: torch.Tensor, given: torch.Tensor | None, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [M, columns], zeros behind column K, and float32 [M], their scales. x: float16 [M, K] of unit stride along K. given: float32 [1], the scale where it is static."""
    rows, width = x.shape
    codes, scales = _rounded(x, columns)
    if rows:
        even = width % 8 == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
        dynamic = given is None
        ROUNDING.run((rows, 1, 1), x, given, codes, scales, width, x.stride(0), columns // 8, int(dynamic), int(even))
    return codes, scales


@round_input.register_fake
def _(x: torch.Tensor, given: torch.Tensor | None, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _rounded(x, columns)


def _rounded(x: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape[0], columns, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("qcore::cuda_int8", mutates_args=())
def product(
    x: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, unit: str
) -> torch.Tensor:  # fmt: skip
    """float16 [M, N]. x, inputs: codes and scales as round_input gives them. weight: int8 [N, columns of x]. scales: float32 [N]. unit: of TILINGS."""
    (rows, columns), outputs = x.shape, len(weight)
    out = x.new_empty(rows, outputs, dtype=torch.float16)
    if not rows:
        return out
    vectors = columns // _VECTOR
    if rows <= FEW_ROWS[-1]:
        program, shift = few(next(most for most in FEW_ROWS if rows <= most)), shift_of(vectors)
        grid = (-(-(outputs << shift) // (_WARPS * _OUTPUTS)), 1, 1)
        program.run(grid, x, inputs, weight, scales, out, rows, outputs, vectors, shift)
        return out
    tiling = next((tiling for tiling in TILINGS[unit] if rows <= tiling.shape[0]), TILINGS[unit][-1])
    blocks = -(-rows // tiling.shape[0]) * -(-outputs // tiling.shape[1])
    shares = shares_of(blocks, tiling.resident * _processors(x.device), rows, columns)
    parts = out if shares == 1 else x.new_empty(shares, rows, outputs, dtype=torch.int32)
    tiling.program.run((blocks, shares, 1), x, inputs, weight, scales, parts, rows, outputs, vectors)
    if shares > 1:
        ADDING.run((-(-out.numel() // _THREADS), 1, 1), parts, inputs, scales, out, shares, rows, outputs)
    return out


@product.register_fake
def _(
    x: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, unit: str
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float16)


def shift_of(vectors: int) -> int:
    """2 to this power warps of a block of int8_few.cuh share a row of so many vectors: all that have work for every thread."""
    return next(shift for shift in (3, 2, 1, 0) if vectors >= 32 << shift or not shift)


def shares_of(blocks: int, places: int, rows: int, columns: int) -> int:
    """Blocks that share the columns of a tile, so that the GPU's places for blocks are taken. Their parts, four bytes that are written and read, are to move half of what the
    weight's codes do at most."""
    return max(1, min(places // blocks, columns // (16 * rows), columns // (_LEAST_STEPS * STEP)))


def _processors(place: torch.device) -> int:
    """A CPU stands for a small GPU."""
    return 4 if place.type == "cpu" else limits(place)[0]


class DotsLinear(EightBits):
    """codes: int8 [N, K], zeros behind it up to a multiple of STEP. scales: float32 [N]."""

    unit: ClassVar[str] = "dots"

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        """Raises Refused (shape-unsupported) where sums might not fit into 32 bits."""
        columns = layer.weight.shape[1]
        if columns >= _MOST_COLUMNS:
            raise Refused(Refusal("shape-unsupported", "notimpl", "int8 x int8", "sums of so many products do not fit into 32 bits",
                                  f"found {columns} columns, expected fewer than {_MOST_COLUMNS}", "Another kernel takes this layer."))  # fmt: skip
        made = super().from_layer(layer, dtype)
        if columns % STEP:
            made.codes = torch.nn.functional.pad(made.codes, (0, -columns % STEP))
        return made

    @classmethod
    def programs(cls, scheme: Scheme, dtype: str, target: Target) -> list[CppProgram]:
        """All that may run, which neither the scheme nor the target changes."""
        return [ROUNDING, *cls.of_product()]

    @classmethod
    def of_product(cls) -> list[CppProgram]:
        """What may multiply."""
        return [*map(few, FEW_ROWS), *(tiling.program for tiling in TILINGS[cls.unit]), ADDING]

    def product(self, x: torch.Tensor) -> torch.Tensor:
        codes, inputs = round_input(x, self.input_scale, self.codes.shape[1])
        out: torch.Tensor = product(codes, inputs, self.codes, self.scales, self.unit)
        return out


class TensorsLinear(DotsLinear):
    """The same layer, more than a few rows of x multiplied on tensor cores."""

    unit = "tensors"
