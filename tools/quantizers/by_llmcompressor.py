"""Quantizes with LLM Compressor, and runs the decompressed model with compressed-tensors' own arithmetic of activations.

python tools/quantizers/by_llmcompressor.py CASE MODEL TOKENS OUT
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from perplexity import calibration, perplexity, tell
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

REQUIRES = "llmcompressor==0.14.0.1 compressed-tensors==0.19.0 transformers==5.17.0 torch==2.13.0"
READER = "compressed_tensors"
CASES = (
    "W4A16 by 64, asymmetric",
    "W4A16 by 64, GPTQ with static act-order",
    "W3A16 by 64",
    "INT8",
    "INT8, GPTQ",
    "FP8_DYNAMIC",
    "FP8",
    "NVFP4A16",
    "MXFP4A16",
    "MXFP8",
)


def modifier(case: str) -> Any:
    def integers(bits: int, **more: Any) -> dict[str, QuantizationScheme]:
        weights = QuantizationArgs(num_bits=bits, strategy="group", group_size=64, **more)
        return {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}

    match case:
        case "W4A16 by 64, asymmetric":
            return QuantizationModifier(config_groups=integers(4, symmetric=False), ignore=["lm_head"])
        case "W4A16 by 64, GPTQ with static act-order":
            return GPTQModifier(config_groups=integers(4), actorder="static", ignore=["lm_head"])
        case "W3A16 by 64":
            return QuantizationModifier(config_groups=integers(3), ignore=["lm_head"])
        case "INT8, GPTQ":
            return GPTQModifier(scheme="INT8", targets="Linear", ignore=["lm_head"])
    return QuantizationModifier(scheme=case, targets="Linear", ignore=["lm_head"])


def main(case: str, model: Path, tokens: Path, out: Path) -> None:
    made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    windows = calibration(tokens)
    data = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]})
    needed = {} if "A16" in case and "GPTQ" not in case else {"dataset": data, "num_calibration_samples": len(windows)}
    oneshot(model=made, recipe=modifier(case), **needed)
    made.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    plain = CompressedTensorsConfig(run_compressed=False)
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, quantization_config=plain)
    tell(f"llmcompressor {version('llmcompressor')}", perplexity(again.float(), tokens))


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
