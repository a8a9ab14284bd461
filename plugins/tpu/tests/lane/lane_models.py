"""Whole models: the golden checkpoints through Pallas on a CPU, as jax's arrays over torchax, and compiled for TPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tpu_models import GOLDEN, JAX, PROMPT, REFERENCE, check_logits, check_tokens, load

import qcore
from golden_checkpoints import goldens
from qcore.model.generate import Stepper
from qcore_tpu.decoder import CompiledDecoder, CompiledSteps, bucket
from qcore_tpu.plugin import qcore_platforms


@pytest.mark.parametrize("path", goldens(), ids=lambda path: path.name)
def test_logits_of_golden_checkpoints(path: Path) -> None:
    check_logits(path)


@pytest.mark.parametrize("name", ["gptqmodel-gptq-4bit-sym", "llmcompressor-w8a8-int8-dynamic"])
def test_a_model_over_torchax_gives_the_same_tokens_and_compiles_nothing_more(name: str) -> None:
    check_tokens(name, JAX, "tpu_decoder", lambda steps: steps.decoder.programs)  # type: ignore[attr-defined]


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
