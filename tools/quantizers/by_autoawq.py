"""Quantizes with AutoAWQ, and runs the model that it opens again: python tools/quantizers/by_autoawq.py CASE MODEL TOKENS OUT

Its layers multiply in float16 alone, so that dense ones in float32 take their places, with the weights that its own code dequantizes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import torch
from awq import AutoAWQForCausalLM
from awq.models import base
from awq.modules.linear import WQLinear_GEMM
from awq.utils.packing_utils import dequantize_gemm
from perplexity import calibration, perplexity, tell

REQUIRES = "autoawq==0.2.9 transformers==4.51.3 torch==2.13.0"
FEW = 2
"""Windows to calibrate with, and no search for ranges to clip to: its searches are made for GPUs, and take an hour on a CPU."""
CASES = ("4 bits by 64, gemm",)


def main(case: str, model: Path, tokens: Path, out: Path) -> None:
    assert case in CASES
    with tempfile.TemporaryDirectory() as folder:
        older(model, Path(folder))
        made = AutoAWQForCausalLM.from_pretrained(folder, device_map="cpu", torch_dtype=torch.float32)
    wanted = {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}
    windows = calibration(tokens)[:FEW]
    # It keeps weights apart by moving them to the CPU while it tries scales out: on a CPU that has to copy them.
    with patch.object(torch.Tensor, "cpu", torch.Tensor.clone):
        made.quantize(None, quant_config=wanted, calib_data=windows, max_calib_seq_len=len(windows[0]),
                      max_calib_samples=len(windows), apply_clip=False)  # fmt: skip
    made.save_quantized(str(out))
    base.get_best_device = lambda: "cuda:0"  # on a CPU it has no layers but those of another package
    again = AutoAWQForCausalLM.from_quantized(
        str(out), fuse_layers=False, device_map={"": "cpu"}, torch_dtype=torch.float32
    ).model.float()
    for name, layer in list(again.named_modules()):
        if isinstance(layer, WQLinear_GEMM):
            again.set_submodule(name, dense(layer))
    again.set_attn_implementation = partial(setattr, again.config, "_attn_implementation")  # of later versions
    tell(f"autoawq {version('autoawq')}", perplexity(again, tokens))


def older(model: Path, out: Path) -> None:
    """The model with its rope_theta where the last transformers that AutoAWQ runs with looks for it."""
    for file in model.iterdir():
        (out / file.name).symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text())
    config |= {key: value for key, value in config.pop("rope_parameters", {}).items() if key == "rope_theta"}
    (out / "config.json").unlink()
    (out / "config.json").write_text(json.dumps(config))


def dense(layer: WQLinear_GEMM) -> torch.nn.Linear:
    made = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), layer.w_bit, layer.group_size)
    made.weight = torch.nn.Parameter(weight.t().contiguous(), requires_grad=False)
    return made


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
