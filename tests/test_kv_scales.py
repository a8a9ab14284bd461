"""What checkpoints say of kv caches: calibrated scales by every name, declarations, and what is wrong with them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import qcore
from kv_reference import (
    FP8,
    LAYERS,
    UNIT,
    K,
    V,
    attention,
    close,
    fp8,
    load,
    logits,
    made,
    reference,
    scales,
    tokens,
    twice,
)
from makers import dense_llama, write
from qcore.checkpoint.kv_scales import CHOICES, SPELLINGS, spelled
from qcore.model.kv_cache import kv_cache_of

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
     ({"strategy": None, "group_size": 16}, "strategy group"), ({"strategy": None, "group_size": -1}, "strategy channel"),
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
    path = made(tmp_path / "b", scales(), FP8, attention_input_activations=FP8)
    with pytest.raises(qcore.Refused, match="queries"):
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
