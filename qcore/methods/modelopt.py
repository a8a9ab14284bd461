"""NVIDIA ModelOpt's unified checkpoints: fp8, NVFP4 and MX formats, int4 AWQ and int8 SmoothQuant.

    FP8                        weight e4m3 [N, K], weight_scale and input_scale f32 scalars
    FP8_PER_CHANNEL_PER_TOKEN  weight_scale f32 [N]; inputs by token, or by input_scale where it stands
    FP8_PB_WO, FP8_PB_REAL     weight_scale f32 [N / b, 1, K / b, 1] or [N / b, K / b], b = 128 as a rule; inputs as they are
    NVFP4, W4A16_NVFP4         weight uint8 [N, K / 2], first code low; weight_scale e4m3 [N, K / 16], weight_scale_2 f32
    MXFP8, MXFP4               weight e4m3 [N, K] or uint8 [N, K / 2], weight_scale uint8 [N, K / 32] (e8m0)
    W4A16_AWQ                  weight uint8 [N / 2, K]: rows 2 j in the low nibble, 2 j + 1 in the high one, two's
                               complement; weight_scale [N, K / g]
    W4A8_AWQ                   the same with fp8 inputs; weight_scale_2 is the range of an fp8 copy, no part of w
    W8A8_SQ_PER_CHANNEL        weight int8 [N, K], weight_scale [N], input_scale
    all                        pre_quant_scale [K], where it stands, multiplies the input

w = q * weight_scale (* weight_scale_2). The config stands in config.json or, as `quantization`, in hf_quant_config.json.
Read from ModelOpt's exporter (torch/export/quant_utils.py, torch/quantization/qtensor).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import AliasChoices, Field

from qcore.checkpoint.kv_scales import declared_algorithm
from qcore.checkpoint.patterns import check_count, wildcard
from qcore.checkpoint.settings import Settings, check
from qcore.elements import Float, Granularity, Group, Tile
from qcore.layouts import modelopt_writer
from qcore.layouts.scaled import Names, read_layer, shape_of
from qcore.method import CheckpointFiles, Method, ModulePlan, dense_modules, finite, require_tensor
from qcore.refusal import Refusal, Refused, bad_file
from qcore.scheme import Scheme, TensorScheme, integer_weight

if TYPE_CHECKING:
    import torch

    from qcore.checkpoint.kv_scales import KvScales
    from qcore.tensor import LayerTensors

_TENSOR_FP8 = TensorScheme.parse("fp8-tensor")
_SCHEMES: Mapping[str, str] = {
    "FP8": "W8A8-fp8-static",
    "FP8_PER_CHANNEL_PER_TOKEN": "W8A8-fp8-dyn",
    "FP8_PB_WO": "W8A16-fp8-block128",
    "FP8_PB_REAL": "W8A16-fp8-block128",
    "NVFP4": "W4A4-nvfp4",
    "NVFP4_AWQ": "W4A4-nvfp4",
    "W4A16_NVFP4": "W4A16-nvfp4",
    "W4A8_NVFP4_FP8": "W4A8-e2m1-g16:e4m3fn+tensor/fp8-tensor",
    "MXFP4": "W4A4-e2m1-g32:e8m0/e2m1-g32:e8m0ceil-dyn",
    "W4A8_MXFP4_FP8": "W4A8-e2m1-g32:e8m0/fp8-tensor",
    "MXFP8": "W8A8-fp8-g32:e8m0/fp8-g32:e8m0ceil-dyn",
    "W8A16": "W8A16-channel-sym",
    "W8A8_SQ_PER_CHANNEL": "W8A8-int8-static",
}
"""Schemes by quant_algo, in the usual sizes of groups and blocks; those that differ stand in the shapes, as the int4 ones do."""
_INT4: Mapping[str, TensorScheme | None] = {"W4A16_AWQ": None, "W4A8_AWQ": _TENSOR_FP8}
"""Inputs of the algorithms with int4 weights."""
_ALGORITHMS = (*_SCHEMES, *_INT4)
_NAMES = Names()


class ModelOptConfig(Settings):
    """The keys that decide what the tensors mean, in the spellings of both places."""

    quant_algo: str | None = None
    kv_cache_quant_algo: str | None = None
    kv_cache_scheme: dict[str, Any] | str | None = None
    ignore: list[str] = Field(default_factory=list, validation_alias=AliasChoices("ignore", "exclude_modules"))
    quantized_layers: dict[str, dict[str, Any]] | None = None
    has_zero_point: bool = False


class ModelOpt(Method):
    name = "modelopt"
    quant_methods = ("modelopt", "modelopt_fp4", "modelopt_mixed")
    variants = _ALGORITHMS
    written = tuple(row.word.upper() for row in modelopt_writer.ROWS)
    side_files = ("hf_quant_config.json",)
    parts = frozenset(
        {"weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "bias", "k_scale", "v_scale"}
    )

    def format_version(self, files: CheckpointFiles) -> str:
        return self._config(files).quant_algo or ""

    def plan(self, files: CheckpointFiles) -> dict[str, ModulePlan]:
        config, plan = self._config(files), {}
        for name in files.source.tensors:
            module, _, part = name.rpartition(".")
            if part == "weight_scale":
                algorithm = self._algorithm(files, module)
                scheme, shape = self._scheme(files, module, algorithm), self._shape(files, module, algorithm)
                plan[module] = ModulePlan(scheme, f"quant_algo {algorithm}", shape)
        if not plan:
            raise bad_file("missing-tensor", "the config says ModelOpt, but no tensor is named *.weight_scale",
                           file=files.path, field="quantization_config.quant_method")  # fmt: skip
        for module, entry in dense_modules(files.source.tensors, "").items():
            named = next((skip for skip in config.ignore if _excludes(files, skip, module)), None)
            plan.setdefault(
                module, ModulePlan(None, f"excluded by {named!r}" if named else "stored unquantized", entry.shape)
            )
        return plan

    def kv_cache(self, files: CheckpointFiles) -> TensorScheme | None:
        config = self._config(files)
        return declared_algorithm(files, config.kv_cache_quant_algo, config.kv_cache_scheme)

    def kv_scales(self, files: CheckpointFiles) -> dict[str, KvScales]:
        return {name: replace(found, order="inverses") for name, found in super().kv_scales(files).items()}

    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:
        algorithm = self._algorithm(files, module)
        scheme, shape = self._scheme(files, module, algorithm), self._shape(files, module, algorithm)
        codes = _by_rows(files.source.read(f"{module}.weight")) if algorithm in _INT4 else None
        layer = read_layer(files, module, scheme, _NAMES, shape=shape, codes=codes)
        if scheme.input and isinstance(scheme.input.element, Float) and not isinstance(scheme.input.granularity, Group):
            layer = replace(layer, order="inverses")
        multiplier = f"{module}.pre_quant_scale"
        if multiplier not in files.source.tensors:
            return layer
        return replace(layer, input_multiplier=finite(files, multiplier, files.source.read(multiplier)))

    def encode_config(self, plan: Mapping[str, ModulePlan], variant: str = "") -> dict[str, Any]:
        """variant: the algorithm of every layer; without it each has the usual one of its scheme."""
        return modelopt_writer.config_of(plan, variant)

    def encode(self, module: str, layer: LayerTensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return modelopt_writer.pack_layer(module, layer, config)

    def encode_kv_cache(
        self, scheme: TensorScheme, scales: Mapping[str, KvScales]
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        return modelopt_writer.kv_cache_of(scheme, scales)

    def encode_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {"hf_quant_config.json": modelopt_writer.side_file(config)}

    def _config(self, files: CheckpointFiles) -> ModelOptConfig:
        return files.once("config", lambda: self._checked(files))

    def _checked(self, files: CheckpointFiles) -> ModelOptConfig:
        values = dict(files.quantization or {})
        inner = values.get("quantization")
        config = check(ModelOptConfig, inner if isinstance(inner, dict) else values, file=files.quantization_file)
        check_count(config.ignore, file=files.quantization_file, field="quantization_config.ignore", wildcards=True)
        algorithm = str(config.quant_algo).upper()  # those that ModelOpt has no name for stand in lower case
        if algorithm not in (*_ALGORITHMS, "MIXED_PRECISION"):
            raise self._variant(files, str(config.quant_algo))
        if config.has_zero_point:
            raise self._variant(files, f"{algorithm} with zero points (has_zero_point)")
        return config.model_copy(update={"quant_algo": algorithm})

    def _algorithm(self, files: CheckpointFiles, module: str) -> str:
        config = self._config(files)
        if config.quant_algo != "MIXED_PRECISION":
            return str(config.quant_algo)
        algorithm = str((config.quantized_layers or {}).get(module, {}).get("quant_algo")).upper()
        if algorithm not in _ALGORITHMS:
            raise self._variant(files, f"{algorithm} for {module}")
        return algorithm

    def _variant(self, files: CheckpointFiles, found: str) -> Refused:
        return Refused(
            Refusal("unknown-variant", "notimpl", str(files.path), "this algorithm of ModelOpt is not read yet",
                    f"found quant_algo {found}, expected one of {', '.join(_ALGORITHMS)}",
                    "Export the model with one of these.", str(files.quantization_file),
                    field="quantization_config.quant_algo")
        )  # fmt: skip

    def _scheme(self, files: CheckpointFiles, module: str, algorithm: str) -> Scheme:
        if algorithm in _INT4:
            rows, columns = self._packed_shape(files, module)
            scale = require_tensor(files, f"{module}.weight_scale")
            groups = scale.shape[-1] if scale.shape else 0
            if not groups or columns % groups:
                raise bad_file("bad-shape", "the scales do not fit the weight", file=scale.file, tensor=scale.name,
                               field="shape", found=list(scale.shape),
                               expected=f"[{rows}, G], where G divides {columns}")  # fmt: skip
            return Scheme(integer_weight(4, Group(columns // groups), symmetric=True), _INT4[algorithm])
        scheme = self._sized(files, module, Scheme.parse(_SCHEMES[algorithm]))
        given = f"{module}.input_scale" in files.source.tensors
        if algorithm == "FP8_PER_CHANNEL_PER_TOKEN" and given:
            return Scheme(scheme.weight, _TENSOR_FP8)
        if scheme.input is not None and not scheme.input.dynamic and not given:
            # ModelOpt finds the range of MXFP4's fp8 inputs at run time; of the others it has it, or leaves them whole.
            return Scheme(scheme.weight, TensorScheme.parse("fp8-tensor-dyn") if "MXFP4" in algorithm else None)
        return scheme

    def _sized(self, files: CheckpointFiles, module: str, scheme: Scheme) -> Scheme:
        """The scheme with the groups or blocks that the shape of the scales tells."""
        codes, scales = (files.source.tensors.get(f"{module}.{part}") for part in ("weight", "weight_scale"))
        fine, *whole = scheme.weight.scales
        grid: Granularity | None = None
        if codes is None or scales is None or len(codes.shape) != 2:
            return scheme  # refused where shapes are checked
        if isinstance(fine.granularity, Tile) and len(scales.shape) in (2, 4):
            grid = _block(codes.shape, (scales.shape[0], scales.shape[len(scales.shape) // 2]))
        elif whole and len(scales.shape) == 2 and scales.shape[1] and not codes.shape[1] * 2 % scales.shape[1]:
            grid = Group(codes.shape[1] * 2 // scales.shape[1])
        if grid is None or grid == fine.granularity:
            return scheme
        given = scheme.input
        if given is not None and given.granularity == fine.granularity:  # the config states one size for both
            given = replace(given, scales=(replace(given.scales[0], granularity=grid), *given.scales[1:]))
        return Scheme(replace(scheme.weight, scales=(replace(fine, granularity=grid), *whole)), given)

    def _shape(self, files: CheckpointFiles, module: str, algorithm: str) -> tuple[int, int]:
        """[N, K], once all headers agree. Raises Refused (missing-tensor, bad-shape, bad-dtype)."""
        scheme = self._scheme(files, module, algorithm)
        packed = self._packed_shape(files, module) if algorithm in _INT4 else None
        rows, columns = shape_of(files, module, scheme, _NAMES, shape=packed)
        if f"{module}.pre_quant_scale" in files.source.tensors:
            require_tensor(files, f"{module}.pre_quant_scale", shape=(columns,), dtypes=["F32", "BF16", "F16"])
        return rows, columns

    def _packed_shape(self, files: CheckpointFiles, module: str) -> tuple[int, int]:
        """[N, K] of int4 codes, two rows to a byte."""
        weight = require_tensor(files, f"{module}.weight", dtypes=["U8"])
        if len(weight.shape) != 2:
            raise bad_file("bad-shape", "the weight is a matrix", file=weight.file, tensor=weight.name, field="shape",
                           found=list(weight.shape), expected="two dimensions")  # fmt: skip
        return 2 * weight.shape[0], weight.shape[1]


def _block(shape: tuple[int, ...], grid: tuple[int, int]) -> Tile | None:
    """The square blocks that a weight of this shape has so many of."""
    for side in modelopt_writer.SIDES:
        if (-(-shape[0] // side), -(-shape[1] // side)) == grid:
            return Tile(side, side)
    return None


def _by_rows(stored: torch.Tensor) -> torch.Tensor:
    """Two's complement nibbles of two rows a byte [N / 2, K] -> codes + 8, two columns a byte [N, K / 2]."""
    import torch

    from qcore.bits import pack

    codes = torch.stack([stored & 15, stored >> 4], 1).flatten(0, 1) ^ 8  # from two's complement to q + 8
    return pack(codes, 4)


def _excludes(files: CheckpointFiles, pattern: str, module: str) -> bool:
    """By name, by a part of it (as writers before 0.39 meant it), or by wildcards."""
    return pattern in module or wildcard(
        pattern, module, file=files.quantization_file, field="quantization_config.ignore"
    )


METHOD = ModelOpt()
