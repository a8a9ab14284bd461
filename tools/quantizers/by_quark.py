"""Quantizes with AMD Quark, and runs what it imports again, in float32: python tools/quantizers/by_quark.py CASE MODEL TOKENS OUT"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from perplexity import calibration, perplexity, tell
from quark.torch import LLMTemplate, ModelQuantizer, export_safetensors, import_model_from_safetensors
from transformers import AutoModelForCausalLM, AutoTokenizer

REQUIRES = "amd-quark==0.13 transformers==5.23.0 torch==2.13.0"
CASES = ("fp8", "ptpc_fp8", "int8", "uint4_wo_64", "int4_wo_64", "int4_wo_per_channel", "mxfp4", "mxfp6_e2m3", "nvfp4")


def main(case: str, model: Path, tokens: Path, out: Path) -> None:
    made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    quantizer = ModelQuantizer(LLMTemplate.get("llama").get_config(scheme=case))
    with torch.no_grad():
        made = quantizer.quantize_model(made, [torch.tensor([window]) for window in calibration(tokens)])
        export_safetensors(quantizer.freeze(made), out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    again = import_model_from_safetensors(None, str(out), device="cpu").float()
    tell(f"amd-quark {version('amd-quark')}", perplexity(again, tokens))


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
