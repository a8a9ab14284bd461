"""Quantizes with NVIDIA ModelOpt, which cannot open its exports: what it exported is put back into its model, in float32.

    python tools/quantizers/by_modelopt.py CASE MODEL TOKENS OUT

Weights are the exported ones, dequantized by ModelOpt's own classes (tools/readers/with_modelopt.py), and its quantizers round the
inputs. The model as it is in memory after quantizing has other numbers: some weights round otherwise than in the export.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from perplexity import calibration, perplexity, tell
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

REQUIRES = "nvidia-modelopt[hf]==0.47.0 transformers==5.14.1 torch==2.13.0"
READ = Path(__file__).parents[1] / "readers" / "with_modelopt.py"
CASES = (
    "FP8_DEFAULT_CFG",
    "FP8_DEFAULT_CFG, FP8_KV_CFG",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "INT8_SMOOTHQUANT_CFG",
    "INT4_AWQ_CFG by 64",
)


def config(case: str) -> Any:
    first, _, more = case.removesuffix(" by 64").partition(", ")
    made = copy.deepcopy(getattr(mtq, first))
    if more:
        made["quant_cfg"] = [*made["quant_cfg"], *getattr(mtq, more)["quant_cfg"]]
    if case.endswith(" by 64"):
        for entry in made["quant_cfg"]:
            if entry.get("quantizer_name") == "*weight_quantizer" and "cfg" in entry:
                entry["cfg"]["block_sizes"] = {-1: 64, "type": "static"}
    return made


def put_back(exported: Path, running: Any) -> None:
    """What the export says, in the model with its quantizers: weights, scales of inputs and of the kv cache, multipliers of inputs,
    norms."""
    with tempfile.TemporaryDirectory() as folder:
        dequantized = Path(folder) / "weights.safetensors"
        subprocess.run([sys.executable, READ, exported, dequantized], check=True, stdout=subprocess.DEVNULL)
        weights = load_file(dequantized)
    tensors = {name: tensor for file in exported.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, parameter in running.named_parameters():
        module = name.removesuffix(".weight")
        if name in weights:
            layer = running.get_submodule(module)
            layer.weight_quantizer.disable()
            inputs = layer.input_quantizer
            if hasattr(inputs, "_pre_quant_scale"):
                delattr(inputs, "_pre_quant_scale")
            if f"{module}.pre_quant_scale" in tensors:
                inputs.pre_quant_scale = tensors[f"{module}.pre_quant_scale"].float()
            if f"{module}.input_scale" in tensors:
                inputs.amax = tensors[f"{module}.input_scale"].float() * inputs.maxbound
        if name in weights or name in tensors:
            parameter.copy_(weights[name] if name in weights else tensors[name])
    for name, attention in running.named_modules():
        for side in ("k", "v"):  # a range may come back from its scale with another last bit, as inputs' do
            if f"{name}.{side}_proj.{side}_scale" in tensors:
                quantizer = getattr(attention, f"{side}_bmm_quantizer")
                quantizer.amax = tensors[f"{name}.{side}_proj.{side}_scale"].float() * quantizer.maxbound


def main(case: str, model: Path, tokens: Path, out: Path) -> None:
    made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def calibrate(running: Any) -> None:
        for window in calibration(tokens):
            running(torch.tensor([window]))

    with torch.no_grad():
        mtq.quantize(made, config(case), calibrate)
        running = copy.deepcopy(made)
        export_hf_checkpoint(made, export_dir=out)
        put_back(out, running)
        value = perplexity(running, tokens)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    tell(f"nvidia-modelopt {version('nvidia-modelopt')}", value)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
