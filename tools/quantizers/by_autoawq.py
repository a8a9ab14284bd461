"""Quantizes with AutoAWQ, and runs the model that it opens again: python tools/quantizers/by_autoawq.py CASE MODEL TOKENS OUT"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from awq import AutoAWQForCausalLM
from perplexity import calibration, perplexity, tell
from transformers import AutoModelForCausalLM

REQUIRES = "autoawq==0.2.9 transformers==4.51.3 torch==2.13.0"
CASES = ("4 bits by 64, gemm",)


def main(case: str, model: Path, tokens: Path, out: Path) -> None:
    assert case in CASES
    made = AutoAWQForCausalLM.from_pretrained(str(model), device_map="cpu", torch_dtype=torch.float32)
    wanted = {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}
    windows = calibration(tokens)
    made.quantize(None, quant_config=wanted, calib_data=windows, max_calib_seq_len=len(windows[0]),
                  max_calib_samples=len(windows))  # fmt: skip
    made.save_quantized(str(out))
    again = AutoModelForCausalLM.from_pretrained(out, torch_dtype=torch.float32, device_map="cpu")
    tell(f"autoawq {version('autoawq')}", perplexity(again.float(), tokens))


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
