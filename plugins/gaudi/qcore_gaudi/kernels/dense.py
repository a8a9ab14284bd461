"""Weights that become bfloat16 at every call, by operators of torch that Gaudi has, and torch's product: what Intel's own layers do with checkpoints that its
matrix engine has no type for (vllm-hpu-extension's dequant_block_fp8_weight_naive, for one). Memory keeps the codes.

Gaudi's matrix engine has bfloat16 and fp8, and no integers (Intel's table of operators: mm, bmm and matmul have no INT8). Whole numbers up to 256 are numbers of
bfloat16, so int8 x int8 is a product of bfloat16 whose factors are exact and whose sums are in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from qcore.bits import unpack
from qcore.elements import Codebook, Float, Group, Int, PerChannel, PerTensor
from qcore.kernels.order import columns_by_group
from qcore.kernels.scales import by_group, finest_scales, group_size
from qcore.tensor import TORCH_FLOATS, float_table
from qcore_gaudi.kernels import inputs
from qcore_gaudi.kernels.e4m3 import from_codes, halved_groups
from qcore_gaudi.kernels.planes import packed, unpacked

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.scheme import TensorScheme
    from qcore.tensor import LayerTensors, QuantizedTensor

_ROWS = 256
"""Rows repacked at a time."""


class DenseLinear(torch.nn.Module):
    """codes: int32 [N, words] (qcore_gaudi/kernels/planes.py), or e4m3 [N, K]. values: of the codes, float32 [2^bits]; None for whole numbers, from which
    `center` is taken. scales, zeros: [N, groups], in the types that they are stored in; one group of all columns follows the sums. order: int64 [K],
    act-order columns sorted by group. input_scale, input_zero: of static inputs."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    values: torch.Tensor | None
    shifts: torch.Tensor | None
    order: torch.Tensor | None
    input_scale: torch.Tensor | None
    input_zero: torch.Tensor | None

    def __init__(self, columns: int, group: int, bits: int, center: int, given: TensorScheme | None) -> None:
        """group: columns under one scale. bits: of a code; 0 for e4m3. given: what inputs are rounded to."""
        super().__init__()
        self.columns, self.group, self.bits, self.center, self.given = columns, group, bits, center, given
        self.added = False
        self.register_buffer("shifts", torch.arange(32, dtype=torch.int32) if bits else None)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        """Raises Refused (shape-unsupported) where act-order groups are not all of one size."""
        weight = layer.weight
        scheme, (rows, columns) = weight.scheme.weight, weight.shape
        element, grid, order = scheme.element, scheme.granularity, None
        assert isinstance(element, Int | Float | Codebook)
        if weight.index is not None:
            assert isinstance(grid, Group)
            order = columns_by_group(weight.index, grid.size, "Gaudi's dense product")
        single = len(scheme.scales) == 1 and scheme.scales[0].type == "float"
        scales = weight.scales[0] if single else finest_scales(weight)
        scales = by_group(scales, grid, rows).t().contiguous()
        whole_rows = isinstance(grid, PerChannel | PerTensor)
        group = columns if whole_rows else min(group_size(grid), columns)
        is_e4m3 = isinstance(element, Float) and element.format == "e4m3fn"
        center = 1 << element.bits - 1 if isinstance(element, Int) and element.signed else 0
        made = cls(columns, group, 0 if is_e4m3 else element.bits, center, weight.scheme.input)
        if is_e4m3:
            codes, scales = halved_groups(weight.codes, scales.to(torch.float32), group)
        else:
            codes = torch.cat([packed(part, element.bits) for part in _codes(weight, order)])
        zeros = None if weight.zeros is None else by_group(weight.zeros, grid, rows).t().contiguous()
        made.added = scheme.zero == "float"
        parts = {"codes": codes, "scales": scales, "zeros": zeros, "values": _values(weight), "order": order}
        for name, part in (parts | {"input_scale": layer.input_scale, "input_zero": layer.input_zero}).items():
            made.register_buffer(name, part)
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = self.product(flat) if len(flat) else x.new_empty(0, len(self.codes))
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K], of one row at least -> [M, N] in x's dtype."""
        factor, dtype = None, x.dtype
        if self.given is not None:
            x, factor = inputs.rounded(x, self.given, self.input_scale, self.input_zero)
        if self.order is not None:
            x = x.index_select(1, self.order)
        out = torch.mm(x.to(dtype), self.weight().to(dtype).t())
        if self.follows:
            out = out.to(torch.float32) * self.wide(self.scales).t()
        if factor is not None:
            out = out.to(torch.float32) * factor
        return out.to(dtype)

    @property
    def follows(self) -> bool:
        """Whether scales follow the sums."""
        return self.scales.shape[1] == 1 and not self.added

    def weight(self) -> torch.Tensor:
        """float32 [N, K], without scales that follow the sums."""
        numbers = torch.nn.functional.pad(self.numbers(), (0, -self.columns % self.group))
        grouped = numbers.reshape(len(numbers), -1, self.group)
        if self.zeros is not None and not self.added:
            grouped = grouped - self.wide(self.zeros).unsqueeze(-1)
        if not self.follows:
            grouped = grouped * self.wide(self.scales).unsqueeze(-1)
        if self.zeros is not None and self.added:
            grouped = grouped + self.wide(self.zeros).unsqueeze(-1)
        return grouped.reshape(len(numbers), -1)[:, : self.columns]

    def numbers(self) -> torch.Tensor:
        """float32 [N, K]: what codes stand for, before zero points and scales."""
        if self.shifts is None:
            return from_codes(self.codes, torch.float32)
        codes = unpacked(self.codes, self.shifts, self.bits, self.columns)
        if self.values is None:
            return codes.to(torch.float32) - self.center
        return self.values.index_select(0, codes.reshape(-1)).reshape(codes.shape)

    def wide(self, part: torch.Tensor) -> torch.Tensor:
        """Scales or zero points in float32 [N, groups]."""
        return part.to(torch.float32)


def _codes(weight: QuantizedTensor, order: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """uint8 [rows, K], a few rows at a time."""
    bits, parts = weight.scheme.weight.bits, weight.codes.split(_ROWS)
    if bits == 8:
        signed = weight.codes.dtype == torch.int8
        found = (part.view(torch.uint8) ^ (128 if signed else 0) for part in parts)
    else:
        found = (unpack(part, bits, weight.shape[1]) for part in parts)
    return (part if order is None else part[:, order] for part in found)


def _values(weight: QuantizedTensor) -> torch.Tensor | None:
    """float32 [2^bits]: what codes stand for; None for integers, and for e4m3, which has an operator."""
    element = weight.scheme.weight.element
    if isinstance(element, Codebook):
        return weight.table
    if isinstance(element, Int) or (isinstance(element, Float) and element.format == "e4m3fn"):
        return None
    assert isinstance(element, Float)
    if element.format in TORCH_FLOATS:
        return torch.arange(256, dtype=torch.uint8).view(TORCH_FLOATS[element.format]).to(torch.float32)
    return float_table(element.format)
