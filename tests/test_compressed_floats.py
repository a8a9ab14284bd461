"""compressed-tensors' small floats: NVFP4, MXFP4, MXFP6 and MXFP8, weights and inputs, against the library's own code."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.mxfp6.base import MXFP6PackedCompressor
from compressed_tensors.compressors.mxfp8.base import MXFP8QuantizationCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils.helpers import calculate_qparams, compute_dynamic_scales_and_zp

import qcore
from makers import dense_llama, write
from qcore.kernels.activations import quantize_input
from qcore.kernels.minifloat import LARGEST, mx_scale, round_to
from qcore.scheme import TensorScheme
from qcore.tensor import float_table

MODULE = "model.layers.0.mlp.down_proj"
ROWS, COLUMNS = 64, 96
COMPRESSORS = {
    "NVFP4": ("nvfp4-pack-quantized", NVFP4PackedCompressor),
    "NVFP4A16": ("nvfp4-pack-quantized", NVFP4PackedCompressor),
    "MXFP4": ("mxfp4-pack-quantized", MXFP4PackedCompressor),
    "MXFP4A16": ("mxfp4-pack-quantized", MXFP4PackedCompressor),
    "MXFP6A16": ("mxfp6-pack-quantized", MXFP6PackedCompressor),
    "MXFP6A8": ("mxfp6-pack-quantized", MXFP6PackedCompressor),
    "MXFP8": ("mxfp8-quantized", MXFP8QuantizationCompressor),
}
SCHEMES = {
    "NVFP4": "W4A4-nvfp4",
    "NVFP4A16": "W4A16-nvfp4",
    "MXFP4": "W4A4-mxfp4",
    "MXFP4A16": "W4A16-mxfp4",
    "MXFP6A16": "W6A16-e2m3-g32:e8m0",
    "MXFP6A8": "W6A8-e2m3-g32:e8m0/fp8-g32:e8m0-dyn",
    "MXFP8": "W8A8-mxfp8",
}


def compressed(name: str) -> tuple[QuantizationScheme, dict[str, torch.Tensor], torch.Tensor]:
    """A random weight as the library stores it, and as the library's arithmetic has it."""
    scheme = preset_name_to_scheme(name, ["Linear"])
    weight = torch.randn(ROWS, COLUMNS) * torch.logspace(-3, 1, ROWS).unsqueeze(1)
    groups = weight.unflatten(1, (-1, scheme.weights.group_size))
    whole = 448.0 * 6 / weight.abs().amax().reshape(1) if "NV" in name else None
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights, whole)
    state = {"weight": weight, "weight_scale": scale.float()} | (
        {} if whole is None else {"weight_global_scale": whole}
    )
    expected = fake_quantize(weight, scale.float(), None, scheme.weights, global_scale=whole)
    return scheme, COMPRESSORS[name][1].compress(state, scheme), expected


def checkpoint(
    folder: Path, name: str, scheme: QuantizationScheme, parts: dict[str, torch.Tensor], layout: str | None = None
) -> Path:
    tensors = dense_llama()
    del tensors[f"{MODULE}.weight"]
    if "input_global_scale" not in parts and scheme.input_activations and "NV" in name:
        parts = {**parts, "input_global_scale": torch.tensor([700.0])}
    tensors |= {f"{MODULE}.{part}": tensor for part, tensor in parts.items()}
    group = scheme.model_dump(mode="json") | {"targets": ["re:.*down_proj"], "format": COMPRESSORS[name][0]}
    quantization: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": layout or COMPRESSORS[name][0],
        "config_groups": {"group_0": group},
    }
    return write(folder, tensors, quantization)


@pytest.mark.parametrize("name", list(COMPRESSORS))
@pytest.mark.parametrize("layout", [None, "mixed-precision"])
def test_weights_are_the_librarys(tmp_path: Path, name: str, layout: str | None) -> None:
    scheme, parts, expected = compressed(name)
    opened = qcore.open_checkpoint(checkpoint(tmp_path, name, scheme, parts, layout))
    assert str(opened.plan[MODULE]) == SCHEMES[name]
    assert opened.weight(MODULE).scheme == opened.plan[MODULE]
    assert torch.equal(opened.dequantize(MODULE), expected)


