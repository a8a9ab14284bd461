"""INC's saved fp8 models, made from schemes and weights: the inverse of what its method reads, from one rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qcore.elements import Float, PerChannel
from qcore.layouts.affine import exactly, unholdable
from qcore.method import ModulePlan, is_embedding, left_whole
from qcore.scheme import Scheme, TensorScheme

if TYPE_CHECKING:
    import torch

    from qcore.checkpoint.kv_scales import KvScales
    from qcore.tensor import LayerTensors

NAME = "inc"
FORMS = {"saved": ("scale_weight", "scale_input"), "qdq": ("dequant_weights.scale", "quant_input.scale")}
"""Where the scales of weights and inputs stand: in a Gaudi's models, and in those that quantize and dequantize."""
_FP8 = {"e4m3fn": "E4M3", "e5m2": "E5M2"}
_METHODS = {False: ("maxabs_arbitrary", "scalar"), True: ("act_maxabs_pow2_weights_pcs_maxabs_pow2", "const")}
"""scale_method and scale_format of weights under one scale, and under one for each output channel."""


def config_of(plan: Mapping[str, ModulePlan], form: str) -> dict[str, Any]:
    """The quantization config. Raises Refused (not-representable)."""
    schemes = {module: entry.scheme for module, entry in plan.items() if entry.scheme is not None}
    if not schemes:
        unholdable(NAME, "fp8_config", "no quantized layer", "fp8 weights, beside which a kv cache may stand")
    kept = left_whole(plan)
    elements = {_element(module, plan[module], scheme) for module, scheme in schemes.items()}
    if len(elements) > 1:
        unholdable(NAME, next(iter(schemes)), f"layers in {' and '.join(sorted(elements))}", "one kind of fp8")
    for module in schemes:
        if named := next((name for name in kept if name in module), None):  # INC looks for names anywhere
            unholdable(NAME, module, f"the name of {named}, which is not quantized, in its own", "names that differ")
    method, scale_format = _METHODS[any(isinstance(s.weight.granularity, PerChannel) for s in schemes.values())]
    return {
        "mode": "LOAD",
        "observer": "maxabs",
        "fp8_config": _FP8[elements.pop()],
        "hp_dtype": "bf16",
        "scale_method": method,
        "scale_format": scale_format,
        "use_qdq": str(form == "qdq"),
        "fake_quant": "False",
        "allowlist": {"names": [], "types": ["Linear"]},
        "blocklist": {"names": kept, "types": []},
        "dump_stats_path": "./hqt_output/measure",
        "measure_exclude": "OUTPUT",
        "measure_on_hpu": True,
        "mod_dict": {},
        "scale_params": {},
        "world_size": -1,
    }


def kv_cache_of(scheme: TensorScheme, scales: Mapping[str, KvScales]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The kind of fp8, which weights share, and the scales of a cache, whose being there declares it. Raises Refused (not-representable)."""
    if not scales or str(scheme) not in ("fp8-tensor", "e5m2-tensor"):
        unholdable(NAME, "kv_cache", scheme, "fp8 under calibrated scales")
    tensors = {}
    for attention, own in scales.items():
        for part, side in (("k", own.k), ("v", own.v)):
            if side.scale.numel() != 1 or side.zero is not None:
                unholdable(NAME, attention, "scales by head or zero points of a kv cache", "one scale")
            tensors[f"{attention}.{part}_cache.dequant_output.scale"] = side.scale.reshape(())
            tensors[f"{attention}.{part}_cache.quant_input.scale_inv"] = (1 / side.scale).reshape(())
    assert isinstance(scheme.element, Float)
    return {"fp8_config": _FP8[scheme.element.format]}, tensors


def pack_layer(module: str, layer: LayerTensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The module's tensors. Raises Refused (not-representable)."""
    import torch

    weight, given = layer.weight, layer.input_scale
    if layer.input_multiplier is not None or given is None:
        unholdable(NAME, module, "an input without a scale, or with a vector that multiplies it", "a scale")
    qdq, channels = config["use_qdq"] == "True", config["scale_format"] == "const"
    scale = exactly(NAME, module, weight.scales[0], torch.bfloat16, torch.float32)
    scale = scale.reshape(-1).expand(weight.shape[0]).contiguous() if channels else scale.reshape(())
    given = exactly(NAME, module, given, torch.bfloat16, torch.float32).reshape(())
    parts = dict(zip(FORMS["qdq" if qdq else "saved"], (scale, given), strict=True))
    parts |= {"weight": weight.codes.t().contiguous(), "quant_input.scale_inv": (1 / given.float()).to(given.dtype)}
    if qdq and channels:
        parts |= {f"{part}.zero_point": torch.zeros(()) for part in ("dequant_weights", "quant_input")}
    if layer.bias is not None:
        parts["bias"] = layer.bias
    return {f"{module}.{part}": tensor for part, tensor in parts.items()}


def _element(module: str, entry: ModulePlan, scheme: Scheme) -> str:
    """The float format of weight and input."""
    element = scheme.weight.element
    name = element.format if isinstance(element, Float) else ""
    word = "fp8" if name == "e4m3fn" else name
    fits = str(scheme.weight) in (f"{word}-tensor", f"{word}-channel") and str(scheme.input) == f"{word}-tensor"
    if name not in _FP8 or not fits or is_embedding(module) or len(entry.shape) != 2:
        unholdable(NAME, module, f"{scheme} of shape {list(entry.shape)}", "a linear layer in fp8 with static inputs")
    return name
