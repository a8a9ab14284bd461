"""compressed-tensors' config and tensors, made from schemes and weights: the inverse of what its method reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qcore.elements import Float, Granularity, Group, Int, Level, PerChannel, PerTensor, PerToken, Tile
from qcore.layouts.affine import affine_parts, exactly, unholdable, words
from qcore.method import ModulePlan, is_embedding
from qcore.scheme import Scheme, TensorScheme

if TYPE_CHECKING:
    import torch

    from qcore.checkpoint.kv_scales import KvScales
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
LAYOUTS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp6-pack-quantized",
    "mxfp8-quantized",
)
_ALSO_HELD_BY = {
    "pack-quantized": ("int-quantized", "naive-quantized"),
    "int-quantized": ("pack-quantized", "naive-quantized"),
    "float-quantized": ("naive-quantized",),
    "naive-quantized": ("float-quantized",),
}
"""The library's own choice of a layout, and the others that hold the same layers."""


def config_of(plan: Mapping[str, ModulePlan], layout: str = "") -> dict[str, Any]:
    """One config group a scheme. The commonest is for all linear layers, the others name theirs.

    layout: one of LAYOUTS for all layers; empty for what the library would choose for each. Raises Refused
    (not-representable).
    """
    schemes = {module: _whole_groups(module, entry) for module, entry in plan.items()}
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
            "format": _holding(members[0], scheme, layout),
        }
    formats = {group["format"] for group in groups.values()}
    kept = [module for module, scheme in schemes.items() if scheme is None and not is_embedding(module)]
    if "lm_head" not in schemes:  # tied to the embedding: the library has a linear layer there all the same
        kept.append("lm_head")
    return {
        "quant_method": NAME,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": kept,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _whole_groups(module: str, entry: ModulePlan) -> Scheme | None:
    """The scheme of a layer with groups that end with its rows: the library splits rows into whole groups."""
    if entry.scheme is None:
        return None
    weight, columns = entry.scheme.weight, entry.shape[-1]
    if not weight.scales or not isinstance(grid := weight.scales[0].granularity, Group) or columns % grid.size == 0:
        return entry.scheme
    if grid.size < columns or weight.ordered or weight.scales[0].type != "float":
        unholdable(NAME, module, f"{grid} for rows of {columns}", "rows of whole groups")
    return replace(entry.scheme, weight=replace(weight, scales=(Level(PerChannel()),)))


def _holding(module: str, scheme: Scheme, layout: str) -> str:
    """The layout, if it holds the scheme; the library's own choice where none is asked for."""
    own = format_of(scheme)
    if layout and layout != own and layout not in _ALSO_HELD_BY.get(own, ()):
        unholdable(NAME, module, scheme, f"what {layout} holds; {own} would hold this layer")
    return layout or own


def format_of(scheme: Scheme) -> str:
    """The layout that the library itself would choose."""
    element, fine = scheme.weight.element, scheme.weight.scales[0]
    if isinstance(element, Int):
        return "pack-quantized" if scheme.input is None else "int-quantized"
    if element.bits == 8 and fine.type == "float":
        return "naive-quantized" if scheme.input is None else "float-quantized"
    if fine.type == "e4m3fn":
        return "nvfp4-pack-quantized"
    return "mxfp8-quantized" if element.bits == 8 else f"mxfp{element.bits}-pack-quantized"


def _arguments(module: str, scheme: TensorScheme) -> dict[str, Any]:
    """QuantizationArgs of a weight or an input. Raises Refused (not-representable)."""
    element, levels = scheme.element, scheme.scales
    known = isinstance(element, Int) or (isinstance(element, Float) and element.format in _FLOAT_BITS)
    types = [level.type for level in levels]
    fits = types in (["float"], ["e8m0"], ["e4m3fn", "float"]) and scheme.zero != "float"
    fits = fits and scheme.outliers is None and scheme.bound is None
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
        "symmetric": scheme.zero is None and not (isinstance(element, Int) and not element.signed),
        "strategy": "tensor_group" if len(levels) == 2 else _STRATEGIES[type(grid)],
        "group_size": grid.size if isinstance(grid, Group) else None,
        "block_structure": [grid.rows, grid.cols] if isinstance(grid, Tile) else None,
        "dynamic": "local" if scheme.dynamic and len(levels) == 2 else scheme.dynamic,
        "actorder": "group" if scheme.ordered else None,
        "scale_dtype": _SCALE_TYPES.get(types[0]),
    }


