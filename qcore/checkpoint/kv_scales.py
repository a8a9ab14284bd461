"""Quantized kv caches: what a config declares, what can be asked for, and the calibrated scales beside the weights.

A cached key is its code times the attention layer's k scale, a value its code times the v scale. Each tool has names of
its own for these scales; `SPELLINGS` has them all (vLLM: weight_utils.py, maybe_remap_kv_scale_name). docs/formats.md.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qcore.checkpoint.source import TensorInfo, TensorSource
from qcore.elements import Element, Float, Granularity, Int, Level, PerChannel, PerTensor, PerToken
from qcore.refusal import Refusal, Refused, bad_file
from qcore.scheme import TensorScheme

if TYPE_CHECKING:
    import torch

    from qcore.checkpoint.open import Checkpoint
    from qcore.method import CheckpointFiles
    from qcore.tensor import Order

log = logging.getLogger("qcore")

Part = Literal["k", "v", "kv", "q", "prob"]
"""Whose scale: keys, values, one for both, queries, or attention probabilities."""
_PARTS: tuple[Part, Part] = ("k", "v")


@dataclass(frozen=True)
class Spelling:
    """One name of a scale. suffix: what follows the attention module's name; inverse: 1 / scale is stored."""

    suffix: str
    part: Part
    kind: Literal["scale", "inverse", "zero"]
    writer: str


SPELLINGS = (
    Spelling("k_scale", "k", "scale", "compressed-tensors"),
    Spelling("v_scale", "v", "scale", "compressed-tensors"),
    Spelling("q_scale", "q", "scale", "compressed-tensors"),
    Spelling("k_zero_point", "k", "zero", "compressed-tensors"),
    Spelling("v_zero_point", "v", "zero", "compressed-tensors"),
    Spelling("q_zero_point", "q", "zero", "compressed-tensors"),
    Spelling("k_proj.output_scale", "k", "scale", "compressed-tensors before attention had scales, Quark, AutoFP8"),
    Spelling("v_proj.output_scale", "v", "scale", "compressed-tensors before attention had scales, Quark, AutoFP8"),
    Spelling("q_proj.output_scale", "q", "scale", "compressed-tensors before attention had scales, Quark"),
    Spelling("k_proj.output_zero_point", "k", "zero", "Quark"),
    Spelling("v_proj.output_zero_point", "v", "zero", "Quark"),
    Spelling("q_proj.output_zero_point", "q", "zero", "Quark"),
    Spelling("prob_output_scale", "prob", "scale", "Quark"),
    Spelling("k_proj.k_scale", "k", "scale", "ModelOpt; the module may be a mixer, as in Nemotron-H"),
    Spelling("v_proj.v_scale", "v", "scale", "ModelOpt; the module may be a mixer, as in Nemotron-H"),
    Spelling("kv_scale", "kv", "scale", "AutoFP8 at first, INC for vLLM"),
    Spelling("qkv_proj.k_scale", "k", "scale", "fused projections, as vLLM reads them"),
    Spelling("qkv_proj.v_scale", "v", "scale", "fused projections, as vLLM reads them"),
    Spelling("k_cache.scale", "k", "scale", "vLLM's remaps"),
    Spelling("v_cache.scale", "v", "scale", "vLLM's remaps"),
    Spelling("q.scale", "q", "scale", "vLLM's remaps"),
    Spelling("k_cache.dequant_output.scale", "k", "scale", "INC"),
    Spelling("v_cache.dequant_output.scale", "v", "scale", "INC"),
    Spelling("k_cache.quant_input.scale_inv", "k", "inverse", "INC"),
    Spelling("v_cache.quant_input.scale_inv", "v", "inverse", "INC"),
)
_LONGEST_FIRST = sorted(SPELLINGS, key=lambda row: -len(row.suffix))

_FP8 = TensorScheme(Float("e4m3fn"), (Level(PerTensor()),))
_E5M2 = TensorScheme(Float("e5m2"), (Level(PerTensor()),))
CHOICES: dict[str, TensorScheme | None] = {
    "none": None,
    "fp8": _FP8,
    "fp8_e4m3": _FP8,
    "fp8_e5m2": _E5M2,
    "int8": TensorScheme(Int(8, signed=True), (Level(PerToken()),), dynamic=True),
}
"""What can be asked for beside auto. int8 takes a scale for each token and head, unless the checkpoint has calibrated ones."""
_INT8 = TensorScheme(Int(8, signed=True), (Level(PerTensor()),))
CALIBRATED: dict[str, TensorScheme | None] = {
    "none": None,
    "fp8": _FP8,
    "fp8_e4m3": _FP8,
    "fp8_e5m2": _E5M2,
    "int8": _INT8,
    "fp8_per_head": TensorScheme(Float("e4m3fn"), (Level(PerChannel()),)),
    "int8_per_head": TensorScheme(Int(8, signed=True), (Level(PerChannel()),)),
}
"""What scales can be found for by calibration (qcore/calibration/caching.py); none leaves the cache as the checkpoint declares it."""
_ALGORITHMS = {"FP8": _FP8, "INT8": _INT8}
"""ModelOpt's words for kv caches, of those that are read."""
_SCALE_DTYPES = ("F32", "BF16", "F16", "F64")
_ZERO_DTYPES = (*_SCALE_DTYPES, "F8_E4M3", "I8", "U8", "I32", "I64")


