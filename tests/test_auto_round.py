"""AutoRound's own format from codes that the test chooses: every packing, and layers with numbers of their own."""

from pathlib import Path
from typing import Any

import pytest
import torch

import qcore
from makers import LINEARS, dense_llama, gptq_tensors, words, write
from qcore.scheme import Scheme
from qcore.tensor import float_table
from test_awq import GEMM

PREFIX = "model.layers.0."
UP, DOWN, Q = f"{PREFIX}mlp.up_proj", f"{PREFIX}mlp.down_proj", f"{PREFIX}self_attn.q_proj"


def layer(
    name: str, bits: int, group_size: int, packing: str, *, sym: bool
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One layer's tensors, and its weight by the definition."""
    random = torch.Generator().manual_seed(len(name))
    rows, columns = LINEARS[name.removeprefix(PREFIX)]
    groups = columns // group_size
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=random)
    zeros = torch.randint(0, 1 << bits, (rows, groups), generator=random)
    zeros = torch.full_like(zeros, 1 << (bits - 1)) if sym else zeros
    scales = (torch.rand(rows, groups, generator=random) * 0.01 + 0.001).half()
    if "awq" in packing:
        woven = [words(part.t().unflatten(1, (-1, 8))[..., GEMM].flatten(1), bits) for part in (codes, zeros)]
        parts = {"qweight": woven[0], "qzeros": woven[1], "scales": scales.t()}
    else:
        parts = gptq_tensors(codes, zeros, scales, bits, None, v1=packing == "auto_round:auto_gptq")
    weight = (codes - zeros.repeat_interleave(group_size, 1)).float() * scales.float().repeat_interleave(group_size, 1)
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}, weight


def checkpoint(folder: Path, layers: dict[str, dict[str, torch.Tensor]], **config: Any) -> Path:
    tensors = dense_llama()
    for name, parts in layers.items():
        del tensors[f"{name}.weight"]
        tensors |= parts
    settings = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int", **config}
    return write(folder, tensors, {k: v for k, v in settings.items() if v is not None})


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(
    "packing", ["auto_round", "auto_round:auto_gptq", "auto_round:gptqmodel", "auto_round:auto_awq"]
)
@pytest.mark.parametrize("sym", [True, False])
def test_every_packing_is_exact(tmp_path: Path, bits: int, packing: str, sym: bool) -> None:
    if "awq" in packing and bits in (2, 3, 8):
        path = checkpoint(
            tmp_path, {UP: layer(UP, bits, 32, packing, sym=sym)[0]}, packing_format=packing, bits=bits, sym=sym
        )
        with pytest.raises(qcore.Refused, match="bad-field"):
            qcore.open_checkpoint(path)
        return
    parts, weight = layer(UP, bits, 32, packing, sym=sym)
    opened = qcore.open_checkpoint(checkpoint(tmp_path, {UP: parts}, packing_format=packing, bits=bits, sym=sym))
    assert (opened.method, opened.format_version) == ("auto-round", packing)
    assert torch.equal(opened.dequantize(UP), weight)
    if "awq" not in packing:  # AWQ stores zero points that happen to be 8 too, and then they stay
        assert opened.plan[UP] == Scheme.parse(f"W{bits}A16-g32-{'sym' if sym else 'asym'}")


def test_without_a_packing_format_it_is_auto_gptq(tmp_path: Path) -> None:
    parts, weight = layer(UP, 4, 32, "auto_round:auto_gptq", sym=False)
    opened = qcore.open_checkpoint(checkpoint(tmp_path, {UP: parts}, sym=False))
    assert torch.equal(opened.dequantize(UP), weight) and opened.format_version == "auto_round:auto_gptq"


def test_layers_may_have_numbers_of_their_own(tmp_path: Path) -> None:
    """By name first, then by the first pattern that is found anywhere in it; 16 bits are no quantization."""
    made = {
        UP: layer(UP, 8, 32, "auto_round", sym=False),
        DOWN: layer(DOWN, 2, 48, "auto_round", sym=False),
        Q: layer(Q, 4, 32, "auto_round", sym=False),
    }
    extra = {
        UP: {"bits": 8, "act_bits": 16},
        r".*mlp\.(up|down)_proj.*": {"bits": 2, "group_size": 48},
        "down_proj": {"bits": 3},
        f"{PREFIX}mlp.gate_proj": {"bits": 16, "data_type": "float"},
    }
    tensors = {name: parts for name, (parts, _) in made.items()}
    opened = qcore.open_checkpoint(
        checkpoint(tmp_path, tensors, packing_format="auto_round", sym=False, extra_config=extra)
    )
    for name, (_, weight) in made.items():
        assert torch.equal(opened.dequantize(name), weight), name
    assert [str(opened.plan[name]) for name in (UP, DOWN, Q)] == ["W8A16-g32-asym", "W2A16-g48-asym", "W4A16-g32-asym"]
    assert "extra_config" in opened.layers[DOWN].reason and "16 bits" in opened.layers[f"{PREFIX}mlp.gate_proj"].reason


