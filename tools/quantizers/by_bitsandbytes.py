"""Quantizes with bitsandbytes through transformers: python tools/quantizers/by_bitsandbytes.py CASE MODEL TOKENS OUT"""

from __future__ import annotations

import sys
from pathlib import Path

import bitsandbytes
import torch
from perplexity import after_saving, tell
from transformers import BitsAndBytesConfig

CASES = ("nf4", "nf4, double quantization", "fp4", "LLM.int8")


def config(case: str) -> BitsAndBytesConfig:
    if case == "LLM.int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=case[:3], bnb_4bit_use_double_quant="double" in case,
                              bnb_4bit_compute_dtype=torch.float32)  # fmt: skip


def main(case: str, model: Path, tokens: Path, out: Path) -> None:
    value = after_saving(model, tokens, out, config(case))
    tell(f"bitsandbytes {bitsandbytes.__version__}", value)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
