"""torchao's config, records and tensors, made from schemes and weights: the inverse of what its method reads.

A weight goes into the first class of `WRITTEN` that holds it, or into the one that is asked for. Sources: torchao's
quantize_/workflows, prototype/mx_formats, prototype/safetensors and core/config.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qcore.elements import Float, Granularity, Group, Int, Level, PerChannel, PerTensor, PerToken
from qcore.layouts.affine import affine_parts, exactly, unholdable, words
from qcore.method import ModulePlan, is_embedding
from qcore.scheme import Scheme, TensorScheme

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors, QuantizedTensor

NAME = "torchao"
_DTYPES = {"e4m3fn": "float8_e4m3fn", "e5m2": "float8_e5m2", "e2m1": "float4_e2m1fn_x2"}
_MODES = {"e8m0": "EVEN", "e8m0floor": "FLOOR", "e8m0ceil": "RCEIL"}
_TOKENS = TensorScheme.parse("int8-token-asym-dyn")
_FP8_TOKENS = TensorScheme.parse("fp8-token-dyn")
_NVFP4_INPUTS = TensorScheme(Float("e2m1"), (Level(Group(16), "e4m3fn"), Level(PerTensor())), dynamic=True)


@dataclass(frozen=True)
class Form:
    """How torchao holds a weight: the attributes of its class, its parts, and the config by which torchao makes it.

    dtype: the attribute that names the type that it is computed in, if the class has one.
    """

    data: dict[str, Any]
    parts: tuple[str, ...]
    config: dict[str, Any]
    dtype: str = "dtype"


Shape = tuple[int, int]


def _object(kind: str, **data: Any) -> dict[str, Any]:
    """An object as both JSON encodings of torchao have it."""
    return {"_type": kind, "_data": data}


def _named(kind: str, name: str) -> dict[str, Any]:
    """An enum or a dtype."""
    return {"_type": kind, "_data": name}


def _config(kind: str, _version: int = 2, /, **data: Any) -> dict[str, Any]:
    return {"_type": kind, "_version": _version, "_data": data}


def _grain(grid: Granularity, shape: Shape) -> tuple[list[int], dict[str, Any]] | None:
    """block_size and granularity; None where torchao has no word for it."""
    rows, columns = shape
    if isinstance(grid, PerTensor):
        return [rows, columns], _object("PerTensor")
    if isinstance(grid, PerChannel):
        return [1, columns], _object("PerRow", dim=-1)
    if isinstance(grid, Group) and columns % grid.size == 0:
        return [1, grid.size], _object("PerGroup", group_size=grid.size)
    return None


def _int8(scheme: Scheme, shape: Shape) -> Form | None:
    weight, given = scheme.weight, scheme.input
    found = _grain(weight.scales[0].granularity, shape)
    if weight != TensorScheme(Int(8, signed=True), (Level(weight.scales[0].granularity),)) or found is None:
        return None
    block, grain = found
    data: dict[str, Any] = {"act_quant_kwargs": None, "reduce_range": False, "block_size": block}
    parts = ("zero_point", "qdata", "scale")
    if given is None:
        config = _config("Int8WeightOnlyConfig", group_size=None, granularity=grain, set_inductor_config=True)
        return Form(data, parts, config)
    grid = given.scales[0].granularity
    known = TensorScheme(Int(8, signed=True), (Level(grid),), given.zero, dynamic=True)
    if given != known or not isinstance(grid, PerToken | PerTensor) or grain["_type"] == "PerGroup":
        return None
    inputs = _object("PerRow", dim=-1) if isinstance(grid, PerToken) else _object("PerTensor")
    mapping = _named("MappingType", "SYMMETRIC" if given.zero is None else "ASYMMETRIC")
    data["act_quant_kwargs"] = _object("QuantizeTensorToInt8Kwargs", granularity=inputs, mapping_type=mapping,
                                       reduce_range=False)  # fmt: skip
    config = _config("Int8DynamicActivationInt8WeightConfig", act_mapping_type=mapping, weight_only_decode=False,
                     granularity=[inputs, grain], set_inductor_config=True, reduce_range=False)  # fmt: skip
    return Form(data, parts, config)


def _intx(scheme: Scheme, shape: Shape) -> Form | None:
    weight, given = scheme.weight, scheme.input
    found = _grain(weight.scales[0].granularity, shape)
    if not _plain_integers(weight) or found is None or given not in (None, _TOKENS):
        return None
    block, grain = found
    if grain["_type"] == "PerTensor":
        return None
    grain = _object("PerAxis", axis=0) if grain["_type"] == "PerRow" else grain
    target = _named("torch.dtype", f"int{weight.bits}")
    mapping = _named("MappingType", "SYMMETRIC" if weight.zero is None else "ASYMMETRIC")
    common: dict[str, Any] = {"intx_packing_format": _named("IntxPackingFormat", "UNPACKED_TO_INT8"),
              "intx_choose_qparams_algorithm": _named("IntxChooseQParamsAlgorithm", "AFFINE")}  # fmt: skip
    data = {"target_dtype": target, "block_size": block,
            "activation_quantization": None if given is None else "int8_asym_per_token"}  # fmt: skip
    if given is None:
        config = _config("IntxWeightOnlyConfig", weight_dtype=target, granularity=grain, mapping_type=mapping,
                         scale_dtype=None, **common)  # fmt: skip
    else:
        config = _config("Int8DynamicActivationIntxWeightConfig", weight_dtype=target, weight_granularity=grain,
                         weight_mapping_type=mapping, weight_scale_dtype=None,
                         act_mapping_type=_named("MappingType", "ASYMMETRIC"), **common)  # fmt: skip
    return Form(data, ("qdata", "scale", "zero_point"), config)


def _plain_integers(weight: TensorScheme) -> bool:
    """Integers under one level of float scales, with integer zero points or none."""
    return (
        isinstance(weight.element, Int)
        and [level.type for level in weight.scales] == ["float"]
        and weight.zero != "float"
        and not weight.ordered
    )


def _float8(scheme: Scheme, shape: Shape) -> Form | None:
    weight, given, element = scheme.weight, scheme.input, scheme.weight.element
    if not isinstance(element, Float) or element.bits != 8 or element.format not in _DTYPES:
        return None
    found = _grain(weight.scales[0].granularity, shape)
    if [level.type for level in weight.scales] != ["float"] or found is None:
        return None
    block, grain = found
    dtype, auto = _named("torch.dtype", _DTYPES[element.format]), _named("KernelPreference", "AUTO")
    data: dict[str, Any] = {"block_size": block, "mm_config": None, "act_quant_kwargs": None, "kernel_preference": auto}
    if given is None:
        config = _config("Float8WeightOnlyConfig", weight_dtype=dtype, set_inductor_config=True, granularity=grain)
        return Form(data, ("qdata", "scale"), config)
    grid = PerToken() if grain["_type"] == "PerRow" else PerTensor()
    if given != TensorScheme(element, (Level(grid),), dynamic=True, bound=given.bound) or grain["_type"] == "PerGroup":
        return None
    data["mm_config"] = _object("Float8MMConfig", emulate=False, use_fast_accum=True, pad_inner_dim=False)
    data["act_quant_kwargs"] = _object(
        "QuantizeTensorToFloat8Kwargs", float8_dtype=dtype, granularity=grain, mm_config=None, hp_value_lb=None,
        hp_value_ub=given.bound, kernel_preference=auto,
    )  # fmt: skip
    config = _config(
        "Float8DynamicActivationFloat8WeightConfig", activation_dtype=dtype, weight_dtype=dtype, granularity=[grain, grain],
        packing_format=_named("Float8PackingFormat", "PLAIN"), mm_config=data["mm_config"], activation_value_lb=None,
        activation_value_ub=given.bound, kernel_preference=auto, set_inductor_config=True, alg_id=0,
    )  # fmt: skip
    return Form(data, ("qdata", "scale"), config)


def _mx(scheme: Scheme, shape: Shape) -> Form | None:
    element, given = scheme.weight.element, scheme.input
    if not isinstance(element, Float) or element.format not in _DTYPES or given is None or shape[1] % 32:
        return None
    mode = _MODES.get(given.scales[0].type)
    inputs = TensorScheme(element, (replace(given.scales[0], granularity=Group(32)),), dynamic=True)
    if scheme.weight != TensorScheme(element, (Level(Group(32), "e8m0"),)) or given != inputs or mode is None:
        return None
    dtype, auto = _named("torch.dtype", _DTYPES[element.format]), _named("KernelPreference", "AUTO")
    scaling = _named("ScaleCalculationMode", mode)
    kwargs = _object("QuantizeTensorToMXKwargs", elem_dtype=dtype, block_size=32, scaling_mode=scaling,
                     kernel_preference=auto, is_swizzled_scales=False)  # fmt: skip
    data = {"elem_dtype": dtype, "block_size": 32, "kernel_preference": auto, "act_quant_kwargs": kwargs,
            "is_swizzled_scales": False}  # fmt: skip
    config = _config("MXDynamicActivationMXWeightConfig", 1, block_size=32, activation_dtype=dtype, weight_dtype=dtype,
                     kernel_preference=auto, scaling_mode=scaling)  # fmt: skip
    return Form(data, ("qdata", "scale"), config, "orig_dtype")


def _nvfp4(scheme: Scheme, shape: Shape) -> Form | None:
    levels, given = scheme.weight.scales, scheme.input
    whole = len(levels) == 2
    known = (Level(Group(16), "e4m3fn"), *([Level(PerTensor())] if whole else []))
    fits = scheme.weight == TensorScheme(Float("e2m1"), known) and shape[1] % 16 == 0
    inputs = TensorScheme(Float("e2m1"), _NVFP4_INPUTS.scales[:1], dynamic=True)
    if not fits or given not in (None, _NVFP4_INPUTS, inputs):
        return None
    kwargs = given and _object("QuantizeTensorToNVFP4Kwargs", block_size=16, is_swizzled_scales=False,
                               use_triton_kernel=False, use_dynamic_per_tensor_scale=given == _NVFP4_INPUTS)  # fmt: skip
    data = {"is_swizzled_scales": False, "use_triton_kernel": False, "act_quant_kwargs": kwargs, "block_size": 16}
    if given is None:
        config = _config("NVFP4WeightOnlyConfig", 1, use_dynamic_per_tensor_scale=whole)
    else:
        config = _config("NVFP4DynamicActivationNVFP4WeightConfig", 1, use_triton_kernel=False,
                         use_dynamic_per_tensor_scale=given == _NVFP4_INPUTS, step=None)  # fmt: skip
    return Form(data, (*(["per_tensor_scale"] if whole else []), "qdata", "scale"), config, "orig_dtype")


def _int4(scheme: Scheme, shape: Shape) -> Form | None:
    """Float zero points, which are 0 where the integers are symmetric."""
    grid = scheme.weight.scales[0].granularity
    floats = scheme.weight == TensorScheme(Int(4, signed=True), (Level(grid),), scheme.weight.zero)
    if not floats or scheme.weight.zero == "stored" or not isinstance(grid, Group) or shape[1] % max(grid.size, 2):
        return None
    inputs = scheme.input == _FP8_TOKENS and grid.size == 128
    if scheme.input is not None and not inputs:
        return None
    data = {"block_size": [1, grid.size], "shape": list(shape),
            "activation_dtype": _named("torch.dtype", "float8_e4m3fn" if inputs else "bfloat16")}  # fmt: skip
    config = _config("Float8DynamicActivationInt4WeightConfig", 1, int4_packing_format="plain")
    return Form(data, ("qdata", "scale", "zero_point"), config if inputs else _int4_config(grid, "PLAIN"), "")


def _int4_plain_int32(scheme: Scheme, shape: Shape) -> Form | None:
    grid = scheme.weight.scales[0].granularity
    fits = _plain_integers(scheme.weight) and scheme.weight.bits == 4 and scheme.input is None
    if not fits or not isinstance(grid, Group) or shape[1] % 8 or shape[1] % grid.size:
        return None
    data = {"block_size": [1, grid.size], "shape": list(shape)}
    return Form(data, ("qdata", "scale", "zero_point"), _int4_config(grid, "PLAIN_INT32"), "")


def _int4_config(grid: Group, packing: str) -> dict[str, Any]:
    return _config(
        "Int4WeightOnlyConfig", group_size=grid.size, set_inductor_config=True, int4_tile_packed_ntile=8,
        int4_packing_format=_named("Int4PackingFormat", packing),
        int4_choose_qparams_algorithm=_named("Int4ChooseQParamsAlgorithm", "TINYGEMM"),
    )  # fmt: skip


_FORMS: dict[str, Callable[[Scheme, Shape], Form | None]] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Float8Tensor": _float8,
    "MXTensor": _mx,
    "NVFP4Tensor": _nvfp4,
    "Int4Tensor": _int4,
    "Int4PlainInt32Tensor": _int4_plain_int32,
}
WRITTEN = tuple(_FORMS)


def _form(
    module: str, entry: ModulePlan, kinds: Sequence[str], stated: Mapping[str, Any] | None = None
) -> tuple[str, Form]:
    """The first of the classes that holds the module (by the stated config, if any), and how. Raises Refused
    (not-representable)."""
    scheme, shape = entry.scheme, entry.shape
    assert scheme is not None
    if len(shape) != 2 or not scheme.weight.scales:
        unholdable(NAME, module, f"{scheme} of {list(shape)}", "a matrix with scales")
    made = {kind: _FORMS[kind](scheme, (shape[0], shape[1])) for kind in kinds}
    forms = [(kind, form) for kind, form in made.items() if form is not None and stated in (None, form.config)]
    if not forms:
        unholdable(NAME, module, scheme, f"what {' or '.join(kinds)} holds")
    return forms[0]


def config_of(plan: Mapping[str, ModulePlan], variant: str = "") -> dict[str, Any]:
    """TorchAoConfig's keys: one config for all layers, or FqnToConfig. Raises Refused (not-representable)."""
    configs = {
        m: _form(m, entry, [variant] if variant else WRITTEN)[1].config
        for m, entry in plan.items()
        if entry.scheme is not None
    }
    kept = [module for module in plan if module not in configs and not is_embedding(module)]
    embeddings = any(is_embedding(module) for module in configs)
    first = next(iter(configs.values()), _config("Int8WeightOnlyConfig"))
    if any(config != first for config in configs.values()) or embeddings:
        first = _config("FqnToConfig", 1, fqn_to_config=configs, module_fqn_to_config={})
    return {
        "quant_method": NAME, "quant_type": {"default": first},
        "modules_to_not_convert": list(dict.fromkeys([*kept, *(() if "lm_head" in configs else ("lm_head",))])),
        "include_input_output_embeddings": embeddings or "lm_head" in configs, "untie_embedding_weights": False,
    }  # fmt: skip


