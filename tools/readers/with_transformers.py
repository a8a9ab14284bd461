"""Reads an fp8 or mxfp4 checkpoint with transformers, which dequantizes both on a CPU.

python tools/readers/with_transformers.py CHECKPOINT OUT.safetensors [TOKENS.safetensors]

Stacked experts are written [E, out, in]. FBGEMM's fp8 is loaded on GPUs only, and is not read back.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

REQUIRES = "transformers==5.23.0 accelerate torch==2.13.0"
CASES = (
    ("W8A8-fp8-g128/fp8-g128-dyn", "fp8:block"),
    ("W8A8-fp8-tensor/fp8-tensor-dyn", "fp8:tensor"),
    ("llmcompressor-fp8-block", "fp8"),
    ("llmcompressor-fp8-static", "fp8:tensor"),
    ("modelopt-fp8", "fp8:tensor"),
    ("transformers-mxfp4", "mxfp4"),
)


RUNS = (
    ("gptq:W8A8-fp8-g128/fp8-g128-dyn", "fp8:block"),
    ("gptq:FP8", "fp8:tensor"),
    ("gptq:W8A8-fp8-tensor/fp8-tensor-dyn", "fp8:tensor"),
)
LOGITS = 1e-8
"""float32 in another order."""
PLAIN = True
"""On a CPU it multiplies by dequantized weights."""


def main(checkpoint: Path, out: Path, tokens: Path | None = None) -> None:
    """Every weight that has scales in the files; and logits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, device_map="cpu")
    loaded = {name: value.detach().float() for name, value in model.named_parameters()}
    weights = {}
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                if name.endswith(".weight_scale_inv"):
                    weight = name.removesuffix("_scale_inv")
                    weights[weight] = loaded[weight]
                elif name.endswith("_blocks"):
                    stack = name.removesuffix("_blocks")
                    weights[f"{stack}.weight"] = loaded[stack].transpose(1, 2)
    if tokens is not None:
        with torch.no_grad():
            weights["logits"] = model.float()(load_file(tokens)["tokens"]).logits
    tool = f"transformers {transformers.__version__}"
    save_file({name: weight.contiguous() for name, weight in weights.items()}, out, {"tool": tool})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
