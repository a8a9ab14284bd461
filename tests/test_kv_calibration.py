"""Calibrated scales of kv caches: beside what whole models cache and what real tools found, written, resumed and refused."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, FalconMambaConfig

import qcore
from commands import command
from golden_checkpoints import FOLDERS
from qcore.calibration import precision
from qcore.calibration.caching import Magnitudes
from qcore.calibration.run import BlockDone, quantize
from qcore.calibration.texts import windows_of
from qcore.checkpoint.kv_scales import CALIBRATED
from qcore.elements import Int
from qcore.evaluation import evaluate
from qcore.kernels.kv_cache import KvRounding
from qcore.model.kv_cache import kv_cache_of
from qcore.refusal import Refused

GOLDEN = FOLDERS[0]
BASE = GOLDEN / "base"
TEXT = (GOLDEN / "text.txt").read_text(encoding="utf-8")
READ, HELD = TEXT[:28_000], TEXT[28_000:]
"""What models are calibrated with, and what they are tried on."""
SAMPLES, SEQLEN = 8, 128


def made(out: Path, scheme: str = "none", kv_cache: str = "fp8", **others: Any) -> Path:
    asked = {
        "algorithm": "" if scheme == "none" else "rtn",
        "calibration": READ,
        "samples": SAMPLES,
        "seqlen": SEQLEN,
        **others,
    }
    return quantize(BASE, scheme, out=out, kv_cache=kv_cache, **asked).paths[0]


def cached(path: Path, samples: int = SAMPLES, seqlen: int = SEQLEN) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The largest of each head's keys and values that transformers' own cache holds of the windows, layer by layer: [heads]."""
    model = qcore.load_model(path, device="cpu", dtype="float32", kv_cache="none")
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for window in windows_of(qcore.open_checkpoint(BASE), READ, samples, seqlen):
        with torch.no_grad():
            layers = model(window[None], use_cache=True).past_key_values.layers
        own = [(layer.keys[0].abs().amax((1, 2)), layer.values[0].abs().amax((1, 2))) for layer in layers]
        both = zip(own, found or own, strict=True)
        found = [(torch.maximum(keys, k), torch.maximum(values, v)) for (keys, values), (k, v) in both]
    return found


def saved(folder: Path, config: Any) -> Path:
    """An unquantized model with random weights and the golden one's tokenizer."""
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, folder)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize(("scheme", "kv_cache"), [("none", "fp8"), ("none", "fp8_per_head"), ("W3A16-g128-sym", "fp8")])
def test_scales_are_of_the_largest_that_the_written_model_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, kv_cache: str
) -> None:
    """With the weights that it has: of the last block too, and behind blocks that are quantized."""
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)
    path = made(tmp_path / "out", scheme, kv_cache)
    checkpoint, largest = qcore.open_checkpoint(path), cached(path)
    assert checkpoint.kv_cache == CALIBRATED[kv_cache]
    assert list(checkpoint.kv_scales) == [f"model.layers.{number}.self_attn" for number in range(len(largest))]
    for own, sides in zip(checkpoint.kv_scales.values(), largest, strict=True):
        for side, most in zip((own.k, own.v), sides, strict=True):
            wanted = most.view(-1, 1, 1) if kv_cache.endswith("head") else most.max().view(1)
            assert side.zero is None
            torch.testing.assert_close(side.scale, wanted / 448, rtol=1e-4, atol=0)


def test_scales_of_weights_that_change_are_of_the_new_ones(tmp_path: Path) -> None:
    """So that the test above sees in which pass they are found."""
    new, old = cached(made(tmp_path / "out", "W3A16-g128-sym")), cached(BASE)
    assert any(abs(float(ours[0].max() / theirs[0].max()) - 1) > 1e-3 for ours, theirs in zip(new, old, strict=True))