@dataclass(frozen=True)
class Side:
    """Keys' or values' numbers: float32 [1], or [heads, 1, 1]; zero None where it is 0. source: the tensor's name."""

    scale: torch.Tensor
    zero: torch.Tensor | None
    source: str


@dataclass(frozen=True)
class KvScales:
    """One attention layer's. order: of the tool's float operations where floats are rounded (qcore.tensor.Order)."""

    k: Side
    v: Side
    order: Order = "dequantized"

    @classmethod
    def ones(cls, scheme: TensorScheme) -> KvScales:
        """In the place of scales that are not known yet; by head they are of two."""
        import torch

        one = Side(torch.ones((1,) if scheme.scales[0].granularity == PerTensor() else (2, 1, 1)), None, "")
        return cls(one, one)


def spelled(name: str) -> tuple[str, Spelling] | None:
    """The attention module and the spelling, if the name is of a kv cache's scale or zero point. The longest suffix wins:
    `a.k_proj.k_scale` is of `a`, not of `a.k_proj`."""
    for row in _LONGEST_FIRST:
        if name.endswith(f".{row.suffix}"):
            return name[: -len(row.suffix) - 1], row
    return None


def read_kv_scales(source: TensorSource) -> dict[str, KvScales]:
    """Every attention module's scales. Raises Refused: bad-shape, bad-dtype, bad-content."""
    found: dict[str, dict[tuple[Part, bool], tuple[torch.Tensor, str]]] = {}
    for name, info in source.tensors.items():
        if (hit := spelled(name)) is None:
            continue
        attention, row = hit
        value = _read(source, info, row)
        sides = found.setdefault(attention, {})
        for part in _PARTS if row.part == "kv" else (row.part,):
            _agree(sides.setdefault((part, row.kind == "zero"), (value, name)), value, info)
    # Those of queries and probabilities are for attention that multiplies in fp8; here they stay in 16 bits or more.
    if unused := sum(part in ("q", "prob") and not zero for sides in found.values() for part, zero in sides):
        log.info("%d scales of queries and attention probabilities are not needed", unused)
    return {name: scales for name, sides in found.items() if (scales := _both(name, sides)) is not None}


def _both(attention: str, sides: Mapping[tuple[Part, bool], tuple[torch.Tensor, str]]) -> KvScales | None:
    made: dict[str, Side] = {}
    for part in _PARTS:
        scale, zero = sides.get((part, False)), sides.get((part, True))
        if scale is not None:
            made[part] = Side(scale[0], zero[0] if zero is not None and bool(zero[0].any()) else None, scale[1])
    return both_sides(attention, made) if made else None


def both_sides(attention: str, made: Mapping[str, Side]) -> KvScales:
    """Keys' and values', of which one may be for both."""
    if len(made) == 1:  # as vLLM does
        log.warning("%s has a scale for %s alone; it is used for both keys and values", attention, *made)
    one = next(iter(made.values()))
    return KvScales(made.get("k", one), made.get("v", one))


def _read(source: TensorSource, info: TensorInfo, row: Spelling) -> torch.Tensor:
    """float32 [1] or [heads, 1, 1]."""
    import torch

    allowed = _ZERO_DTYPES if row.kind == "zero" else _SCALE_DTYPES
    if info.dtype not in allowed:
        raise bad_file("bad-dtype", "its data type is not one of a kv cache's scales", file=info.file, tensor=info.name,
                       field="dtype", found=info.dtype, expected=" or ".join(allowed))  # fmt: skip
    count = math.prod(info.shape)
    if not count or (count > 1 and info.shape not in ((count,), (count, 1, 1))):
        raise bad_file("bad-shape", "a kv cache has one scale, or one for each head", file=info.file, tensor=info.name,
                       field="shape", found=list(info.shape), expected="[], [1], [heads] or [heads, 1, 1]")  # fmt: skip
    value = source.read(info.name).to(torch.float32)
    if row.kind == "inverse":
        value = 1 / value
    good = value.isfinite() if row.kind == "zero" else value.isfinite() & (value > 0)
    if not bool(good.all()):
        raise bad_file("bad-content", "a kv cache's scale is not a positive number", file=info.file, tensor=info.name,
                       field="values", found=value[~good].flatten()[:4].tolist(),
                       expected="finite numbers" if row.kind == "zero" else "finite scales above 0")  # fmt: skip
    return value.reshape(1) if count == 1 else value.reshape(count, 1, 1)


def _agree(first: tuple[torch.Tensor, str], value: torch.Tensor, info: TensorInfo) -> None:
    """A checkpoint may hold a scale under two names (INC: the scale and its inverse), but not two scales."""
    import torch

    if first[0].shape != value.shape or not torch.allclose(first[0], value, rtol=1e-2, atol=0):
        raise bad_file("bad-content", "two tensors give the same kv cache different scales", file=info.file,
                       tensor=info.name, field="values", found=value.flatten()[:4].tolist(),
                       expected=f"{first[0].flatten()[:4].tolist()}, as {first[1]} has")  # fmt: skip


