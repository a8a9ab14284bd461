"""`fp8` as DeepSeek and transformers write it, per tensor or in blocks, and FBGEMM's fp8 by channel.

    fp8, per tensor   weight e4m3 [N, K], weight_scale f32; input_scale f32 where activation_scheme is static
    fp8, in blocks    weight e4m3 [N, K], weight_scale_inv f32 [ceil(N / r), ceil(K / c)]: multiplied, despite its name;
                      inputs by groups of c, scaled at run time
    fbgemm_fp8        weight e4m3 [N, K], weight_scale f32 [N, 1]; inputs by token

w = q * scale. Sources: DeepSeek-V3's config and weight_dequant, transformers' FineGrainedFP8 and FbgemmFp8 quantizers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from qcore.checkpoint.settings import Settings, check
from qcore.elements import Float, Granularity, Group, Level, PerChannel, PerTensor, PerToken, Tile, scale_shape
from qcore.method import CheckpointFiles, Method, ModulePlan, dense_modules, finite, require_tensor, stated_method
from qcore.refusal import Refusal, Refused, bad_file
from qcore.scheme import Scheme, TensorScheme

if TYPE_CHECKING:
    from qcore.tensor import LayerTensors

_FLOATS = ("F32", "BF16", "F16")
_NAMES: Mapping[type[Granularity], str] = {
    Tile: "weight_scale_inv",
    PerTensor: "weight_scale",
    PerChannel: "weight_scale",
}


class Fp8Config(Settings):
    """The keys that decide what the tensors mean."""

    activation_scheme: Literal["static", "dynamic"] = "dynamic"
    weight_block_size: tuple[int, int] | None = None
    fmt: str = "e4m3"
    scale_fmt: str | None = None
    activation_scale_ub: float | None = Field(None, gt=0)
    ignored_layers: list[str] | None = None
    modules_to_not_convert: list[str] | None = None


class Fp8(Method):
    name = "fp8"
    quant_methods = ("fp8", "fbgemm_fp8")
    variants = ("tensor", "block", "channel")
    parts = frozenset({"weight", "weight_scale", "weight_scale_inv", "input_scale", "bias", "input_scale_ub"})

    def format_version(self, files: CheckpointFiles) -> str:
        return stated_method(files.quantization)

    def plan(self, files: CheckpointFiles) -> dict[str, ModulePlan]:
        config, plan = self._config(files), {}
        for name, info in files.source.tensors.items():
            module, _, part = name.rpartition(".")
            if part == "weight" and info.dtype == "F8_E4M3":
                scheme = self._scheme(files)
                plan[module] = ModulePlan(scheme, "quantization_config", self._shape(files, module, scheme))
        if not plan:
            raise bad_file("missing-tensor", "the config says fp8, but no weight is stored in fp8", file=files.path,
                           fix="An unquantized model that is only marked is not read; quantize it first.")  # fmt: skip
        skipped = [*(config.ignored_layers or ()), *(config.modules_to_not_convert or ())]
        for module, entry in dense_modules(files.source.tensors, "").items():
            named = next((skip for skip in skipped if skip in module), None)
            plan.setdefault(
                module, ModulePlan(None, f"the config skips {named!r}" if named else "stored unquantized", entry.shape)
            )
        return plan

    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:
        from qcore.tensor import LayerTensors, QuantizedTensor

        scheme = self._scheme(files)
        rows, columns = self._shape(files, module, scheme)
        read, grid = files.source.read, scheme.weight.scales[0].granularity
        name = f"{module}.{_NAMES[type(grid)]}"
        scales = finite(files, name, read(name)).reshape(scale_shape(grid, rows, columns))
        static = scheme.input is not None and not scheme.input.dynamic
        given = f"{module}.input_scale"
        return LayerTensors(
            QuantizedTensor(scheme, (rows, columns), read(f"{module}.weight"), (scales,)),
            read(f"{module}.bias") if f"{module}.bias" in files.source.tensors else None,
            input_scale=finite(files, given, read(given)).reshape(1) if static else None,
        )

    def _config(self, files: CheckpointFiles) -> Fp8Config:
        return files.once("config", lambda: self._checked(files))

    def _checked(self, files: CheckpointFiles) -> Fp8Config:
        config = check(Fp8Config, files.quantization or {}, file=files.quantization_file)
        found = [
            f"{name} {value!r}"
            for name, value, known in (
                ("fmt", config.fmt, config.fmt in ("e4m3", "e4m3fn", "float8_e4m3fn")),
                ("scale_fmt", config.scale_fmt, config.scale_fmt in (None, "float", "ue8m0")),
                ("weight_block_size", config.weight_block_size, min(config.weight_block_size or (1,)) > 0),
                (
                    "activation_scheme",
                    config.activation_scheme,
                    not (config.weight_block_size and config.activation_scheme == "static"),
                ),
            )
            if not known
        ]
        if found:
            raise Refused(
                Refusal("unknown-variant", "notimpl", str(files.path), "this form of fp8 is not read yet",
                        f"found {found[0]}, expected e4m3, float scales, inputs of blocks scaled at run time",
                        "Export the model as fp8 e4m3.", str(files.quantization_file),
                        field=f"quantization_config.{found[0].split()[0]}")
            )  # fmt: skip
        return config

    def _scheme(self, files: CheckpointFiles) -> Scheme:
        config, element = self._config(files), Float("e4m3fn")

        def both(weight: Granularity, given: Granularity, *, dynamic: bool) -> Scheme:
            return Scheme(
                TensorScheme(element, (Level(weight),)), TensorScheme(element, (Level(given),), dynamic=dynamic)
            )

        if stated_method(files.quantization) == "fbgemm_fp8":
            return both(PerChannel(), PerToken(), dynamic=True)
        if config.weight_block_size:
            return both(Tile(*config.weight_block_size), Group(config.weight_block_size[1]), dynamic=True)
        return both(PerTensor(), PerTensor(), dynamic=config.activation_scheme == "dynamic")

    def _shape(self, files: CheckpointFiles, module: str, scheme: Scheme) -> tuple[int, int]:
        """[N, K], once all headers agree. Raises Refused (missing-tensor, bad-shape, bad-dtype)."""
        weight = require_tensor(files, f"{module}.weight", dtypes=["F8_E4M3"])
        if len(weight.shape) != 2:
            raise bad_file("bad-shape", "the weight is a matrix", file=weight.file, tensor=weight.name, field="shape",
                           found=list(weight.shape), expected="two dimensions")  # fmt: skip
        rows, columns = weight.shape
        grid = scheme.weight.scales[0].granularity
        wanted = scale_shape(grid, rows, columns)
        scale = require_tensor(files, f"{module}.{_NAMES[type(grid)]}", dtypes=_FLOATS)
        numbers = {wanted, () if wanted == (1, 1) else wanted, (1,) if wanted == (1, 1) else wanted,
                   (rows,) if isinstance(grid, PerChannel) else wanted}  # fmt: skip
        if scale.shape not in numbers:
            raise bad_file("bad-shape", "the scales do not fit the weight", file=scale.file, tensor=scale.name,
                           field="shape", found=list(scale.shape), expected=list(wanted))  # fmt: skip
        if scheme.input is not None and not scheme.input.dynamic:
            given = require_tensor(files, f"{module}.input_scale", dtypes=_FLOATS)
            if given.shape not in ((), (1,)):
                raise bad_file("bad-shape", "the scale is one number", file=given.file, tensor=given.name, field="shape",
                               found=list(given.shape), expected="[] or [1]")  # fmt: skip
        return rows, columns


METHOD = Fp8()
