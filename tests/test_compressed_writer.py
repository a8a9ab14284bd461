"""compressed-tensors as it is written, decompressed by the library itself: the same numbers under the same layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match, match_targets
from safetensors.torch import load_file

import qcore
from makers import dense_llama, words, write
from mixtures import Mixture, logits
from qcore.checkpoint.open import Checkpoint, open_checkpoint
from qcore.convert import convert
from test_compressed_tensors import arguments, checkpoint, scales_for

DOWN = "model.layers.0.mlp.down_proj"


def theirs(folder: Path) -> dict[str, torch.Tensor]:
    """Every module with scales, as the library decompresses it in float32."""
    given = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(given)
    schemes = {target: group for group in config.config_groups.values() for target in group.targets}
    tensors, weights = load_file(folder / "model.safetensors"), {}
    for name in (key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")):
        kind = torch.nn.Embedding(1, 1) if "embed" in name else torch.nn.Linear(1, 1)
        assert not is_match(name, kind, config.ignore)
        scheme = schemes[match_targets(name, kind, schemes)[0]]
        parts = {key[len(name) + 1 :]: part for key, part in tensors.items() if key.rpartition(".")[0] == name}
        wide = {key: p.float() if p.is_floating_point() and p.itemsize > 1 else p for key, p in parts.items()}
        weights[name] = BaseCompressor.get_value_from_registry(scheme.format).decompress(wide, scheme)["weight"]
    return weights


def written(source: Any, out: Path, layout: str = "") -> Checkpoint:
    """The source as compressed-tensors, once the library has read the same numbers from it."""
    result = open_checkpoint(convert(source, f"compressed-tensors{layout and ':'}{layout}", out))
    read = theirs(out)
    assert read.keys() == {name for name, scheme in result.plan.items() if scheme is not None} and read
    for module, weight in read.items():
        assert torch.equal(result.dequantize(module), weight), module
    return result


@pytest.mark.parametrize(
    ("scheme", "layout", "format"),
    [
        *((f"W{bits}A16-g32-{sign}", "", "pack-quantized") for bits in range(2, 9) for sign in ("sym", "asym")),
        ("W3A16-tensor-asym", "", "pack-quantized"),
        ("W5A16-channel-asym", "", "pack-quantized"),
        ("W4A16-g32-asym", "int-quantized", "int-quantized"),
        ("W4A16-tensor-asym", "naive-quantized", "naive-quantized"),
        ("W8A8-int8-dyn", "", "int-quantized"),
        ("W8A8-int8-dyn", "pack-quantized", "pack-quantized"),
        ("W4A8-int4-g32-sym/fp8-token-dyn", "", "int-quantized"),
        ("FP8_DYNAMIC", "", "float-quantized"),
        ("FP8_DYNAMIC", "naive-quantized", "naive-quantized"),
        ("W8A16-fp8-channel", "", "naive-quantized"),
        ("W8A16-fp8-tensor", "float-quantized", "float-quantized"),
    ],
)
def test_schemes(tmp_path: Path, scheme: str, layout: str, format: str) -> None:
    source = open_checkpoint(write(tmp_path / "a", dense_llama())).quantized(scheme)
    result = written(source, tmp_path / "b", layout)
    assert result.files.quantization is not None and result.files.quantization["format"] == format
    for module, entry in source.layers.items():
        assert torch.equal(source.dequantize(module), result.dequantize(module))
        assert result.plan[module] == entry.scheme


@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized"])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group", "block"])
def test_zero_points_are_packed_where_the_library_packs_them(tmp_path: Path, layout: str, strategy: str) -> None:
    codes, scale = torch.randint(-8, 8, (64, 96), dtype=torch.int8), scales_for(strategy)
    given = arguments(strategy=strategy, symmetric=False, group_size=32 if strategy == "group" else None)
    if strategy == "block":
        given["block_structure"] = [32, 32]
    parts = {"weight": codes, "weight_scale": scale}
    parts["weight_zero_point"] = torch.randint(-8, 8, scale.shape, dtype=torch.int8)
    source = open_checkpoint(checkpoint(tmp_path / "a", parts, given, layout="int-quantized"))
    result = written(source, tmp_path / "b", layout)
    assert torch.equal(source.dequantize(DOWN), result.dequantize(DOWN))


def test_what_a_layer_holds_may_be_less_than_its_plan_says(tmp_path: Path) -> None:
    """Columns that are in order after all are written as the config declares them; other groups end with the rows."""
    codes, scale = torch.randint(-8, 8, (64, 96)), scales_for("group")
    packed = {"weight_packed": words(codes + 8, 4), "weight_shape": torch.tensor([64, 96])}
    parts = {**packed, "weight_scale": scale, "weight_g_idx": torch.full((96,), -1, dtype=torch.int32)}
    source = open_checkpoint(checkpoint(tmp_path / "a", parts, arguments(actorder="group")))
    result = open_checkpoint(convert(source, "compressed-tensors", tmp_path / "b"))
    assert torch.equal(source.dequantize(DOWN), result.dequantize(DOWN))
    source = open_checkpoint(
        checkpoint(tmp_path / "c", {**packed, "weight_scale": scales_for("channel")}, arguments(group_size=128))
    )
    result = written(source, tmp_path / "d")
    assert str(result.plan[DOWN]) == "W4A16-channel-sym"
    ragged = {**packed, "weight_scale": torch.ones(64, 2)}
    with pytest.raises(qcore.Refused, match="whole groups"):
        convert(checkpoint(tmp_path / "e", ragged, arguments(group_size=64)), "compressed-tensors", tmp_path / "f")


@pytest.mark.parametrize("layout", ["float-quantized", "nvfp4-pack-quantized", "mxfp8-quantized"])
def test_a_layout_that_does_not_hold_a_layer_is_refused(tmp_path: Path, layout: str) -> None:
    source = open_checkpoint(write(tmp_path / "a", dense_llama())).quantized("W4A16-g32-sym")
    with pytest.raises(qcore.Refused, match=f"{layout} holds; pack-quantized would"):
        convert(source, f"compressed-tensors:{layout}", tmp_path / "b")


def test_a_tied_head_is_ignored(tmp_path: Path) -> None:
    """The library would look for its scales: it is a linear layer of the model, if not of the checkpoint."""
    tensors = dense_llama()
    del tensors["lm_head.weight"]
    source = open_checkpoint(write(tmp_path / "a", tensors, tie_word_embeddings=True)).quantized("W4A16-g32-sym")
    result = written(source, tmp_path / "b")
    assert result.files.quantization is not None and "lm_head" in result.files.quantization["ignore"]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_stay_one_by_one(tmp_path: Path, kind: str) -> None:
    mixture = Mixture(kind)
    plain = open_checkpoint(mixture.write(tmp_path / "a", mixture.tensors()))
    source = plain.quantized("W4A16-g32-sym")
    result = written(source, tmp_path / "b")
    assert any("experts.3" in module and scheme is not None for module, scheme in result.plan.items())
    assert result.layers.keys() == source.layers.keys()
    ours, same = (logits(qcore.load_model(one, dtype=torch.float32)) for one in (source, result))
    assert torch.equal(ours, same)
    # A router of 4 rows has one word of zero points a group, which the library's own view of bytes fails at.
    affine = plain.quantized("W4A16-g32-asym")
    again = open_checkpoint(convert(affine, "compressed-tensors", tmp_path / "c"))
    assert all(torch.equal(affine.dequantize(module), again.dequantize(module)) for module in affine.layers)


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_kv_caches_alone(tmp_path: Path, strategy: str, symmetric: bool) -> None:
    shape = (1,) if strategy == "tensor" else (2, 1, 1)
    attention, tensors = "model.layers.0.self_attn", dense_llama()
    for part in "kv":
        tensors[f"{attention}.{part}_scale"] = torch.rand(shape) + 0.1
        if not symmetric:
            tensors[f"{attention}.{part}_zero_point"] = torch.randint(-9, 9, shape, dtype=torch.int8)
    cache = {"num_bits": 8, "type": "int", "strategy": strategy, "symmetric": symmetric}
    config = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "kv_cache_scheme": cache}
    source = open_checkpoint(write(tmp_path / "a", tensors, config))
    result = open_checkpoint(convert(source, "compressed-tensors", tmp_path / "b"))
    given = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    read = QuantizationConfig.model_validate(given)
    assert read.kv_cache_scheme is not None and read.kv_cache_scheme.strategy == strategy
    assert read.format == "dense" and read.kv_cache_scheme.symmetric == symmetric
    assert result.kv_cache == source.kv_cache
    held = load_file(tmp_path / "b" / "model.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(held[name], tensor) and (held[name].dtype == tensor.dtype or "zero" not in name)
    ours, same = (logits(qcore.load_model(one, dtype=torch.float32)) for one in (source, result))
    assert torch.equal(ours, same)
    if not symmetric:
        with pytest.raises(qcore.Refused, match="zero points"):
            qcore.load_model(source, kv_cache="fp8")