def _chosen(module: str, entry: ModulePlan, config: Mapping[str, Any]) -> tuple[str, Form]:
    """The class that `config_of` chose for the module."""
    stated = config["quant_type"]["default"]
    if stated["_type"] == "FqnToConfig":
        stated = stated["_data"]["fqn_to_config"][module]
    return _form(module, entry, WRITTEN, stated)


def metadata_of(plan: Mapping[str, ModulePlan], config: Mapping[str, Any], dtype: str) -> dict[str, str]:
    """What the files' metadata says of each weight; dtype: the type that the model computes in."""
    records: dict[str, str] = {}
    for module, entry in plan.items():
        record: dict[str, Any] = {"_type": "Tensor"}
        if entry.scheme is not None:
            kind, form = _chosen(module, entry, config)
            data = {**form.data, form.dtype: _named("torch.dtype", dtype)} if form.dtype else form.data
            record = {"_type": kind, "_data": data, "_tensor_data_names": list(form.parts)}
        records[f"{module}.weight"] = json.dumps(record)
    return {**records, "tensor_names": json.dumps(list(records))}


def pack_layer(module: str, layer: LayerTensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The module's tensors. Raises Refused (not-representable)."""
    weight = layer.weight
    if layer.input_multiplier is not None or layer.input_scale is not None:
        unholdable(NAME, module, "a stored scale of the input", "what transformers loads: inputs scaled at run time")
    kind, _ = _chosen(module, ModulePlan(weight.scheme, "", weight.shape), config)
    parts = _PACKERS[kind](module, weight)
    tensors = {f"{module}._weight_{part}": tensor for part, tensor in parts.items()}
    return tensors if layer.bias is None else {**tensors, f"{module}.bias": layer.bias}


def _pack_integers(module: str, weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    import torch

    middle = 1 << (weight.scheme.weight.bits - 1)
    codes, scales, zeros = affine_parts(weight)
    scales = scales[: weight.scales[0].shape[0]]
    held = torch.full(scales.shape, middle, dtype=torch.uint8) if zeros is None else zeros
    return {
        "qdata": (codes.to(torch.int16) - middle).to(torch.int8),
        "scale": exactly(NAME, module, scales, scales.dtype, torch.float32),
        "zero_point": (held.to(torch.int16) - middle).to(torch.int8),
    }


def _pack_floats(module: str, weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    import torch

    fine, kind = weight.scales[0], weight.scheme.weight.scales[0].type
    scale = fine.view(torch.float8_e8m0fnu) if kind == "e8m0" else fine
    if kind == "float":
        scale = exactly(NAME, module, fine, torch.float32)
    parts = {"qdata": weight.codes, "scale": scale}
    if len(weight.scales) == 2:
        parts["per_tensor_scale"] = _factor(module, fine, weight.scales[1]).reshape(())
    return parts


def _factor(module: str, fine: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """The float32 factor that gives the same scales; `whole` is a float64 where the format that it comes from divides."""
    import torch

    factor = whole.to(torch.float32)
    if not torch.equal((fine.float() * whole).float(), fine.float() * factor):
        unholdable(NAME, module, "a scale of the whole that divides", "one that multiplies to the same numbers")
    return factor


def _pack_int4(module: str, weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    import torch

    scale = weight.scales[0]
    zeros = torch.zeros_like(scale) if weight.zeros is None else weight.zeros
    dtypes = (scale.dtype, torch.float32) if zeros.dtype == scale.dtype else (torch.float32,)
    return {
        "qdata": (weight.codes ^ 0x88).view(torch.int8),
        "scale": exactly(NAME, module, scale, *dtypes).t().contiguous(),
        "zero_point": exactly(NAME, module, zeros, *dtypes).t().contiguous(),
    }


def _pack_int4_plain_int32(module: str, weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    import torch

    codes, scales, zeros = affine_parts(weight)
    held = torch.full(scales.shape, 8, dtype=torch.uint8) if zeros is None else zeros
    return {
        "qdata": words(codes, 4),
        "scale": exactly(NAME, module, scales, scales.dtype, torch.float32).t().contiguous(),
        "zero_point": held.to(torch.int8).t().contiguous(),
    }


_PACKERS: dict[str, Callable[[str, QuantizedTensor], dict[str, torch.Tensor]]] = {
    "Int8Tensor": _pack_integers,
    "IntxUnpackedToInt8Tensor": _pack_integers,
    "Float8Tensor": _pack_floats,
    "MXTensor": _pack_floats,
    "NVFP4Tensor": _pack_floats,
    "Int4Tensor": _pack_int4,
    "Int4PlainInt32Tensor": _pack_int4_plain_int32,
}
