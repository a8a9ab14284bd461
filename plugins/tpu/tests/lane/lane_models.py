"""Whole models: the golden checkpoints through Pallas on a CPU, as jax's arrays over torchax, and compiled for TPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file  # torch's own storages are none of torchax's

import qcore
from golden_checkpoints import divergence, goldens
from qcore.model.generate import Stepper
from qcore.model.load import kernel_counts
from qcore.platform import Device
from qcore_tpu.decoder import CompiledDecoder, CompiledSteps, bucket
from qcore_tpu.plugin import qcore_platforms, qcore_stand_ins

GOLDEN = Path(__file__).parents[4] / "tests" / "golden"
PROMPT = list(range(5, 16))
BOUND = 1e-6
BOUNDS = {"llmcompressor-w8a8": 1e-4, "llmcompressor-fp8": 1e-4, "bitsandbytes-int8": 1e-4}
"""The largest Kullback-Leibler divergence from the reference's logits in float32, by how a name begins: where inputs are rounded, a last bit decides which way."""

(STAND_IN,) = qcore_stand_ins()
REFERENCE = replace(STAND_IN, id="reference", architecture="v2")
"""Where none of the plugin's kernels run."""
JAX = replace(STAND_IN, id="jax", torch_device="jax", ready="qcore_tpu.sharding:on_one")


def load(path: Path, device: Device) -> torch.nn.Module:
    return qcore.load_model(next(iter(path.glob("*.gguf")), path), device=device, dtype=torch.float32)


@pytest.mark.parametrize("path", goldens(), ids=lambda path: path.name)
def test_logits_of_golden_checkpoints(path: Path) -> None:
    tokens, found = torch.tensor(load_file(path / "expected.safetensors")["input_ids"].tolist()), []
    for device in (STAND_IN, REFERENCE):
        model = load(path, device)
        if device is STAND_IN:
            linears = {name for name in kernel_counts(model) if name != "reference_embedding"}
            assert all(name.startswith("tpu_") for name in linears), linears
            assert linears or not any(qcore.open_checkpoint(path).plan.values())
        with torch.no_grad():
            found.append(model(tokens).logits)
    bound = next((most for start, most in BOUNDS.items() if path.name.startswith(start)), BOUND)
    assert divergence(*found) < bound


@pytest.mark.parametrize("name", ["gptqmodel-gptq-4bit-sym", "llmcompressor-w8a8-int8-dynamic"])
def test_a_model_over_torchax_gives_the_same_tokens_and_compiles_nothing_more(name: str) -> None:
    """The decoder is held against the layers before it is trusted (qcore.model.trial)."""
    reference = load(GOLDEN / name, REFERENCE)
    with torch.no_grad():
        expected = reference.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False)[0].tolist()  # type: ignore[operator]
    steps = Stepper(load(GOLDEN / name, JAX))  # type: ignore[arg-type]
    found = steps.prompt(PROMPT)
    assert steps.decoder == "tpu_decoder"
    text = [*PROMPT, int(found.argmax())]
    found = steps.step(text[-1])
    assert isinstance(steps.steps, CompiledSteps)
    decoder = steps.steps.decoder
    warm = decoder.programs
    while len(text) < len(expected):
        text.append(int(found.argmax()))
        found = steps.step(text[-1])
    assert decoder.programs == warm and text == expected


@pytest.mark.parametrize("kv_cache", ["fp8", "int8", "file"])
def test_the_decoder_takes_quantized_kv_caches(kv_cache: str) -> None:
    """As the layers do, which are held against it, with their rows of bytes; and as the reference. Within a step, whatever the room is, no dense copy of all is in memory."""
    name, given = (
        ("llmcompressor-kvfp8-only", {}) if kv_cache == "file" else ("gptqmodel-gptq-4bit-sym", {"kv_cache": kv_cache})
    )
    path = GOLDEN / name
    reference = qcore.load_model(path, device=REFERENCE, dtype=torch.float32, **given)
    steps = Stepper(qcore.load_model(path, device=JAX, dtype=torch.float32, **given))
    logits, expected = steps.prompt(PROMPT), Stepper(reference)
    wanted = expected.prompt(PROMPT)
    assert steps.decoder == "tpu_decoder" and isinstance(steps.steps, CompiledSteps)
    decoder = steps.steps.decoder
    steps.step(int(wanted.argmax()))
    steps.steps.forget(1)
    warm = decoder.programs
    for _ in range(12):
        token = int(wanted.argmax())
        assert int(logits.argmax()) == token
        logits, wanted = steps.step(token), expected.step(token)
    assert decoder.programs == warm and all(str(part.dtype) == "uint8" for part in decoder.room(16))
    target = next(target for target in qcore_platforms()[0].targets if target.architecture == "v5e")
    small, large = (decoder.compile(target, 1, room) for room in (1024, 8192))
    rows = sum(part.nbytes for part in decoder.room(8192)) - sum(part.nbytes for part in decoder.room(1024))
    assert large["temporary bytes"] - small["temporary bytes"] < rows, (small, large, rows)


@pytest.mark.parametrize("target", qcore_platforms()[0].targets, ids=lambda target: target.architecture)
def test_a_models_steps_compile_for_every_generation(target: object) -> None:
    decoder = CompiledDecoder.from_model(load(GOLDEN / "gptqmodel-gptq-4bit-sym", JAX))  # type: ignore[arg-type]
    held = sum(array.nbytes for array in decoder.weights.values())
    for count in (1, 16):
        found = decoder.compile(target, count)  # type: ignore[arg-type]
        assert found["bytes of code"] > 0 and found["bytes needed"] >= held
        assert found["temporary bytes"] < held


def test_prompts_are_filled_up_to_few_sizes() -> None:
    assert {bucket(count) for count in range(1, 129)} == {1, 16, 32, 64, 128}
