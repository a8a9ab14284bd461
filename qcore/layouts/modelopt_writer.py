"""ModelOpt's config and tensors, made from schemes and weights: the inverse of what its method reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qcore.elements import Granularity, Group, PerChannel, Tile
from qcore.layouts.affine import exactly, multiplier_of, unholdable
from qcore.method import WRITER, ModulePlan, is_embedding, left_whole
from qcore.scheme import Scheme, TensorScheme

if TYPE_CHECKING:
    import torch

    from qcore.checkpoint.kv_scales import KvScales
    from qcore.tensor import LayerTensors

NAME = "modelopt"
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
"""What readers ask for: the format's name, and the version whose rules for `exclude_modules` are meant."""
SIDES = (128, 16, 32, 64, 256)
"""Of square blocks; no file states them, but the shape of the scales tells. Of several that fit the first is the usual one."""
_STATIC = "fp8-tensor"
_NVFP4, _MXFP4 = "e2m1-g16:e4m3fn+tensor", "e2m1-g32:e8m0"


@dataclass(frozen=True)
class Row:
    """An algorithm: its word in the config, the weight and the inputs that it stands for. sized: groups or blocks of other
    sizes are the same. multiplies: its layers may have a pre_quant_scale."""

    word: str
    weight: str
    inputs: tuple[str | None, ...] = (None,)
    sized: bool = False
    multiplies: bool = False


ROWS = (
    Row("FP8", "fp8-tensor", (_STATIC, None)),
    Row("FP8_PER_CHANNEL_PER_TOKEN", "fp8-channel", ("fp8-token-dyn", _STATIC)),
    Row("fp8_pb_wo", "fp8-block128", sized=True),
    Row("NVFP4", _NVFP4, (f"{_NVFP4}-dyn",), sized=True),
    Row("NVFP4_AWQ", _NVFP4, (f"{_NVFP4}-dyn",), sized=True, multiplies=True),
    Row("W4A16_NVFP4", _NVFP4, sized=True),
    Row("W4A8_NVFP4_FP8", _NVFP4, (_STATIC,), sized=True),
    Row("mxfp4", _MXFP4, ("e2m1-g32:e8m0ceil-dyn",)),
    Row("W4A8_MXFP4_FP8", _MXFP4, (_STATIC, f"{_STATIC}-dyn")),
    Row("MXFP8", "fp8-g32:e8m0", ("fp8-g32:e8m0ceil-dyn",)),
    Row("W4A16_AWQ", "int4-g128-sym", sized=True, multiplies=True),
    Row("W4A8_AWQ", "int4-g128-sym", (_STATIC,), sized=True, multiplies=True),
    Row("W8A16", "int8-channel-sym"),
    Row("W8A8_SQ_PER_CHANNEL", "int8-channel-sym", ("int8-tensor-sym",), multiplies=True),
)
"""Of two that fit, the first is the usual one."""
_BY_WORD = {row.word: row for row in ROWS}


def config_of(plan: Mapping[str, ModulePlan], word: str = "") -> dict[str, Any]:
    """The quantization config of config.json; MIXED_PRECISION where layers differ. word: the algorithm of all of them.

    Raises Refused (not-representable).
    """
    layers = {m: _layer(m, entry, entry.scheme, word) for m, entry in plan.items() if entry.scheme is not None}
    if not layers:
        unholdable(NAME, "quant_algo", "no quantized layer", "quantized weights, beside which a kv cache may stand")
    different = Counter(tuple(layer.items()) for layer in layers.values())
    config: dict[str, Any] = {
        "quant_method": NAME,
        "producer": {**_PRODUCER, "writer": WRITER},
        "ignore": left_whole(plan) + [m for m, entry in plan.items() if entry.scheme is None and is_embedding(m)],
        "config_groups": {
            f"group_{i}": {
                **_group(dict(layer)),
                "targets": ["Linear"]
                if len(different) == 1
                else [m for m in layers if tuple(layers[m].items()) == layer],
            }
            for i, layer in enumerate(different)
        },
    }
    if len(different) == 1:
        return config | dict(next(iter(different)))
    return config | ({"quant_algo": "MIXED_PRECISION", "quantized_layers": layers} if layers else {"quant_algo": None})


