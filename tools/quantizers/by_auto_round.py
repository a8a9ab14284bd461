"""Quantizes with AutoRound, and runs what it saved with its own layers: python tools/quantizers/by_auto_round.py CASE MODEL TOKENS OUT"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from perplexity import calibration, perplexity, tell
from transformers import AutoModelForCausalLM

REQUIRES = "auto-round==0.16.1 transformers==5.23.0 torch==2.13.0"
CASES = (
    "W4A16 by 64, auto_round",
    "W4A16 by 64, tuned, auto_round",
    "W4A16 by 64, asymmetric, auto_round:auto_gptq",
    "W3A16 by 64, asymmetric, auto_round",
    "MXFP4, auto_round",
    "NVFP4, auto_round",
)


def options(case: str) -> dict[str, Any]:
    if case.startswith(("MXFP4", "NVFP4")):
        return {"scheme": case[:5]}
    return {"bits": int(case[1]), "group_size": 64, "sym": "asymmetric" not in case}


def main(case: str, model: Path, tokens: Path, out: Path) -> None:
    effort: dict[str, Any] = {"iters": 0, "disable_opt_rtn": True}
    if "tuned" in case or "NVFP4" in case:  # which has scales for its inputs
        data = [torch.tensor([window[:64]]) for window in calibration(tokens)]
        effort |= {
            "iters": 2 if "tuned" in case else 0,
            "nsamples": len(data),
            "seqlen": 64,
            "batch_size": 4,
            "dataset": data,
        }
    maker = AutoRound(str(model), device_map="cpu", **options(case), **effort)
    maker.quantize_and_save(output_dir=str(out), format=case.rpartition(", ")[2])
    (config,) = out.rglob("config.json")  # in a folder of its own where the scheme is not a preset
    again = AutoModelForCausalLM.from_pretrained(config.parent, dtype=torch.float32, device_map="cpu")
    tell(f"auto-round {version('auto-round')}", perplexity(again, tokens))


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
