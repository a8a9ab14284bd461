"""Reads a checkpoint with NVIDIA ModelOpt: its QTensor classes dequantize the tensors; run by ModelOpt's own Python.

    python tools/readers/with_modelopt.py CHECKPOINT OUT.safetensors

ModelOpt has no loader of its exports and no inverse of its int4 packing: those codes are taken apart here, and have to give the
same bytes again when `pack_int4_in_uint8` packs them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from modelopt.torch.export.quant_utils import pack_int4_in_uint8
from modelopt.torch.quantization.qtensor import FP8QTensor, INT8QTensor, MXFP4QTensor, MXFP8QTensor, NVFP4QTensor
from safetensors import safe_open
from safetensors.torch import save_file

CASES = (
    ("W8A16-fp8-tensor", "modelopt"),
    ("FP8_DYNAMIC", "modelopt"),
    ("W4A16-g128-sym", "modelopt"),
    ("W4A16-g32-sym", "modelopt"),
    ("W8A16-channel-sym", "modelopt"),
    ("modelopt-fp8-kvfp8", "modelopt"),
    ("modelopt-int4-awq", "modelopt"),
    ("quark-fp8", "modelopt"),
)

Parts = Mapping[str, torch.Tensor]


def main(checkpoint: Path, out: Path) -> None:
    """Writes <module>.weight float32 [N, K] of every quantized layer."""
    config = json.loads((checkpoint / "config.json").read_text()).get("quantization_config")
    config = config or json.loads((checkpoint / "hf_quant_config.json").read_text())["quantization"]
    tensors: dict[str, torch.Tensor] = {}
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    weights = {}
    for module in sorted(name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")):
        layer = config.get("quantized_layers", {}).get(module, config)
        parts = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{module}.")}
        weights[f"{module}.weight"] = dequantized(layer["quant_algo"].upper(), parts)
    save_file(weights, out, {"tool": f"nvidia-modelopt {version('nvidia-modelopt')}"})


def dequantized(algorithm: str, parts: Parts) -> torch.Tensor:
    """float32 [N, K]."""
    weight, scale = parts["weight"], parts["weight_scale"]
    rows, columns = weight.shape
    if algorithm in ("W4A16_AWQ", "W4A8_AWQ"):
        return _int4(weight, scale.float())
    made: Any
    options: dict[str, Any]
    if weight.dtype != torch.uint8:
        floats = MXFP8QTensor if scale.dtype == torch.uint8 else FP8QTensor
        kind = INT8QTensor if weight.dtype == torch.int8 else floats
        made = kind(weight.shape, torch.float32, weight)
        options = _spread(weight, scale) if scale.dtype == torch.float32 else {"scale": scale}
    else:
        shape = torch.Size((rows, 2 * columns))
        made = (MXFP4QTensor if scale.dtype == torch.uint8 else NVFP4QTensor)(shape, torch.float32, weight)
        options = {"scale": scale, "double_scale": parts.get("weight_scale_2")}
        options["block_sizes"] = {-1: 2 * columns // scale.shape[-1]}
    whole: torch.Tensor = made.dequantize(**options)
    return whole.contiguous()


def _spread(weight: torch.Tensor, scale: torch.Tensor) -> dict[str, Any]:
    """One scale, one a row [N], or one a square block [N / b, 1, K / b, 1] or [N / b, K / b]."""
    if scale.dim() < 2:
        return {"scale": scale.reshape(-1, 1) if scale.numel() > 1 else scale}
    grid = scale.reshape(scale.shape[0], -1)
    sides = (128, 16, 32, 64, 256)
    side = next(s for s in sides if all(-(-weight.shape[d] // s) == grid.shape[d] for d in (0, 1)))
    return {"scale": grid, "block_sizes": {-1: side, -2: side}}


def _int4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    signed = torch.stack([packed << 4, packed & 0xF0], 1).flatten(0, 1).view(torch.int8) >> 4
    size = signed.shape[1] // scale.shape[1]
    weight = signed * scale.repeat_interleave(size, 1)
    if not torch.equal(pack_int4_in_uint8(weight, scale, size), packed):
        raise SystemExit("ModelOpt packs these weights to other bytes")
    return weight


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