@pytest.mark.parametrize("kind", ["qwen3", "gpt_neox"])
def test_keys_are_those_behind_norms_and_rotations(tmp_path: Path, kind: str) -> None:
    """And of attention that has another name for its cache."""
    config = AutoConfig.for_model(kind, vocab_size=1024, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                  num_key_value_heads=2, head_dim=8, max_position_embeddings=128)  # fmt: skip
    path = saved(tmp_path / "model", config)
    asked = {"samples": 3, "seqlen": 32}
    written = quantize(path, "none", "", READ, out=tmp_path / "out", kv_cache="fp8", **asked).paths[0]
    scales = qcore.open_checkpoint(written).kv_scales
    for own, (keys, values) in zip(scales.values(), cached(path, **asked), strict=True):
        torch.testing.assert_close(own.k.scale, keys.max().view(1) / 448)
        torch.testing.assert_close(own.v.scale, values.max().view(1) / 448)


def test_attention_is_what_it_is_without(tmp_path: Path) -> None:
    """What the second block's layers see is the same to the last bit."""
    asked = {"out": tmp_path / "out", "samples": 2, "seqlen": 64}
    one = quantize(BASE, "W4A16", "rtn", READ, kv_cache="fp8", **asked)
    shutil.rmtree(tmp_path / "out")
    assert one.errors == quantize(BASE, "W4A16", "rtn", READ, **asked).errors


def test_as_the_real_tool_finds_them(tmp_path: Path) -> None:
    """LLM Compressor 0.14, from other windows of a text of the same kind."""
    theirs = qcore.open_checkpoint(GOLDEN / "llmcompressor-kvfp8-only")
    own = qcore.open_checkpoint(made(tmp_path / "out", samples=16, seqlen=256))
    assert own.kv_cache == theirs.kv_cache and own.kv_scales.keys() == theirs.kv_scales.keys()
    for name, scales in theirs.kv_scales.items():
        for side in ("k", "v"):
            assert 0.9 < float(getattr(own.kv_scales[name], side).scale / getattr(scales, side).scale) < 1.15


@pytest.mark.parametrize("kv_cache", ["fp8", "int8", "int8_per_head"])
def test_a_kv_cache_alone_leaves_weights_as_they_are_and_runs(tmp_path: Path, kv_cache: str) -> None:
    path = made(tmp_path / "out", kv_cache=kv_cache)
    base, own = qcore.open_checkpoint(BASE), qcore.open_checkpoint(path)
    assert not any(own.plan.values())
    for name in base.parameters:
        assert (
            torch.equal(base.parameter(name), own.parameter(name))
            and base.parameter(name).dtype == own.parameter(name).dtype
        )
    model = qcore.load_model(path, device="cpu", dtype="float32")
    assert kv_cache_of(model) == CALIBRATED[kv_cache]
    tokens = base.load_tokenizer()(HELD)["input_ids"][:1024]
    plain = qcore.load_model(BASE, device="cpu", dtype="float32")
    divergence = float(evaluate(model, tokens, reference=plain, context=256).summary()["kld_mean"])
    assert 0 < divergence < 1e-3


@pytest.mark.parametrize("tail", ["normal", "outliers", "uniform", "one"])
def test_integers_have_the_scale_of_least_error(tail: str) -> None:
    random = torch.Generator().manual_seed(1)
    states = torch.randn(1, 2, 4000, 16, generator=random)
    if tail == "outliers":
        states[..., 3] *= 12
    elif tail == "uniform":
        states = torch.rand(states.shape, generator=random) * 2 - 1
    elif tail == "one":
        states[0, 0, 7, 7] = 1000
    seen = Magnitudes()
    for part in states.split(1000, 2):
        seen.add(part)
    largest = states.abs().amax((0, 2, 3))

    def error(scale: torch.Tensor) -> float:
        return float((KvRounding(Int(8, signed=True), scale)(states) - states).double().square().sum())

    own = seen.scale(Int(8, signed=True), by_head=True)
    assert own.shape == (2, 1, 1) and bool((own.flatten() <= largest / 127 * 1.001).all())
    one = seen.scale(Int(8, signed=True), by_head=False)
    assert one.shape == (1,)
    tried = [largest.max().view(1) / 127 * part for part in torch.linspace(0.02, 1, 99)]
    assert error(one) <= 1.02 * min(map(error, tried))
    assert error(own) <= 1.001 * error(one)


