"""Whole models through torch-xla on a CPU: the golden checkpoints, and texts that go on in graphs that are compiled once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch_xla.debug import metrics

import qcore
from golden_checkpoints import divergence, goldens
from qcore.model.generate import Stepper
from qcore.model.load import kernel_counts
from qcore.platform import Device
from qcore_tpu.lazy_decoder import LazySteps
from qcore_tpu.plugin import qcore_stand_ins

GOLDEN = Path(__file__).parents[4] / "tests" / "golden"
PROMPT = list(range(5, 16))
BOUND = 1e-6
BOUNDS = {"llmcompressor-w8a8": 1e-4, "llmcompressor-fp8": 1e-4, "bitsandbytes-int8": 1e-4}
"""The largest Kullback-Leibler divergence from the reference's logits in float32, by how a name begins: where inputs are rounded, a last bit decides which way."""

(STAND_IN,) = qcore_stand_ins()
REFERENCE = replace(STAND_IN, id="reference", torch_device="cpu", architecture="v2", ready="")
"""Where none of the plugin's kernels run."""


def load(path: Path, device: Device) -> torch.nn.Module:
    return qcore.load_model(next(iter(path.glob("*.gguf")), path), device=device, dtype=torch.float32)


@pytest.mark.parametrize("path", goldens(), ids=lambda path: path.name)
def test_logits_of_golden_checkpoints(path: Path) -> None:
    tokens, found = load_file(path / "expected.safetensors")["input_ids"], []
    for device in (STAND_IN, REFERENCE):
        model = load(path, device)
        if device is STAND_IN:
            linears = {name for name in kernel_counts(model) if name != "reference_embedding"}
            assert all(name.startswith("tpu_") for name in linears), linears
            assert linears or not any(qcore.open_checkpoint(path).plan.values())
        with torch.no_grad():
            found.append(model(tokens.to(device.torch_device)).logits.cpu())
    bound = next((most for start, most in BOUNDS.items() if path.name.startswith(start)), BOUND)
    assert divergence(*found) < bound


@pytest.mark.parametrize("name", ["gptqmodel-gptq-4bit-sym", "llmcompressor-w8a8-int8-dynamic"])
def test_a_model_gives_the_same_tokens_and_compiles_nothing_more(name: str) -> None:
    """The decoder is held against the layers before it is trusted (qcore.model.trial)."""
    reference = load(GOLDEN / name, REFERENCE)
    with torch.no_grad():
        expected = reference.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False)[0].tolist()  # type: ignore[operator]
    steps = Stepper(load(GOLDEN / name, STAND_IN))  # type: ignore[arg-type]
    found = steps.prompt(PROMPT)
    assert steps.decoder == "tpu_lazy_decoder" and isinstance(steps.steps, LazySteps)
    text = [*PROMPT, int(found.argmax())]
    for _ in range(2):
        text.append(int((found := steps.step(text[-1])).argmax()))
    warm = metrics.metric_data("CompileTime")[0]
    while len(text) < len(expected):
        text.append(int((found := steps.step(text[-1])).argmax()))
    assert metrics.metric_data("CompileTime")[0] == warm and text == expected
