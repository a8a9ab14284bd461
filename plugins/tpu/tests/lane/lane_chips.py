"""Each generation's own way of multiplying, interpreted on a CPU: the same numbers."""

from __future__ import annotations

import pytest
import torch

from qcore.accuracy import worst_error
from qcore.kernels.activations import quantize_input
from qcore.scheme import Scheme
from qcore.testing.layers import random_layer
from qcore_tpu.bridge import bucket
from qcore_tpu.chips import CHIPS, made_for
from qcore_tpu.kernels.linear import IntegerLinear
from qcore_tpu.kernels.pallas import product
from qcore_tpu.kernels.rounded import RoundedFloatLinear, RoundedIntegerLinear


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.architecture)
@pytest.mark.parametrize(
    ("linear", "name"),
    [
        (RoundedIntegerLinear, "W8A8-int8-dyn"),
        (RoundedIntegerLinear, "W8A8-int8-static"),
        (RoundedIntegerLinear, "W4A8"),
        (RoundedFloatLinear, "W8A8-fp8-dyn"),
        (RoundedFloatLinear, "W8A8-fp8-block128"),
    ],
)
def test_rounded_products(chip: object, linear: type[RoundedIntegerLinear | RoundedFloatLinear], name: str) -> None:
    scheme = Scheme.parse(name)
    layer = random_layer(scheme, 256, 384)
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(1)) * torch.tensor([1, 8, 0.1, 0, 1])[:, None]
    assert scheme.input is not None
    expected = quantize_input(x, scheme.input, layer.input_scale).double() @ layer.weight.dequantize().double().t()
    with made_for(chip.architecture):  # type: ignore[attr-defined]
        got = linear.from_layer(layer, torch.float32)(x)
    assert worst_error(got, expected) < 2e-5


def test_batches_of_many_sizes_need_few_programs() -> None:
    layer = random_layer(Scheme.parse("W4A16-g128-sym"), 64, 256)
    made = IntegerLinear.from_layer(layer, torch.bfloat16)
    x = torch.randn(64, 256).to(torch.bfloat16)
    for rows in (1, 17, 33):
        made(x[:rows])
    warm = product._cache_size()
    outs = [made(x[:rows]) for rows in range(1, 65)]
    assert product._cache_size() == warm and [len(out) for out in outs] == list(range(1, 65))
    assert {bucket(rows) for rows in (1, 16, 17, 64, 500, 513, 1024)} == {16, 32, 64, 512, 1024}
