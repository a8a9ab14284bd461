"""Reads a compressed-tensors checkpoint with the library itself: its config, its matching of layers, its decompression.

python tools/readers/with_compressed_tensors.py CHECKPOINT OUT.safetensors [TOKENS.safetensors]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import compressed_tensors
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.utils.match import is_match, match_targets
from safetensors import safe_open
from safetensors.torch import load_file, save_file

REQUIRES = "compressed-tensors==0.20.0 transformers==5.23.0 torch==2.13.0"
CASES = (
    ("W2A16-g32-sym", "compressed-tensors"), ("W3A16-g64-asym", "compressed-tensors"), ("W4A16-g128-sym", "compressed-tensors"),
    ("W5A16-channel-asym", "compressed-tensors"), ("W6A16-tensor-asym", "compressed-tensors"),
    ("W7A16-g32-sym", "compressed-tensors"), ("W8A16-channel-sym", "compressed-tensors"),
    ("W4A16-g64-asym", "compressed-tensors:int-quantized"), ("W4A16-tensor-asym", "compressed-tensors:naive-quantized"),
    ("W8A8-int8-dyn", "compressed-tensors"), ("W8A8-int8-dyn", "compressed-tensors:pack-quantized"),
    ("W4A8-int4-g64-sym/fp8-token-dyn", "compressed-tensors"), ("FP8_DYNAMIC", "compressed-tensors"),
    ("FP8_DYNAMIC", "compressed-tensors:naive-quantized"), ("W8A16-fp8-tensor", "compressed-tensors"),
    ("W8A16-fp8-channel", "compressed-tensors:float-quantized"),
    ("llmcompressor-fp8-block", "compressed-tensors"), ("llmcompressor-fp8-static", "compressed-tensors"),
    ("llmcompressor-nvfp4a16", "compressed-tensors"), ("llmcompressor-mxfp4a16", "compressed-tensors"),
    ("quark-mxfp4", "compressed-tensors"), ("gptqmodel-gptq-dynamic-mixed", "compressed-tensors"),
    ("gptqmodel-awq-gemm-asym", "compressed-tensors"), ("autoround-auto_round-w2-sym", "compressed-tensors"),
    ("modelopt-fp8-kvfp8", "compressed-tensors"), ("gguf-q8_0", "compressed-tensors"),
)  # fmt: skip


RUNS = (
    ("gptq:W4A16-g128-sym", "compressed-tensors"), ("awq:W4A16-g64-asym", "compressed-tensors"),
    ("auto_round:W2A16-g32-sym", "compressed-tensors"), ("hadamard+gptq:W4A16-g64-sym", "compressed-tensors"),
    ("smoothquant+gptq:W8A8-int8-dyn", "compressed-tensors"), ("gptq:FP8", "compressed-tensors"),
    ("gptq:FP8_DYNAMIC", "compressed-tensors"), ("gptq:NVFP4A16", "compressed-tensors"),
    ("gptq:W4A16-g64-sym target_bpw=4.6", "compressed-tensors"), ("gptq:FP8 kv_cache=fp8", "compressed-tensors"),
    ("gptq:NVFP4", "compressed-tensors"), ("gptq:W8A8-int8-static", "compressed-tensors"),
)  # fmt: skip
LOGITS = 1e-8
"""float32 in another order."""


def main(folder: Path, out: Path, tokens: Path | None = None) -> None:
    """Every module with scales, under the scheme that the library finds for it; and logits, of the model as transformers loads it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = QuantizationConfig.model_validate(config["quantization_config"])
    schemes = {target: group for group in quantization.config_groups.values() for target in group.targets}
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as held:
            tensors |= {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    weights = {}
    for name in sorted(key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")):
        kind = torch.nn.Embedding(1, 1) if name.endswith("embed_tokens") else torch.nn.Linear(1, 1)
        if is_match(name, kind, quantization.ignore or []):
            raise ValueError(f"{name} has scales and is ignored")
        parts = {key[len(name) + 1 :]: value for key, value in tensors.items() if key.rpartition(".")[0] == name}
        scheme = schemes[match_targets(name, kind, schemes)[0]]
        weights[f"{name}.weight"] = decompressed(parts, scheme, quantization.format)
    if tokens is not None:
        weights["logits"] = logits(folder, quantization, load_file(tokens)["tokens"])
    save_file(weights, out, {"tool": f"compressed-tensors {compressed_tensors.__version__}"})


def logits(folder: Path, quantization: QuantizationConfig, tokens: torch.Tensor) -> torch.Tensor:
    """[windows, tokens, vocabulary] float32.

    transformers 5.23 makes no room for packed zero points (LLM Compressor's own checkpoints fail too), unless asked to dequantize at once. The library gives nvfp4 in bfloat16 when a
    model runs first, which holds its products of 2 and 4 bits.
    """
    packed_zeros = any(not group.weights.symmetric for group in quantization.config_groups.values())
    options = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if packed_zeros else {}
    narrow = quantization.format == "nvfp4-pack-quantized"
    dtype = torch.bfloat16 if narrow else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    with torch.no_grad():
        if narrow:
            model(tokens[:1, :1])
            torch.nn.Module.float(model)  # which transformers refuses of any quantized model
        found: torch.Tensor = model(tokens).logits.contiguous()
    return found


def decompressed(parts: dict[str, torch.Tensor], scheme: QuantizationScheme, format: str) -> torch.Tensor:
    """A module's weight in float32: scales are widened first, for the library computes in their type."""
    format = scheme.format or format
    if format == "nvfp4-pack-quantized":  # which the library rounds to bfloat16 at last
        rows, half = parts["weight_packed"].shape
        codes = unpack_fp4_from_uint8(parts["weight_packed"], rows, 2 * half, torch.float32)
        weight: torch.Tensor = dequantize(codes, parts["weight_scale"].float(), None, scheme.weights,
                                          global_scale=parts["weight_global_scale"])  # fmt: skip
        return weight
    narrow = (torch.float16, torch.bfloat16)
    wide = {name: part.float() if part.dtype in narrow else part for name, part in parts.items()}
    weight = BaseCompressor.get_value_from_registry(format).decompress(wide, scheme)["weight"]
    return weight.float().contiguous()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
