"""Quantizes with bitsandbytes through transformers: python tools/quantizers/by_bitsandbytes.py CASE MODEL TOKENS OUT"""

from __future__ import annotations

import sys
from pathlib import Path

import bitsandbytes
import torch
from perplexity import perplexity, tell
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

CASES = ("nf4", "nf4, double quantization", "fp4", "LLM.int8")


def config(case: str) -> BitsAndBytesConfig:
    if case == "LLM.int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=case[:3], bnb_4bit_use_double_quant="double" in case,
                              bnb_4bit_compute_dtype=torch.float32)  # fmt: skip


def main(case: str, model: Path, tokens: Path, out: Path) -> None:
    made = AutoModelForCausalLM.from_pretrained(model, quantization_config=config(case), dtype=torch.float32)
    made.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tell(f"bitsandbytes {bitsandbytes.__version__}", perplexity(again, tokens))


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
