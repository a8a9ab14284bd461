"""Inputs under one scale for all of their rows, which is found at run time: of experts that are held as one, a scale for each expert's rows.

The scale is found by torch's operators and given to what rounds rows under scales that are given.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qcore.elements import Float, PerTensor
from qcore.kernels.divide import divide
from qcore.kernels.minifloat import LARGEST
from qcore.kernels.triton.eights import EightsLinear, product
from qcore.kernels.triton.rounding import round_input

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.kernels.triton.program import Program
    from qcore.platform import Target
    from qcore.scheme import Scheme, TensorScheme
    from qcore.tensor import LayerTensors


def given_scale(scheme: TensorScheme) -> TensorScheme | None:
    """How inputs are rounded once the scale of all of them is known; None where a scheme has no such scale, or zero points beside it."""
    whole = isinstance(scheme.scales[-1].granularity, PerTensor)
    if not (scheme.dynamic and whole and scheme.zero is None and scheme.outliers is None):
        return None
    return replace(scheme, dynamic=False, bound=None) if len(scheme.scales) == 1 else scheme


def scale_of(x: torch.Tensor, scheme: TensorScheme, experts: torch.Tensor | None, count: int) -> torch.Tensor:
    """float32 scale of x [M, K]: [1], or of each row [M] where experts, int32 [M] below `count`, says whose rows they are.

    As qcore.kernels.activations has it: of the largest magnitude, an element's largest number and, above scales of e4m3, theirs.
    """
    largest = x.abs().amax(-1).to(torch.float32)
    if scheme.bound is not None:
        largest = largest.clamp(max=scheme.bound)
    if experts is None:
        found = torch.nn.functional.pad(largest, (0, 1)).amax(0, keepdim=True)
    else:
        found = largest.new_zeros(count).scatter_reduce(0, experts.long(), largest, "amax")[experts]
    element, fine = scheme.element, LARGEST["e4m3fn"] if len(scheme.scales) > 1 else 1.0
    steps = LARGEST[element.format] * fine if isinstance(element, Float) else (2**scheme.bits - 1) / 2
    scale = divide(found, steps)
    return torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)


class WholeEightsLinear(EightsLinear):
    """As EightsLinear, but for how inputs' scale is found."""

    found: TensorScheme

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        scheme = layer.weight.scheme
        assert scheme.input is not None
        made = super().from_layer(replace(layer, weight=replace(layer.weight, scheme=_known(scheme))), dtype)
        made.found = scheme.input
        return made

    @classmethod
    def programs(cls, scheme: Scheme, dtype: str, target: Target) -> list[Program]:
        return super().programs(_known(scheme), dtype, target)

    def forward(self, x: torch.Tensor, experts: torch.Tensor | None = None) -> torch.Tensor:
        flat, how = x.reshape(-1, x.shape[-1]), self.rounding
        if flat.stride(-1) != 1:
            flat = flat.contiguous()
        scale = scale_of(flat, self.found, experts, len(self.codes))
        codes, inputs = round_input(flat, scale, how.element, how.group, how.scale, how.dynamic, how.bound, True)
        if experts is None:
            out = self.product(codes, inputs, x.dtype)
        else:
            out = product(codes, inputs, self.codes, self.scales, x.dtype, experts)
        return out.reshape(*x.shape[:-1], out.shape[-1])


def _known(scheme: Scheme) -> Scheme:
    """The scheme of a layer whose inputs' scale is given."""
    known = given_scale(scheme.input) if scheme.input else None
    assert known is not None, "the row takes no other inputs"
    return replace(scheme, input=known)
