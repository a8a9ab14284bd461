"""fp8 checkpoints made from schemes and weights, as transformers reads them: per tensor, in blocks, and FBGEMM's by channel.

Sources: transformers' FineGrainedFP8Config and FP8Linear, FbgemmFp8Config and FbgemmFp8Linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qcore.elements import Float, Granularity, Group, Level, PerChannel, PerTensor, PerToken, ScaleType, Tile
from qcore.layouts.affine import exactly, unholdable
from qcore.method import CheckpointFiles, ModulePlan, is_embedding
from qcore.refusal import bad_file
from qcore.scheme import Scheme, TensorScheme

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors

WRITTEN = ("block", "tensor", "channel")
DEFAULT_BOUND = 1200.0
"""FBGEMM's activation_scale_ub where a config does not state it, as transformers has it."""
LARGEST = 3.4028234663852886e38
"""float32's largest number."""
_KINDS: dict[type[Granularity], str] = {Tile: "block", Group: "block", PerTensor: "tensor", PerChannel: "channel"}
_AT_RUN_TIME: dict[tuple[str, ScaleType], tuple[ScaleType, ...]] = {
    ("tensor", "float"): ("float",),
    ("block", "float"): ("float", "e8m0ceil"),  # the second as DeepSeek-V3.1, whose powers of two are stored as floats
    ("block", "e8m0"): ("e8m0ceil",),
}
"""How inputs may be scaled at run time, by the variant and the type of the weight's scales: scale_fmt is one for both."""
_FP8 = Float("e4m3fn")


def grid_of(block: tuple[int, int]) -> Granularity:
    """What weight_block_size means; blocks of one row are groups."""
    return Group(block[1]) if block[0] == 1 else Tile(*block)


def stacked_scale(name: str) -> str:
    """The scales of stacked experts."""
    return f"{name}_scale_inv"


def stacked_input(name: str) -> str:
    """The scales of stacked experts' inputs."""
    return f"{name}_activation_scale"


def stacked_parts(name: str) -> tuple[str, str]:
    """What stands beside stacked experts."""
    return stacked_scale(name), stacked_input(name)


def divided(files: CheckpointFiles, name: str, layer: LayerTensors) -> LayerTensors:
    """The layer whose scales, in the tensor of this name, divide: 1 / s in float64, with which a float32 product is as exact
    as the division. Raises Refused (bad-content)."""
    (stored,) = layer.weight.scales
    if not bool((stored > 0).all()):
        raise bad_file("bad-content", "this scale divides, and is positive", file=files.source.tensors[name].file,
                       tensor=name, field="values", found=float(stored.min()), expected="a positive number")  # fmt: skip
    return replace(layer, weight=replace(layer.weight, scales=(1 / stored.double(),)))


def config_of(plan: Mapping[str, ModulePlan], variant: str = "") -> dict[str, Any]:
    """One scheme for all layers; those that are not quantized are named. Raises Refused (not-representable)."""
    schemes: dict[Scheme, str] = {}
    for module, entry in plan.items():
        if entry.scheme is not None:
            schemes.setdefault(entry.scheme, module)
            if is_embedding(module):
                unholdable("fp8", module, "a quantized embedding", "linear layers")
    if len(schemes) > 1:
        unholdable("fp8", list(schemes.values())[1], " and ".join(map(str, schemes)), "one scheme for all layers")
    ((scheme, module),) = schemes.items() or [(_default(variant), "")]
    kind = _kind(module, scheme, variant)
    kept = [name for name, entry in plan.items() if entry.scheme is None and not is_embedding(name)]
    quantized = {name for name, entry in plan.items() if entry.scheme is not None}
    skipped = list(dict.fromkeys([*kept, *(() if "lm_head" in quantized else ("lm_head",))]))
    given = scheme.input
    assert given is not None
    if kind == "channel":
        return {"quant_method": "fbgemm_fp8", "activation_scale_ub": given.bound or LARGEST,
                "modules_to_not_convert": skipped}  # fmt: skip
    fine = scheme.weight.scales[0]
    return {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic" if given.dynamic else "static",
        "weight_block_size": _block(fine.granularity),
        "scale_fmt": "float" if {fine.type, given.scales[0].type} == {"float"} else "ue8m0",
        "modules_to_not_convert": skipped,
    }  # fmt: skip


def _block(grid: Granularity) -> list[int] | None:
    if isinstance(grid, Tile):
        return [grid.rows, grid.cols]
    return [1, grid.size] if isinstance(grid, Group) else None


def _default(variant: str) -> Scheme:
    """What a checkpoint without quantized layers says."""
    return Scheme.parse({"channel": "FP8_DYNAMIC", "tensor": "FP8"}.get(variant, "FP8_BLOCK"))


def _kind(module: str, scheme: Scheme, variant: str) -> str:
    """The variant that holds the scheme. Raises Refused (not-representable)."""
    weight, given = scheme.weight, scheme.input
    grid = weight.granularity
    kind = "" if grid is None else _KINDS.get(type(grid), "")
    fits = weight.element == _FP8 and len(weight.scales) == 1 and kind and kind == (variant or kind)
    if not fits or weight.scales[0].type not in (("float", "e8m0") if kind == "block" else ("float",)):
        unholdable("fp8", module, scheme, f"e4m3 with scales of the {variant or 'tensor, its blocks or its rows'}")
    if kind == "channel":
        inputs = [TensorScheme(_FP8, (Level(PerToken()),), dynamic=True, bound=None if given is None else given.bound)]
    else:
        levels = [Level(_by_run(grid), type) for type in _AT_RUN_TIME[kind, weight.scales[0].type]]
        inputs = [
            TensorScheme(_FP8, (Level(PerTensor()),)),
            *(TensorScheme(_FP8, (own,), dynamic=True) for own in levels),
        ]
    if given not in inputs:
        unholdable("fp8", module, scheme, f"inputs of {' or '.join(map(str, inputs))}")
    return kind


def _by_run(grid: Granularity | None) -> Granularity:
    """What shares a scale of the inputs that is found at run time."""
    if isinstance(grid, Tile):
        return Group(grid.cols)
    return grid if isinstance(grid, Group) else PerTensor()


def pack_layer(module: str, layer: LayerTensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The module's tensors. Raises Refused (not-representable)."""
    import torch

    if layer.input_multiplier is not None:
        unholdable("fp8", module, "a vector that multiplies the input", "none")
    weight, fbgemm = layer.weight, config["quant_method"] == "fbgemm_fp8"
    fine, kind = weight.scales[0], weight.scheme.weight.scales[0].type
    scale = fine.view(torch.float8_e8m0fnu) if kind == "e8m0" else exactly("fp8", module, fine, torch.float32)
    if isinstance(weight.scheme.weight.granularity, PerTensor) and len(weight.shape) == 2:
        scale = scale.reshape(())
    stacked = len(weight.shape) == 3
    if stacked and (fbgemm or layer.bias is not None):
        unholdable("fp8", module, "stacked experts with a bias or scales by channel", "experts one by one")
    codes, beside, given = (
        (module, stacked_scale(module), stacked_input(module)) if stacked
        else (f"{module}.weight", f"{module}.weight_scale{'' if fbgemm else '_inv'}", f"{module}.activation_scale")
    )  # fmt: skip
    tensors = {codes: weight.codes, beside: scale}
    if layer.input_scale is not None:
        number = exactly("fp8", module, layer.input_scale, torch.float32)
        tensors[given] = number.flatten() if stacked else number.reshape(())
    return tensors if layer.bias is None else {**tensors, f"{module}.bias": layer.bias}
