"""compressed-tensors from codes that the test chooses, and against the library's own compressors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, fake_quantize
from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp

import qcore
from makers import dense_llama, words, write
from qcore.kernels.activations import quantize_input
from qcore.layouts.compressed_config import CompressedConfig
from qcore.scheme import TensorScheme

MODULE = "model.layers.0.mlp.down_proj"
ROWS, COLUMNS = 64, 96
LINEAR = {"targets": ["Linear"]}


def arguments(**values: Any) -> dict[str, Any]:
    return {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **values}


def checkpoint(
    folder: Path,
    parts: dict[str, torch.Tensor],
    weights: dict[str, Any],
    *,
    layout: str = "pack-quantized",
    **config: Any,
) -> Path:
    """A llama whose down_proj is quantized; every other layer is ignored."""
    tensors = dense_llama()
    del tensors[f"{MODULE}.weight"]
    tensors |= {f"{MODULE}.{part}": tensor for part, tensor in parts.items()}
    group = {"targets": ["re:.*down_proj"], "weights": weights, **config.pop("group", {})}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        **config,
    }
    return write(folder, tensors, quantization)


def scales_for(strategy: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    shape = {"tensor": (1,), "channel": (ROWS, 1), "group": (ROWS, 3), "block": (2, 3)}[strategy]
    return (torch.rand(shape) * 0.01 + 0.001).to(dtype)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel"])
def test_packed_integers(tmp_path: Path, bits: int, symmetric: bool, strategy: str) -> None:
    offset = 1 << (bits - 1)
    codes = torch.randint(-offset, offset, (ROWS, COLUMNS))
    scale = scales_for(strategy)
    zeros = torch.randint(-offset, offset, scale.shape)
    parts = {
        "weight_packed": words(codes + offset, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([ROWS, COLUMNS]),
    }
    if not symmetric:
        parts["weight_zero_point"] = words((zeros + offset).t(), bits).t()
    size = 32 if strategy == "group" else None
    path = checkpoint(
        tmp_path, parts, arguments(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=size)
    )
    opened = qcore.open_checkpoint(path)
    wide = torch.Tensor.repeat_interleave(scale.float(), COLUMNS // scale.shape[1], 1)
    shift = 0 if symmetric else zeros.float().repeat_interleave(COLUMNS // scale.shape[1], 1)
    assert torch.equal(opened.dequantize(MODULE), (codes - shift) * wide)
    assert opened.weight(MODULE).scheme == opened.plan[MODULE]
    grid = "g32" if strategy == "group" else "channel"
    assert str(opened.plan[MODULE]) == f"W{bits}A16-{grid}-{'sym' if symmetric else 'asym'}"
    if bits == 4:
        assert torch.equal(pack_to_int32(codes.to(torch.int8), bits), parts["weight_packed"])


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_the_older_packing_of_odd_widths(tmp_path: Path, bits: int) -> None:
    """Until late 2025 no code crossed a word."""
    offset, per_word = 1 << (bits - 1), 32 // bits
    codes = torch.randint(-offset, offset, (ROWS, COLUMNS))
    padded = torch.nn.functional.pad(codes + offset, (0, -COLUMNS % per_word)).view(ROWS, -1, per_word)
    packed = (padded << (torch.arange(per_word) * bits)).sum(-1).to(torch.int32)
    scale = scales_for("group")
    parts = {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor([ROWS, COLUMNS])}
    opened = qcore.open_checkpoint(checkpoint(tmp_path, parts, arguments(num_bits=bits)))
    assert torch.equal(opened.dequantize(MODULE), codes * scale.float().repeat_interleave(32, 1))


def test_act_order(tmp_path: Path) -> None:
    codes, scale = torch.randint(-8, 8, (ROWS, COLUMNS)), scales_for("group")
    index = (torch.arange(COLUMNS) // 32)[torch.randperm(COLUMNS)].int()
    parts = {
        "weight_packed": words(codes + 8, 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor([ROWS, COLUMNS]),
        "weight_g_idx": index,
    }
    opened = qcore.open_checkpoint(checkpoint(tmp_path, parts, arguments(actorder="group")))
    assert torch.equal(opened.dequantize(MODULE), codes * scale.float()[:, index])
    parts["weight_g_idx"] = torch.full_like(index, -1)  # as the library leaves it where nothing was calibrated
    opened = qcore.open_checkpoint(checkpoint(tmp_path / "b", parts, arguments(actorder="group")))
    assert torch.equal(opened.dequantize(MODULE), codes * scale.float().repeat_interleave(32, 1))
    assert not opened.weight(MODULE).scheme.weight.ordered
    parts["weight_g_idx"][0] = 3
    with pytest.raises(qcore.Refused, match="bad-content"):
        qcore.open_checkpoint(checkpoint(tmp_path / "c", parts, arguments(actorder="group"))).weight(MODULE)
    with pytest.raises(qcore.Refused, match="unexpected-tensor"):
        qcore.open_checkpoint(checkpoint(tmp_path / "d", parts, arguments())).weight(MODULE)


@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized"])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group", "block"])
def test_zero_points_that_are_not_packed(tmp_path: Path, layout: str, strategy: str) -> None:
    """Zero points of tensors and blocks are never packed, those of channels and groups were not at first."""
    codes, scale = torch.randint(-8, 8, (ROWS, COLUMNS), dtype=torch.int8), scales_for(strategy)
    zeros = torch.randint(-8, 8, scale.shape, dtype=torch.int8)
    packed = {"weight_packed": words(codes.long() + 8, 4), "weight_shape": torch.tensor([ROWS, COLUMNS])}
    parts = packed if layout == "pack-quantized" else {"weight": codes}
    parts |= {"weight_scale": scale, "weight_zero_point": zeros}
    given = arguments(strategy=strategy, symmetric=False, group_size=32 if strategy == "group" else None)
    if strategy == "block":
        given["block_structure"] = [32, 32]
    opened = qcore.open_checkpoint(checkpoint(tmp_path, parts, given, layout=layout))
    expected = dequantize(codes, scale.float(), zeros, QuantizationArgs(**given))
    assert torch.equal(opened.dequantize(MODULE), expected)


def test_an_order_that_nobody_calibrated_was_left_out(tmp_path: Path) -> None:
    codes, scale = torch.randint(-8, 8, (ROWS, COLUMNS)), scales_for("group")
    parts = {"weight_packed": words(codes + 8, 4), "weight_scale": scale, "weight_shape": torch.tensor([ROWS, COLUMNS])}
    given = arguments(actorder="group")
    opened = qcore.open_checkpoint(checkpoint(tmp_path / "a", parts, given, version="0.11.0"))
    assert torch.equal(opened.dequantize(MODULE), codes * scale.float().repeat_interleave(32, 1))
    assert str(opened.plan[MODULE]) == "W4A16-g32-sym"
    for version in ("0.12.2", ""):
        path = checkpoint(tmp_path / f"v{version}", parts, given, version=version)
        with pytest.raises(qcore.Refused, match="missing-tensor"):
            qcore.open_checkpoint(path).weight(MODULE)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_the_older_packing_of_odd_zero_points(tmp_path: Path, bits: int) -> None:
    """Along the rows, no code crossed a word either."""
    offset, per_word = 1 << (bits - 1), 32 // bits
    codes, scale = torch.randint(-offset, offset, (ROWS, COLUMNS)), scales_for("group")
    zeros = torch.randint(-offset, offset, scale.shape)

    def old(values: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(values + offset, (0, -values.shape[1] % per_word))
        shifted = padded.view(len(values), -1, per_word) << (torch.arange(per_word) * bits)
        return shifted.sum(-1).to(torch.int32)

    parts = {"weight_packed": old(codes), "weight_scale": scale, "weight_shape": torch.tensor([ROWS, COLUMNS]),
             "weight_zero_point": old(zeros.t()).t()}  # fmt: skip
    opened = qcore.open_checkpoint(checkpoint(tmp_path, parts, arguments(num_bits=bits, symmetric=False)))
    shift = zeros.repeat_interleave(32, 1)
    assert torch.equal(opened.dequantize(MODULE), (codes - shift) * scale.float().repeat_interleave(32, 1))


def test_overlapping_targets_are_tried_in_the_librarys_order(tmp_path: Path) -> None:
    """Names, then regular expressions by the alphabet, then classes, wherever their groups stand in the config."""
    codes, scale = torch.randint(-8, 8, (ROWS, COLUMNS)), scales_for("group")
    parts = {"weight_packed": words(codes + 8, 4), "weight_scale": scale, "weight_shape": torch.tensor([ROWS, COLUMNS])}
    others = {
        "whole": {"targets": ["Linear"], "weights": arguments(strategy="channel", group_size=None)},
        "later": {"targets": ["re:.*proj"], "weights": arguments(num_bits=8)},
    }
    groups = {**others, "own": {"targets": ["re:.*down_proj"], "weights": arguments()}}
    ignored = [f"re:(?!{MODULE}$).*"]
    path = checkpoint(tmp_path / "a", parts, {}, config_groups=groups, ignore=ignored)
    assert torch.equal(qcore.open_checkpoint(path).dequantize(MODULE), codes * scale.float().repeat_interleave(32, 1))
    groups["named"] = {"targets": [MODULE], "weights": arguments(group_size=96)}
    parts["weight_scale"] = scales_for("channel")
    path = checkpoint(tmp_path / "b", parts, {}, config_groups=groups, ignore=ignored)
    assert str(qcore.open_checkpoint(path).plan[MODULE]) == "W4A16-g96-sym"
    path = checkpoint(tmp_path / "c", parts, {}, config_groups=groups, ignore=["Linear"])
    with pytest.raises(qcore.Refused, match="does not cover it"):
        qcore.open_checkpoint(path).plan  # noqa: B018


@pytest.mark.parametrize("strategy", ["tensor", "channel", "group", "block"])
@pytest.mark.parametrize("bits", [8, 4])
def test_integers_one_to_a_byte(tmp_path: Path, strategy: str, bits: int) -> None:
    limit = 1 << (bits - 1)
    codes = torch.randint(-limit, limit, (ROWS, COLUMNS), dtype=torch.int8)
    scale = scales_for(strategy)
    given = arguments(num_bits=bits, strategy=strategy, group_size=32 if strategy == "group" else None)
    if strategy == "block":
        given["block_structure"] = [32, 32]
    opened = qcore.open_checkpoint(
        checkpoint(tmp_path, {"weight": codes, "weight_scale": scale}, given, layout="int-quantized")
    )
    assert torch.equal(opened.dequantize(MODULE), dequantize(codes, scale.float(), None, QuantizationArgs(**given)))


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_fp8(tmp_path: Path, strategy: str) -> None:
    codes = (torch.randn(ROWS, COLUMNS) * 50).to(torch.float8_e4m3fn)
    given = {"num_bits": 8, "type": "float", "strategy": strategy}
    scale = scales_for(strategy)
    if strategy == "block":  # ragged in both directions
        given["block_structure"] = [40, 40]
        scale = (torch.rand(2, 3) * 0.01).to(torch.bfloat16)
    opened = qcore.open_checkpoint(
        checkpoint(tmp_path, {"weight": codes, "weight_scale": scale}, given, layout="float-quantized")
    )
    wide = scale.float()
    if strategy == "block":
        wide = wide.repeat_interleave(40, 0)[:ROWS].repeat_interleave(40, 1)[:, :COLUMNS]
    assert torch.equal(opened.dequantize(MODULE), codes.float() * wide)


@pytest.mark.parametrize("static", [True, False])
def test_weights_that_are_multiplied_out_leave_inputs_whole(tmp_path: Path, static: bool) -> None:
    """transformers' dequantize; what run_compressed means depends on its release, but not where inputs are whole."""
    codes = (torch.randn(ROWS, COLUMNS) * 50).to(torch.float8_e4m3fn)
    parts = {"weight": codes, "weight_scale": scales_for("tensor"), "input_scale": torch.tensor([0.1])}
    given, inputs = {"num_bits": 8, "type": "float", "strategy": "tensor"}, {"num_bits": 8, "type": "float"}
    group = {"input_activations": {**inputs, "strategy": "tensor" if static else "token", "dynamic": not static}}
    if not static:
        del parts["input_scale"]

    def opened(name: str, **config: Any) -> qcore.Checkpoint:
        return qcore.open_checkpoint(checkpoint(tmp_path / name, parts, given, layout="float-quantized", **config))

    cache = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    whole = opened("a", group=group, dequantize=True, kv_cache_scheme=cache)
    assert str(whole.plan[MODULE]) == "W8A16-fp8-tensor" and whole.kv_cache is None
    x = torch.randn(3, COLUMNS)
    expected = x @ whole.dequantize(MODULE).t()
    torch.testing.assert_close(qcore.load_model(whole, dtype="float32").get_submodule(MODULE)(x), expected)
    assert str(opened("b", group=group, run_compressed=True, kv_cache_scheme=cache).kv_cache) == "fp8-tensor"
    assert opened("c", run_compressed=False).plan[MODULE] == whole.plan[MODULE]
    with pytest.raises(qcore.Refused, match="run_compressed false"):
        opened("d", group=group, run_compressed=False)


