"""Reads an fp8 or mxfp4 checkpoint with transformers, which dequantizes both on a CPU: CHECKPOINT OUT.safetensors.

Stacked experts are written [E, out, in], under the names of their modules. FBGEMM's fp8 is read on GPUs only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

CASES = (
    ("W8A8-fp8-g128/fp8-g128-dyn", "fp8:block"),
    ("W8A8-fp8-tensor/fp8-tensor-dyn", "fp8:tensor"),
    ("llmcompressor-fp8-block", "fp8"),
    ("llmcompressor-fp8-static", "fp8:tensor"),
    ("modelopt-fp8", "fp8:tensor"),
    ("transformers-mxfp4", "mxfp4"),
)
"""What is written, and as what; tools/read_back.py makes it and compares."""


def read(checkpoint: Path) -> dict[str, Any]:
    """Every quantized layer's weight, float32."""
    import torch
    from transformers import AutoModelForCausalLM

    method = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["quant_method"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, device_map="cpu")
    weights = dict(model.named_parameters())
    names = _stored(checkpoint)
    if method == "mxfp4":
        stacks = [name.removesuffix("_blocks") for name in names if name.endswith("_blocks")]
        return {f"{stack}.weight": weights[stack].float().transpose(1, 2) for stack in stacks}
    quantized = {name.rpartition(".")[0] for name in names if name.endswith("weight_scale_inv")}
    return {f"{module}.weight": weights[f"{module}.weight"].float() for module in quantized}


def _stored(checkpoint: Path) -> list[str]:
    from safetensors import safe_open

    names: list[str] = []
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names += opened.keys()
    return names


def main() -> None:
    from safetensors.torch import save_file

    weights = {name: weight.detach().contiguous() for name, weight in read(Path(sys.argv[1])).items()}
    import transformers

    save_file(weights, sys.argv[2], {"tool": f"transformers {transformers.__version__}"})


if __name__ == "__main__":
    main()
