"""Reads a checkpoint with AMD Quark: its own import, and its layers' own dequantization; run by Quark's own Python.

python tools/readers/with_quark.py CHECKPOINT OUT.safetensors
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from quark.torch import import_model_from_safetensors
from quark.torch.export.nn.modules.qparamslinear import QParamsLinear
from safetensors.torch import save_file

CASES = (
    ("FP8_DYNAMIC", "quark"),
    ("W8A16-fp8-tensor", "quark"),
    ("W4A16-g128-asym", "quark"),
    ("W4A16-g32-sym", "quark"),
    ("W4A16-channel-sym", "quark"),
    ("W8A16-g64-asym", "quark"),
    ("W8A16-channel-sym", "quark"),
    ("INT8", "quark"),
    ("quark-fp8", "quark"),
    ("quark-int8", "quark"),
    ("quark-mxfp4", "quark"),
    ("quark-uint4_wo_128", "quark"),
    ("modelopt-fp8-kvfp8", "quark"),
    ("llmcompressor-mxfp4a16", "quark"),
    ("llmcompressor-w4a16-awq-asym", "quark"),
)


def main(checkpoint: Path, out: Path) -> None:
    """Writes <module>.weight float32 [N, K] of every quantized layer."""
    model = import_model_from_safetensors(None, str(checkpoint), device="cpu")
    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QParamsLinear) and layer.weight_quantizer is not None:
            weight = layer._get_qweight(layer.weight)
            if weight.dtype != torch.float32:
                raise SystemExit(f"Quark dequantizes {name} in {weight.dtype}, not in float32")
            weights[f"{name}.weight"] = weight.contiguous()
    save_file(weights, out, {"tool": f"amd-quark {version('amd-quark')}"})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
