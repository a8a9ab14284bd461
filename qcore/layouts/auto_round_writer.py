"""AutoRound's config and tensors, made from schemes and weights: the inverse of what its method reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qcore.elements import Float, Granularity, Group, Int, Level, PerChannel, PerTensor, PerToken, Tile
from qcore.layouts import awq, gptq
from qcore.layouts.affine import integer_of, plain_inputs, unholdable
from qcore.method import ModulePlan, is_embedding
from qcore.scheme import Scheme, TensorScheme

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors

NAME = "auto-round"
AWQ_BITS = (4, 5, 6, 7)
_MX = (Level(Group(32), "e8m0"),)
_NV = (Level(Group(16), "e4m3fn"), Level(PerTensor()))
_ROUNDINGS = {"e8m0floor": "mx_fp", "e8m0ceil": "mx_fp_rceil"}
"""How the exponents of MX inputs are found, as act_data_type."""


def config_of(plan: Mapping[str, ModulePlan], variant: str = "") -> dict[str, Any]:
    """The commonest numbers for the whole, `extra_config` for the layers that differ or are out of the blocks."""
    numbers = {module: _numbers(module, entry, variant) for module, entry in plan.items() if entry.scheme is not None}
    kinds = {own["data_type"]: module for module, own in numbers.items()}
    if len(kinds) > 1:
        unholdable(NAME, min(kinds.values()), f"weights of {', '.join(sorted(kinds))}", "one kind of numbers for all")
    common = dict(Counter(tuple(own.items()) for own in numbers.values()).most_common(1)[0][0])
    config = {"quant_method": NAME, **common, **_packing(plan, common, variant)}
    blocks = sorted({module[: _block_end(module)] for module in numbers if _block_end(module)})
    extra: dict[str, dict[str, Any]] = {}
    for module, entry in plan.items():
        inside = any(module.startswith(block) for block in blocks)
        if module in numbers and not inside:
            extra[module] = numbers[module]
        elif module in numbers:
            extra[module] = {key: value for key, value in numbers[module].items() if value != common[key]}
        elif inside and not is_embedding(module) and entry.scheme is None:
            extra[module] = {"bits": 16, "act_bits": 16, "data_type": "float"}
    extra = {module: own for module, own in extra.items() if own}
    config["block_name_to_quantize"] = ",".join(block.rstrip(".") for block in blocks)
    return {**config, "extra_config": extra} if extra else config


def pack_layer(module: str, layer: LayerTensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The module's tensors under a config that `config_of` made. Raises Refused (not-representable)."""
    plain_inputs(NAME, module, layer)
    if config["data_type"] != "int":
        return _floats(module, layer)
    own = {**config, **config.get("extra_config", {}).get(module, {})}
    packing = config["packing_format"]
    if "awq" in packing:
        settings = awq.AwqSettings(bits=own["bits"], group_size=own["group_size"], woven=True)
        return awq.pack_layer(module, layer, settings, NAME)
    rows, columns = layer.weight.shape
    if rows % 32 or columns % 32:  # without g_idx, only whole words tell how many there are
        unholdable(NAME, module, f"{rows} output and {columns} input channels", "multiples of 32")
    values = {key: own[key] for key in ("bits", "group_size", "sym")}
    v1 = packing == "auto_round:auto_gptq"
    parts = gptq.pack_layer(module, layer, gptq.GptqSettings(**values, v1=v1), NAME)
    del parts[f"{module}.g_idx"]
    return parts


def _block_end(module: str) -> int:
    """Where the name of a layer's block ends: before its number, which is kept out. 0 where it has none."""
    parts = module.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return sum(len(part) + 1 for part in parts[:number])


def _numbers(module: str, entry: ModulePlan, variant: str) -> dict[str, Any]:
    """One layer's numbers in AutoRound's words. Raises Refused (not-representable)."""
    scheme = entry.scheme
    assert scheme is not None
    if isinstance(scheme.weight.element, Int):
        bits, size = integer_of(NAME, module, scheme, AWQ_BITS if "awq" in variant else gptq.BITS)
        own: dict[str, Any] = {"bits": bits, "group_size": size, "sym": scheme.weight.zero is None, "data_type": "int",
                             "act_bits": 16}  # fmt: skip
    else:
        own = _float_numbers(module, scheme)
    if variant and variant.partition(":")[0] != ("auto_round" if own["data_type"] == "int" else own["data_type"]):
        unholdable(NAME, module, scheme, f"weights of {variant}")
    return own


