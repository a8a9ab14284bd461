"""Reads a TorchAO checkpoint with transformers and torchao: CHECKPOINT OUT.safetensors.

Weights are what torchao's own functions dequantize, in float32; its int4 classes dequantize nowhere, and are not read back.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

CASES = (
    ("W8A16", "torchao:Int8Tensor"),
    ("W8A16-g64-sym", "torchao"),
    ("W8A8", "torchao:Int8Tensor"),
    ("W8A8-int8-channel-sym/int8-token-asym-dyn", "torchao"),
    ("W8A8-int8-tensor-sym/int8-tensor-sym-dyn", "torchao"),
    ("W8A16-g64-asym", "torchao"),
    ("W4A16-g32-sym", "torchao:IntxUnpackedToInt8Tensor"),
    ("W4A16-g32-asym", "torchao"),
    ("W3A16-channel-asym", "torchao"),
    ("W2A16-g128-sym", "torchao"),
    ("W1A16-g64-sym", "torchao"),
    ("W6A8-int6-g32-sym/int8-token-asym-dyn", "torchao"),
    ("FP8_DYNAMIC", "torchao:Float8Tensor"),
    ("W8A8-fp8-tensor/fp8-tensor-dyn", "torchao"),
    ("W8A16-fp8-channel", "torchao"),
    ("W8A16-fp8-g64", "torchao"),
    ("W8A16-e5m2-channel", "torchao"),
    ("torchao-int8wo", "torchao"),
    ("torchao-int8da-int4w", "torchao"),
    ("gptqmodel-gptq-dynamic-mixed", "torchao"),
    ("gptqmodel-gptq-4bit-sym", "torchao"),
    ("autoawq-gemm-w4-zp", "torchao"),
    ("quark-mxfp4", "torchao:MXTensor"),
    ("llmcompressor-nvfp4a16", "torchao:NVFP4Tensor"),
)
"""What is written, and as what; tools/read_back.py makes it and compares."""


def dequantized(weight: Any) -> Any:
    """float32 [out, in] of a torchao tensor; None of a plain one."""
    import torch
    from torchao.quantization.quant_primitives import _DTYPE_TO_QVALUE_BOUNDS, dequantize_affine

    kind = type(weight).__name__
    if kind in ("Int8Tensor", "Float8Tensor", "MXTensor", "NVFP4Tensor"):
        return weight.dequantize(torch.float32)
    if kind != "IntxUnpackedToInt8Tensor":
        return None
    bounds = _DTYPE_TO_QVALUE_BOUNDS[weight.target_dtype]
    return dequantize_affine(weight.qdata, weight.block_size, weight.scale, weight.zero_point, torch.int8, *bounds,
                             output_dtype=torch.float32)  # fmt: skip


def main() -> None:
    import torchao
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto", device_map="cpu")
    found = {name: dequantized(weight.detach()) for name, weight in model.named_parameters()}
    weights = {name: weight.contiguous() for name, weight in found.items() if weight is not None}
    save_file(weights, Path(sys.argv[2]), {"tool": f"torchao {torchao.__version__}"})


if __name__ == "__main__":
    main()
