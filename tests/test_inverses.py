"""Inputs multiplied by inverses, and coarse scales first: each step in numpy's float32, as the two tools take them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qcore.elements import Float
from qcore.kernels.activations import quantize_input
from qcore.kernels.kv_cache import KvRounding
from qcore.kernels.reference import ReferenceEmbedding, ReferenceLinear
from qcore.scheme import Scheme, TensorScheme
from qcore.tensor import LayerTensors, QuantizedTensor
from qcore.testing.layers import random_layer

ONE = np.float32(1)


def inputs(rows: int = 64, columns: int = 128) -> torch.Tensor:
    random = torch.Generator().manual_seed(5)
    return torch.randn(rows, columns, generator=random) * torch.rand(rows, 1, generator=random) * 9


def as_fp8(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn).float().numpy()


@pytest.mark.parametrize("seed", range(4))
def test_static_fp8_is_modelopts(seed: int) -> None:
    x = inputs()
    largest = np.float32(2.0 + seed / 8)  # of those that 448 times the file's scale gives back
    stored = torch.tensor([largest]) / torch.tensor(448.0)
    given = quantize_input(x, TensorScheme.parse("fp8-tensor"), stored, order="inverses")
    inverse = (ONE / largest) * np.float32(448)
    assert np.array_equal(given.numpy(), as_fp8(x.numpy() * inverse) * (ONE / inverse))


def test_dynamic_fp8_is_modelopts() -> None:
    x = inputs()
    x[3] = 0
    given = quantize_input(x, TensorScheme.parse("fp8-token-dyn"), order="inverses")
    largest = np.abs(x.numpy()).max(-1, keepdims=True)
    inverse = (ONE / np.where(largest <= 2.0**-24, ONE, largest)) * np.float32(448)
    assert np.array_equal(given.numpy(), as_fp8(x.numpy() * inverse) * (ONE / inverse))
    plain = quantize_input(x, TensorScheme.parse("fp8-token-dyn"))
    assert not torch.equal(given, plain) and torch.allclose(given, plain, rtol=0.07, atol=1e-6)


@pytest.mark.parametrize("whole", [True, False])
def test_nvfp4_is_autorounds(whole: bool) -> None:
    x = inputs()
    x[3] = 0
    largest_of_all = np.abs(x.numpy()).max()
    divisor = np.float32(1234.5) if whole else np.float32(448 * 6) * (ONE / largest_of_all)
    scale = 1 / torch.tensor([divisor], dtype=torch.float64) if whole else None
    scheme = Scheme.parse("W4A4-nvfp4").input
    assert scheme is not None
    given = quantize_input(x, scheme, scale, order="inverses").numpy()

    groups = x.numpy().reshape(64, 8, 16)
    fine = divisor * (np.abs(groups).max(-1, keepdims=True) * np.float32(1 / 6))
    stored = as_fp8(fine)
    effective = stored * (ONE / divisor)
    inverse = np.divide(ONE, effective, out=np.zeros_like(effective), where=effective != 0)
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    scaled = groups * inverse
    codes = np.sign(scaled) * grid[np.abs(np.abs(scaled)[..., None] - grid).argmin(-1)]  # no ties among random numbers
    back = np.divide(ONE, inverse, out=np.zeros_like(inverse), where=inverse != 0)
    assert np.array_equal(given, (codes * back).reshape(64, 128))


def test_coarse_scales_first() -> None:
    made = random_layer(Scheme.parse("W4A16-nvfp4"), 64, 256).weight
    parts = (made.scheme, made.shape, made.codes, made.scales)
    first = QuantizedTensor(*parts, coarse_first=True)
    values, (fine, coarse) = made.values(), made.scales
    wanted = ((values * coarse.float()).unflatten(1, (-1, 16)) * fine.float().unsqueeze(-1)).flatten(1)
    assert torch.equal(first.dequantize(), wanted)
    assert not torch.equal(made.dequantize(), wanted) and torch.allclose(made.dequantize(), wanted, rtol=3e-7)
    assert torch.equal(ReferenceLinear(LayerTensors(first))(torch.eye(256)).t(), wanted)
    rows = torch.tensor([5, 0, 63])
    assert torch.equal(ReferenceEmbedding(first, torch.float32)(rows), wanted[rows])
    assert torch.equal(first.rows(8, 24).dequantize(), wanted[8:24])


def test_a_kv_cache_is_modelopts() -> None:
    states, largest = inputs(), np.float32(2.375)
    stored = torch.tensor([largest]) / torch.tensor(448.0)
    inverse = (ONE / largest) * np.float32(448)
    wanted = as_fp8(states.numpy() * inverse) * (ONE / inverse)
    rounding = KvRounding(Float("e4m3fn"), stored, order="inverses")
    assert rounding.encode(states).dtype == torch.uint8
    assert np.array_equal(rounding(states).numpy(), wanted)
    assert not np.array_equal(KvRounding(Float("e4m3fn"), stored)(states).numpy(), wanted)