def declared_scheme(files: CheckpointFiles, field: str, given: Mapping[str, Any]) -> TensorScheme:
    """The scheme that `kv_cache_scheme` stands for: 8-bit floats or integers, with one stored scale or one for each head.

    vLLM refuses only what is neither a float nor of 8 bits, and so runs 4-bit floats as fp8; both have to hold here.
    Raises Refused (unknown-variant).
    """
    kind, strategy = str(given.get("type", "int")), str(given.get("strategy") or "tensor")
    bits, dynamic, affine = given.get("num_bits", 8), bool(given.get("dynamic")), given.get("symmetric") is False
    elements: dict[str, Element] = {"float": Float("e4m3fn"), "int": Int(8, signed=True)}
    levels: dict[str, Granularity] = {"tensor": PerTensor(), "attn_head": PerChannel()}
    readable = kind in elements and bits == 8 and strategy in levels and not dynamic
    if not readable or (kind == "float" and affine):
        extra = ", dynamic" * dynamic + ", asymmetric" * affine
        raise unknown_kv_cache(files, field, f"{bits}-bit {kind}, strategy {strategy}{extra}")
    return TensorScheme(elements[kind], (Level(levels[strategy]),), "stored" if affine else None)


def declared_algorithm(
    files: CheckpointFiles, algorithm: str | None, scheme: Mapping[str, Any] | str | None
) -> TensorScheme | None:
    """ModelOpt's two ways to declare: `kv_cache_quant_algo`, and in config.json `kv_cache_scheme`. Raises Refused
    (unknown-variant)."""
    if isinstance(scheme, Mapping) and scheme:
        return declared_scheme(files, "kv_cache_scheme", scheme)
    name = algorithm or scheme
    if not name:
        return None
    if name not in _ALGORITHMS:
        raise unknown_kv_cache(files, "kv_cache_quant_algo", str(name))
    return _ALGORITHMS[str(name)]


def unknown_kv_cache(files: CheckpointFiles, field: str, found: str) -> Refused:
    """A quantization of the kv cache that is not read."""
    return Refused(
        Refusal("unknown-variant", "notimpl", str(files.path), "this quantization of the kv cache is not read yet",
                f"found {found}, expected 8-bit floats or integers under one stored scale, or one for each head",
                "Load the model with the kv cache 'none', or quantize it with an FP8 kv cache.",
                str(files.quantization_file), field=f"quantization_config.{field}")
    )  # fmt: skip


def chosen_scheme(choice: str | None, checkpoint: Checkpoint) -> TensorScheme | None:
    """The kv cache to run with. Raises Refused (bad-argument).

    auto (or None) does as the checkpoint declares. Scales without a declaration were calibrated for an fp8 cache, so that
    it is used: older tools declared nothing. A choice of the declared element keeps the declared granularity.
    """
    checked_choice(choice)
    scales, path = checkpoint.kv_scales, checkpoint.path
    if choice == "none":
        if scales:
            log.info("%s has calibrated kv scales; the kv cache stays unquantized, as was asked for", path)
        return None
    declared = checkpoint.kv_cache
    if choice is None or choice == "auto":
        if declared is None and scales:
            log.warning("%s declares no kv cache, but has calibrated scales for %d layers: it runs with an fp8 kv cache; "
                        "ask for the kv cache 'none' to keep it unquantized", path, len(scales))  # fmt: skip
            return _FP8
        return declared
    wanted = CHOICES[choice]
    if wanted and declared and wanted.element == declared.element:
        return declared
    if (
        wanted
        and not wanted.dynamic
        and any(side.zero is not None for own in scales.values() for side in (own.k, own.v))
    ):
        raise Refused(Refusal("bad-argument", "never", "kv_cache", "the checkpoint's kv scales are for integers with zero "
                              f"points, which a {choice} cache has not", f"found {declared}, expected a kv cache of that kind",
                              "Use auto, int8 or none."))  # fmt: skip
    return wanted


def checked_choice(choice: str | None, subject: str = "kv_cache") -> str | None:
    """`choice`, if it is one. Raises Refused (bad-argument)."""
    if choice is not None and choice != "auto" and choice not in CHOICES:
        raise Refused(Refusal("bad-argument", "usage", subject, "this is not a kv cache", f"found {choice!r}",
                              f"Use one of: auto, {', '.join(CHOICES)}."))  # fmt: skip
    return choice


def calibrated_scheme(choice: str | None, subject: str = "kv_cache") -> TensorScheme | None:
    """The kv cache whose scales calibration is to find. Raises Refused (bad-argument)."""
    if choice is not None and choice not in CALIBRATED:
        raise Refused(Refusal("bad-argument", "usage", subject, "scales of such a kv cache are not found by calibration",
                              f"found {choice!r}", f"Use one of: {', '.join(CALIBRATED)}."))  # fmt: skip
    return CALIBRATED[choice or "none"]
