"""Weights that become bfloat16 at every call: planes, block types, and inputs that are rounded by operators that Gaudi has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qcore.blocks.types import BLOCK_TYPES
from qcore.kernels.activations import quantize_input
from qcore.kernels.kv_cache import KvRounding
from qcore.scheme import Scheme
from qcore.tensor import LayerTensors
from qcore.testing.layers import random_layer
from qcore_gaudi import stand_in
from qcore_gaudi.kernels import inputs
from qcore_gaudi.kernels.blocks import BlockLinear
from qcore_gaudi.kernels.dense import DenseLinear
from qcore_gaudi.kernels.fp8 import Fp8ProductLinear
from qcore_gaudi.kernels.kv_cache import KvCache
from qcore_gaudi.kernels.planes import packed, unpacked

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


@pytest.fixture(scope="module", autouse=True)
def operators() -> None:
    stand_in.load()


@pytest.mark.parametrize("bits", range(1, 13))
@pytest.mark.parametrize("columns", [1, 31, 64, 203])
def test_codes_come_back_from_planes(bits: int, columns: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, columns), generator=torch.Generator().manual_seed(bits))
    words = packed(codes, bits)
    assert words.dtype == torch.int32 and words.numel() * 32 <= 5 * bits * (columns + 31)
    assert torch.equal(unpacked(words, torch.arange(32, dtype=torch.int32), bits, columns), codes.int())


def whole(packed: DenseLinear) -> torch.Tensor:
    """float32 [N, K], scales that follow the sums included."""
    found = packed.weight()
    return found * packed.wide(packed.scales) if packed.follows else found


@pytest.mark.parametrize(
    "text",
    [
        "W1A16-g128-sym", "W2A16-g64-asym", "W3A16-g128-sym-actorder", "W4A16-g64-zfloat", "W5A16-tensor-asym", "W6A16-channel-zfloat", "W7A16-int7-g32-asym",
        "W8A16-g128-asym", "W8A16-int8-g32-asym", "W8A16-channel-sym", "W4A16-nf4-g64", "W4A16-fp4-flat64", "W4A16-nf4-flat64:dynamic8+flat16384",
        "W4A16-mxfp4", "W4A16-nvfp4", "W6A16-e3m2-g512", "W6A16-e2m3-channel", "W8A16-e4m3-g512", "W8A16-e5m2-g128", "W8A16-e4m3fnuz-tensor", "W8A16-mxfp8",
        "W8A16-fp8-block128", "W8A16-fp8-g128", "W8A16-fp8-tile64x32",
    ],
)  # fmt: skip
@pytest.mark.parametrize("columns", [512, 203])
def test_weights_are_the_definitions(text: str, columns: int) -> None:
    """But for the last bit of float32; ragged groups and tiles too."""
    scheme = Scheme.parse(text)
    if columns % 64 and ("flat" in text or scheme.weight.ordered):
        pytest.skip("flat groups lie in rows, and act-order groups are of one size")
    layer = random_layer(scheme, 37, columns)
    made = DenseLinear.from_layer(layer, BF16)
    expected = layer.weight.dequantize()
    got = whole(made) if made.order is None else whole(made)[:, made.order.argsort()]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


def test_e4m3_of_tiles_is_halved_row_by_row_and_tile_by_tile() -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(E4M3).float().nan_to_num(0.0)
    layer = random_layer(Scheme.parse("W8A16-fp8-block128"), 130, 300)
    codes = torch.stack([numbers.repeat(2)[row : row + 300] for row in range(130)]).to(E4M3)
    layer = replace(layer, weight=replace(layer.weight, codes=codes))
    made = DenseLinear.from_layer(layer, BF16)
    assert made.codes.dtype == E4M3 and made.codes.float().abs().max() == 240 and made.scales.shape == (130, 3)
    expected, scale = layer.weight.dequantize(), layer.weight.scales[0].float().max()
    assert (whole(made) - expected).abs().max() <= scale * 2.0**-9
    large = codes.float().abs() >= 2.0**-5
    torch.testing.assert_close(whole(made)[large], expected[large], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_block_types_are_ggmls(kind: str) -> None:
    block = BLOCK_TYPES[kind]
    for columns in (block.elements, 3 * block.elements):
        layer = random_layer(Scheme.parse(f"W{block.bits}A16-gguf:{kind}"), 70, columns)
        made = BlockLinear.from_layer(layer, BF16)
        torch.testing.assert_close(whole(made), layer.weight.dequantize(), rtol=2e-6, atol=1e-9)
        assert torch.equal(made.scales.float(), made.scales.float().nan_to_num())


def states(seed: int = 0) -> torch.Tensor:
    """Rows of many sizes, numbers halfway between codes, zeros, and columns that are outliers."""
    x = torch.randn(9, 96, generator=torch.Generator().manual_seed(seed))
    x = x * torch.tensor([1e-6, 0.01, 0.3, 1.0, 3.0, 17.0, 250.0, 900.0, 0.0]).unsqueeze(1)
    x[3] = torch.arange(-48, 48) / 16
    x[4, 5], x[5, 60] = 448.0, -7.5
    return x.to(BF16)


@pytest.mark.parametrize(
    "text",
    [
        "int8-token-sym-dyn", "int8-token-asym-dyn", "int8-tensor-sym", "int8-tensor-asym", "int8-tensor-sym-dyn", "int8-token-sym-dyn-outliers6.0",
        "fp8-token-dyn", "fp8-tensor", "fp8-tensor-dyn", "fp8-tensor:e8m0ceil-dyn", "fp8-g96:e8m0ceil-dyn", "fp8-g32-dyn", "fp8-g32:e8m0-dyn",
        "fp8-g40:e8m0ceil-dyn", "fp8-g32:e8m0floor-dyn", "e2m1-g32:e8m0-dyn", "e2m1-g32:e8m0ceil-dyn", "e2m1-g32:e8m0floor-dyn",
        "e2m1-g16:e4m3fn+tensor-dyn",
    ],
)  # fmt: skip
@pytest.mark.parametrize("given", [False, True])
def test_inputs_stand_for_what_the_definition_says(text: str, given: bool) -> None:
    """Bit by bit in float32; where rows with numbers above 240 are halved, but for 2^-10 of their scale."""
    scheme = Scheme.parse(
        f"W8A8-fp8-channel/{text}" if text[0] == "f" else f"W8A{text[3] if text[0] == 'i' else 4}-fp8-channel/{text}"
    ).input
    assert scheme is not None and str(scheme) == text
    scale = torch.tensor([0.03]) if not scheme.dynamic or (given and "+" in text) else None
    zero = torch.tensor([-3], dtype=torch.int8) if scheme.zero and not scheme.dynamic else None
    x = states()
    codes, factor = inputs.rounded(x, scheme, scale, zero)
    got = codes if factor is None else codes * factor
    expected = quantize_input(x.float(), scheme, scale, zero)
    exact = torch.equal(got, expected)
    close = (got - expected).abs() <= 2.0**-9 * x.float().abs().amax(-1, keepdim=True) / 240 + 1e-6 * expected.abs()
    assert exact or (bool(close.all()) and text.startswith(("fp8", "e2m1-g16")))
    if text.startswith("int8") and "outliers" not in text:
        assert torch.equal(codes.to(BF16).float(), codes), "codes are numbers of bfloat16"


@pytest.mark.parametrize("size", [64, 96, 200])
def test_a_product_of_e4m3_by_groups_is_one_of_each(size: int) -> None:
    """INC's run-time scales by row are one group of all columns."""
    layer = random_layer(Scheme.parse(f"W8A8-fp8-channel/fp8-g{size}:e8m0ceil-dyn"), 32, 192)
    assert layer.weight.scheme.input is not None
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(1)).to(BF16)
    expected = quantize_input(x.float(), layer.weight.scheme.input) @ layer.weight.dequantize().t()
    got = Fp8ProductLinear.from_layer(layer, BF16)(x)
    torch.testing.assert_close(got.float(), expected, rtol=0.008, atol=float(expected.std()) * 0.004)


@pytest.mark.parametrize("zero", [None, torch.tensor([3], dtype=torch.float32)])
@pytest.mark.parametrize("scale", [None, torch.tensor([0.02])])
def test_the_int8_cache_is_the_references(scale: torch.Tensor | None, zero: torch.Tensor | None) -> None:
    if scale is None and zero is not None:
        pytest.skip("scales of run time have no zero points")
    element = Scheme.parse("W8A16-tensor-sym").weight.element
    x = torch.randn(2, 3, 16, 32, generator=torch.Generator().manual_seed(0)).to(BF16)
    own, reference = KvCache(element, scale, zero), KvRounding(element, scale, zero)
    assert torch.equal(own.encode(x), reference.encode(x)) and torch.equal(own(x), reference(x))


def test_a_layer_keeps_its_codes_and_nothing_dense() -> None:
    layer: LayerTensors = random_layer(Scheme.parse("W4A16-nf4-g64"), 256, 1024)
    held = {
        name: part.numel() * part.element_size() for name, part in DenseLinear.from_layer(layer, BF16).named_buffers()
    }
    assert held["codes"] == 256 * 1024 // 2 and sum(held.values()) < 1.1 * layer.weight.nbytes
