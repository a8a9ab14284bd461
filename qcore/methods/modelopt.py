"""NVIDIA ModelOpt's unified checkpoints: fp8 per tensor, channel and block, NVFP4, MXFP8, int4 AWQ and int8 SmoothQuant.

    FP8                        weight e4m3 [N, K], weight_scale and input_scale f32 scalars
    FP8_PER_CHANNEL_PER_TOKEN  weight_scale f32 [N]; inputs by token
    FP8_PB_WO                  weight_scale f32 [N / 128, 1, K / 128, 1]; inputs as they are
    NVFP4, W4A16_NVFP4         weight uint8 [N, K / 2], first code low; weight_scale e4m3 [N, K / 16], weight_scale_2 f32
    MXFP8                      weight e4m3 [N, K], weight_scale uint8 [N, K / 32] (e8m0)
    W4A16_AWQ                  weight uint8 [N / 2, K]: rows 2 j in the low nibble, 2 j + 1 in the high one, two's
                               complement; weight_scale [N, K / g]; pre_quant_scale [K] multiplies the input
    W8A8_SQ_PER_CHANNEL        weight int8 [N, K], weight_scale [N], input_scale; pre_quant_scale [K]

w = q * weight_scale (* weight_scale_2). The config stands in config.json or, as `quantization`, in hf_quant_config.json.
Read from ModelOpt's exporter (torch/export/quant_utils.py, torch/quantization/qtensor).
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from pydantic import AliasChoices, Field

from qcore.checkpoint.kv_scales import declared_algorithm
from qcore.checkpoint.settings import Settings, check
from qcore.elements import Group
from qcore.method import CheckpointFiles, Method, ModulePlan, dense_modules, finite, require_tensor
from qcore.refusal import Refusal, Refused, bad_file
from qcore.scheme import Scheme, TensorScheme, integer_weight

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors

_TENSOR_FP8 = TensorScheme.parse("fp8-tensor")
_SCHEMES: Mapping[str, str] = {
    "FP8": "W8A8-fp8-static",
    "FP8_PER_CHANNEL_PER_TOKEN": "W8A8-fp8-dyn",
    "FP8_PB_WO": "W8A16-fp8-block128",
    "NVFP4": "W4A4-nvfp4",
    "W4A16_NVFP4": "W4A16-nvfp4",
    "MXFP8": "W8A8-mxfp8",
    "W8A8_SQ_PER_CHANNEL": "W8A8-int8-static",
}
"""Schemes by quant_algo; W4A16_AWQ's group size stands in its shapes."""
_ALGORITHMS = (*_SCHEMES, "W4A16_AWQ")


class ModelOptConfig(Settings):
    """The keys that decide what the tensors mean, in the spellings of both places."""

    quant_algo: str | None = None
    kv_cache_quant_algo: str | None = None
    kv_cache_scheme: dict[str, Any] | str | None = None
    ignore: list[str] = Field(default_factory=list, validation_alias=AliasChoices("ignore", "exclude_modules"))
    quantized_layers: dict[str, dict[str, Any]] | None = None


