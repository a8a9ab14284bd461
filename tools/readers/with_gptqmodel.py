"""Reads a GPTQ or AWQ checkpoint with GPTQModel: python tools/readers/with_gptqmodel.py CHECKPOINT OUT.safetensors [TOKENS.safetensors]

The checkpoint is opened with its loader and dequantized with its code: for GPTQ the method
of its layer, with scales in float32; for AWQ its dequantize_gemm.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

REQUIRES = "gptqmodel==7.7.0 transformers==5.23.0 torch==2.13.0"
CASES = (
    ("gptqmodel-gptq-4bit-sym", "gptq"),
    ("gptqmodel-gptq-4bit-asym-descact", "gptq:gptq_v2"),
    ("gptqmodel-gptq-4bit-asym-descact", "gptq:gptq_p"),
    ("gptqmodel-gptq-3bit-sym", "gptq:gptq_v2"),
    ("gptqmodel-gptq-3bit-sym", "gptq:gptq_p"),
    ("gptqmodel-gptq-8bit-sym", "gptq"),
    ("gptqmodel-gptq-dynamic-mixed", "gptq:gptq_v2"),
    ("llmcompressor-w4a16-awq-asym", "gptq"),
    ("llmcompressor-w4a16-gptq", "gptq:gptq_v2"),
    ("autoawq-gemm-w4-zp", "gptq"),
    ("W5A16-g32-asym", "gptq"),
    ("W6A16-g64-sym", "awq:gemm"),
    ("autoawq-gemm-w4-zp", "awq"),
    ("gptqmodel-gptq-4bit-sym", "awq:gemm"),
    ("gptqmodel-gptq-3bit-sym", "awq:gemm"),
    ("gptqmodel-gptq-8bit-sym", "awq:gemm"),
    ("autoround-auto_round-w2-sym", "awq:gemm"),
)


RUNS = (
    ("gptq:W4A16-g128-sym", "gptq"), ("gptq:W4A16-g64-asym", "gptq"), ("gptq:W4A16-g64-asym", "gptq:gptq_v2"), ("gptq:W3A16-g64-sym", "gptq"),
    ("gptq:W5A16-g64-sym", "gptq"), ("gptq:W6A16-g32-sym", "gptq"), ("gptq:W8A16-g64-sym", "gptq"), ("auto_round:W2A16-g32-sym", "gptq"),
    ("hadamard+gptq:W4A16-g64-sym", "gptq"), ("gptq:W4A16-g64-sym target_bpw=4.6", "gptq"), ("gptq:W4A16-g64-asym target_bpw=4.6", "gptq:gptq_v2"),
    ("awq:W4A16-g64-asym", "awq"), ("awq:W4A16-g64-sym", "awq:gemm"), ("awq:W4A16-g64-asym target_bpw=4.6", "awq:gemm"), ("awq:W5A16-g64-asym", "awq:gemm"),
)  # fmt: skip
LOGITS = 1e-7
"""float32 in another order; scales times codes of AWQ in float16."""


def main(checkpoint: Path, out: Path, tokens: Path | None = None) -> None:
    import gptqmodel
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules.qlinear import AWQuantLinear, BaseQuantLinear
    from gptqmodel.nn_modules.qlinear.torch import TorchQuantEmbeddings
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(checkpoint / "model.safetensors", "pt") as held:
        names = list(held.keys())
        scales = [held.get_tensor(name).dtype for name in names if name.endswith(".scales")]
        awq = not any(name.endswith(".g_idx") for name in names)
    backend = BACKEND.AWQ_TORCH if awq else BACKEND.GPTQ_TORCH
    model = GPTQModel.load(str(checkpoint), backend=backend, device="cpu", dtype=scales[0])
    weights = {} if tokens is None else {"logits": logits(model.model, load_file(tokens)["tokens"])}
    for name, layer in model.model.named_modules():
        if isinstance(layer, AWQuantLinear):
            weight = dequantize_gemm(
                layer.qweight, layer.qzeros, layer.scales.float(), layer.bits, layer.group_size
            ).t()
        elif isinstance(layer, BaseQuantLinear):
            layer.scales = layer.scales.float()
            weight = layer.dequantize_weight()
            weight = weight if isinstance(layer, TorchQuantEmbeddings) else weight.t()
        else:
            continue
        weights[f"{name}.weight"] = weight.to(torch.float32).contiguous()
    save_file(weights, out, metadata={"tool": f"gptqmodel {gptqmodel.__version__}"})


def logits(model: Any, tokens: Any) -> Any:
    """[windows, tokens, vocabulary] float32."""
    import torch

    with torch.no_grad():
        return model.float()(tokens).logits.float().contiguous()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