@pytest.mark.parametrize("name", ["auto-round", "auto_round", "Intel/Auto-Round"])
def test_names_of_the_method(tmp_path: Path, name: str) -> None:
    parts, weight = layer(UP, 4, 32, "auto_round:auto_gptq", sym=True)
    opened = qcore.open_checkpoint(checkpoint(tmp_path, {UP: parts}, quant_method=name))
    assert torch.equal(opened.dequantize(UP), weight)


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"data_type": "mx_fp"}, "missing-tensor"),
        ({"data_type": "nv_fp", "group_size": -2}, "bad-field"),
        ({"act_bits": 8}, "unknown-variant"),
        ({"packing_format": "abacus"}, "unknown-variant"),
        ({"rotation_config": {"algorithm": "hadamard", "block_size": 32}}, "unknown-variant"),
        ({"extra_config": {UP: {"rotation_config": {"algorithm": "hadamard"}}}}, "unknown-variant"),
        ({"spinquant_config": {"r1": True}}, "unknown-variant"),
        ({"bits": 9}, "bad-field"),
        ({"bits": None}, "bad-field"),
        ({"group_size": 0}, "bad-field"),
        ({"group_size": 64}, "bad-shape"),
        ({"extra_config": {"(": {"bits": 2}}}, "bad-field"),
        ({"extra_config": {"(a*)*b": {"bits": 2}}}, "limit-exceeded"),
        ({"extra_config": ["up_proj"]}, "bad-field"),
    ],
)
def test_what_is_broken_or_not_read_is_refused(tmp_path: Path, config: dict[str, Any], code: str) -> None:
    parts, _ = layer(UP, 4, 32, "auto_round:auto_gptq", sym=True)
    with pytest.raises(qcore.Refused) as caught:
        qcore.open_checkpoint(checkpoint(tmp_path, {UP: parts}, **config))
    assert caught.value.refusal.code == code and caught.value.refusal.fix


