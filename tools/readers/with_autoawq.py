"""Reads an AWQ checkpoint with AutoAWQ: python tools/readers/with_autoawq.py CHECKPOINT OUT.safetensors

The checkpoint is opened with its loader, in its layers. gemm has a dequantize_gemm; the kernels of the other layouts run on a GPU
only, so that their words are unpacked by what the layer's own packing makes of the numbers of places.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from awq import AutoAWQForCausalLM
from awq.models import base
from awq.modules.linear import WQLinear_GEMM, WQLinear_GEMV, WQLinear_GEMVFast, WQLinear_Marlin
from awq.modules.linear.gemv_fast import pack_intweight
from awq.modules.linear.marlin import _perm, _scale_perm
from awq.utils.packing_utils import dequantize_gemm, unpack_awq
from safetensors.torch import save_file

REQUIRES = "autoawq==0.2.9 transformers==4.51.3 torch==2.13.0"
CASES = (
    ("autoawq-gemm-w4-zp", "awq"),
    ("autoawq-gemm-w4-zp", "awq:gemv"),
    ("autoround-auto_awq-w4-asym", "awq"),
    ("llmcompressor-w4a16-awq-asym", "awq:gemm"),
    ("W4A16-g64-asym", "awq:gemv"),
    ("W4A16-g128-sym", "awq:gemv_fast"),
    ("W4A16-g32-sym", "awq:gemv_fast"),
    ("gptqmodel-gptq-4bit-sym", "awq:marlin"),
)


def main(checkpoint: Path, out: Path) -> None:
    base.get_best_device = lambda: "cuda:0"  # on a CPU it has no layers but those of another package
    model = AutoAWQForCausalLM.from_quantized(
        str(checkpoint), fuse_layers=False, device_map={"": "cpu"}, torch_dtype=torch.float16
    )
    kinds = {WQLinear_GEMM: _gemm, WQLinear_GEMV: _gemv, WQLinear_GEMVFast: _gemv_fast, WQLinear_Marlin: _marlin}
    layers = {name: layer for name, layer in model.model.named_modules() if type(layer) in kinds}
    weights = {f"{name}.weight": kinds[type(layer)](layer).float().contiguous() for name, layer in layers.items()}
    save_file(weights, out, {"tool": f"autoawq {version('autoawq')}"})


def _gemm(layer: Any) -> Any:
    return dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), layer.w_bit, layer.group_size).t()


def _gemv(layer: Any) -> Any:
    codes, zeros = unpack_awq(layer.qweight, layer.qzeros, layer.w_bit)
    size, groups = layer.group_size, layer.in_features // layer.group_size
    scales, zeros = (part[:, :groups].repeat_interleave(size, 1) for part in (layer.scales.float(), zeros & 15))
    return ((codes & 15) - zeros) * scales


def _gemv_fast(layer: Any) -> Any:
    rows, columns, groups = layer.out_features, layer.in_features, layer.in_features // layer.group_size
    # A code of 1 in one place shows which field of the packed weight it is stored in, for each place of a tile.
    codes = torch.zeros(rows, columns, dtype=torch.int32)
    words = layer.qweight.to(torch.int32)
    for row in range(4):
        for column in range(64):
            place = torch.zeros(4, 64, dtype=torch.int32)
            place[row, column] = 1
            found = pack_intweight(place, interleave=4, kstride=64)[0]
            at = int(found.nonzero())
            shift = int(found[at]).bit_length() - 1 if int(found[at]) > 0 else 12
            codes[row::4, column::64] = (words[:, at::64] >> shift) & 15
    scales, zeros = (
        part[:groups].t().float().repeat_interleave(layer.group_size, 1) for part in (layer.scales, layer.qzeros)
    )
    return codes * scales + zeros


def _marlin(layer: Any) -> Any:
    rows, columns = layer.out_features, layer.in_features
    shifts = torch.arange(0, 32, 4)
    stored = ((layer.qweight[:, :, None] >> shifts) & 15).reshape(-1, 1024)
    tiles = torch.empty_like(stored)
    tiles[:, _perm] = stored
    codes = tiles.reshape(columns // 16, rows // 16, 16, 16).permute(0, 2, 1, 3).reshape(columns, rows).t()
    scales = torch.empty_like(layer.scales.reshape(-1, len(_scale_perm)))
    scales[:, _scale_perm] = layer.scales.reshape(-1, len(_scale_perm))
    scales = scales.reshape(-1, rows).t().float().repeat_interleave(layer.group_size, 1)
    return (codes - 8) * scales


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
