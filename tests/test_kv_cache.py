"""Quantized kv caches: a model that runs with one gives the logits of a model whose attention rounds keys and values."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache, PreTrainedModel, StaticCache

import qcore
from commands import command
from kv_reference import (
    E5M2,
    FP8,
    HEAD_DIM,
    HEADS,
    INT8,
    LAYERS,
    PER_HEAD,
    UNIT,
    K,
    Round,
    V,
    affine,
    attention,
    close,
    fp8,
    int8,
    load,
    logits,
    made,
    reference,
    scales,
    tokens,
    twice,
)
from qcore.model.kv_cache import QuantizedKvCache, cache_bytes, kv_cache_of

GOLDEN = Path(__file__).parent / "golden"

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


def goldens() -> list[Path]:
    """The one that this repository carries, and those of QCORE_GOLDEN."""
    folders = [GOLDEN, *map(Path, filter(None, [os.environ.get("QCORE_GOLDEN")]))]
    names = ("llmcompressor-kvfp8-only", "modelopt-fp8-kvfp8")
    found = [folder / name for folder in folders for name in names if (folder / name).is_dir()]
    assert found, "no golden checkpoints"
    return found


@pytest.mark.parametrize("path", goldens(), ids=lambda path: path.name)
def test_the_tools_own_logits_need_the_rounding(path: Path) -> None:
    """test_goldens.py tests that they are met; without the rounding they are not."""
    name = path.name
    expected = load_file(path / "expected.safetensors")
    dtype = torch.bfloat16 if name.startswith("modelopt") else torch.float32
    apart = []
    for choice in ("auto", "none"):
        found = logits(load(path, choice, dtype), expected["input_ids"]).float()
        apart.append((found - expected["logits"]).abs().max())
    assert apart[1] > 4 * apart[0]


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
        return command("run", GOLDEN / "base", "-p", "Who", "--max-new-tokens", 3, "--json", "--kv-cache", choice)

    assert json.loads(run("auto").stdout)["kv_cache"] is None
    assert json.loads(run("int8").stdout)["kv_cache"] == "int8-token-sym-dyn"
    wrong = run("int3")
    assert wrong.returncode == 2 and "--kv-cache" in wrong.stdout and "fp8_e5m2" in wrong.stdout
