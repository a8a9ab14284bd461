"""Reads a TorchAO checkpoint with transformers, and dequantizes with torchao's own functions, in float32.

python tools/readers/with_torchao.py CHECKPOINT OUT.safetensors

torchao has no function that dequantizes its int4 classes; they are not read back.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torchao
import transformers
from safetensors.torch import save_file
from torchao.quantization.quant_primitives import _DTYPE_TO_QVALUE_BOUNDS, dequantize_affine

REQUIRES = "torchao==0.18.0 transformers==5.23.0 accelerate torch==2.13.0"
CASES = (
    ("W8A16", "torchao:Int8Tensor"), ("W8A16-g64-sym", "torchao"), ("W8A8", "torchao:Int8Tensor"),
    ("W8A8-int8-channel-sym/int8-token-asym-dyn", "torchao"), ("W8A8-int8-tensor-sym/int8-tensor-sym-dyn", "torchao"),
    ("W8A16-g64-asym", "torchao"), ("W4A16-g32-sym", "torchao:IntxUnpackedToInt8Tensor"), ("W4A16-g32-asym", "torchao"),
    ("W3A16-channel-asym", "torchao"), ("W2A16-g128-sym", "torchao"), ("W1A16-g64-sym", "torchao"),
    ("W6A8-int6-g32-sym/int8-token-asym-dyn", "torchao"), ("FP8_DYNAMIC", "torchao:Float8Tensor"),
    ("W8A8-fp8-tensor/fp8-tensor-dyn", "torchao"), ("W8A16-fp8-channel", "torchao"), ("W8A16-fp8-g64", "torchao"),
    ("W8A16-e5m2-channel", "torchao"), ("torchao-int8wo", "torchao"), ("torchao-int8da-int4w", "torchao"),
    ("gptqmodel-gptq-dynamic-mixed", "torchao"), ("gptqmodel-gptq-4bit-sym", "torchao"), ("autoawq-gemm-w4-zp", "torchao"),
    ("quark-mxfp4", "torchao:MXTensor"),
)  # fmt: skip


def dequantized(weight: Any) -> torch.Tensor | None:
    """float32 [out, in] of a torchao tensor; None of a plain one."""
    kind = type(weight).__name__
    if kind in ("Int8Tensor", "Float8Tensor", "MXTensor", "NVFP4Tensor"):
        whole: torch.Tensor = weight.dequantize(torch.float32)
        return whole
    if kind != "IntxUnpackedToInt8Tensor":
        return None
    bounds = _DTYPE_TO_QVALUE_BOUNDS[weight.target_dtype]
    affine: torch.Tensor = dequantize_affine(
        weight.qdata,
        weight.block_size,
        weight.scale,
        weight.zero_point,
        torch.int8,
        *bounds,
        output_dtype=torch.float32,
    )
    return affine


def main(checkpoint: Path, out: Path) -> None:
    """Every parameter of torchao's classes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", device_map="cpu")
    found = {name: dequantized(weight.detach()) for name, weight in model.named_parameters()}
    weights = {name: weight.contiguous() for name, weight in found.items() if weight is not None}
    save_file(weights, out, {"tool": f"torchao {torchao.__version__}, transformers {transformers.__version__}"})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