def float_layer(kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, Any], str]:
    """up_proj in one of the float exports: tensors, weight by the definition, config and scheme."""
    random = torch.Generator().manual_seed(1)
    rows, columns = LINEARS["mlp.up_proj"]
    nibbles = torch.randint(0, 16, (rows, columns), generator=random, dtype=torch.uint8)
    packed, values = nibbles[:, 0::2] | nibbles[:, 1::2] << 4, float_table("e2m1")[nibbles.int()]
    exponents = torch.randint(118, 123, (rows, columns // 32), generator=random, dtype=torch.uint8)
    powers = torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
    eights = torch.randn(rows, columns, generator=random).to(torch.float8_e4m3fn)
    mx = {"data_type": "mx_fp", "group_size": 32, "act_data_type": "mx_fp", "act_group_size": 32}
    if kind in ("MXFP4", "MXFP4A8"):
        config = {**mx, "bits": 4, "act_bits": 8 if kind == "MXFP4A8" else 4}
        inputs = "W4A8-e2m1-g32:e8m0/fp8" if kind == "MXFP4A8" else "W4A4-e2m1-g32:e8m0/e2m1"
        return (
            {"weight_packed": packed, "weight_scale": exponents},
            values * powers,
            config,
            f"{inputs}-g32:e8m0floor-dyn",
        )
    if kind == "MXFP8":
        config = {**mx, "bits": 8, "act_bits": 8}
        return (
            {"weight": eights, "weight_scale": exponents},
            eights.float() * powers,
            config,
            "W8A8-fp8-g32:e8m0/fp8-g32:e8m0floor-dyn",
        )
    if kind == "NVFP4":
        fine = torch.rand(rows, columns // 16, generator=random).to(torch.float8_e4m3fn)
        whole = torch.tensor([731.25])
        config = {"data_type": "nv_fp", "bits": 4, "group_size": 16, "act_bits": 4, "act_group_size": 16,
                  "act_data_type": "nv_fp4_with_static_gs"}  # fmt: skip
        parts = {"weight_packed": packed, "weight_scale": fine, "weight_global_scale": whole,
                 "input_global_scale": torch.tensor([99.0])}  # fmt: skip
        weight = values * (1 / whole) * fine.float().repeat_interleave(16, 1)  # in this order
        return parts, weight, config, "W4A4-nvfp4"
    config = {"data_type": "fp", "bits": 8, "act_bits": 8, "act_data_type": "fp", "group_size": -1}
    if kind == "FP8_STATIC":
        scale = torch.rand(rows, generator=random).bfloat16()
        parts = {"weight": eights, "weight_scale": scale, "input_scale": torch.tensor([0.5])}
        config |= {"act_group_size": 0, "act_dynamic": False}
        return parts, eights.float() * scale.float()[:, None], config, "W8A8-fp8-channel/fp8-tensor"
    if kind == "FPW8A16":
        scale = torch.rand(1, generator=random)
        fives = eights.float().to(torch.float8_e5m2)
        config |= {"group_size": 0, "act_bits": 16, "fmt": "e5m2"}
        return {"weight": fives, "weight_scale": scale}, fives.float() * scale, config, "W8A16-e5m2-tensor"
    if kind == "FPW8A16_G32":
        scale = torch.rand(rows, columns // 32, generator=random)
        config |= {"group_size": 32, "act_bits": 16}
        weight = eights.float() * scale.repeat_interleave(32, 1)
        return {"weight": eights, "weight_scale": scale.flatten()}, weight, config, "W8A16-fp8-g32"
    scale = torch.rand(2, 2, generator=random)
    spread = scale.repeat_interleave(64, 0)[:rows].repeat_interleave(32, 1)
    config |= {"group_size": [64, 32], "act_group_size": 32, "act_dynamic": True}
    return (
        {"weight": eights, "weight_scale_inv": scale},
        eights.float() * spread,
        config,
        "W8A8-fp8-tile64x32/fp8-g32-dyn",
    )


FLOATS = ("MXFP4", "MXFP4A8", "FPW8A16_G32", "MXFP8", "NVFP4", "FP8_STATIC", "FPW8A16", "FP8_BLOCK")


@pytest.mark.parametrize("kind", FLOATS)
def test_float_exports_are_exact_and_run(tmp_path: Path, kind: str) -> None:
    parts, weight, config, scheme = float_layer(kind)
    layers = {UP: {f"{UP}.{part}": tensor for part, tensor in parts.items()}}
    opened = qcore.open_checkpoint(checkpoint(tmp_path, layers, packing_format="auto_round:llm_compressor", **config))
    assert opened.plan[UP] == opened.weight(UP).scheme == Scheme.parse(scheme)
    assert torch.equal(opened.dequantize(UP), weight)
    assert opened.layer(UP).order == ("inverses" if kind == "NVFP4" else "dequantized")
    logits = qcore.load_model(opened, dtype="float32")(torch.tensor([[1, 5, 9]])).logits
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize(
    "config",
    [
        {"act_data_type": "mx_fp_stochastic"},
        {"bits": 6, "act_bits": 6},
        {"data_type": "mx_int"},
        {"data_type": "nvfp4_v2"},
        {"act_bits": 6},
        {"fmt": "e3m4"},
        {"group_size": 16},
        {"act_group_size": 64},
        {"act_dynamic": False},
    ],
)
def test_float_forms_that_are_not_read_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    parts, _, stated, _ = float_layer("MXFP4")
    layers = {UP: {f"{UP}.{part}": tensor for part, tensor in parts.items()}}
    with pytest.raises(qcore.Refused, match="unknown-variant"):
        qcore.open_checkpoint(checkpoint(tmp_path, layers, **stated, **config) if not stated.keys() & config.keys()
                              else checkpoint(tmp_path, layers, **{**stated, **config}))  # fmt: skip


@pytest.mark.parametrize(
    ("config", "cache"),
    [
        ({}, None),
        ({"static_kv_dtype": "bfloat16"}, None),
        ({"static_kv_dtype": "fp8", "static_kv_granularity": "tensor"}, "fp8-tensor"),
        ({"static_kv_dtype": "float8_e4m3fn", "static_kv_granularity": "head"}, "fp8-channel"),
        ({"static_kv_dtype": "nvfp4"}, "static_kv_dtype"),
        ({"static_kv_dtype": "fp8", "static_kv_granularity": "token"}, "static_kv_dtype"),
        ({"static_kv_dtype": "fp8", "static_attention_dtype": "fp8"}, "static_attention_dtype"),
    ],
)
def test_a_cache_is_as_it_is_declared(tmp_path: Path, config: dict[str, Any], cache: str | None) -> None:
    """Queries that are rounded too, and caches in 4 bits, are refused, but not where the cache is to stay whole."""
    parts = layer(UP, 4, 32, "auto_round:auto_gptq", sym=True)[0]
    heads = 2 if "head" in config.values() else 1
    scales = {f"{PREFIX}self_attn.{part}_scale": torch.rand(heads) + 0.1 for part in "kv"} if config else {}
    opened = qcore.open_checkpoint(checkpoint(tmp_path, {UP: {**parts, **scales}}, **config))
    if cache is None or cache.startswith("fp8"):
        assert str(opened.kv_cache) == str(cache)
        return
    with pytest.raises(qcore.Refused) as caught:
        qcore.load_model(opened, dtype="float32")
    assert caught.value.refusal.field == f"quantization_config.{cache}"
    qcore.load_model(opened, dtype="float32", kv_cache="none")