@pytest.mark.parametrize("strategy", ["token", "tensor", "group"])
@pytest.mark.parametrize("kind", ["int", "float"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_activations_are_quantized_as_the_library_does(strategy: str, kind: str, symmetric: bool) -> None:
    if kind == "float" and not symmetric:
        symmetric = True
    given = QuantizationArgs(
        num_bits=8,
        type=kind,
        strategy=strategy,
        symmetric=symmetric,
        dynamic=True,
        group_size=32 if strategy == "group" else None,
    )
    x = torch.randn(2, 5, 96) * torch.rand(2, 5, 1) * 10
    x[0, 0] = 0
    scale, zero = compute_dynamic_scales_and_zp(x, given, torch.nn.Module())
    expected = fake_quantize(x, scale, zero, given)
    element = "int8" if kind == "int" else "fp8"
    grid = {"token": "token", "tensor": "tensor", "group": "g32"}[strategy]
    sign = "" if kind == "float" else "-sym" if symmetric else "-asym"
    got = quantize_input(x, TensorScheme.parse(f"{element}-{grid}{sign}-dyn"))
    assert torch.allclose(got, expected, rtol=0, atol=1e-6)


def test_static_activations(tmp_path: Path) -> None:
    x, scale = torch.randn(4, 96) * 3, torch.tensor([0.02])
    for sign, zero in (("sym", None), ("asym", torch.tensor([17], dtype=torch.int8))):
        given = QuantizationArgs(num_bits=8, strategy="tensor", symmetric=zero is None)
        got = quantize_input(x, TensorScheme.parse(f"int8-tensor-{sign}"), scale, zero)
        assert torch.allclose(got, fake_quantize(x, scale, zero, given), rtol=0, atol=1e-6)


def test_ignore_targets_and_their_order(tmp_path: Path) -> None:
    codes = torch.randint(-128, 128, (ROWS, COLUMNS), dtype=torch.int8)
    parts = {"weight": codes, "weight_scale": scales_for("channel")}
    given = arguments(num_bits=8, strategy="channel", group_size=None)
    path = checkpoint(
        tmp_path,
        parts,
        given,
        layout="int-quantized",
        group={"targets": ["Linear"]},
        ignore=["lm_head", "re:.*up_proj"],
    )
    layers = qcore.open_checkpoint(path).layers
    assert str(layers[MODULE].scheme) == "W8A16-channel-sym"
    assert layers["lm_head"].reason == "in the ignore list as 'lm_head'"
    assert "re:.*up_proj" in layers["model.layers.0.mlp.up_proj"].reason
    assert "stored unquantized" in layers["model.layers.0.mlp.gate_proj"].reason
    assert layers["model.embed_tokens"].scheme is None


def test_embeddings_are_a_class_of_their_own(tmp_path: Path) -> None:
    tensors = dense_llama()
    codes = torch.randint(-128, 128, (128, 64), dtype=torch.int8)
    tensors["model.embed_tokens.weight"] = codes
    tensors["model.embed_tokens.weight_scale"] = scale = torch.rand(128, 1)
    given = arguments(num_bits=8, strategy="channel", group_size=None)
    group = {"targets": ["Embedding"], "weights": given}
    config = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": group}}
    opened = qcore.open_checkpoint(write(tmp_path, tensors, config))
    assert torch.equal(opened.dequantize("model.embed_tokens"), codes * scale)
    assert [module for module, scheme in opened.plan.items() if scheme] == ["model.embed_tokens"]
    assert qcore.load_model(opened)(torch.tensor([[1, 2]])).logits.isfinite().all()


def test_presets_by_name(tmp_path: Path) -> None:
    codes = torch.randint(-8, 8, (ROWS, COLUMNS))
    parts = {"weight_packed": words(codes + 8, 4), "weight_shape": torch.tensor([ROWS, COLUMNS]),
             "weight_scale": torch.ones(ROWS, 1, dtype=torch.bfloat16)}  # fmt: skip
    tensors = {**dense_llama(), **{f"{MODULE}.{part}": tensor for part, tensor in parts.items()}}
    del tensors[f"{MODULE}.weight"]
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"W4A16": ["re:.*down_proj"]},
    }
    opened = qcore.open_checkpoint(write(tmp_path, tensors, quantization))
    assert str(opened.plan[MODULE]) == "W4A16-g128-sym" and torch.equal(opened.dequantize(MODULE), codes.float())


