"""Reads a GGUF file with transformers, which dequantizes with gguf-py.

python tools/readers/with_transformers_gguf.py MODEL.gguf OUT.safetensors [TOKENS.safetensors]
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

REQUIRES = "transformers==5.23.0 gguf==0.19.0 accelerate torch==2.13.0"
CASES = (
    ("gptqmodel-gptq-4bit-sym", "gguf"),
    ("autoawq-gemm-w4-zp", "gguf"),
    ("llmcompressor-mxfp4a16", "gguf"),
    ("base", "gguf:q4_0"), ("base", "gguf:q4_1"), ("base", "gguf:q5_0"), ("base", "gguf:q5_1"), ("base", "gguf:q8_0"),
    ("base", "gguf:q2_k"), ("base", "gguf:q3_k_m"), ("base", "gguf:q4_k_m"), ("base", "gguf:q5_k_m"), ("base", "gguf:q6_k"),
    ("base", "gguf:iq1_s"), ("base", "gguf:iq1_m"), ("base", "gguf:iq2_xxs"), ("base", "gguf:iq2_xs"), ("base", "gguf:iq2_s"),
    ("base", "gguf:iq3_xxs"), ("base", "gguf:iq3_s"), ("base", "gguf:iq4_nl"), ("base", "gguf:iq4_xs"), ("base", "gguf:tq1_0"),
    ("base", "gguf:tq2_0"), ("base", "gguf:mxfp4"),
)  # fmt: skip


RUNS = (
    ("gptq:Q4_K_M", "gguf"), ("imatrix:Q4_K_M", "gguf"), ("gptq:IQ2_XS", "gguf"), ("imatrix:IQ3_S", "gguf"),
    ("hadamard+gptq:Q4_K_M", "gguf"), ("gptq:Q5_K_S", "gguf"),
)  # fmt: skip
LOGITS = 1e-8
"""float32 in another order."""


def main(file: Path, out: Path, tokens: Path | None = None) -> None:
    """Every matrix, as transformers' model has it; and logits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    weights = {name: value.float().contiguous() for name, value in model.state_dict().items() if value.dim() == 2}
    if tokens is not None:
        with torch.no_grad():
            weights["logits"] = model(load_file(tokens)["tokens"]).logits
    tool = f"transformers {transformers.__version__}, gguf-py {importlib.metadata.version('gguf')}"
    save_file({name: value.clone() for name, value in weights.items()}, out, {"tool": tool})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
