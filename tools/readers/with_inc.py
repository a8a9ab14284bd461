"""Reads a saved fp8 model with Intel Neural Compressor: its own load, and its layers' own dequantization, on a CPU.

    python tools/readers/with_inc.py CHECKPOINT OUT.safetensors

On a CPU it loads what quantizes and dequantizes (`use_qdq`); a Gaudi's models differ from these in the scales' names.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from neural_compressor.torch.algorithms.fp8_quant.patched_module_base import PatchedModuleBase
from neural_compressor.torch.quantization import load
from safetensors.torch import save_file

CASES = (
    ("modelopt-fp8", "inc:qdq"),
    ("quark-fp8", "inc:qdq"),
    ("llmcompressor-fp8-static", "inc:qdq"),
)


def main(checkpoint: Path, out: Path) -> None:
    """Writes <module>.weight float32 [N, K] of every quantized layer."""
    model = load(str(checkpoint), format="huggingface", device="cpu")
    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, PatchedModuleBase) and hasattr(layer, "dequant_weights"):
            layer.dequant_weights.hp_dtype = torch.float32  # else it is rounded to the model's own dtype
            weights[f"{name}.weight"] = layer.dequant_weights(layer.weight).t().contiguous()
    save_file(weights, out, {"tool": f"neural-compressor {version('neural-compressor-pt')}"})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