PACKED = {
    "weight_packed": words(torch.zeros(ROWS, COLUMNS, dtype=torch.int64), 4),
    "weight_scale": torch.ones(ROWS, 3),
    "weight_shape": torch.tensor([ROWS, COLUMNS]),
}


STATIC = {"num_bits": 8, "strategy": "tensor"}
TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}


def rotated(*locations: str) -> dict[str, Any]:
    return {
        "config_groups": {
            "R1": {"type": "hadamard", "apply": [{"location": at, "targets": ["Linear"]} for at in locations]}
        }
    }


def test_rotations_of_weights_are_in_them_already(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, PACKED, arguments(), transform_config=rotated("weight_input", "weight_output"))
    assert torch.equal(qcore.open_checkpoint(path).dequantize(MODULE), torch.full((ROWS, COLUMNS), -8.0))


@pytest.mark.parametrize("preset", ["W2A16", "W7A8", "W4A4", "MXFP4XFP8", "W9A16", "W8A4"])
def test_presets(preset: str) -> None:
    """The short names of the library, beyond those that qcore quantizes to."""
    from compressed_tensors.quantization import preset_name_to_scheme

    given = {"config_groups": {preset: ["Linear"]}}
    try:
        theirs = preset_name_to_scheme(preset, ["Linear"]).model_dump(mode="json")
    except KeyError:
        with pytest.raises(ValueError, match=preset):
            CompressedConfig.model_validate(given).groups[preset].scheme()
        return
    ours = CompressedConfig.model_validate(given).groups[preset].scheme()
    assert ours == CompressedConfig.model_validate({"config_groups": {"g": theirs}}).groups["g"].scheme()


