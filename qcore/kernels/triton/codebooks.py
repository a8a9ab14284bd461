"""bitsandbytes' codebooks of 16 values: w = table[q] * s, nested scales widened once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcore.elements import FlatGroup
from qcore.kernels.triton.linear import PlanesLinear, by_group, group_size, rows_of
from qcore.kernels.triton.product import Form, programs_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.kernels.triton.program import Program
    from qcore.platform import Target
    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors, QuantizedTensor


class CodebookLinear(PlanesLinear):
    """The table is rounded to the activations' type; scales are float32."""

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        weight = layer.weight
        assert weight.table is not None, "a codebook travels with its tensor"
        scales = by_group(_scales(weight), weight.scheme.weight.granularity, weight.shape[0])
        return cls(_form(weight.scheme), rows_of(weight), scales, table=weight.table.to(dtype))

    @classmethod
    def programs(cls, scheme: Scheme, dtype: str, target: Target) -> list[Program]:
        return programs_of(_form(scheme), str(scheme), torch.float32, None, None, dtype, target)


def _form(scheme: Scheme) -> Form:
    return Form(scheme.weight.bits, group_size(scheme.weight.granularity), table=True)


def _scales(weight: QuantizedTensor) -> torch.Tensor:
    """float32, in the shape of the finest level."""
    fine, *coarse = weight.scheme.weight.scales
    if fine.type != "dynamic8":
        return weight.scales[0].to(torch.float32)
    assert weight.scale_table is not None, "a nested codebook travels with its tensor"
    found = weight.scale_table[weight.scales[0].int()]
    assert isinstance(fine.granularity, FlatGroup) and isinstance(coarse[0].granularity, FlatGroup)
    each = coarse[0].granularity.size // fine.granularity.size
    wide = weight.scales[1].to(torch.float32).repeat_interleave(each, -1)[..., : found.numel()].reshape(found.shape)
    return found * wide if weight.offset is None else found * wide + weight.offset