def _float_numbers(module: str, scheme: Scheme) -> dict[str, Any]:
    weight, given = scheme.weight, scheme.input
    element, levels = weight.element, weight.scales
    own: dict[str, Any] = {"bits": weight.bits, "sym": True, "act_bits": 16}
    if levels == _MX and element in (Float("e2m1"), Float("e4m3fn")):
        own |= {"group_size": 32, "data_type": "mx_fp"}
        for rounding, name in _ROUNDINGS.items():
            for inputs in (Float("e2m1"), Float("e4m3fn")):
                if given == TensorScheme(inputs, (Level(Group(32), rounding),), dynamic=True):  # type: ignore[arg-type]
                    return own | _inputs(inputs.bits, name, 32)
    elif levels == _NV and element == Float("e2m1"):
        own |= {"group_size": 16, "data_type": "nv_fp"}
        if given == TensorScheme(element, _NV, dynamic=True):
            return own | _inputs(4, "nv_fp4_with_static_gs", 16)
    elif element in (Float("e4m3fn"), Float("e5m2")) and len(levels) == 1 and levels[0].type == "float":
        size = _sizes(levels[0].granularity) or -1  # its own config class refuses the 0 of one scale for all
        own |= {"group_size": size, "data_type": "fp"}
        fits = given is not None and len(given.scales) == 1 and replace(given, dynamic=False) == TensorScheme(
            element, (Level(given.scales[0].granularity),)
        )  # fmt: skip
        if given is not None and fits and (given.dynamic or given.granularity == PerTensor()):
            width = _sizes(given.scales[0].granularity)
            if isinstance(width, int):
                return own | _inputs(8, "fp", width) | {"act_dynamic": given.dynamic}
    else:
        unholdable(NAME, module, scheme, "MX, NVFP4 or 8-bit floats under float scales")
    if given is not None:
        unholdable(NAME, module, scheme, "inputs that are quantized as the weight is, in a way that AutoRound has")
    return own


def _inputs(bits: int, name: str, size: int) -> dict[str, Any]:
    return {"act_bits": bits, "act_data_type": name, "act_group_size": size, "act_sym": True, "act_dynamic": True}


def _sizes(grid: Granularity) -> int | tuple[int, int]:
    if isinstance(grid, Tile):
        return grid.rows, grid.cols
    return grid.size if isinstance(grid, Group) else {PerTensor: 0, PerChannel: -1, PerToken: -1}[type(grid)]


def _packing(plan: Mapping[str, ModulePlan], common: Mapping[str, Any], variant: str) -> dict[str, Any]:
    """What names the tensors' form, as the tool chooses it."""
    schemes = [entry.scheme for entry in plan.values() if entry.scheme is not None]
    if common["data_type"] == "int":
        symmetric = all(scheme.weight.zero is None for scheme in schemes)
        known = all(scheme.weight.bits in (2, 3, 4, 8) for scheme in schemes)
        return {"packing_format": variant or ("auto_round:auto_gptq" if symmetric and known else "auto_round")}
    if common["data_type"] != "fp":
        return {"packing_format": "auto_round:llm_compressor"}
    elements = {scheme.weight.element for scheme in schemes}
    if len(elements) > 1:
        unholdable(NAME, next(iter(plan)), "e4m3 and e5m2 beside each other", "one of them")
    static = common["act_bits"] < 16 and not common["act_dynamic"]
    return {
        "packing_format": "auto_round:fp8_static" if static else "auto_round:fp8",
        "fmt": "e5m2" if elements == {Float("e5m2")} else "e4m3",
        "activation_scheme": "static" if static else "dynamic",
    }


def _floats(module: str, layer: LayerTensors) -> dict[str, torch.Tensor]:
    from qcore.layouts.compressed_writer import divisor_of

    weight, scheme = layer.weight, layer.weight.scheme
    grid, fine = scheme.weight.scales[0].granularity, weight.scales[0]
    parts = {"weight" if scheme.weight.bits == 8 else "weight_packed": weight.codes}
    if isinstance(grid, PerChannel | PerTensor):
        fine = fine.flatten().expand(weight.shape[0]).contiguous()
    parts["weight_scale_inv" if isinstance(grid, Tile) else "weight_scale"] = fine
    if len(weight.scales) == 2:
        parts["weight_global_scale"] = divisor_of(module, weight.scales[0], weight.scales[1]).reshape(1)
    if scheme.input is not None and layer.input_scale is not None:
        whole = len(scheme.input.scales) == 2
        scale = (1 / layer.input_scale.double()).float() if whole else layer.input_scale
        parts["input_global_scale" if whole else "input_scale"] = scale.reshape(1)
    if layer.bias is not None:
        parts["bias"] = layer.bias
    return {f"{module}.{part}": tensor for part, tensor in parts.items()}
