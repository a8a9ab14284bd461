"""Quantizes with NVIDIA ModelOpt, which cannot open its exports: its perplexity is that of the model in memory, in float32.

python tools/quantizers/by_modelopt.py CASE MODEL TOKENS OUT
"""

from __future__ import annotations

import copy
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from perplexity import calibration, perplexity, tell
from transformers import AutoModelForCausalLM, AutoTokenizer

REQUIRES = "nvidia-modelopt[hf]==0.47.0 transformers==5.14.1 torch==2.13.0"
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


def main(case: str, model: Path, tokens: Path, out: Path) -> None:
    made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def calibrate(running: Any) -> None:
        for window in calibration(tokens):
            running(torch.tensor([window]))

    with torch.no_grad():
        mtq.quantize(made, config(case), calibrate)
        value = perplexity(made, tokens)
        export_hf_checkpoint(made, export_dir=out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    tell(f"nvidia-modelopt {version('nvidia-modelopt')}", value)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
