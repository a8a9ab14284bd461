"""TorchAO as transformers saves it today: tensor subclasses taken apart into safetensors, with their attributes beside them.

The part P of <module>.weight is the tensor <module>._weight_P; the file's metadata holds for each weight a JSON object
{_type: class, _data: attributes, _tensor_data_names: parts}. By class:

    Int8Tensor, IntxUnpackedToInt8Tensor  qdata int8 [N, K]; scale, zero_point one a block: w = (q - z) * s
    Float8Tensor                          qdata e4m3 or e5m2 [N, K]; scale one a block
    Int4Tensor                            qdata int8 [N, K / 2], signed nibbles, first low; scale, zero_point [K / g, N]:
                                          w = q * s + z
    Int4PlainInt32Tensor                  qdata int32 [N, K / 8]; scale, zero_point int8 [K / g, N]: w = (q - z) * s
    Int4TilePackedTo4dTensor              qdata int32 [N / 8, K / 128, 32, 4], tinygemm's tiles, padded; scale_and_zero
                                          [K / g, N, 2]: w = (q - 8) * s + z
    MXTensor                              qdata e4m3, e5m2 [N, K] or uint8 [N, K / 2]; scale e8m0 [N, K / 32], in order or
                                          swizzled
    NVFP4Tensor                           qdata uint8 [N, K / 2]; scale e4m3 [N, K / 16], in order or swizzled;
                                          per_tensor_scale

Sources: torchao's prototype/safetensors, quantization/quantize_/workflows and prototype/mx_formats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qcore.checkpoint.json_file import parse_json
from qcore.checkpoint.patterns import matches
from qcore.checkpoint.settings import check
from qcore.elements import (
    Float,
    FloatFormat,
    Granularity,
    Group,
    Int,
    Level,
    PerTensor,
    PerToken,
    ScaleType,
    scale_shape,
)
from qcore.layouts import torchao_writer
from qcore.layouts.torchao import (
    INT4,
    Record,
    activation_words,
    bare,
    check_attributes,
    granularity_of,
    int4_headers,
    out_of_range,
    read_int4,
    sizes,
    unswizzle_scales,
)
from qcore.method import SCALE_DTYPES, CheckpointFiles, Method, ModulePlan, dense_modules, read_scale, require_tensor
from qcore.refusal import Refusal, Refused, bad_file
from qcore.scheme import Scheme, TensorScheme, Zero, integer_weight

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors, Order, QuantizedTensor

_FLOATS: dict[str, FloatFormat] = {
    "float8_e4m3fn": "e4m3fn",
    "float8_e5m2": "e5m2",
    "float4_e2m1fn_x2": "e2m1",
}
_HELD = {"e4m3fn": "F8_E4M3", "e5m2": "F8_E5M2", "e2m1": "U8"}
_ROUNDINGS: dict[str, ScaleType] = {"EVEN": "e8m0", "FLOOR": "e8m0floor", "RCEIL": "e8m0ceil"}
_CLASSES = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor", *INT4, "MXTensor", "NVFP4Tensor")
_PARTS = (
    "qdata",
    "scale",
    "zero_point",
    "scale_and_zero",
    "per_tensor_scale",
    "act_pre_scale",
    "act_quant_scale",
    "act_quant_zero_point",
    "act_per_tensor_scale",
)


_ORDERS: dict[str, Order] = {"Int8Tensor": "integers", "IntxUnpackedToInt8Tensor": "reciprocal"}
"""How the classes with int8 inputs multiply; those with floats divide by the scale."""


class TorchAo(Method):
    name = "torchao"
    quant_methods = ("torchao",)
    variants = _CLASSES
    written = torchao_writer.WRITTEN
    embeddings = True
    pickles = (
        "Where the files are trusted, load them once with AutoModelForCausalLM.from_pretrained (transformers 5, torchao 0.15 "
        "or newer) and save them again with save_pretrained: TorchAO is written as safetensors since then."
    )
    parts = frozenset({"bias", *(f"_weight_{part}" for part in _PARTS)})

    def plan(self, files: CheckpointFiles) -> dict[str, ModulePlan]:
        records = self._records(files)
        if not records:
            raise bad_file("missing-tensor", "the config says TorchAO, but the file's metadata describes no quantized weight",
                           file=files.path, field="__metadata__", found=sorted(files.source.metadata)[:4],
                           expected="an entry for each weight",
                           fix="Save the model again with torchao 0.15 or newer and transformers' save_pretrained.")  # fmt: skip
        plan = dense_modules(files.source.tensors, "stored unquantized")
        for module, record in records.items():
            scheme, shape = self._headers(files, module, record)
            plan[module] = ModulePlan(scheme, record.type, shape)
        return plan

    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:
        from qcore.tensor import LayerTensors

        record = self._records(files)[module]
        scheme, shape = self._headers(files, module, record)
        reader = {"Int8Tensor": _read_int8, "IntxUnpackedToInt8Tensor": _read_int8}.get(
            record.type, read_int4 if record.type in INT4 else _read_float
        )
        tensors = files.source.tensors
        optional = {part: f"{module}._weight_{part}" for part in _PARTS if f"{module}._weight_{part}" in tensors}
        given, zero = None, None
        if scheme.input is not None:
            part = "act_quant_scale" if not scheme.input.dynamic else "act_per_tensor_scale"
            if part in optional and (len(scheme.input.scales) > 1 or not scheme.input.dynamic):
                given = read_scale(files, optional[part]).reshape(1)
            if scheme.input.zero:
                zero = files.source.read(optional["act_quant_zero_point"]).reshape(1) if given is not None else None
        bias = f"{module}.bias"
        return LayerTensors(
            reader(files, module, record, scheme, shape),
            files.source.read(bias) if bias in tensors else None,
            input_scale=given,
            input_zero=zero,
            input_multiplier=read_scale(files, optional["act_pre_scale"]).reshape(-1)
            if "act_pre_scale" in optional
            else None,
            order=_ORDERS.get(record.type, "dequantized"),
        )

    def encode_config(self, plan: Mapping[str, ModulePlan], variant: str = "") -> dict[str, Any]:
        return torchao_writer.config_of(plan, variant)

    def encode(self, module: str, layer: LayerTensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return torchao_writer.pack_layer(module, layer, config)

    def encode_metadata(self, plan: Mapping[str, ModulePlan], config: Mapping[str, Any], dtype: str) -> dict[str, str]:
        return torchao_writer.metadata_of(plan, config, dtype)

    def _records(self, files: CheckpointFiles) -> dict[str, Record]:
        return files.once("records", lambda: self._described(files))

    def _described(self, files: CheckpointFiles) -> dict[str, Record]:
        """The quantized weights, by module. Raises Refused (bad-json, bad-field, unknown-variant)."""
        found = {}
        for name, text in files.source.metadata.items():
            module, _, part = name.rpartition(".")
            if not module or not str(text).startswith("{"):
                continue
            entry = parse_json([str(text).encode()], file=files.path, field=f"__metadata__.{name:.200}")
            record = check(Record, entry, file=files.path, prefix=f"__metadata__.{name:.200}")
            if record.type in ("Tensor", "torch.Tensor"):
                continue
            if record.type not in _CLASSES or part != "weight":
                raise self._variant(files, name, record.type if part == "weight" else f"{record.type} for {part}")
            found[module] = record
        return found

    def _variant(self, files: CheckpointFiles, name: str, found: str) -> Refused:
        return Refused(
            Refusal("unknown-variant", "notimpl", str(files.path), "this form of TorchAO is not read yet",
                    f"found {found}, expected {', '.join(_CLASSES)}", "Save the model with one of torchao's plain layouts.",
                    str(files.path), field=f"__metadata__.{name:.200}")
        )  # fmt: skip

    def _headers(self, files: CheckpointFiles, module: str, record: Record) -> tuple[Scheme, tuple[int, int]]:
        """The scheme and [N, K], once all headers agree. Raises Refused."""
        for part in _PARTS:
            if part in record.parts:
                require_tensor(files, f"{module}._weight_{part}")
        try:
            check_attributes(record)
            if record.type in INT4:
                return int4_headers(files, module, record)
            if record.type in ("MXTensor", "NVFP4Tensor"):
                return _block_float_headers(files, module, record)
            return _affine_headers(files, module, record)
        except ValueError as error:
            raise self._variant(files, f"{module}.weight", str(error)) from error


def _matrix(files: CheckpointFiles, name: str, dtypes: tuple[str, ...]) -> tuple[int, int]:
    info = require_tensor(files, name, dtypes=dtypes)
    if len(info.shape) != 2:
        raise bad_file("bad-shape", "the weight is a matrix", file=info.file, tensor=name, field="shape",
                       found=list(info.shape), expected="two dimensions")  # fmt: skip
    return info.shape[0], info.shape[1]


def _affine_headers(files: CheckpointFiles, module: str, record: Record) -> tuple[Scheme, tuple[int, int]]:
    """Codes of a byte with a scale, and a zero point for integers, for each block."""
    prefix = f"{module}._weight_"
    floats = record.type == "Float8Tensor"
    shape = _matrix(files, f"{prefix}qdata", ("F8_E4M3", "F8_E5M2") if floats else ("I8",))
    granularity = granularity_of(record.sizes("block_size"), shape)
    grid = scale_shape(granularity, *shape)
    scale = require_tensor(files, f"{prefix}scale", dtypes=SCALE_DTYPES["float"])
    if scale.shape not in (grid, () if grid == (1, 1) else grid):
        require_tensor(files, scale.name, shape=grid)
    level = Level(granularity)
    if floats:
        kind = files.source.tensors[f"{prefix}qdata"].dtype
        element = Float("e4m3fn" if kind == "F8_E4M3" else "e5m2")
        return Scheme(TensorScheme(element, (level,)), _inputs(record.data.get("act_quant_kwargs"), floats=True)), shape
    if "zero_point" in record.parts:
        require_tensor(files, f"{prefix}zero_point", shape=scale.shape, dtypes=["I8", *SCALE_DTYPES["float"]])
    bits = 8
    given = _inputs(record.data.get("act_quant_kwargs"), floats=False)
    if record.type == "IntxUnpackedToInt8Tensor":
        target = str(record.value("target_dtype"))
        if not target.removeprefix("int").isdigit() or not 1 <= int(target.removeprefix("int")) <= 8:
            raise ValueError(f"target_dtype {target}")
        bits = int(target.removeprefix("int"))
        words = activation_words(record)
        given = TensorScheme.parse(words) if words else None
    if given is not None and not given.dynamic:
        require_tensor(files, f"{prefix}act_quant_scale", dtypes=SCALE_DTYPES["float"])
    elif "act_quant_scale" in record.parts and given is not None:
        given = TensorScheme(given.element, (Level(PerTensor()),), given.zero)
    symmetric = not _asymmetric(files, module)
    return Scheme(integer_weight(bits, granularity, symmetric=symmetric), given), shape


def _inputs(kwargs: object, *, floats: bool) -> TensorScheme | None:
    """The input's scheme by torchao's act_quant_kwargs. Raises ValueError."""
    if kwargs is None:
        return None
    data = kwargs.get("_data") if isinstance(kwargs, dict) else None
    if not isinstance(data, dict):
        raise ValueError(f"act_quant_kwargs {json.dumps(kwargs)[:80]}")
    grain = data.get("granularity")
    kind = grain.get("_type") if isinstance(grain, dict) else None
    inner = grain.get("_data") if isinstance(grain, dict) else None
    spread: Granularity
    mapping = bare(data.get("mapping_type"))
    if mapping not in (None, "SYMMETRIC", "ASYMMETRIC"):
        raise ValueError(f"activations mapped by {mapping}")
    if kind in ("PerRow", "PerToken") and (not isinstance(inner, dict) or inner.get("dim", -1) == -1):
        spread = PerToken()
    elif kind == "PerTensor":
        spread = PerTensor()
    elif kind == "PerBlock" and isinstance(inner, dict):
        *outer, width = sizes(inner.get("block_size"))
        if any(size != 1 for size in outer):
            raise ValueError(f"activations in blocks of {[*outer, width]}")
        spread = Group(width)
    else:
        raise ValueError(f"activations {kind}")
    if data.get("reduce_range"):
        raise ValueError("activations of 7 bits (reduce_range)")
    if not floats:
        zero: Zero | None = "stored" if mapping == "ASYMMETRIC" else None
        return TensorScheme(Int(8, signed=True), (Level(spread),), zero, dynamic=True)
    bound = data.get("hp_value_ub")
    if data.get("hp_value_lb") is not None or not isinstance(bound, float | int | None):
        raise ValueError(f"activations scaled within {data.get('hp_value_lb')!r:.20} and {bound!r:.20}")
    if (name := bare(data.get("float8_dtype")) or "float8_e4m3fn") not in ("float8_e4m3fn", "float8_e5m2"):
        raise ValueError(f"activations in {name}")
    return TensorScheme(Float(_FLOATS[name]), (Level(spread),), dynamic=True, bound=bound)


def _asymmetric(files: CheckpointFiles, module: str) -> bool:
    """Whether the config says that the module's weight has zero points."""
    config = _own_config(files, module)
    mapping = config.get("weight_mapping_type", config.get("mapping_type"))
    return isinstance(mapping, dict) and mapping.get("_data") == "ASYMMETRIC"


