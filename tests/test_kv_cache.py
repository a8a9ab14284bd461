"""Quantized kv caches: a model that runs with one gives the logits of a model whose attention rounds keys and values.

That other model is the reference here: it has no cache, computes everything anew each time, and shares no code with it. Both
run in float64, and round from float32, so that the noise of float32's sums moves no key from one number to the next.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import qcore
from makers import dense_llama, write
from qcore.checkpoint.kv_scales import CHOICES, SPELLINGS
from qcore.model.kv_cache import QuantizedKvCache, cache_bytes, kv_cache_of

GOLDEN = Path(__file__).parent / "golden"
LAYERS, HEADS, HEAD_DIM, VOCABULARY = 2, 2, 16, 128
K, V = 0.01, 0.004
FP8 = {"type": "float", "num_bits": 8, "strategy": "tensor", "symmetric": True, "dynamic": False}
INT8 = {**FP8, "type": "int"}

Round = Callable[[torch.Tensor], torch.Tensor]


def attention(layer: int) -> str:
    return f"model.layers.{layer}.self_attn"


def scales(k: Any = K, v: Any = V) -> dict[str, torch.Tensor]:
    """Scales of both layers by compressed-tensors' names; the second layer's are doubled."""
    return {
        f"{attention(layer)}.{part}_scale": torch.as_tensor(value).reshape(-1, 1, 1).squeeze(0) * (layer + 1)
        for layer in range(LAYERS)
        for part, value in (("k", k), ("v", v))
    }


def made(folder: Path, extra: dict[str, torch.Tensor] | None = None, scheme: Any = None, **config: Any) -> Path:
    """A llama of two layers whose keys are large enough for their rounding to be seen."""
    tensors = dense_llama(num_hidden_layers=LAYERS)
    for name in tensors:
        if "k_proj" in name or "q_proj" in name:
            tensors[name] *= 4
    groups = config.pop("config_groups", {})
    quantization = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": groups}
    if scheme is not None:
        quantization["kv_cache_scheme"] = scheme
    return write(folder, {**tensors, **(extra or {})}, quantization, num_hidden_layers=LAYERS, **config)


def tokens(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(4, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def logits(model: PreTrainedModel, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, **arguments).logits


def fp8(scale: Any, kind: torch.dtype = torch.float8_e4m3fn) -> Round:
    most = torch.finfo(kind).max
    return lambda x: (x / scale).clamp(-most, most).to(kind).float() * scale


def int8(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def affine(scale: float, zero: int) -> Round:
    return lambda x: (((x / scale).round() + zero).clamp(-128, 127) - zero) * scale


def load(path: Path, kv_cache: str = "auto", dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    return qcore.load_model(path, dtype=dtype, kv_cache=kv_cache)


def close(found: torch.Tensor, wanted: torch.Tensor, bound: float = 1e-6) -> None:
    torch.testing.assert_close(found, wanted, atol=bound, rtol=0)


def reference(path: Path, rounds: list[tuple[Round, Round]], dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The unquantized model, with attention that rounds keys and values first."""

    def rounded(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        of_keys, of_values = rounds[module.layer_idx]
        key, value = of_keys(key.float()).to(dtype), of_values(value.float()).to(dtype)
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("rounded", rounded)
    AttentionMaskInterface.register("rounded", sdpa_mask)
    model = load(path, "none", dtype)
    assert kv_cache_of(model) is None
    model.set_attn_implementation("rounded")
    model.config.use_cache = model.generation_config.use_cache = False
    return model


def twice(k: Any = K, v: Any = V, kind: torch.dtype = torch.float8_e4m3fn) -> list[tuple[Round, Round]]:
    return [(fp8(k * (layer + 1), kind), fp8(v * (layer + 1), kind)) for layer in range(LAYERS)]


PER_HEAD = torch.tensor([0.01, 0.02]), torch.tensor([0.004, 0.008])
UNIT = [(fp8(1.0), fp8(1.0))] * LAYERS
E5M2 = torch.float8_e5m2
CASES: dict[str, tuple[dict[str, torch.Tensor], Any, str, list[tuple[Round, Round]], str]] = {
    "fp8": (scales(), FP8, "auto", twice(), "fp8-tensor"),
    "fp8, saturated": (scales(K / 20, V / 20), FP8, "auto", twice(K / 20, V / 20), "fp8-tensor"),
    "fp8, asked for": (scales(), FP8, "fp8_e4m3", twice(), "fp8-tensor"),
    "fp8 without scales": ({}, FP8, "auto", UNIT, "fp8-tensor"),
    "fp8, not declared": ({}, None, "fp8", UNIT, "fp8-tensor"),
    "a scale for each head": (
        scales(*PER_HEAD), {**FP8, "strategy": "attn_head"}, "auto", twice(*(s[:, None, None] for s in PER_HEAD)), "fp8-channel",
    ),
    "e5m2": ({}, None, "fp8_e5m2", [(fp8(1.0, E5M2), fp8(1.0, E5M2))] * LAYERS, "e5m2-tensor"),
    "e5m2, saturated": (scales(1e-4, 1e-5), FP8, "fp8_e5m2", twice(1e-4, 1e-5, E5M2), "e5m2-tensor"),
    "e5m2 under e4m3's scales": (scales(), FP8, "fp8_e5m2", twice(kind=E5M2), "e5m2-tensor"),
    "int8": ({}, None, "int8", [(int8, int8)] * LAYERS, "int8-token-sym-dyn"),
    "int8 in place of fp8": (scales(), FP8, "int8", [(int8, int8)] * LAYERS, "int8-token-sym-dyn"),
    "int8 without scales": ({}, INT8, "auto", [(int8, int8)] * LAYERS, "int8-tensor-sym"),
    "int8 with scales": (
        scales(), INT8, "int8", [(affine(K * n, 0), affine(V * n, 0)) for n in (1, 2)], "int8-tensor-sym",
    ),
    "int8 with zero points": (
        scales() | {f"{attention(n)}.{part}_zero_point": torch.tensor([zero], dtype=torch.int8)
                    for n in range(LAYERS) for part, zero in (("k", 5), ("v", -9))},
        {**INT8, "symmetric": False}, "auto", [(affine(K * n, 5), affine(V * n, -9)) for n in (1, 2)], "int8-tensor-asym",
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model with the cache, and the reference, which differs from the model without it."""
    extra, declared, choice, rounds, scheme = CASES[request.param]
    path = made(tmp_path, extra, declared)
    model = load(path, choice)
    assert str(kv_cache_of(model)) == scheme
    rounded, ids = reference(path, rounds), tokens(2, 12)
    plain = logits(load(path, "none"), ids)
    assert (plain - logits(rounded, ids)).abs().max() > 1e-3
    return model, rounded


# --- Numbers --------------------------------------------------------------------------------------------------------


def test_every_way_to_run_gives_the_logits_of_rounded_keys_and_values(
    pair: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    model, rounded = pair
    ids = tokens(2, 12)
    wanted = logits(rounded, ids)
    for arguments in ({}, {"use_cache": False}, {"use_cache": True}, {"past_key_values": DynamicCache()}):
        close(logits(model, ids, **arguments), wanted)
    with torch.inference_mode():
        first = model(ids[:, :5])
        assert isinstance(first.past_key_values, QuantizedKvCache)
        pieces, cache = [first.logits], first.past_key_values
        for start, stop in ((5, 6), (6, 10), (10, 12)):
            pieces.append(model(ids[:, start:stop], past_key_values=cache).logits)
    close(torch.cat(pieces, 1), wanted)
    assert cache.get_seq_length() == 12


def test_generated_tokens_are_the_references(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    model, rounded = pair
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # the first of the batch is shorter
    for arguments in ({}, {"num_beams": 3}, {"use_cache": False}):
        both = [
            one.generate(
                ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None,
                **({"use_cache": False} if one is rounded else {}) | arguments,
            )
            for one in (model, rounded)
        ]  # fmt: skip
        assert torch.equal(*both), arguments


def test_rounding_is_visible_and_the_bound_tells_schemes_apart(tmp_path: Path) -> None:
    """What the bound of the tests above is worth: other rounding is a hundred times farther away."""
    path, ids = made(tmp_path), tokens(2, 12)
    found = [logits(load(path, choice), ids) for choice in ("none", "fp8", "fp8_e5m2", "int8")]
    for index, one in enumerate(found):
        for other in found[:index]:
            assert (one - other).abs().max() > 2e-3


def test_without_a_cache_asked_for_none_is_kept(tmp_path: Path) -> None:
    model = load(made(tmp_path), "fp8")
    ids = tokens(1, 4)
    with torch.inference_mode():
        assert model(ids, use_cache=False).past_key_values is None
        assert model(ids).past_key_values is not None
        assert len(model(ids, use_cache=False, return_dict=False)) == 1
        assert model.model(ids).past_key_values.get_seq_length() == 4  # the decoder alone rounds too


@pytest.mark.parametrize("name", ["llmcompressor-kvfp8-only", "modelopt-fp8-kvfp8"])
def test_the_tools_own_logits_need_the_rounding(name: str) -> None:
    """test_goldens.py tests that they are met; without the rounding they are not."""
    path = Path(os.environ.get("QCORE_GOLDEN", GOLDEN)) / name
    if not path.is_dir():
        pytest.skip("QCORE_GOLDEN does not name the folder with this checkpoint")
    expected = load_file(path / "expected.safetensors")
    dtype = torch.bfloat16 if name.startswith("modelopt") else torch.float32
    apart = []
    for choice in ("auto", "none"):
        found = logits(load(path, choice, dtype), expected["input_ids"]).float()
        apart.append((found - expected["logits"]).abs().max())
    assert apart[1] > 4 * apart[0]


# --- Scales ---------------------------------------------------------------------------------------------------------


def test_the_table_has_every_name() -> None:
    names = """k_scale v_scale q_scale k_zero_point v_zero_point q_zero_point k_proj.output_scale v_proj.output_scale
    q_proj.output_scale prob_output_scale k_proj.k_scale v_proj.v_scale kv_scale qkv_proj.k_scale k_cache.scale q.scale
    k_cache.dequant_output.scale k_cache.quant_input.scale_inv"""
    assert set(names.split()) <= {row.suffix for row in SPELLINGS}
    assert len({row.suffix for row in SPELLINGS}) == len(SPELLINGS)


@pytest.mark.parametrize("row", SPELLINGS, ids=lambda row: row.suffix)
def test_each_spelling_is_the_scale_that_it_says(tmp_path: Path, row: Any) -> None:
    def loaded(value: float, folder: str) -> tuple[Path, torch.Tensor]:
        stored = 1 / value if row.kind == "inverse" else value
        extra = {} if row.part == "kv" else scales()
        for layer in range(LAYERS):
            if row.kind != "zero" and row.part in ("k", "v"):
                del extra[f"{attention(layer)}.{row.part}_scale"]
            given = torch.tensor([0], dtype=torch.int8) if row.kind == "zero" else torch.tensor(stored)
            extra[f"{attention(layer)}.{row.suffix}"] = given
        path = made(tmp_path / folder, extra, FP8)
        return path, logits(load(path), ids)

    ids = tokens(1, 10)
    path, found = loaded(0.03, "1")
    own = {part: fp8(0.03) for part in ("k", "v") if row.kind != "zero" and part in row.part}
    rounds = [(own.get("k", k), own.get("v", v)) for k, v in twice()]
    close(found, logits(reference(path, rounds), ids))
    changed = not torch.allclose(found, loaded(0.05, "2")[1], atol=1e-4)
    assert changed == bool(own)


def test_a_mixer_is_attention_too() -> None:
    from qcore.checkpoint.kv_scales import spelled

    hit = spelled("backbone.layers.4.mixer.k_proj.k_scale")
    assert hit is not None and (hit[0], hit[1].part) == ("backbone.layers.4.mixer", "k")
    assert spelled("model.layers.0.mlp.up_proj.weight_scale") is None


@pytest.mark.parametrize("part", ["k", "v"])
def test_one_scale_alone_is_for_both(tmp_path: Path, part: str, caplog: pytest.LogCaptureFixture) -> None:
    extra = {name: value for name, value in scales().items() if name.endswith(f"{part}_scale")}
    path, one, ids = made(tmp_path, extra, FP8), K if part == "k" else V, tokens(1, 10)
    found = logits(load(path), ids)
    assert f"a scale for {part} alone" in caplog.text
    close(found, logits(reference(path, twice(one, one)), ids))


def test_undeclared_scales_are_used_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, ids = made(tmp_path, scales()), tokens(1, 10)
    assert qcore.open_checkpoint(path).kv_cache is None
    found = logits(load(path), ids)
    assert "declares no kv cache" in caplog.text
    close(found, logits(reference(path, twice()), ids))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        plain = load(path, "none")
    assert "stays unquantized" in caplog.text and kv_cache_of(plain) is None
    assert not torch.allclose(logits(plain, ids), found, atol=1e-4)


def test_missing_and_unused_scales_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = {name: value for name, value in scales().items() if ".0." in name}
    path = made(tmp_path, first, FP8)
    found = logits(load(path), tokens(1, 10))
    assert "no kv scales for 1 attention layers" in caplog.text
    wanted = reference(path, [twice()[0], UNIT[0]])
    close(found, logits(wanted, tokens(1, 10)))
    caplog.clear()
    load(path, "int8")
    assert "are not used" in caplog.text
    caplog.clear()
    load(made(tmp_path / "2", scales(), FP8))
    assert not caplog.text


K_NAME = f"{attention(1)}.k_scale"
BAD = {
    "zero": ({K_NAME: torch.tensor([0.0])}, "bad-content"),
    "negative": ({K_NAME: torch.tensor([-0.01])}, "bad-content"),
    "not a number": ({K_NAME: torch.tensor([float("nan")])}, "bad-content"),
    "infinite": ({K_NAME: torch.tensor([float("inf")])}, "bad-content"),
    "one of the heads": ({K_NAME: torch.tensor([0.01, 0.0]).reshape(2, 1, 1)}, "bad-content"),
    "inverse of infinity": (
        {f"{attention(1)}.k_cache.quant_input.scale_inv": torch.tensor(float("inf"))},
        "bad-content",
    ),
    "another beside it": ({f"{attention(1)}.kv_scale": torch.tensor(0.5)}, "bad-content"),
    "a query's": ({f"{attention(1)}.q_scale": torch.tensor([0.0])}, "bad-content"),
    "a zero point": ({f"{attention(1)}.k_zero_point": torch.tensor([1], dtype=torch.int8)}, "bad-content"),
    "three heads": ({K_NAME: torch.ones(3, 1, 1)}, "bad-shape"),
    "a matrix": ({K_NAME: torch.ones(2, 2)}, "bad-shape"),
    "nothing": ({K_NAME: torch.ones(0)}, "bad-shape"),
    "integers": ({K_NAME: torch.ones(1, dtype=torch.int32)}, "bad-dtype"),
    "of no layer": ({f"{attention(7)}.k_scale": torch.ones(1)}, "unexpected-tensor"),
    "of an mlp": ({"model.layers.0.mlp.k_scale": torch.ones(1)}, "unexpected-tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_scales_are_refused(tmp_path: Path, case: str) -> None:
    extra, code = BAD[case]
    path = made(tmp_path, {**scales(), **extra}, FP8)
    with pytest.raises(qcore.Refused) as caught:
        load(path)
    assert caught.value.refusal.code == code and caught.value.refusal.kind == "bad-file"
    assert caught.value.refusal.tensor is not None


def test_a_scale_may_stand_there_twice(tmp_path: Path) -> None:
    twins = {f"{attention(n)}.k_cache.{name}": torch.tensor(value) for n in range(LAYERS)
             for name, value in (("dequant_output.scale", 0.25), ("quant_input.scale_inv", 4.0))}  # fmt: skip
    found = qcore.open_checkpoint(made(tmp_path, twins, FP8)).kv_scales
    assert [layer.k.scale.tolist() for layer in found.values()] == [[0.25]] * LAYERS


# --- Declarations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [({"num_bits": 4}, "4-bit float"), ({"type": "int", "num_bits": 4}, "4-bit int"), ({"dynamic": True}, "dynamic"),
     ({"strategy": "group", "group_size": 16}, "strategy group"), ({"symmetric": False}, "asymmetric"),
     ({"strategy": "tensor_group", "num_bits": 4}, "strategy tensor_group")],
)  # fmt: skip
def test_what_compressed_tensors_declares_else_is_refused_by_name(tmp_path: Path, change: Any, named: str) -> None:
    path = made(tmp_path, scales(), {**FP8, **change})
    with pytest.raises(qcore.Refused, match="unknown-variant") as caught:
        load(path)
    assert named in caught.value.refusal.fact and caught.value.refusal.field == "quantization_config.kv_cache_scheme"
    assert kv_cache_of(load(path, "none")) is None


def test_quantized_queries_are_refused(tmp_path: Path) -> None:
    path = made(
        tmp_path, scales(), config_groups={"attention": {"targets": ["LlamaAttention"], "input_activations": FP8}}
    )
    with pytest.raises(qcore.Refused, match="quantizes attention"):
        load(path)


@pytest.mark.parametrize(
    ("config", "scheme"),
    [({}, "None"), ({"kv_cache_quant_algo": "FP8"}, "fp8-tensor"), ({"kv_cache_quant_algo": "INT8"}, "int8-tensor-sym"),
     ({"kv_cache_quant_algo": "NVFP4"}, "NVFP4"), ({"kv_cache_quant_algo": "NVFP4_AFFINE"}, "NVFP4_AFFINE"),
     ({"kv_cache_scheme": {"type": "float", "num_bits": 8, "dynamic": False}}, "fp8-tensor"),
     ({"kv_cache_scheme": {"type": ["float"], "num_bits": {}}}, "float"),
     ({"kv_cache_scheme": {"type": "float", "num_bits": 4, "group_size": 16}}, "4-bit float")],
)  # fmt: skip
def test_what_modelopt_declares(tmp_path: Path, config: dict[str, Any], scheme: str) -> None:
    tensors = dense_llama()
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
    tensors |= {f"{name}.weight_scale": torch.tensor(1.0), f"{attention(0)}.k_proj.k_scale": torch.tensor(K)}
    opened = qcore.open_checkpoint(
        write(tmp_path, tensors, {"quant_method": "modelopt", "quant_algo": "FP8", **config})
    )
    if scheme.startswith(("None", "fp8", "int8")):
        assert str(opened.kv_cache) == scheme
        return
    with pytest.raises(qcore.Refused, match="unknown-variant") as caught:
        _ = opened.kv_cache
    assert scheme in caught.value.refusal.fact


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "uint8"])
def test_what_quark_declares(tmp_path: Path, dtype: str) -> None:
    tensors = dense_llama()
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
    tensors |= {f"{name}.weight_scale": torch.tensor(1.0), f"{attention(0)}.k_proj.output_scale": torch.tensor(K)}
    spec = {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}
    config = {
        "quant_method": "quark", "global_quant_config": {"weight": spec},
        "export": {"kv_cache_group": ["*k_proj", "*v_proj"]},
        "kv_cache_quant_config": {"*k_proj": {"weight": spec, "output_tensors": {**spec, "dtype": dtype}}},
    }  # fmt: skip
    path = write(tmp_path, tensors, config)
    if dtype == "fp8_e4m3":
        assert str(kv_cache_of(load(path, dtype=torch.float32))) == "fp8-tensor"
        return
    with pytest.raises(qcore.Refused, match="unknown-variant"):
        load(path)


def test_autofp8_keeps_scales_in_quantized_layers_and_declares_nothing(tmp_path: Path) -> None:
    tensors = dense_llama()
    for part, scale in (("k", K), ("v", V)):
        name = f"{attention(0)}.{part}_proj"
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
        tensors |= {f"{name}.weight_scale": torch.tensor(4.0), f"{name}.output_scale": torch.tensor(scale)}
    path, ids = write(tmp_path, tensors, {"quant_method": "fp8", "activation_scheme": "dynamic"}), tokens(1, 10)
    model = load(path, dtype=torch.float32)  # in which its kernels compute
    assert str(kv_cache_of(model)) == "fp8-tensor"
    close(logits(model, ids), logits(reference(path, twice(), torch.float32), ids), 2e-5)


@pytest.mark.parametrize("choice", ["fp4", "FP8", "", "int4"])
def test_unknown_choices_are_refused(tmp_path: Path, choice: str) -> None:
    with pytest.raises(qcore.Refused) as caught:
        load(made(tmp_path), choice)
    assert caught.value.refusal.code == "bad-argument"
    assert all(name in caught.value.refusal.fix for name in ("auto", *CHOICES))


# --- The cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("choice", "most"), [("fp8", 0.5), ("fp8_e5m2", 0.5), ("int8", 0.5 + 4 / (2 * HEAD_DIM))])
def test_memory_is_half_of_bfloat16(tmp_path: Path, choice: str, most: float) -> None:
    """int8 adds four bytes of scale to each token and head."""
    path, ids = made(tmp_path), tokens(3, 40)
    with torch.inference_mode():
        caches = [load(path, one, torch.bfloat16)(ids).past_key_values for one in ("none", choice)]
        wide = load(path, "none", torch.float32)(ids).past_key_values
    numbers = 2 * LAYERS * 3 * HEADS * 40 * HEAD_DIM
    assert cache_bytes(caches[0]) == 2 * numbers and cache_bytes(wide) == 4 * numbers
    assert cache_bytes(caches[1]) == most * 2 * numbers
    held = {part.data_ptr(): part.untyped_storage().nbytes() for layer in caches[1].layers
            for part in vars(layer).values() if isinstance(part, torch.Tensor)}  # fmt: skip
    assert sum(held.values()) == cache_bytes(caches[1]), "nothing else is kept"


@pytest.mark.parametrize("choice", ["fp8", "int8"])
def test_crop_and_reorder_take_scales_along(tmp_path: Path, choice: str) -> None:
    model, ids = load(made(tmp_path), choice), tokens(3, 12)
    wanted = logits(model, ids)
    with torch.inference_mode():
        cache = model(torch.cat([ids[:, :8], tokens(3, 4, seed=9)], 1)).past_key_values
        cache.crop(-4)
        close(logits(model, ids[:, 8:], past_key_values=cache), wanted[:, 8:])
        cache = model(ids[:, :8]).past_key_values
        order = torch.tensor([2, 0, 0])
        cache.reorder_cache(order)
        found = logits(model, ids[order, 8:], past_key_values=cache)
        close(found, wanted[order, 8:])
        cache.reset()
        close(logits(model, ids, past_key_values=cache), wanted)


def test_rollbacks_of_guessed_tokens_change_nothing(tmp_path: Path) -> None:
    model = load(made(tmp_path), "int8")
    ids = tokens(1, 6).repeat(1, 3)
    plain, guessed = (
        model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None, **arguments)
        for arguments in ({}, {"prompt_lookup_num_tokens": 4})
    )
    assert torch.equal(plain, guessed)


@pytest.mark.parametrize("choice", ["fp8", "int8"])
def test_sliding_windows_hold_their_window(tmp_path: Path, choice: str) -> None:
    config = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8}
    path, ids = made(tmp_path, **config), tokens(2, 14)
    rounds = UNIT if choice == "fp8" else [(int8, int8)] * LAYERS
    model, rounded = load(path, choice), reference(path, rounds)
    wanted = logits(rounded, ids)
    close(logits(model, ids), wanted)
    with torch.inference_mode():
        cache = model(ids[:, :9]).past_key_values
        for start in range(9, 14):
            found = model(ids[:, start : start + 1], past_key_values=cache).logits
            close(found, wanted[:, start : start + 1])
    assert cache.is_sliding == [True] * LAYERS and cache.layers[0].keys.shape[-2] == 7
    recording = DynamicCache(config=model.config)
    recording.activate_past_recording()
    with torch.inference_mode():
        for piece in (ids[:, :10], tokens(2, 3)):
            model(piece, past_key_values=recording)
        recording.crop(-3)
        found = model(ids[:, 10:], past_key_values=recording).logits
        close(found, wanted[:, 10:])
    arguments = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **arguments), rounded.generate(ids, use_cache=False, **arguments))


def test_caches_of_others_are_taken_over_or_refused(tmp_path: Path) -> None:
    model, plain = (load(made(tmp_path), choice) for choice in ("fp8", "none"))
    ids = tokens(1, 4)
    with torch.inference_mode():
        own = DynamicCache(config=model.config)
        model(ids, past_key_values=own)
        assert own.get_seq_length() == 4 and own.layers[0].keys.dtype == torch.uint8
        filled = plain(ids).past_key_values
        for cache in (filled, StaticCache(config=model.config, max_cache_len=16)):
            with pytest.raises(qcore.Refused, match="cannot become one"):
                model(ids, past_key_values=cache)
        with pytest.raises(qcore.Refused, match="cannot become one"):
            model.generate(ids, max_new_tokens=2, cache_implementation="static")


def test_an_architecture_without_keys_is_refused(tmp_path: Path) -> None:
    """Mamba keeps a state in place of keys and values. What it lacks is told before its weights are looked for."""
    path = made(tmp_path, model_type="mamba", architectures=["MambaForCausalLM"])
    with pytest.raises(qcore.Refused) as caught:
        load(path, "fp8")
    assert caught.value.refusal.subject == "kv_cache"


# --- The command ----------------------------------------------------------------------------------------------------


def test_the_command_runs_with_it() -> None:
    def run(choice: str) -> subprocess.CompletedProcess[str]:
        command = ["-m", "qcore", "run", str(GOLDEN / "base"), "-p", "Who", "--max-new-tokens", "3", "--json"]
        done = [sys.executable, *command, "--kv-cache", choice]
        return subprocess.run(done, capture_output=True, text=True, check=False)

    assert json.loads(run("auto").stdout)["kv_cache"] is None
    assert json.loads(run("int8").stdout)["kv_cache"] == "int8-token-sym-dyn"
    wrong = run("int3")
    assert wrong.returncode == 2 and "--kv-cache" in wrong.stdout and "fp8_e5m2" in wrong.stdout
