"""Checkpoints made by the real tools: the weights that those tools dequantize, exactly, and their logits.

QCORE_GOLDEN=FOLDER tests more of them than the few that this repository carries, QCORE_DEVICE=ID another device than the CPU.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import golden_checkpoints
import qcore
from golden_checkpoints import divergence

READ = (
    "base",
    "gguf",
    "gptqmodel",
    "llmcompressor",
    "autoawq",
    "autoround",
    "inc-rtn",
    "bitsandbytes",
    "modelopt-fp8",
    "quark",
    "torchao",
)
BOUNDS = {
    "bitsandbytes-int8": 1e-4,
    "modelopt": 1e-3,
    "quark-fp8": 1e-4,
    "quark-int8": 1e-4,
    "llmcompressor-nvfp4a16": 1e-4,
    "llmcompressor-mxfp4a16": 1e-4,
    "torchao-int8da-int4w": 1e-4,
}
"""Kullback-Leibler divergence of logits, where not 1e-5: bitsandbytes rounds activations to float16 on its way to int8,
ModelOpt's and compressed-tensors' fp4 forwards are in bfloat16, Quark's weights are rounded to it, and
torchao's logits in float32 leave activations unquantized."""
METHODS = (
    "auto-round",
    "awq",
    "bitsandbytes",
    "modelopt",
    "quark",
    "torchao",
    "gguf",
    "gptq",
    "compressed-tensors",
    "dense",
)


def goldens() -> list[Path]:
    """Checkpoints of the formats that are read in this version; others must be refused, which test_methods.py checks."""
    return [path for path in golden_checkpoints.goldens() if path.name.startswith(READ)]


@pytest.fixture(scope="module", params=goldens(), ids=lambda path: path.name)
def golden(request: pytest.FixtureRequest) -> tuple[Path, dict[str, torch.Tensor]]:
    return request.param, load_file(request.param / "expected.safetensors")


def test_weights_are_the_tools_own(golden: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, expected = golden
    checkpoint = qcore.open_checkpoint(path)
    assert checkpoint.method in METHODS
    modules = [name[len("dequant.") : -len(".weight")] for name in expected if name.startswith("dequant.")]
    assert modules
    for module in modules:
        got = checkpoint.dequantize(module)
        assert got.dtype == torch.float32
        wanted = expected[f"dequant.{module}.weight"]
        if path.name.startswith(("quark", "llmcompressor-nvfp4", "llmcompressor-mxfp4", "torchao-int8da")):
            # their own weights are rounded to the model's bfloat16
            assert torch.equal(got.to(torch.bfloat16).float(), wanted), module
        else:
            assert torch.equal(got, wanted), module


def test_planned_schemes_are_the_decoded_ones(golden: tuple[Path, dict[str, torch.Tensor]]) -> None:
    checkpoint = qcore.open_checkpoint(golden[0])
    for module, scheme in checkpoint.plan.items():
        if scheme is not None:
            assert checkpoint.weight(module).scheme == scheme
            assert checkpoint.weight(module).shape == checkpoint.layers[module].shape


def test_logits_are_the_tools_own(golden: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, expected = golden
    # A key that lies between two fp8 numbers goes to the one or the other with bfloat16's noise, in which ModelOpt runs.
    noisy = path.name == "modelopt-fp8-kvfp8"
    model = qcore.load_model(path, dtype=torch.bfloat16 if noisy else torch.float32)
    with torch.inference_mode():
        logits = model(expected["input_ids"].to(model.device)).logits.float().cpu()
    own = path.name.startswith("modelopt")  # its float32 logits leave activations unquantized
    reference = expected["logits"] if own else expected.get("logits_dequant_fp32", expected["logits"])
    assert divergence(logits, reference) < BOUNDS.get(path.name.partition("-")[0] if own else path.name, 1e-5)


def test_other_data_types_give_nearly_the_same(golden: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, expected = golden
    found = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = qcore.load_model(path, dtype=dtype)
        with torch.inference_mode():
            logits = model(expected["input_ids"].to(model.device)).logits
        assert logits.dtype == dtype
        found[dtype] = logits
    exact = found.pop(torch.float32)
    for rounded in found.values():
        assert divergence(rounded, exact) < 2e-2
