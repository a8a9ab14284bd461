"""compressed-tensors' config and tensors, made from schemes and weights: the inverse of what its method reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qcore.elements import Float, Granularity, Group, Int, PerChannel, PerTensor, PerToken, Tile
from qcore.layouts.affine import affine_parts, exactly, unholdable, words
from qcore.method import ModulePlan, is_embedding
from qcore.scheme import Scheme, TensorScheme

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors, QuantizedTensor

NAME = "compressed-tensors"
_FLOAT_BITS = {"e2m1": 4, "e2m3": 6, "e4m3fn": 8}
_STRATEGIES: dict[type[Granularity], str] = {
    PerTensor: "tensor",
    PerChannel: "channel",
    PerToken: "token",
    Group: "group",
    Tile: "block",
}
_SCALE_TYPES = {"e8m0": "torch.uint8", "e4m3fn": "torch.float8_e4m3fn"}


def config_of(plan: Mapping[str, ModulePlan]) -> dict[str, Any]:
    """One config group a scheme. The commonest is for all linear layers, the others name theirs."""
    schemes = {module: entry.scheme for module, entry in plan.items()}
    counts = Counter(scheme for module, scheme in schemes.items() if scheme and not is_embedding(module))
    groups: dict[str, dict[str, Any]] = {}
    found = [*(scheme for scheme, _ in counts.most_common()), *(s for s in schemes.values() if s and s not in counts)]
    for scheme in dict.fromkeys(found):
        members = [module for module, own in schemes.items() if own == scheme]
        # Names win over classes, so that the first group may take all linear layers.
        targets = [module for module in members if groups or is_embedding(module)]
        if not groups and any(not is_embedding(module) for module in members):
            targets = ["Linear", *targets]
        groups[f"group_{len(groups)}"] = {
            "targets": targets,
            "weights": _arguments(members[0], scheme.weight),
            "input_activations": None if scheme.input is None else _arguments(members[0], scheme.input),
            "output_activations": None,
            "format": format_of(scheme),
        }
    formats = {group["format"] for group in groups.values()}
    kept = [module for module, scheme in schemes.items() if scheme is None and not is_embedding(module)]
    return {
        "quant_method": NAME,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": kept,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def format_of(scheme: Scheme) -> str:
    """The layout that the library itself would choose."""
    element, fine = scheme.weight.element, scheme.weight.scales[0]
    if isinstance(element, Int):
        return "pack-quantized" if scheme.input is None else "int-quantized"
    if element.bits == 8:
        return "mxfp8-quantized" if fine.type == "e8m0" else "float-quantized"
    if fine.type == "e4m3fn":
        return "nvfp4-pack-quantized"
    return f"mxfp{element.bits}-pack-quantized"


def _arguments(module: str, scheme: TensorScheme) -> dict[str, Any]:
    """QuantizationArgs of a weight or an input. Raises Refused (not-representable)."""
    element, levels = scheme.element, scheme.scales
    known = isinstance(element, Int) or (isinstance(element, Float) and element.format in _FLOAT_BITS)
    types = [level.type for level in levels]
    fits = types in (["float"], ["e8m0"], ["e4m3fn", "float"]) and scheme.zero != "float" and scheme.outliers is None
    if (
        not known
        or not fits
        or type(levels[0].granularity) not in _STRATEGIES
        or (types == ["e8m0"] and element.bits > 8)
    ):
        unholdable(NAME, module, scheme, "integers or small floats under scales of its kinds")
    grid = levels[0].granularity
    if isinstance(element, Float) and element.bits < 8 and types == ["float"]:
        unholdable(NAME, module, scheme, "floats of fewer than 8 bits under MX or NVFP4 scales")
    if types == ["e8m0"] and grid != Group(32):
        unholdable(NAME, module, scheme, "MX groups of 32")
    return {
        "num_bits": element.bits,
        "type": "int" if isinstance(element, Int) else "float",
        "symmetric": scheme.zero is None,
        "strategy": "tensor_group" if len(levels) == 2 else _STRATEGIES[type(grid)],
        "group_size": grid.size if isinstance(grid, Group) else None,
        "block_structure": [grid.rows, grid.cols] if isinstance(grid, Tile) else None,
        "dynamic": "local" if scheme.dynamic and len(levels) == 2 else scheme.dynamic,
        "actorder": "group" if scheme.ordered else None,
        "scale_dtype": _SCALE_TYPES.get(types[0]),
    }


def pack_layer(module: str, layer: LayerTensors) -> dict[str, torch.Tensor]:
    """The module's tensors. Raises Refused (not-representable)."""
    import torch

    weight, scheme = layer.weight, layer.weight.scheme
    if layer.input_multiplier is not None:
        unholdable(NAME, module, "a vector that multiplies the input", "none")
    layout = format_of(scheme)
    parts = _integers(weight, layout) if isinstance(scheme.weight.element, Int) else _floats(weight)
    fine = weight.scales[0]
    if scheme.weight.scales[0].type == "float":
        fine = exactly(NAME, module, fine, fine.dtype, torch.float32)
        fine = fine.reshape(1) if isinstance(scheme.weight.scales[0].granularity, PerTensor) else fine
    parts["weight_scale"] = fine
    if len(weight.scales) == 2:
        parts["weight_global_scale"] = divisor_of(module, weight.scales[0], weight.scales[1]).reshape(1)
    if weight.index is not None:
        parts["weight_g_idx"] = weight.index
    if layer.input_scale is not None and scheme.input is not None:
        if len(scheme.input.scales) == 2:
            parts["input_global_scale"] = (1 / layer.input_scale.double()).float().reshape(1)
        else:
            parts["input_scale"] = layer.input_scale.reshape(1)
    elif scheme.input is not None and len(scheme.input.scales) == 2:
        unholdable(NAME, module, "no scale for the whole input", "a calibrated input_global_scale")
    if layer.input_zero is not None:
        parts["input_zero_point"] = layer.input_zero.reshape(1)
    if layer.bias is not None:
        parts["bias"] = layer.bias
    return {f"{module}.{part}": tensor for part, tensor in parts.items()}


def divisor_of(module: str, fine: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """The global scale g for which s / g is s * `whole` for all scales s that are there, in float32."""
    import torch

    divisor = (1 / whole.double()).float()
    product = (fine.float().double() * whole.double()).float()
    if not torch.equal(
        fine.float() / divisor, product if whole.dtype == torch.float64 else fine.float() * whole.float()
    ):
        unholdable(NAME, module, "a scale of the whole tensor that multiplies", "one that divides to the same numbers")
    return divisor


def _integers(weight: QuantizedTensor, layout: str) -> dict[str, torch.Tensor]:
    import torch

    element = weight.scheme.weight.element
    bits, middle = element.bits, 1 << (element.bits - 1)
    codes, _, zeros = affine_parts(weight)
    if layout == "int-quantized":
        parts = {"weight": (codes.to(torch.int16) - middle).to(torch.int8)}
        if zeros is not None:
            parts["weight_zero_point"] = (zeros.to(torch.int16) - middle).to(torch.int8)
        return parts
    parts = {"weight_packed": words(codes, bits), "weight_shape": torch.tensor(weight.shape, dtype=torch.int64)}
    if zeros is not None:
        parts["weight_zero_point"] = words(zeros.t().contiguous(), bits).t().contiguous()
    return parts


def _floats(weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    return {"weight" if weight.scheme.weight.bits == 8 else "weight_packed": weight.codes}