@pytest.mark.parametrize(
    ("code", "parts", "config"),
    [
        ("missing-tensor", {"weight_scale": None}, {}),
        ("missing-tensor", {"weight_shape": None}, {}),
        ("missing-tensor", {}, {"weights": arguments(symmetric=False)}),
        ("missing-tensor", {}, {"weights": arguments(actorder="group")}),
        ("missing-tensor", {}, {"group": {"input_activations": {"num_bits": 8, "strategy": "tensor"}}}),
        ("bad-shape", {"weight_scale": torch.ones(ROWS, 4)}, {}),
        ("bad-shape", {"weight_shape": torch.tensor([ROWS, 1 << 40])}, {}),
        ("bad-shape", {"weight_shape": torch.tensor([ROWS, -1])}, {}),
        ("bad-shape", {"weight_shape": torch.tensor([ROWS, 60])}, {}),
        ("bad-dtype", {"weight_packed": torch.zeros(ROWS, 12, dtype=torch.int64)}, {}),
        ("bad-dtype", {"weight_scale": torch.ones(ROWS, 3, dtype=torch.int32)}, {}),
        ("bad-content", {"weight_scale": torch.full((ROWS, 3), float("nan"))}, {}),
        ("unexpected-tensor", {"weight_spare": torch.ones(1)}, {}),
        ("bad-field", {}, {"weights": arguments(num_bits=9)}),
        ("bad-field", {}, {"weights": arguments(type="complex")}),
        ("bad-field", {}, {"weights": arguments(strategy="diagonal")}),
        ("bad-field", {}, {"group": {"targets": ["re:("]}}),
        ("bad-field", {}, {"group": {"targets": ["nothing"]}}),
        ("bad-field", {}, {"ignore": ["re:.*down_proj"]}),
        ("unknown-variant", {}, {"layout": "marlin-24"}),
        ("unknown-variant", {}, {"layout": "sparse-bitmask"}),
        ("unknown-variant", {}, {"sparsity_config": {"format": "sparse-24-bitmask"}}),
        ("unknown-variant", {}, {"transform_config": rotated("weight_input", "input")}),
        ("bad-field", {}, {"transform_config": {"config_groups": {"R1": {"apply": [{}]}}}}),
        ("unexpected-tensor", {"weight_g_idx": torch.zeros(COLUMNS, dtype=torch.int32)}, {}),
        ("bad-content", {"weight_zero_point": torch.ones(ROWS, 3, dtype=torch.int8)}, {}),
        (
            "missing-tensor",
            {"input_scale": torch.ones(1)},
            {"group": {"input_activations": STATIC | {"symmetric": False}}},
        ),
        (
            "bad-content",
            {"input_scale": torch.ones(1), "input_zero_point": torch.ones(1, dtype=torch.int8)},
            {"group": {"input_activations": STATIC}},
        ),
        ("bad-shape", {"input_scale": torch.ones(3)}, {"group": {"input_activations": STATIC}}),
        ("unknown-variant", {}, {"group": {"input_activations": STATIC | {"strategy": "group", "group_size": 32}}}),
        ("unknown-variant", {}, {"group": {"weights": None, "input_activations": STATIC}}),
        (
            "unknown-variant",
            {"weight": torch.ones(ROWS, COLUMNS), "weight_packed": None},
            {"quantization_status": "frozen"},
        ),
        *(
            (
                "unknown-variant",
                {"weight": torch.ones(ROWS, COLUMNS), "weight_packed": None, "weight_scale": None},
                config,
            )
            for config in (
                {"quantization_status": "frozen", "group": {"input_activations": TOKEN}},
                {"weights": arguments(dynamic=True)},
                {"group": {"output_activations": TOKEN}},
            )
        ),
        ("unknown-variant", {}, {"group": {"input_activations": TOKEN | {"scale_dtype": "torch.bfloat16"}}}),
        (
            "unknown-variant",
            {},
            {"group": {"input_activations": TOKEN | {"symmetric": False, "zp_dtype": "torch.float32"}}},
        ),
        ("bad-field", {}, {"transform_config": {"transform_groups": {}, "x": 1}}),
        ("unknown-variant", {}, {"fp8_dtype_flavor": "float8_e4m3fnuz"}),
        ("unknown-variant", {}, {"moe_sparsity_config": {"method": "prune", "num_experts": [3]}}),
        ("unknown-variant", {}, {"group": {"format": "nvfp4-pack-quantized"}}),
        ("unknown-variant", {}, {"weights": arguments(type="float", num_bits=4, group_size=64)}),
        ("unknown-variant", {}, {"weights": arguments(strategy="group", group_size=None)}),
        ("unknown-variant", {}, {"group": {"output_activations": {"num_bits": 8}}}),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, code: str, parts: dict[str, Any], config: dict[str, Any]) -> None:
    held = {name: tensor for name, tensor in {**PACKED, **parts}.items() if tensor is not None}
    path = checkpoint(tmp_path, held, config.pop("weights", arguments()), **config)
    with pytest.raises(qcore.Refused) as caught:
        qcore.open_checkpoint(path).weight(MODULE)
    assert caught.value.refusal.code == code
    assert str(tmp_path) in caught.value.refusal.subject and caught.value.refusal.fix