@pytest.mark.parametrize("name", ["MXFP4", "MXFP6A8", "MXFP8", "NVFP4"])
def test_inputs_are_quantized_as_the_library_does(name: str) -> None:
    given: QuantizationArgs = preset_name_to_scheme(name, ["Linear"]).input_activations
    x = torch.randn(2, 5, COLUMNS) * torch.logspace(-4, 3, 10).reshape(2, 5, 1)
    x[0, 0, :32] = 0
    whole = torch.tensor([2688.0]) / x.abs().amax() if name == "NVFP4" else None
    scale, zero = compute_dynamic_scales_and_zp(x, given, torch.nn.Module(), whole)
    expected = fake_quantize(x, scale, zero, given, global_scale=whole)
    scheme = qcore.Scheme.parse(SCHEMES[name]).input
    assert scheme is not None
    got = quantize_input(x, scheme, None if whole is None else 1 / whole.double())
    assert torch.allclose(got, expected, rtol=1e-6, atol=0)


def test_nvfp4_inputs_without_a_stored_scale_span_their_own_range() -> None:
    x = torch.randn(3, 64)
    scheme = TensorScheme.parse("e2m1-g16:e4m3fn+tensor-dyn")
    whole = (x.abs().amax() / (448 * 6)).reshape(1)
    assert torch.equal(quantize_input(x, scheme), quantize_input(x, scheme, whole))


@pytest.mark.parametrize("name", ["e2m1", "e2m3", "e3m2", "e4m3fn", "e5m2"])
def test_rounding_finds_the_nearest_number(name: str) -> None:
    x = torch.cat([torch.randn(5000) * scale for scale in (1e-3, 0.1, 3.0, 300.0)])
    got = round_to(x, name)
    if name in ("e4m3fn", "e5m2"):
        dtype = torch.float8_e4m3fn if name == "e4m3fn" else torch.float8_e5m2
        assert torch.equal(got, x.clamp(-LARGEST[name], LARGEST[name]).to(dtype).float())
        return
    grid = float_table(name)
    assert torch.isin(got, grid).all()
    nearest = (x.unsqueeze(1) - grid).abs().amin(1)
    assert torch.equal((got - x).abs(), nearest)
    middles = (grid.unique()[1:] + grid.unique()[:-1]) / 2
    codes = torch.searchsorted(grid.unique(), round_to(middles, name)) - len(grid.unique()) // 2
    assert not (codes % 2).any()  # ties go to even codes


def test_mx_scales_stay_powers_of_two_at_both_ends() -> None:
    scale = mx_scale(torch.tensor([0.0, 1e-45, 6.0, 7.0, 3e38]), "e2m1")
    assert scale.tolist() == [2.0**-127, 2.0**-127, 1.0, 2.0, 2.0**126]


@pytest.mark.parametrize(
    ("code", "name", "parts"),
    [
        ("missing-tensor", "NVFP4A16", {"weight_global_scale": None}),
        ("bad-content", "NVFP4A16", {"weight_global_scale": torch.zeros(1)}),
        ("bad-content", "NVFP4A16", {"weight_global_scale": torch.tensor([float("nan")])}),
        ("bad-content", "NVFP4", {"input_global_scale": torch.tensor([-1.0])}),
        ("bad-shape", "NVFP4A16", {"weight_scale": torch.zeros(ROWS, 5).to(torch.float8_e4m3fn)}),
        ("bad-dtype", "NVFP4A16", {"weight_scale": torch.ones(ROWS, 6)}),
        ("bad-dtype", "MXFP4A16", {"weight_packed": torch.zeros(ROWS, 12, dtype=torch.int32)}),
        ("bad-content", "MXFP4A16", {"weight_scale": torch.full((ROWS, 3), 255, dtype=torch.uint8)}),
        ("bad-shape", "MXFP6A16", {"weight_packed": torch.zeros(ROWS, 71, dtype=torch.uint8)}),
        ("bad-content", "MXFP8", {"weight_scale": torch.full((ROWS, 3), 255, dtype=torch.uint8)}),
        ("missing-tensor", "MXFP8", {"weight_scale": None}),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, code: str, name: str, parts: dict[str, Any]) -> None:
    scheme, held, _ = compressed(name)
    held = {part: tensor for part, tensor in {**held, **parts}.items() if tensor is not None}
    with pytest.raises(qcore.Refused) as caught:
        qcore.open_checkpoint(checkpoint(tmp_path, name, scheme, held)).layer(MODULE)
    assert caught.value.refusal.code == code
