"""Reads a bitsandbytes checkpoint with transformers, and dequantizes with bitsandbytes' own functions, in float32.

python tools/readers/with_bitsandbytes.py CHECKPOINT OUT.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path

import bitsandbytes
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from safetensors.torch import save_file

REQUIRES = "bitsandbytes==0.50.2 transformers==5.23.0 accelerate torch==2.13.0"
CASES = (
    ("bitsandbytes:nf4", "bitsandbytes:nf4"),
    ("bitsandbytes:fp4", "bitsandbytes:fp4"),
    ("bitsandbytes:nf4-double", "bitsandbytes:nf4"),
    ("bitsandbytes:fp4-double", "bitsandbytes"),
    ("bitsandbytes:int8", "bitsandbytes:int8"),
    ("bitsandbytes-nf4", "bitsandbytes"),
    ("bitsandbytes-nf4-dq", "bitsandbytes"),
    ("bitsandbytes-int8", "bitsandbytes"),
)


def main(checkpoint: Path, out: Path) -> None:
    """Every layer of bitsandbytes' classes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, device_map="cpu")
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weights[f"{name}.weight"] = dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            weights[f"{name}.weight"] = int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    tool = f"bitsandbytes {bitsandbytes.__version__}, transformers {transformers.__version__}"
    save_file({name: weight.float().contiguous() for name, weight in weights.items()}, out, {"tool": tool})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
