"""Quark's config and tensors, made from schemes and weights: the inverse of what its method reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qcore.elements import Float, Granularity, Group, Int, PerChannel, PerTensor, PerToken, Tile
from qcore.layouts.affine import exactly, multiplier_of, unholdable
from qcore.layouts.quark_config import KINDS, Spec, input_scheme, weight_scheme
from qcore.layouts.quark_integers import pack_integers
from qcore.method import WRITER, ModulePlan, is_embedding, left_whole
from qcore.scheme import Scheme, TensorScheme

if TYPE_CHECKING:
    import torch

    from qcore.checkpoint.kv_scales import KvScales
    from qcore.tensor import LayerTensors

NAME = "quark"
_FLOATS = {kind.element: dtype for dtype, kind in KINDS.items() if isinstance(kind.element, Float)}
_QSCHEMES: dict[type[Granularity], tuple[str, str]] = {
    PerTensor: ("per_tensor", "PerTensorMinMaxObserver"),
    PerChannel: ("per_channel", "PerChannelMinMaxObserver"),
    PerToken: ("per_channel", "PerChannelMinMaxObserver"),
    Group: ("per_group", "PerGroupMinMaxObserver"),
    Tile: ("per_block", "PerBlockMXObserver"),
}
_ROUNDINGS = {"e8m0": "even", "e8m0floor": "floor", "e8m0ceil": "ceil"}
_EXPORT = {"kv_cache_group": [], "min_kv_scale": 0.0, "pack_method": "reorder", "weight_format": "real_quantized",
           "weight_merge_groups": None}  # fmt: skip


def config_of(plan: Mapping[str, ModulePlan]) -> dict[str, Any]:
    """The quantization config. Raises Refused (not-representable)."""
    schemes = {module: _checked(module, entry) for module, entry in plan.items() if entry.scheme is not None}
    if not schemes:
        unholdable(
            NAME, "global_quant_config", "no quantized layer", "quantized weights, beside which a kv cache may stand"
        )
    common = Counter(schemes.values()).most_common(1)
    usual = common[0][0]
    return {
        "quant_method": NAME,
        "version": WRITER,
        "quant_mode": "eager_mode",
        "global_quant_config": _layer(usual),
        "layer_quant_config": {module: _layer(scheme) for module, scheme in schemes.items() if scheme != usual},
        "layer_type_quant_config": {},
        "kv_cache_quant_config": {},
        "kv_cache_post_rope": False,
        "softmax_quant_spec": None,
        "algo_config": None,
        "exclude": left_whole(plan),
        "export": _EXPORT,
    }


def kv_cache_of(scheme: TensorScheme, scales: Mapping[str, KvScales]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What declares an fp8 cache, and the scales of the projections' outputs. Raises Refused (not-representable)."""
    if str(scheme) != "fp8-tensor":
        unholdable(NAME, "kv_cache_quant_config", scheme, "fp8-tensor")
    tensors = {}
    for attention, own in scales.items():
        for part, side in (("k", own.k), ("v", own.v)):
            if side.scale.numel() != 1 or side.zero is not None:
                unholdable(NAME, attention, "scales by head or zero points of a kv cache", "one scale")
            tensors[f"{attention}.{part}_proj.output_scale"] = side.scale.reshape(())
    groups = [f"*{part}_proj" for part in "kv"]
    output = {**_layer(None), "output_tensors": _specs(scheme, inputs=True)}
    return {
        "export": {**_EXPORT, "kv_cache_group": groups},
        "kv_cache_quant_config": dict.fromkeys(groups, output),
    }, tensors


def pack_layer(module: str, layer: LayerTensors) -> dict[str, torch.Tensor]:
    """The module's tensors. Raises Refused (not-representable)."""
    import torch

    weight, scheme = layer.weight, layer.weight.scheme
    if layer.input_multiplier is not None:
        unholdable(NAME, module, "a vector that multiplies the input", "none")
    grids = [level.granularity for level in scheme.weight.scales]
    integer = isinstance(scheme.weight.element, Int)
    parts = pack_integers(weight) if integer else {"weight": weight.codes}
    scales = []
    for level, scale in zip(scheme.weight.scales, weight.scales, strict=True):
        kept = exactly(NAME, module, scale, scale.dtype, torch.float32) if scale.dtype != torch.float64 else scale
        kept = kept.t().contiguous() if integer and isinstance(grids[0], Group) else kept
        shapes: dict[type[Granularity], tuple[int, ...]] = {PerTensor: (), PerChannel: (-1,)}
        scales.append(kept.reshape(shapes.get(type(level.granularity), kept.shape)))
    if len(scales) == 2:
        scales[1] = multiplier_of(NAME, module, weight.scales[0], weight.scales[1]).reshape(())
    if integer and len(scales) == 2:  # int4 of fp8: the coarser scale is the fp8's, and comes first
        parts |= {"weight_scale": scales[1], "weight_scale_2": scales[0]}
        parts["weight_zero_point_2"] = parts.pop("weight_zero_point")
    else:
        parts |= dict(zip(("weight_scale", "weight_scale_2"), scales, strict=False))
    two_levels = scheme.input is not None and len(scheme.input.scales) == 2
    if layer.input_scale is not None:
        parts["input_scale_2" if two_levels else "input_scale"] = layer.input_scale.to(torch.float32).reshape(())
    elif two_levels:
        unholdable(NAME, module, "no scale for the whole input", "a calibrated one")
    if scheme.input is not None and isinstance(scheme.input.element, Int) and not scheme.input.dynamic:
        zero = torch.zeros(1, dtype=torch.int8) if layer.input_zero is None else layer.input_zero
        parts["input_zero_point"] = zero.to(torch.int8).reshape(())
    if layer.bias is not None:
        parts["bias"] = layer.bias
    return {f"{module}.{part}": tensor for part, tensor in parts.items()}


