"""Whole models: the golden checkpoints through Pallas on a CPU, as jax's arrays over torchax, and compiled for TPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qcore
from qcore.model.generate import Stepper
from qcore.platform import Device
from qcore_tpu.decoder import CompiledDecoder, CompiledSteps, bucket
from qcore_tpu.plugin import qcore_platforms, qcore_stand_ins

GOLDEN = Path(__file__).parents[4] / "tests" / "golden"
PROMPT = list(range(5, 16))
CASES = {
    "gptqmodel-gptq-4bit-sym": ("tpu_integers", 1e-4),
    "gptqmodel-gptq-4bit-asym-descact": ("tpu_integers", 1e-4),
    "llmcompressor-w4a16-awq-asym": ("tpu_integers", 1e-4),
    "llmcompressor-w8a8-int8-dynamic": ("tpu_int8", 2e-2),
    "llmcompressor-fp8-block": ("tpu_fp8_block128", 2e-2),
    "bitsandbytes-nf4-dq": ("tpu_codebooks", 1e-4),
    "bitsandbytes-int8": ("tpu_llm_int8", 2e-2),
    "transformers-mxfp4": ("tpu_floats", 1e-4),
    "gguf-q4_k_m": ("tpu_blocks", 1e-4),
}
"""The kernel that takes the layers, and how far logits may be off in float32: where inputs are rounded, a last bit decides which way."""

(STAND_IN,) = qcore_stand_ins()
REFERENCE = replace(STAND_IN, id="reference", architecture="v2")
"""Where none of the plugin's kernels run."""
JAX = replace(STAND_IN, id="jax", torch_device="jax", ready="qcore_tpu.runtime:start")


def load(name: str, device: Device) -> torch.nn.Module:
    folder = GOLDEN / name
    path = next(iter(folder.glob("*.gguf")), folder)
    return qcore.load_model(path, device=device, dtype=torch.float32)


def logits(model: torch.nn.Module, device: str) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([PROMPT]).to(device)).logits.cpu()
    return found


@pytest.mark.parametrize("name", CASES)
def test_logits_of_golden_checkpoints(name: str) -> None:
    kernel, bound = CASES[name]
    expected = logits(load(name, REFERENCE), "cpu")
    model = load(name, STAND_IN)
    assert kernel in {getattr(module, "kernel_name", "") for module in model.modules()}
    got = logits(model, "cpu")
    assert float((got - expected).abs().max()) <= bound * float(expected.abs().max())


@pytest.mark.parametrize("name", ["gptqmodel-gptq-4bit-sym", "llmcompressor-w8a8-int8-dynamic"])
def test_a_model_over_torchax_gives_the_same_tokens_and_compiles_nothing_more(name: str) -> None:
    """The decoder is held against the layers before it is trusted (qcore.model.trial)."""
    reference = load(name, REFERENCE)
    with torch.no_grad():
        expected = reference.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False)[0].tolist()  # type: ignore[operator]
    steps = Stepper(load(name, JAX))  # type: ignore[arg-type]
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


@pytest.mark.parametrize("target", qcore_platforms()[0].targets, ids=lambda target: target.architecture)
def test_a_models_steps_compile_for_every_generation(target: object) -> None:
    decoder = CompiledDecoder.from_model(load("gptqmodel-gptq-4bit-sym", JAX))  # type: ignore[arg-type]
    held = sum(array.nbytes for array in decoder.weights.values())
    for count in (1, 16):
        found = decoder.compile(target, count)  # type: ignore[arg-type]
        assert found["bytes of code"] > 0 and found["bytes needed"] >= held
        assert found["temporary bytes"] < held


def test_prompts_are_filled_up_to_few_sizes() -> None:
    assert {bucket(count) for count in range(1, 129)} == {1, 16, 32, 64, 128}
