"""Round to nearest: within half a step everywhere, and exact where the weight is a grid already."""

import pytest
import torch

from qcore.algorithms.rtn import rtn
from qcore.discovery import registry
from qcore.elements import Float
from qcore.refusal import Refused
from qcore.scheme import Scheme
from qcore.testing.cases import catalogue

ROW = next(algorithm for algorithm in registry().algorithms if algorithm.name == "rtn")
SCHEMES = [
    scheme
    for scheme in catalogue()
    if scheme.input is None and ROW.accepts.refuse(scheme) is None and "+" not in str(scheme) and ":" not in str(scheme)
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_weights_are_within_half_a_step(scheme: Scheme) -> None:
    weight = torch.randn(24, 512, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    made = ROW.load()(weight, scheme)
    assert made.scheme == scheme
    scale = made.scales[0].float()
    step = made._spread(scale) if scale.shape[-1] > 1 else scale
    error = (made.dequantize() - weight).abs()
    if isinstance(scheme.weight.element, Float):
        exponent, mantissa = map(int, scheme.weight.element.format[1:4:2])
        least = 2.0 ** (1 - ((1 << exponent - 1) - 1) - mantissa)
        assert bool((error <= weight.abs() * 2.0 ** -(mantissa + 1) + 0.5001 * step * least).all())
    elif scheme.weight.zero is None:  # the grid has one step less above than below
        assert bool((error <= step * 0.5001 + (weight.abs() >= weight.abs().max() * 0.99) * step).float().mean() > 0.99)
    else:
        assert bool((error <= step * 1.0001).all())


def test_a_grid_comes_back_as_it_was() -> None:
    codes = torch.arange(16).repeat(4, 8).float()
    weight = (codes - 5) * 0.25
    assert torch.equal(rtn(weight, Scheme.parse("W4A16-g32-asym")).dequantize(), weight)


@pytest.mark.parametrize("words", ["W4A16-g64-sym", "W4A16-g64-asym", "MXFP4A16", "W3A16-g256-asym"])
def test_the_last_columns_are_a_group_of_their_own(words: str) -> None:
    weight, scheme = torch.randn(4, 100, generator=torch.Generator().manual_seed(0)), Scheme.parse(words)
    size = scheme.weight.scales[0].granularity.size  # type: ignore[union-attr]
    made, last = rtn(weight, scheme).dequantize(), weight[:, 100 - 100 % size :] if size < 100 else weight
    assert torch.equal(made[:, -last.shape[1] :], rtn(last.contiguous(), scheme).dequantize())


def test_codes_that_hold_no_negative_weight_are_refused() -> None:
    with pytest.raises(Refused, match="no negative weights"):
        rtn(torch.randn(4, 64), Scheme.parse("W4A16-uint4-g64-sym"))


@pytest.mark.parametrize("words", ["NVFP4A16", "FP8_BLOCK", "MXFP4A16", "MXFP8"])
def test_scales_are_such_as_the_scheme_keeps(words: str) -> None:
    """They come back from the file's dtype as they were found, and no weight is farther from its number than the next one."""
    weight = torch.randn(200, 320, generator=torch.Generator().manual_seed(0)) * 0.03
    made = rtn(weight, Scheme.parse(words))
    error = (made.dequantize() - weight).abs()
    assert error.amax() <= weight.abs().amax() * (0.04 if made.scheme.weight.bits == 8 else 0.26)
    assert error.square().mean() < (8e-4 if made.scheme.weight.bits == 8 else 0.02) * weight.square().mean()
