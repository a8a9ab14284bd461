"""How far a kernel may be from the definition: one table of error bounds, and how errors are measured.

The error of a product is that of its worst element, relative to its own size and the root mean square of all: a single
wrong output channel, or one group with a zero point that is off by one, shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcore.kernel import Kernel
from qcore.scheme import Scheme

if TYPE_CHECKING:
    import torch

BOUNDS: dict[str, dict[str, float]] = {
    "1-2 bits":       {"float32": 1e-5, "float16": 2e-3, "bfloat16": 16e-3},
    "3-4 bits":       {"float32": 1e-5, "float16": 2e-3, "bfloat16": 16e-3},
    "5-8 bits":       {"float32": 1e-5, "float16": 2e-3, "bfloat16": 16e-3},
    "8-bit inputs":   {"float32": 2e-5, "float16": 4e-3, "bfloat16": 24e-3},
    "4-bit inputs":   {"float32": 2e-5, "float16": 4e-3, "bfloat16": 24e-3},
}  # fmt: skip
"""The largest error that is allowed, by bit class and the activations' data type.

A class is that of the weight's codes; and of the input where it is quantized, for the definition then rounds the input
first: as the scheme says, or as the kernel says that rounds what the scheme leaves whole (LayerKernel.rounded). The bounds are
about twice the worst that exact products with sums in float32 showed over 1,000 layers, for any number of bits: what is
left is the rounding of scales, weights and results to the activations' type.
"""


def bit_class(kernel: Kernel, scheme: Scheme) -> str:
    """The row of BOUNDS for a kernel that runs a scheme."""
    if scheme.input is not None:
        return "8-bit inputs" if scheme.input.bits > 4 else "4-bit inputs"
    if kernel.quantizes_input:
        return "8-bit inputs"
    bits = scheme.weight.bits
    return "1-2 bits" if bits <= 2 else "3-4 bits" if bits <= 4 else "5-8 bits"


def error_bound(kernel: Kernel, scheme: Scheme, dtype: str) -> float:
    """The largest `worst_error` that the kernel may have. dtype: of the activations, a column of BOUNDS."""
    return BOUNDS[bit_class(kernel, scheme)][dtype]


def worst_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """max |got - expected| / (|expected| + rms(expected)); infinite where an element is no number, or where something was
    found though nothing but zeros was expected."""
    wanted = expected.double()
    difference = (got.detach().to("cpu").double() - wanted).abs_()
    if not difference.numel():
        return 0.0
    usual = wanted.square().mean().sqrt()  # no number where an element is none
    worst = (difference / wanted.abs().add_(usual)).max() if bool(usual > 0) else difference.max() * float("inf")
    if bool(worst == worst):
        return float(worst)
    return float("inf") if bool(difference.isnan().any() | difference.any()) else 0.0
