"""Quantizes with llama.cpp, and runs the file with it: python tools/quantizers/by_llama_cpp.py CASE MODEL.gguf TOKENS OUT.gguf

On a CPU it rounds activations to 8 bits, whatever the weights are. `..., dequantized` is the perplexity of the same file
after llama.cpp itself has made float32 of its weights, which leaves activations whole.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
from perplexity import of, tell

REQUIRES = "llama-cpp-python==0.3.36 safetensors numpy"
CASES = (
    "F32",
    "Q8_0",
    "Q8_0, dequantized",
    "Q4_0",
    "Q4_0, dequantized",
    "Q5_1",
    "Q5_1, dequantized",
    "Q4_K_M",
    "Q4_K_M, dequantized",
    "Q6_K",
    "Q6_K, dequantized",
    "IQ4_XS",
    "IQ4_XS, dequantized",
)
"""llama.cpp's names of its mixtures."""


def quantize(mixture: str, model: Path, out: Path) -> None:
    wanted = llama_cpp.llama_model_quantize_default_params()
    wanted.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{'ALL' if mixture == 'F32' else 'MOSTLY'}_{mixture}")
    wanted.nthread = 2
    wanted.allow_requantize = True
    assert not llama_cpp.llama_model_quantize(str(model).encode(), str(out).encode(), ctypes.byref(wanted))


def main(case: str, model: Path, tokens: Path, out: Path) -> None:
    mixture, _, dequantized = case.partition(", ")
    quantize(mixture, model, out)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        run = Path(folder) / "float32.gguf" if dequantized else out
        if dequantized:
            quantize("F32", out, run)
        value = perplexity_of(run, tokens)
    tell(f"llama.cpp (llama-cpp-python {llama_cpp.__version__})", value)


def perplexity_of(file: Path, tokens: Path) -> float:
    losses = []
    for window in json.loads(tokens.read_text())["scored"]:
        running = llama_cpp.Llama(str(file), n_ctx=len(window), logits_all=True, verbose=False, n_threads=2,
                                  type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)  # fmt: skip
        running.eval(window)
        logits = running.scores[: len(window) - 1].astype(np.float64)
        largest = logits.max(1)
        total = np.log(np.exp(logits - largest[:, None]).sum(1)) + largest
        losses.append(float((total - logits[np.arange(len(logits)), window[1:]]).mean()))
    return of(losses)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
