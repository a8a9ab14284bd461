"""Reads a bitsandbytes checkpoint with transformers and bitsandbytes: CHECKPOINT OUT.safetensors.

Run by a Python that has both. Weights are what bitsandbytes' own functions dequantize, in float32.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
"""What is written, and as what; tools/read_back.py makes it and compares."""


@dataclass(frozen=True)
class Reading:
    """What the tool made of a checkpoint."""

    weights: dict[str, Any]
    tool: str


def read(checkpoint: Path) -> Reading:
    """Every quantized layer's weight."""
    import bitsandbytes as bnb
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, device_map="cpu")
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weights[f"{name}.weight"] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            weights[f"{name}.weight"] = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    return Reading(weights, f"bitsandbytes {bnb.__version__}")


def main() -> None:
    from safetensors.torch import save_file

    reading = read(Path(sys.argv[1]))
    weights = {name: weight.detach().float().contiguous() for name, weight in reading.weights.items()}
    save_file(weights, sys.argv[2], {"tool": reading.tool})


if __name__ == "__main__":
    main()