def _own_config(files: CheckpointFiles, module: str) -> dict[str, Any]:
    """The attributes of the config that a module was quantized with. FqnToConfig has one for the names of weights and
    modules, for regular expressions that match the whole of either, and for all others, and so they are tried."""
    stated = _data(_data(files.quantization, "quant_type"), "default")
    names = stated.get("fqn_to_config") or stated.get("module_fqn_to_config")
    if not isinstance(names, dict):
        return stated
    weight, field = f"{module}.weight", "quantization_config.quant_type"
    patterns = [key for key in names if str(key).startswith("re:")]
    found = next(
        (key for key in patterns for name in (weight, module)
         if matches(f"(?:{key[3:]})$", name, file=files.quantization_file, field=field)),
        "_default",
    )  # fmt: skip
    key = next((key for key in (weight, module) if key in names), found)
    return _data(names, key)


def _data(found: object, key: str) -> dict[str, Any]:
    """The attributes of the object under a key, or what stands there; empty where nothing does."""
    inner = found.get(key) if isinstance(found, Mapping) else None
    data = inner.get("_data", inner) if isinstance(inner, dict) else None
    return data if isinstance(data, dict) else {}


def _read_int8(
    files: CheckpointFiles, module: str, record: Record, scheme: Scheme, shape: tuple[int, int]
) -> QuantizedTensor:
    """Contents are believed: zero points that are all 0 make the weight symmetric, others do not."""
    import torch

    from qcore.bits import pack
    from qcore.tensor import QuantizedTensor

    prefix, bits = f"{module}._weight_", scheme.weight.bits
    granularity = scheme.weight.scales[0].granularity
    codes = files.source.read(f"{prefix}qdata")
    least, most = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if codes.numel() and not least <= int(codes.min()) <= int(codes.max()) <= most:
        raise out_of_range(files, f"{prefix}qdata", codes, least, most)
    grid = scale_shape(granularity, *shape)
    scale = read_scale(files, f"{prefix}scale").reshape(grid)
    zeros = None
    if "zero_point" in record.parts:
        zeros = read_scale(files, f"{prefix}zero_point").reshape(grid)
        if not bool(((zeros == zeros.round()) & (zeros >= least) & (zeros <= most)).all()):
            raise out_of_range(files, f"{prefix}zero_point", zeros, least, most)
    symmetric = zeros is None or not bool(zeros.any())
    own = Scheme(integer_weight(bits, granularity, symmetric=symmetric), scheme.input)
    if symmetric and bits == 8:
        return QuantizedTensor(own, shape, codes, (scale,))
    shifted = (codes.to(torch.int16) - least).to(torch.uint8)
    return QuantizedTensor(
        own, shape, pack(shifted, bits), (scale,),
        None if symmetric or zeros is None else (zeros.to(torch.int16) - least).to(torch.uint8),
    )  # fmt: skip