def _checked(module: str, entry: ModulePlan) -> Scheme:
    """The scheme, where Quark has one that means the same."""
    scheme = entry.scheme
    assert scheme is not None
    wanted = "a linear layer in one of Quark's schemes"
    specs = _layer(scheme)
    weight, given = (_parsed(specs[key]) for key in ("weight", "input_tensors"))
    same = weight_scheme(weight) == _normal(scheme.weight) and input_scheme(given) == scheme.input
    if not same or is_embedding(module) or len(entry.shape) != 2:
        unholdable(NAME, module, f"{scheme} of shape {list(entry.shape)}", wanted)
    rows, columns = entry.matrix
    grid, bits = scheme.weight.granularity, scheme.weight.bits
    if isinstance(grid, Group | Tile):
        sizes = (1, grid.size) if isinstance(grid, Group) else (grid.rows, grid.cols)
        if rows % sizes[0] or columns % sizes[1]:
            unholdable(NAME, module, f"{grid} in {rows} x {columns}", "groups and blocks that divide the weight")
    if isinstance(scheme.weight.element, Int) and bits == 4 and (rows % 8 or columns % 8):
        unholdable(NAME, module, f"{rows} x {columns}", "rows and columns in multiples of 8")
    return scheme


def _normal(scheme: TensorScheme) -> TensorScheme:
    """Asymmetric integers are written unsigned, whatever they are held as."""
    element = scheme.element
    if isinstance(element, Int) and scheme.zero == "stored":
        element = Int(element.bits, signed=False)
    return TensorScheme(element, scheme.scales, scheme.zero, scheme.ordered)


def _parsed(specs: dict[str, Any] | list[dict[str, Any]] | None) -> Spec | list[Spec] | None:
    if isinstance(specs, list):
        return [Spec(**spec) for spec in specs]
    return None if specs is None else Spec(**specs)


def _layer(scheme: Scheme | None) -> dict[str, Any]:
    return {
        "weight": None if scheme is None else _specs(scheme.weight, inputs=False),
        "input_tensors": None if scheme is None or scheme.input is None else _specs(scheme.input, inputs=True),
        "output_tensors": None,
        "bias": None,
        "target_device": None,
    }


def _specs(scheme: TensorScheme, *, inputs: bool) -> dict[str, Any] | list[dict[str, Any]]:
    """The spec of a tensor, or the two of its levels; of what Quark does not have, one that means something else."""
    element, levels = scheme.element, scheme.scales
    dtype = _FLOATS.get(element, "") if isinstance(element, Float) else ""
    if isinstance(element, Int):
        dtype = f"{'' if inputs or scheme.zero is None else 'u'}int{element.bits}"
    if len(levels) == 2 and isinstance(element, Int):
        fp8 = TensorScheme(Float("e4m3fn"), levels[1:])
        return [_spec("fp8_e4m3", fp8, inputs), _spec(dtype, TensorScheme(element, levels[:1]), inputs)]
    if len(levels) == 2:
        whole = {**_spec("fp8_e4m3", TensorScheme(Float("e4m3fn"), levels[1:]), inputs), "is_scale_quant": True}
        return [{**_spec(dtype, scheme, inputs), "scale_type": "float32", "scale_format": "float32"}, whole]
    return _spec(dtype, scheme, inputs)


def _spec(dtype: str, scheme: TensorScheme, inputs: bool) -> dict[str, Any]:
    level = scheme.scales[0] if scheme.scales else None
    grid = level.granularity if level else PerTensor()
    qscheme, observer = _QSCHEMES.get(type(grid), ("", ""))
    small = isinstance(scheme.element, Float) and scheme.bits < 8
    rounding = _ROUNDINGS.get(level.type) if level else None
    axes = {"per_channel": 1 if inputs else 0, "per_group": -1}
    return {
        "dtype": dtype,
        "qscheme": qscheme,
        "ch_axis": axes.get(qscheme),
        "group_size": grid.size if isinstance(grid, Group) else None,
        "block_size": [grid.rows, grid.cols] if isinstance(grid, Tile) else None,
        "is_dynamic": scheme.dynamic,
        "is_scale_quant": False,
        "symmetric": None if small else scheme.zero is None,
        "scale_type": "float",
        "scale_format": "e8m0" if rounding else None,
        "scale_calculation_mode": rounding,
        "observer_cls": "PerBlockMXObserver" if small else observer,
        "round_method": "half_even",
        "zero_point_type": "int32",
        "mx_element_dtype": None,
        "enable_buffer_reuse": False,
        "max_input_numel": 4194304,
    }
