"""Mixtures of experts: what every architecture and format computes, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qcore
import qcore.kernels.reference
from mixtures import CONFIGS, Mixture, Tensors, fp8, gptq, logits, packed
from qcore.model.load import kernel_counts

BY_NAME = [kind for kind in CONFIGS if kind != "gpt_oss"]
Maker = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
FORMATS: dict[str, tuple[Maker, dict[str, Any]]] = {
    "gptq": (gptq, GPTQ),
    "fp8": (lambda weight: fp8(weight, None), {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "fp8-block": (lambda weight: fp8(weight, 32), {"quant_method": "fp8", "weight_block_size": [32, 32]}),
    "compressed-tensors": (packed, {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head", "re:.*gate$"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}}},
    }),
}  # fmt: skip


def quantized(mixture: Mixture, make: Maker, modules: list[str] | None = None) -> Tensors:
    """The checkpoint's tensors with these experts' modules quantized (all by default); the mixture's parts follow."""
    tensors = mixture.tensors()
    for module in mixture.parts if modules is None else modules:
        parts, mixture.parts[module] = make(tensors.pop(f"{module}.weight"))
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    return tensors


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.05, "the logits tell weights apart"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_plain_experts_are_stacked(tmp_path: Path, kind: str) -> None:
    mixture = Mixture(kind)
    model = qcore.load_model(mixture.write(tmp_path, mixture.tensors()))
    same(logits(model), mixture.logits())
    assert not kernel_counts(model)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", BY_NAME)
def test_quantized_experts_compute_what_their_weights_say(
    tmp_path: Path, kind: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qcore.kernels.reference, "quantize_input", lambda x, *_: x)
    make, config = FORMATS[form]
    mixture = Mixture(kind)
    path = mixture.write(tmp_path, quantized(mixture, make), config)
    model = qcore.load_model(path, kernel="reference_linear")
    same(logits(model), mixture.logits())
    assert kernel_counts(model) == {"reference_linear": len(mixture.parts)}
    opened = qcore.open_checkpoint(path)
    for module, weight in mixture.parts.items():
        torch.testing.assert_close(opened.dequantize(module), weight)