def _block_float_headers(files: CheckpointFiles, module: str, record: Record) -> tuple[Scheme, tuple[int, int]]:
    prefix, nv = f"{module}._weight_", record.type == "NVFP4Tensor"
    name = "float4_e2m1fn_x2" if nv else str(record.value("elem_dtype"))
    size = record.data.get("block_size")
    if name not in _FLOATS or type(size) is not int or size != (16 if nv else 32):
        raise ValueError(f"{name} in blocks of {size}")
    element = Float(_FLOATS[name])
    rows, columns = _matrix(files, f"{prefix}qdata", (_HELD[element.format],))
    columns *= 8 // element.bits
    levels: tuple[Level, ...] = (Level(Group(size), "e4m3fn" if nv else "e8m0"),)
    if "per_tensor_scale" in record.parts:
        require_tensor(files, f"{prefix}per_tensor_scale", shape=(), dtypes=SCALE_DTYPES["float"])
        levels = (*levels, Level(PerTensor()))
    info = require_tensor(files, f"{prefix}scale", dtypes=SCALE_DTYPES[levels[0].type])
    count, wanted = 1, (rows, -(-columns // size))
    for length in info.shape:
        count *= length
    if record.data.get("is_swizzled_scales"):
        wanted = (-(-wanted[0] // 128) * 128, -(-wanted[1] // 4) * 4)
    if count != wanted[0] * wanted[1]:
        raise bad_file("bad-shape", "the scales do not fit the weight", file=info.file, tensor=info.name, field="shape",
                       found=list(info.shape), expected=list(wanted))  # fmt: skip
    given, static = record.data.get("act_quant_kwargs"), "act_per_tensor_scale" in record.parts
    if static:
        require_tensor(files, f"{prefix}act_per_tensor_scale", dtypes=SCALE_DTYPES["float"])
    inputs = _block_inputs(given, nv=nv, static=static) if given else None
    return Scheme(TensorScheme(element, levels), inputs), (rows, columns)


def _block_inputs(kwargs: object, *, nv: bool, static: bool) -> TensorScheme:
    """Inputs in blocks, their scales found at run time; NVFP4's scale of the whole may be `static`, or left out.

    Raises ValueError.
    """
    data = kwargs.get("_data") if isinstance(kwargs, dict) else None
    if not isinstance(data, dict):
        raise ValueError("act_quant_kwargs")
    if nv:
        if data.get("block_size", 16) != 16:
            raise ValueError(f"activations in blocks of {data['block_size']}")
        whole = (Level(PerTensor()),) if static or data.get("use_dynamic_per_tensor_scale") else ()
        return TensorScheme(Float("e2m1"), (Level(Group(16), "e4m3fn"), *whole), dynamic=True)
    name, mode = bare(data.get("elem_dtype")), bare(data.get("scaling_mode"))
    if mode not in _ROUNDINGS or name not in _FLOATS or data.get("block_size", 32) != 32:
        raise ValueError(f"activations {name} scaled by {mode}")
    return TensorScheme(Float(_FLOATS[name]), (Level(Group(32), _ROUNDINGS[mode]),), dynamic=True)


def _read_float(
    files: CheckpointFiles, module: str, record: Record, scheme: Scheme, shape: tuple[int, int]
) -> QuantizedTensor:
    from qcore.tensor import QuantizedTensor

    prefix, fine = f"{module}._weight_", scheme.weight.scales[0]
    grid = scale_shape(fine.granularity, *shape)
    scale = read_scale(files, f"{prefix}scale", fine.type)
    scale = unswizzle_scales(scale, *grid) if record.data.get("is_swizzled_scales") else scale.reshape(grid)
    scales = [scale]
    if len(scheme.weight.scales) > 1:
        scales.append(read_scale(files, f"{prefix}per_tensor_scale").reshape(1, 1))
    return QuantizedTensor(scheme, shape, files.source.read(f"{prefix}qdata"), tuple(scales))


METHOD = TorchAo()