def side_file(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same as hf_quant_config.json has it."""
    kept = ("quant_algo", "group_size", "has_zero_point", "pre_quant_scale", "quantized_layers")
    return {
        "producer": config["producer"],
        "quantization": {
            **{key: config[key] for key in kept if key in config},
            "kv_cache_quant_algo": "FP8" if config.get("kv_cache_scheme") else None,
            "exclude_modules": config["ignore"],
        },
    }


def kv_cache_of(scheme: TensorScheme, scales: Mapping[str, KvScales]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """kv_cache_scheme, and the scales beside the projections. Raises Refused (not-representable)."""
    tensors = {}
    for attention, own in scales.items():
        for part, side in (("k", own.k), ("v", own.v)):
            if side.scale.numel() != 1 or side.zero is not None:
                unholdable(NAME, attention, "scales by head or zero points of a kv cache", "one scale")
            tensors[f"{attention}.{part}_proj.{part}_scale"] = side.scale.reshape(())
    if str(scheme) != _STATIC:
        unholdable(NAME, "kv_cache_scheme", scheme, _STATIC)
    return {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}, tensors


def pack_layer(module: str, layer: LayerTensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The module's tensors. Raises Refused (not-representable)."""
    import torch

    row = _BY_WORD[config.get("quantized_layers", {}).get(module, config)["quant_algo"]]
    weight, scheme = layer.weight, layer.weight.scheme
    fine = weight.scales[0]
    parts = {"weight": weight.codes, "weight_scale": fine}
    if scheme.weight.scales[0].type == "float":
        parts["weight_scale"] = _shaped(exactly(NAME, module, fine, torch.float32), row)
    if row.weight.startswith("int4"):
        parts["weight"] = _by_rows(weight.codes)
    if len(weight.scales) == 2:
        parts["weight_scale_2"] = multiplier_of(NAME, module, fine, weight.scales[1]).reshape(())
    elif row.word == "W4A8_AWQ":  # the range of the fp8 copy that a kernel makes of the weight
        parts["weight_scale_2"] = weight.dequantize().abs().amax() / 448
    if layer.input_scale is not None:
        parts["input_scale"] = layer.input_scale.to(torch.float32).reshape(())
    elif scheme.input is not None and len(scheme.input.scales) == 2:
        unholdable(NAME, module, "no scale for the whole input", "a calibrated one")
    if layer.input_multiplier is not None:
        if not row.multiplies:
            fitting = ", ".join(row.word for row in ROWS if row.multiplies)
            unholdable(NAME, module, f"a vector that multiplies the input, under {row.word}", f"one of {fitting}")
        parts["pre_quant_scale"] = layer.input_multiplier
    if layer.bias is not None:
        parts["bias"] = layer.bias
    return {f"{module}.{part}": tensor for part, tensor in parts.items()}


def _layer(module: str, entry: ModulePlan, scheme: Scheme, word: str) -> dict[str, Any]:
    """What quantized_layers has of a layer."""
    rows, columns = entry.matrix
    channel = isinstance(scheme.weight.granularity, PerChannel) and scheme.weight.bits == 4
    if channel:  # one group a row
        level = replace(scheme.weight.scales[0], granularity=Group(columns))
        scheme = replace(scheme, weight=replace(scheme.weight, scales=(level,)))
    usual = _usual(scheme)
    rows_of = [row for row in ROWS if _holds(row, usual if row.sized else scheme) and word in ("", row.word.upper())]
    if len(entry.shape) != 2 or not rows_of:
        wanted = f"what {word} stands for" if word else f"one of {', '.join(_BY_WORD)}"
        unholdable(NAME, module, f"{scheme} of shape {list(entry.shape)}", wanted)
    row, grid = rows_of[0], scheme.weight.granularity
    if isinstance(grid, Group) and columns % grid.size:
        unholdable(NAME, module, f"groups of {grid.size} in {columns} columns", "groups that divide them")
    if isinstance(grid, Tile) and grid.rows not in SIDES:
        unholdable(NAME, module, scheme, f"blocks whose side is one of {', '.join(map(str, SIDES))}")
    if row.weight.startswith("int4") and rows % 2:
        unholdable(NAME, module, f"{rows} rows", "an even number")
    layer: dict[str, Any] = {"quant_algo": row.word}
    if isinstance(grid, Group) and row.word != "mxfp4":
        layer["group_size"] = grid.size
    return layer | ({"has_zero_point": False, "pre_quant_scale": True} if row.multiplies and "AWQ" in row.word else {})


def _usual(scheme: Scheme) -> Scheme:
    """The scheme in the sizes of groups and blocks that ROWS has."""
    fine, *whole = scheme.weight.scales
    grid = fine.granularity
    usual: Granularity = Group(16 if whole else 128) if isinstance(grid, Group) else grid
    if isinstance(grid, Tile) and grid.rows == grid.cols:
        usual = Tile(128, 128)
    given = scheme.input
    if given is not None and given.granularity == grid and len(given.scales) == 2:
        given = replace(given, scales=(replace(given.scales[0], granularity=usual), *given.scales[1:]))
    return Scheme(replace(scheme.weight, scales=(replace(fine, granularity=usual), *whole)), given)


def _holds(row: Row, scheme: Scheme) -> bool:
    return str(scheme.weight) == row.weight and (None if scheme.input is None else str(scheme.input)) in row.inputs


def _group(layer: Mapping[str, Any]) -> dict[str, Any]:
    """A config group, which says less than quant_algo does, and is there for other readers."""
    row = _BY_WORD[layer["quant_algo"]]
    sizes = {"group_size": layer["group_size"]} if "group_size" in layer else {}
    group: dict[str, Any] = {}
    for key, text in (("weights", row.weight), ("input_activations", row.inputs[0])):
        if text is None:
            continue
        scheme = TensorScheme.parse(text)
        kind = "int" if text.startswith("int") else "float"
        group[key] = {"dynamic": False, "num_bits": scheme.bits, "type": kind,
                      **(sizes if isinstance(scheme.granularity, Group) else {})}  # fmt: skip
    return group


def _shaped(scale: torch.Tensor, row: Row) -> torch.Tensor:
    """[N, G], [tiles, tiles] or [1, 1] in the dimensions that ModelOpt writes."""
    if row.weight.endswith("tensor"):
        return scale.reshape(())
    if "channel" in row.weight:
        return scale.reshape(-1)
    return scale.reshape(scale.shape[0], 1, scale.shape[1], 1) if "block" in row.weight else scale


def _by_rows(codes: torch.Tensor) -> torch.Tensor:
    """Codes + 8, two columns a byte [N, K / 2] -> two's complement nibbles of two rows a byte [N / 2, K]."""
    from qcore.bits import unpack

    nibbles = unpack(codes, 4, codes.shape[1] * 2) ^ 8
    return (nibbles[0::2] | nibbles[1::2] << 4).contiguous()
