"""Weight-only codes of 4 and 8 bits on tensor cores in CUDA C++ (native/codes.cuh): the weight permuted as these take it, from Turing on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from qcore.bits import unpack
from qcore.elements import Codebook, Float, Granularity, Int
from qcore.kernels.order import columns_by_group
from qcore.kernels.scales import by_group, finest_scales, group_size
from qcore.kernels.stacking import StackableLinear
from qcore.tensor import float_table
from qcore_cuda.kernels.marlin_experts import can_route, experts_product, experts_programs
from qcore_cuda.kernels.marlin_product import (
    CHUNK,
    DEEP,
    HOPPER,
    PRODUCT,
    TOKENS,
    WARPGROUP_ROWS,
    Form,
    adding,
    product,
)

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.kernels.triton.program import Program
    from qcore.platform import Target
    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors, QuantizedTensor
    from qcore_cuda.cpp import CppProgram

_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_EIGHT_BITS = 0x7F
"""Of a byte of e4m3 that is no number, sign aside."""
ROWS = 256
"""Rows repacked at a time."""
_COLUMNS = (8192, 12288)
"""Of layers that programs are compiled for."""


class MarlinLinear(StackableLinear):
    """weight: int32, chunks as native/codes.cuh has them. records: uint8, [N / 16, groups] of the rows' scales and zero points. table: uint8 [2, 16], the low
    and the high bytes of 16 numbers in the activations' dtype. order: int64 [K], act-order columns sorted by group."""

    weight: torch.Tensor
    records: torch.Tensor
    table: torch.Tensor | None
    order: torch.Tensor | None

    COMMON = ("table",)
    SHARED: ClassVar[int] = 0
    """Bytes of shared memory that a block may have; 0: as much as there is."""

    def __init__(
        self, form: Form, center: int, outputs: int, weight: torch.Tensor, records: torch.Tensor, table: torch.Tensor | None, order: torch.Tensor | None
    ) -> None:  # fmt: skip
        super().__init__()
        self.form, self.center, self.outputs = form, center, outputs
        self.register_buffer("weight", weight)
        self.register_buffer("records", records)
        self.register_buffer("table", table)
        self.register_buffer("order", order)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        """Raises Refused (shape-unsupported) where act-order groups are not all of one size."""
        weight = layer.weight
        scheme, (rows, columns) = weight.scheme.weight, weight.shape
        (code, center), grid, scales = _code(scheme.element), scheme.granularity, _scales(weight)
        form = _form(weight.scheme, dtype, scales.dtype)
        order = None if weight.index is None else columns_by_group(weight.index, group_size(grid), "Marlin")
        scales, zeros = by_group(scales, grid, rows), None
        packed = []
        for part in weight.codes.split(ROWS):
            codes = unpack(part, 4, columns).to(torch.uint8) if scheme.bits == 4 else part.view(torch.uint8)
            if code == "Int8":
                codes = codes ^ 128
            packed.append(permuted(codes if order is None else codes[:, order], code).flatten())
        if code == "Float8":  # codes that are no numbers are decoded as if they were
            scales[:, (weight.codes.view(torch.uint8) & _EIGHT_BITS == _EIGHT_BITS).any(1)] = float("nan")
        if weight.zeros is not None:  # those of signed codes are held as they are, and codes `center` higher
            zeros = by_group((weight.zeros.to(torch.int16) + center).to(torch.uint8), grid, rows)
        table = table_of(_numbers(weight), dtype) if code == "Table4" else None
        return cls.of_parts(form, center, packed, scales, zeros, table, order)

    @classmethod
    def of_parts(
        cls, form: Form, center: int, packed: Sequence[torch.Tensor], scales: torch.Tensor, zeros: torch.Tensor | None = None,
        table: torch.Tensor | None = None, order: torch.Tensor | None = None,
    ) -> Self:  # fmt: skip
        """packed: int32, flat, of some rows after others, as `permuted` gives them. scales, zeros: [groups, N], in the form's type and uint8. The rest as
        buffers are."""
        parts = [scales, *([] if zeros is None else [zeros])]
        records = torch.cat([part.view(len(part), -1, 16).view(torch.uint8) for part in parts], 2)
        records = records.transpose(0, 1).flatten()
        # Programs read in pairs of chunks, and so behind the last one where their number is odd.
        weight = torch.cat([*packed, packed[0].new_zeros(form.vectors * 128)])
        records = torch.cat([records, records.new_zeros(form.records * form.record)])
        return cls(form, center, scales.shape[1], weight, records, table, order)

    @classmethod
    def programs(cls, scheme: Scheme, dtype: str, target: Target) -> list[CppProgram | Program]:
        """What may run a scheme on a target. dtype: of the activations, `float16` or `bfloat16`."""
        kind = getattr(torch, dtype)
        exact = not isinstance(scheme.weight.element, Int) and scheme.weight.scales[0].type != "e8m0"
        form = _form(
            scheme, kind, torch.float32 if exact else torch.bfloat16 if scheme.weight.scales[0].type == "e8m0" else kind
        )
        return programs_of(form, target)

    @classmethod
    def stackable(cls, layers: Sequence[Self]) -> bool:
        """Where tables are the same, too."""
        tables = [layer.table for layer in layers if layer.table is not None]
        return can_route() and super().stackable(layers) and all(torch.equal(table, tables[0]) for table in tables)

    def forward(self, x: torch.Tensor, experts: torch.Tensor | None = None) -> torch.Tensor:
        flat, order = x.reshape(-1, x.shape[-1]), self.order
        if order is not None:
            flat = flat[:, order] if experts is None else flat.gather(1, order[experts])
        flat = flat.contiguous()
        out = self.product(flat) if experts is None else self._routed(flat, experts)
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """[M, N] of contiguous x [M, K], by one weight."""
        form = self.form
        out: torch.Tensor = product(
            x, self.weight, self.records, self.table, self.outputs, form.code, form.group, form.scales, form.zeros, self.center, self.SHARED
        )  # fmt: skip
        return out

    def _routed(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        form = self.form
        out: torch.Tensor = experts_product(
            x, experts, self.weight, self.records, self.table, self.outputs, form.code, form.group, form.scales, form.zeros, self.center, self.SHARED
        )  # fmt: skip
        return out


class SmallMarlinLinear(MarlinLinear):
    """The same where a block has no more than 64 KiB of shared memory (Turing): steps of fewer columns, as far as two have their places."""

    SHARED = 64 << 10


def programs_of(form: Form, target: Target) -> list[CppProgram | Program]:
    """What may run a form on a target."""
    if target.name == HOPPER:
        some = [form.warpgroup(rows, target.shared) for rows in WARPGROUP_ROWS]
    else:
        some = [form.wide_in(tokens, deep, target.shared)[0] for tokens in TOKENS for deep in DEEP]
    vectors = [form.vector_in(columns, target.shared, hopper=target.name == HOPPER) for columns in _COLUMNS]
    return [
        *dict.fromkeys([*filter(None, vectors), *some]),
        *experts_programs(form, target.shared),
        form.dense(),
        adding(form.dtype),
    ]


def _form(scheme: Scheme, dtype: torch.dtype, scales: torch.dtype) -> Form:
    weight = scheme.weight
    return Form(_code(weight.element)[0], _group(weight.granularity), weight.zero is not None, dtype, scales)


def _group(grid: Granularity | None) -> int:
    """Products of a group, 0: all."""
    return group_size(grid) // PRODUCT


def _code(element: object) -> tuple[str, int]:
    """The codes' name in native/codes.cuh, and what codes of integers without zero points are too great by."""
    if isinstance(element, Int):
        return ("Int4", 8 if element.signed else 0) if element.bits == 4 else ("Int8", 128)
    if isinstance(element, Codebook) or (isinstance(element, Float) and element.bits == 4):
        return "Table4", 0
    return "Float8", 0


def _scales(weight: QuantizedTensor) -> torch.Tensor:
    """In the shape of the finest level: as they are stored where there are no others, else float32."""
    levels, first = weight.scheme.weight.scales, weight.scales[0]
    if len(levels) == 1 and first.dtype in _SCALES:
        return first
    scales = finest_scales(weight)
    return scales.to(torch.bfloat16) if levels[0].type == "e8m0" else scales  # powers of two


def _numbers(weight: QuantizedTensor) -> torch.Tensor:
    """float32 [16], what codes stand for before they are scaled."""
    element = weight.scheme.weight.element
    numbers = float_table(element.format) if isinstance(element, Float) else weight.table
    assert numbers is not None, "a codebook travels with its tensor"
    return numbers


def table_of(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [2, 16]: the low and the high bytes of 16 numbers in the activations' dtype."""
    return numbers.to(dtype).view(torch.uint8).view(16, 2).t().contiguous()


def permuted(codes: torch.Tensor, code: str) -> torch.Tensor:
    """codes: uint8 [rows, K], multiples of 16 and 64. int32 [rows / 16, K / 64, 128 or 256]: a chunk's lanes one after the other, for each the words of its
    four products."""
    rows, columns = codes.shape
    # [rows / 16, K / 64, g, t, s, pair, half, which of two]
    parts = codes.view(rows // 16, 2, 8, columns // CHUNK, 4, 2, 4, 2).permute(0, 3, 2, 6, 4, 5, 1, 7).to(torch.int64)
    pair, half, which = torch.meshgrid(*(torch.arange(2, device=codes.device),) * 3, indexing="ij")
    if code.endswith("4"):
        places = half + 2 * pair + 4 * which if code == "Int4" else which + 2 * half + 4 * pair
        words = (parts << 4 * places).sum((-3, -2, -1))  # [.., g, t, s]
        return _int32(words).flatten(2)
    byte = 2 * half + which if code == "Int8" else 2 * which + 1 - half
    words = (parts << 8 * byte).sum((-2, -1))  # [.., g, t, s, pair]
    return _int32(words.unflatten(4, (2, 2)).permute(0, 1, 4, 2, 3, 5, 6)).flatten(2)  # a vector holds two products


def _int32(words: torch.Tensor) -> torch.Tensor:
    """The low 32 bits of int64 numbers."""
    return (
        words.contiguous().view(torch.int32)[..., ::2].contiguous()
        if words.dim() == 1
        else _int32(words.flatten()).view(words.shape)
    )