class ModelOpt(Method):
    name = "modelopt"
    quant_methods = ("modelopt", "modelopt_fp4", "modelopt_mixed")
    variants = _ALGORITHMS
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
                self._check_scales(files, module, algorithm, shape)
                plan[module] = ModulePlan(scheme, f"quant_algo {algorithm}", shape)
        if not plan:
            raise bad_file("missing-tensor", "the config says ModelOpt, but no tensor is named *.weight_scale",
                           file=files.path)  # fmt: skip
        for module, entry in dense_modules(files.source.tensors, "").items():
            named = next((skip for skip in config.ignore if _excludes(skip, module)), None)
            plan.setdefault(
                module, ModulePlan(None, f"excluded by {named!r}" if named else "stored unquantized", entry.shape)
            )
        return plan

    def kv_cache(self, files: CheckpointFiles) -> TensorScheme | None:
        config = self._config(files)
        return declared_algorithm(files, config.kv_cache_quant_algo, config.kv_cache_scheme)

    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:

        from qcore.tensor import LayerTensors, QuantizedTensor

        algorithm = self._algorithm(files, module)
        scheme, (rows, columns) = self._scheme(files, module, algorithm), self._shape(files, module, algorithm)
        read, tensors = files.source.read, files.source.tensors

        def scale(part: str) -> torch.Tensor:
            return finite(files, f"{module}.{part}", read(f"{module}.{part}"))

        codes = read(f"{module}.weight")
        if algorithm == "W4A16_AWQ":
            codes = _by_rows(codes)
        fine = read(f"{module}.weight_scale") if algorithm == "MXFP8" else scale("weight_scale")
        if algorithm.endswith("NVFP4"):
            scales: tuple[torch.Tensor, ...] = (fine, scale("weight_scale_2").reshape(1, 1))
        else:
            scales = (fine.reshape(_scale_shape(algorithm, rows, columns, fine.numel())),)
        optional = {part: scale(part) for part in ("input_scale", "pre_quant_scale") if f"{module}.{part}" in tensors}
        static = scheme.input is not None and not scheme.input.dynamic
        return LayerTensors(
            QuantizedTensor(scheme, (rows, columns), codes, scales),
            read(f"{module}.bias") if f"{module}.bias" in tensors else None,
            input_scale=optional["input_scale"].reshape(1) if static else None,
            input_multiplier=optional.get("pre_quant_scale"),
        )

    def _config(self, files: CheckpointFiles) -> ModelOptConfig:
        return files.once("config", lambda: self._checked(files))

    def _checked(self, files: CheckpointFiles) -> ModelOptConfig:
        values = dict(files.quantization or {})
        inner = values.get("quantization")
        config = check(ModelOptConfig, inner if isinstance(inner, dict) else values, file=files.quantization_file)
        if config.quant_algo not in (*_ALGORITHMS, "MIXED_PRECISION"):
            raise self._variant(files, str(config.quant_algo))
        return config

    def _algorithm(self, files: CheckpointFiles, module: str) -> str:
        config = self._config(files)
        if config.quant_algo != "MIXED_PRECISION":
            return str(config.quant_algo)
        algorithm = str((config.quantized_layers or {}).get(module, {}).get("quant_algo"))
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
        if algorithm == "W4A16_AWQ":
            _, columns = self._shape(files, module, algorithm)
            groups = require_tensor(files, f"{module}.weight_scale").shape[-1]
            return Scheme(integer_weight(4, Group(columns // groups), symmetric=True))
        scheme = Scheme.parse(_SCHEMES[algorithm])
        static = scheme.input is not None and not scheme.input.dynamic
        return Scheme(scheme.weight) if static and f"{module}.input_scale" not in files.source.tensors else scheme

    def _shape(self, files: CheckpointFiles, module: str, algorithm: str) -> tuple[int, int]:
        """[N, K]. Raises Refused (bad-shape, bad-dtype)."""
        packed = algorithm.endswith(("NVFP4", "AWQ"))
        dtype = "U8" if packed else "I8" if "SQ" in algorithm else "F8_E4M3"
        weight = require_tensor(files, f"{module}.weight", dtypes=[dtype])
        if len(weight.shape) != 2:
            raise bad_file("bad-shape", "the weight is a matrix", file=weight.file, tensor=weight.name, field="shape",
                           found=list(weight.shape), expected="two dimensions")  # fmt: skip
        rows, columns = weight.shape
        if algorithm.endswith("AWQ"):
            return 2 * rows, columns
        return rows, 2 * columns if packed else columns

    def _check_scales(self, files: CheckpointFiles, module: str, algorithm: str, shape: tuple[int, int]) -> None:
        """Raises Refused (bad-shape, bad-dtype, missing-tensor) where the scales do not fit the weight."""
        rows, columns = shape
        info = require_tensor(files, f"{module}.weight_scale")
        count = 1
        for size in info.shape:
            count *= size
        wanted = _scale_shape(algorithm, rows, columns, count)
        fits = count == wanted[0] * wanted[1] and (algorithm != "W4A16_AWQ" or columns % wanted[1] == 0)
        if not fits:
            raise bad_file("bad-shape", "the scales do not fit the weight", file=info.file, tensor=info.name,
                           field="shape", found=list(info.shape), expected=list(wanted))  # fmt: skip
        floats = (
            ["F8_E4M3"] if algorithm.endswith("NVFP4") else ["U8"] if algorithm == "MXFP8" else ["F32", "BF16", "F16"]
        )
        require_tensor(files, info.name, dtypes=floats)
        if algorithm.endswith("NVFP4"):
            self._scalar(files, f"{module}.weight_scale_2")
        if f"{module}.input_scale" in files.source.tensors:
            self._scalar(files, f"{module}.input_scale")
        if f"{module}.pre_quant_scale" in files.source.tensors:
            require_tensor(files, f"{module}.pre_quant_scale", shape=(columns,), dtypes=["F32", "BF16", "F16"])

    def _scalar(self, files: CheckpointFiles, name: str) -> None:
        info = require_tensor(files, name, dtypes=["F32", "BF16", "F16"])
        if info.shape not in ((), (1,)):
            raise bad_file("bad-shape", "the scale is one number", file=info.file, tensor=name, field="shape",
                           found=list(info.shape), expected="[] or [1]")  # fmt: skip


def _scale_shape(algorithm: str, rows: int, columns: int, count: int) -> tuple[int, int]:
    """The canonical shape of the finest scales; AWQ's groups follow from how many there are."""
    if algorithm == "FP8":
        return 1, 1
    if algorithm in ("FP8_PER_CHANNEL_PER_TOKEN", "W8A8_SQ_PER_CHANNEL"):
        return rows, 1
    if algorithm == "FP8_PB_WO":
        return -(-rows // 128), -(-columns // 128)
    if algorithm == "W4A16_AWQ":
        return rows, max(1, count // max(rows, 1))
    size = 32 if algorithm == "MXFP8" else 16
    return rows, -(-columns // size)


def _by_rows(stored: torch.Tensor) -> torch.Tensor:
    """Two's complement nibbles of two rows a byte [N / 2, K] -> codes + 8, two columns a byte [N, K / 2]."""
    import torch

    from qcore.bits import pack

    codes = torch.stack([stored & 15, stored >> 4], 1).flatten(0, 1) ^ 8  # from two's complement to q + 8
    return pack(codes, 4)


def _excludes(pattern: str, module: str) -> bool:
    """By name, by a part of it (as writers before 0.39 meant it), or by wildcards."""
    return pattern in module or fnmatchcase(module, pattern)


METHOD = ModelOpt()
