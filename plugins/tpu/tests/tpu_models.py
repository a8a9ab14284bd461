"""What both ways to a TPU, jax's and torch-xla's, are asked of whole models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.numpy import load_file  # torch's own storages are none of torchax's

import qcore
from golden_checkpoints import FOLDERS, bound_of, divergence
from qcore.model.generate import Stepper
from qcore.model.load import kernel_counts
from qcore.platform import Device
from qcore_tpu.decoder import CompiledSteps
from qcore_tpu.plugin import qcore_stand_ins

GOLDEN = FOLDERS[0]
PROMPT = list(range(5, 16))
_BOUND = 1e-6
_BOUNDS = {"llmcompressor-w8a8": 1e-4, "llmcompressor-fp8": 1e-4, "bitsandbytes-int8": 1e-4}
"""The largest Kullback-Leibler divergence from the reference's logits in float32, by how a name begins: where inputs are rounded, a last bit decides which way."""

(STAND_IN,) = qcore_stand_ins()
STAND_IN.prepare()
REFERENCE = replace(STAND_IN, id="reference", torch_device="cpu", architecture="v2", ready="")
"""Where none of the plugin's kernels run."""
JAX = replace(STAND_IN, id="jax", torch_device="jax", ready="qcore_tpu.sharding:on_one")
"""A CPU as torchax has it."""


def load(path: Path, device: Device, kv_cache: str = "auto") -> torch.nn.Module:
    return qcore.load_model(
        next(iter(path.glob("*.gguf")), path), device=device, dtype=torch.float32, kv_cache=kv_cache
    )


def check_logits(path: Path) -> None:
    """The checkpoint's layers run on the plugin's kernels, and give what the reference gives."""
    tokens, found = torch.tensor(load_file(path / "expected.safetensors")["input_ids"].tolist()), []
    for device in (STAND_IN, REFERENCE):
        model = load(path, device)
        if device is STAND_IN:
            linears = {name for name in kernel_counts(model) if name != "reference_embedding"}
            assert all(name.startswith("tpu_") for name in linears), linears
            assert linears or not any(qcore.open_checkpoint(path).plan.values())
        with torch.no_grad():
            found.append(model(tokens.to(device.torch_device)).logits.cpu())
    assert divergence(*found) < bound_of(path, _BOUNDS, _BOUND)


def check_tokens(name: str, device: Device, decoder: str, compiled: Callable[[CompiledSteps], int]) -> None:
    """A text goes on as the reference's, and nothing more is compiled. compiled: how much has been. The decoder is held against the layers before it is trusted (qcore.model.trial)."""
    reference = load(GOLDEN / name, REFERENCE)
    with torch.no_grad():
        expected = reference.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False)[0].tolist()  # type: ignore[operator]
    steps = Stepper(load(GOLDEN / name, device))  # type: ignore[arg-type]
    found = steps.prompt(PROMPT)
    assert steps.decoder == decoder and isinstance(steps.steps, CompiledSteps)
    text = [*PROMPT, int(found.argmax())]
    found = steps.step(text[-1])
    warm = compiled(steps.steps)
    while len(text) < len(expected):
        text.append(int(found.argmax()))
        found = steps.step(text[-1])
    assert warm > 0 and compiled(steps.steps) == warm and text == expected