def test_a_cache_of_zeros_takes_any_scale() -> None:
    seen = Magnitudes()
    seen.add(torch.zeros(1, 1, 4, 4))
    assert all(float(seen.scale(scheme.element, by_head=False)) == 1 for scheme in CALIBRATED.values() if scheme)


def test_formats_hold_the_same_scales(tmp_path: Path) -> None:
    formats = ["compressed-tensors", "modelopt", "quark", "inc"]
    made(tmp_path / "out", "FP8", format=formats, ignore=["lm_head"])
    first, *others = (qcore.open_checkpoint(tmp_path / "out" / name) for name in formats)
    assert len(first.kv_scales) == 2
    for other in others:
        assert other.kv_cache == first.kv_cache
        for name, scales in first.kv_scales.items():
            for side in ("k", "v"):
                assert torch.equal(getattr(scales, side).scale, getattr(other.kv_scales[name], side).scale.view(1))


def test_a_stopped_run_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    torch.set_num_threads(1)  # sums of several threads come in another order
    whole = digests(made(tmp_path / "whole", "W4A16", "int8"))

    def stop(done: BlockDone) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "out", "W4A16", "int8", done=stop)
    with pytest.raises(Refused, match="found another kv_cache"):
        made(tmp_path / "out", "W4A16", "fp8", resume=True)
    assert digests(made(tmp_path / "out", "W4A16", "int8", resume=True)) == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_cache": "magic"}, "not found by calibration"),
        ({"calibration": None}, "found by calibration"),
        ({"kv_cache": "none"}, "no kv cache to calibrate"),
        ({"algorithm": "gptq"}, "the algorithm gptq"),
        ({"format": "modelopt"}, "no quantized layer"),
        ({"format": "quark"}, "no quantized layer"),
        ({"format": "inc"}, "no quantized layer"),
        ({"format": "gptq"}, "not written in this format"),
        ({"format": "gguf"}, "not written in this format"),
        ({"kv_cache": "fp8_e5m2"}, "expected fp8 or int8"),
        ({"scheme": "FP8", "format": "inc", "kv_cache": "fp8_e5m2"}, "E4M3 and E5M2"),
        ({"scheme": "FP8", "format": "modelopt", "kv_cache": "fp8_per_head"}, "one scale"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_read(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        made(tmp_path / "out", **changes)
    assert not any(tmp_path.iterdir())


def _latent() -> Any:
    return DeepseekV3Config(vocab_size=1024, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                            q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=2)  # fmt: skip


def _recurrent() -> Any:
    return FalconMambaConfig(vocab_size=1024, hidden_size=32, num_hidden_layers=2, state_size=4)


@pytest.mark.parametrize("config", [_latent, _recurrent])
def test_models_that_cache_something_else_are_refused(tmp_path: Path, config: Any) -> None:
    saved(tmp_path / "model", config())
    with pytest.raises(Refused, match="cache") as refused:
        quantize(tmp_path / "model", "none", "", READ, out=tmp_path / "out", samples=2, seqlen=16, kv_cache="fp8")
    assert "kv_cache" in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_cached_has_to_be_finite(tmp_path: Path) -> None:
    """In the last block too, which no other follows."""
    shutil.copytree(BASE, tmp_path / "base")
    tensors = safetensors.torch.load_file(BASE / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 3] = float("inf")
    safetensors.torch.save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refused, match=r"caches is not finite[\s\S]*layers\.1\.self_attn\.v_scale"):
        quantize(tmp_path / "base", "none", "", READ, out=tmp_path / "out", samples=2, seqlen=16, kv_cache="fp8")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(READ, encoding="utf-8")
    asked = ("--scheme", "none", "--kv-cache", "fp8", "--calibration", text, "--samples", 2, "--seqlen", 64)
    done = command("quantize", BASE, *asked, "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kv_cache"] == "fp8"
    assert str(qcore.open_checkpoint(tmp_path / "out").kv_cache) == "fp8-tensor"
