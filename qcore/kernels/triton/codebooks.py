"""bitsandbytes' codebooks of 16 values: w = table[q] * s, nested scales widened once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcore.kernels.scales import by_group, finest_scales, group_size
from qcore.kernels.triton.linear import PlanesLinear, rows_of
from qcore.kernels.triton.product import Form, programs_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.kernels.triton.program import Program
    from qcore.platform import Target
    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors


class CodebookLinear(PlanesLinear):
    """The table is rounded to the activations' type; scales are float32."""

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        weight = layer.weight
        assert weight.table is not None, "a codebook travels with its tensor"
        scales = by_group(finest_scales(weight), weight.scheme.weight.granularity, weight.shape[0])
        return cls(_form(weight.scheme), rows_of(weight), scales, table=weight.table.to(dtype))

    @classmethod
    def programs(cls, scheme: Scheme, dtype: str, target: Target) -> list[Program]:
        return programs_of(_form(scheme), str(scheme), torch.float32, None, None, dtype, target)


def _form(scheme: Scheme) -> Form:
    return Form(scheme.weight.bits, group_size(scheme.weight.granularity), table=True)