def kv_cache_of(scheme: TensorScheme, scales: Mapping[str, KvScales]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """kv_cache_scheme, and the tensors beside attention. Raises Refused (not-representable)."""
    import torch

    grid, element = scheme.scales[0].granularity, scheme.element
    known = element in (Float("e4m3fn"), Int(8, signed=True))
    if not known or scheme.dynamic or not isinstance(grid, PerTensor | PerChannel):
        unholdable(NAME, "kv_cache_scheme", scheme, "fp8 or int8 under calibrated scales")
    arguments = {"num_bits": 8, "type": "float" if isinstance(element, Float) else "int", "symmetric": scheme.zero is None,
                 "strategy": "attn_head" if isinstance(grid, PerChannel) else "tensor", "dynamic": False}  # fmt: skip
    tensors = {}
    for attention, own in scales.items():
        for part, side in (("k", own.k), ("v", own.v)):
            tensors[f"{attention}.{part}_scale"] = side.scale
            if scheme.zero is not None:
                zero = torch.zeros_like(side.scale) if side.zero is None else side.zero
                tensors[f"{attention}.{part}_zero_point"] = exactly(NAME, side.source, zero, torch.int8)
    return {"kv_cache_scheme": arguments}, tensors


def pack_layer(module: str, layer: LayerTensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The module's tensors, as what `config_of` gave declares them. Raises Refused (not-representable)."""
    import torch

    weight, scheme = layer.weight, layer.weight.scheme
    if layer.input_multiplier is not None:
        unholdable(NAME, module, "a vector that multiplies the input", "none")
    group = _group_of(module, config)
    given = group["weights"]
    # A plan is made from headers; zero points and orders of columns may be other than it says.
    if (given["symmetric"] and weight.zeros is not None) or (given["actorder"] is None and weight.index is not None):
        unholdable(NAME, module, scheme, "zero points and an order of columns only where the plan has them")
    parts = _integers(weight, group) if isinstance(scheme.weight.element, Int) else _floats(weight)
    fine = weight.scales[0]
    if scheme.weight.scales[0].type == "float":
        fine = _flat(weight, exactly(NAME, module, fine, fine.dtype, torch.float32))
    parts["weight_scale"] = fine
    if len(weight.scales) == 2:
        parts["weight_global_scale"] = divisor_of(module, weight.scales[0], weight.scales[1]).reshape(1)
    if given["actorder"] is not None:
        in_order = torch.arange(weight.shape[1], dtype=torch.int32) // given["group_size"]
        parts["weight_g_idx"] = in_order if weight.index is None else weight.index
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


def _group_of(module: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config group that names the module; the first is for all linear layers that none names."""
    groups: dict[str, dict[str, Any]] = config["config_groups"]
    return next((group for group in groups.values() if module in group["targets"]), groups["group_0"])


def _flat(weight: QuantizedTensor, part: torch.Tensor) -> torch.Tensor:
    """What there is one number of for the whole tensor is stored as [1]."""
    return part.reshape(1) if isinstance(weight.scheme.weight.scales[0].granularity, PerTensor) else part


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


def _integers(weight: QuantizedTensor, group: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    import torch

    element, given = weight.scheme.weight.element, group["weights"]
    bits, middle = element.bits, 1 << (element.bits - 1)
    codes = affine_parts(weight)[0]
    zeros = None if given["symmetric"] else _zeros(weight, middle)
    if group["format"] != "pack-quantized":
        parts = {"weight": (codes.to(torch.int16) - middle).to(torch.int8)}
    else:
        parts = {"weight_packed": words(codes, bits), "weight_shape": torch.tensor(weight.shape, dtype=torch.int64)}
        if zeros is not None and given["strategy"] in ("channel", "group"):
            stored = (zeros.to(torch.int16) + middle).to(torch.uint8)
            return parts | {"weight_zero_point": words(stored.t().contiguous(), bits).t().contiguous()}
    return parts if zeros is None else parts | {"weight_zero_point": _flat(weight, zeros)}


def _zeros(weight: QuantizedTensor, middle: int) -> torch.Tensor:
    """int8 zero points of signed codes, one for each scale; 0 where the weight has none."""
    import torch

    element, zeros = weight.scheme.weight.element, weight.zeros
    assert isinstance(element, Int)
    if zeros is None:
        missing = 0 if element.signed else -middle
        return torch.full(weight.scales[0].shape, missing, dtype=torch.int8)
    return (zeros.to(torch.int16) - (0 if element.signed else middle)).to(torch.int8)


def _floats(weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    return {"weight" if weight.scheme.weight.bits == 8 else "weight_packed": weight.codes}
