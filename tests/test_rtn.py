"""Round to nearest: within half a step everywhere, and exact where the weight is a grid already."""

import pytest
import torch

from qcore.algorithms.rtn import rtn
from qcore.discovery import registry
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
    if str(scheme.weight.element) in ("fp8", "e5m2", "e4m3fnuz"):
        mantissa = {"fp8": 3, "e4m3fnuz": 3, "e5m2": 2}[str(scheme.weight.element)]
        assert bool((error <= weight.abs() * 2.0 ** -(mantissa + 1) + step * 2.0**-6).all())
    elif scheme.weight.zero is None:  # the grid has one step less above than below
        assert bool((error <= step * 0.5001 + (weight.abs() >= weight.abs().max() * 0.99) * step).float().mean() > 0.99)
    else:
        assert bool((error <= step * 1.0001).all())


def test_a_grid_comes_back_as_it_was() -> None:
    codes = torch.arange(16).repeat(4, 8).float()
    weight = (codes - 5) * 0.25
    assert torch.equal(rtn(weight, Scheme.parse("W4A16-g32-asym")).dequantize(), weight)


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(Refused, match="shape-unsupported"):
        rtn(torch.randn(4, 100), Scheme.parse("W4A16-g64-sym"))
