"""Reads an AutoRound checkpoint with AutoRound: python tools/readers/with_auto_round.py CHECKPOINT OUT.safetensors [TOKENS.safetensors]

Which layers are quantized, and how, is what its loader says; integers are dequantized by its
own layers (their forward on an identity matrix) or its dequantize_gemm, floats by the layers that transformers loads with it.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

REQUIRES = "auto-round==0.16.1 transformers==5.23.0 torch==2.13.0"
CASES = (
    ("W4A16-g128-sym", "auto-round"),
    ("autoround-auto_round-w2-sym", "auto-round:auto_round"),
    ("autoround-auto_awq-w4-asym", "auto-round:auto_round:auto_awq"),
    ("autoround-auto_awq-w4-asym", "auto-round:auto_round:auto_gptq"),
    ("gptqmodel-gptq-3bit-sym", "auto-round:auto_round"),
    ("gptqmodel-gptq-3bit-sym", "auto-round:auto_round:auto_gptq"),
    ("gptqmodel-gptq-8bit-sym", "auto-round"),
    ("gptqmodel-gptq-dynamic-mixed", "auto-round"),
    ("llmcompressor-w4a16-awq-asym", "auto-round"),
    ("llmcompressor-fp8-static", "auto-round:fp"),
)


RUNS = (
    ("auto_round:W2A16-g32-sym", "auto-round"), ("auto_round:W4A16-g64-asym", "auto-round"),
    ("auto_round:W3A16-g64-sym", "auto-round:auto_round:auto_gptq"), ("gptq:W8A16-g64-sym", "auto-round"), ("hadamard+gptq:W4A16-g64-sym", "auto-round"),
    ("auto_round:W4A16-g64-sym target_bpw=4.6", "auto-round"), ("auto_round:W4A16-g64-asym target_bpw=4.6", "auto-round"), ("gptq:FP8", "auto-round:fp"),
)  # fmt: skip
LOGITS = 1e-4
"""It forces integers' models to float16 (3e-7), and keeps the scales of fp8 layers in bfloat16 (6e-5)."""


def main(checkpoint: Path, out: Path, tokens: Path | None = None) -> None:
    import torch
    from auto_round.inference.convert_model import get_layer_config
    from auto_round.utils import check_to_quantized
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoRoundConfig

    config = AutoConfig.from_pretrained(checkpoint)
    stated: dict[str, Any] = config.quantization_config
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    quantization = AutoRoundConfig.from_dict(dict(stated))
    modules = dict(model.named_modules())  # patterns of extra_config stay in what the loader says
    stated_layers = get_layer_config(model, quantization).items()
    layers = {name: own for name, own in stated_layers if name in modules and check_to_quantized(own)}
    floats = [name for name, own in layers.items() if not own["data_type"].startswith("int")]
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, device_map="cpu") if floats else None
    weights = {}
    with safe_open(checkpoint / "model.safetensors", "pt") as held:
        names = set(held.keys())
        for name, own in layers.items():
            if loaded is not None and name in floats:
                parts = {
                    part: held.get_tensor(f"{name}.{part}")
                    for part in ("weight", "weight_scale")
                    if f"{name}.{part}" in names
                }
                weight = _float_weight(loaded.get_submodule(name), parts)
            else:
                parts = {part: held.get_tensor(f"{name}.{part}") for part in ("qweight", "qzeros", "scales")}
                rows, columns = modules[name].weight.shape
                weight = _integer_weight(parts, own, quantization.packing_format, rows, columns)
            weights[f"{name}.weight"] = weight.detach().to(torch.float32).contiguous()
    if tokens is not None:
        weights["logits"] = logits(checkpoint, load_file(tokens)["tokens"])
    save_file(weights, out, metadata={"tool": f"auto-round {version('auto-round')}"})


def _integer_weight(parts: dict[str, Any], own: Any, packing: str, rows: int, columns: int) -> Any:
    import torch
    from auto_round.export.export_to_autoround.export import dynamic_import_quant_linear_for_packing
    from auto_round.export.export_to_awq.utils import dequantize_gemm

    scales = parts["scales"].float()
    bits, size = own["bits"], own["group_size"] if own["group_size"] > 0 else columns
    if "awq" in packing:
        return dequantize_gemm(parts["qweight"], parts["qzeros"], scales, bits, size).t()
    layer_class = dynamic_import_quant_linear_for_packing(packing, bits, size, own["sym"])
    layer_class = getattr(
        layer_class, "func", layer_class
    )  # without g_idx, for which its forward takes square layers only
    whole = -(-columns // size) * size  # its forward takes whole groups: a smaller last one is filled up
    layer = layer_class(bits, size, whole, rows, False, weight_dtype=torch.float32)
    layer.load_state_dict({**parts, "qweight": _filled(parts["qweight"], whole * bits // 32)}, strict=False)
    layer.scales = scales
    return layer(torch.eye(whole)).t()[:, :columns]


def _filled(words: Any, rows: int) -> Any:
    import torch

    return torch.nn.functional.pad(words, (0, 0, 0, rows - words.shape[0]))


def _float_weight(layer: Any, parts: dict[str, Any]) -> Any:
    import torch

    layer.dtype = torch.float32
    scale = parts.get("weight_scale")
    if "weight" in parts and scale is not None and scale.is_floating_point():  # it is loaded in the model's bfloat16
        layer.pre_dequantized = False
        for part in ("weight", "weight_scale"):
            delattr(layer, part)
        layer.weight, layer.weight_scale = parts["weight"], scale.float()
    return layer.dequant_weight_online()


def logits(checkpoint: Path, tokens: Any) -> Any:
    """[windows, tokens, vocabulary] float32, of the model as transformers loads it with AutoRound's layers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map="cpu", dtype=torch.float32)
    with torch.no_grad():
        return model(tokens).logits.float().contiguous()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
