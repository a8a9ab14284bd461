"""Logits of checkpoints that other tools made, on this plugin's kernels: those of the reference's, and of the tools themselves."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

import qcore
from golden_checkpoints import bound_of, divergence
from qcore.model.load import kernel_counts
from qcore.platform import Device

CPU = Device("cpu", "neuron", "torch on a CPU", "cpu", "trn2", simulated=True)
BOUNDS = {"bitsandbytes-int8": 1e-4, "quark-fp8": 1e-4, "quark-int8": 1e-4, "llmcompressor-nvfp4a16": 1e-4, "llmcompressor-mxfp4a16": 1e-4,
          "torchao-int8da": 1e-4, "modelopt-fp8-kvfp8": 1e-2, "modelopt": 2e-3}  # fmt: skip
"""Kullback-Leibler divergence from the tool's own logits, where not 1e-5, for the reference and these kernels alike (tests/test_goldens.py says why): ModelOpt's are of a
forward in bfloat16, and a key that lies between two fp8 numbers goes to the one or the other with its noise."""
_LAST_BITS = 2e-5
"""From the reference: where inputs are rounded, a last bit decides which way."""


def logits_agree(path: Path, device: Device) -> None:
    """In float32. Raises AssertionError where they do not, or where a layer runs on a kernel that is not this plugin's."""
    expected = load_file(path / "expected.safetensors")
    tokens = expected["input_ids"]
    model = qcore.load_model(path, device=device, dtype=torch.float32)
    own = kernel_counts(model)
    assert all(name.startswith("neuron_") for name in own), own
    reference = qcore.load_model(path, device=CPU, dtype=torch.float32, kernel="reference_linear")
    with torch.no_grad():  # torch-xla has no tensors of inference mode
        got = model(tokens.to(model.device), use_cache=False).logits.float().cpu()
        wanted = reference(tokens, use_cache=False).logits.float()
    assert divergence(got, wanted) < _LAST_BITS
    tool = (
        expected["logits"]
        if path.name.startswith("modelopt")
        else expected.get("logits_dequant_fp32", expected["logits"])
    )
    assert divergence(got, tool) < bound_of(path, BOUNDS, 1e-5)
