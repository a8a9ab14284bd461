"""`fp8` as DeepSeek and transformers write it, per tensor or in blocks, and FBGEMM's fp8 by channel.

    fp8, per tensor   weight e4m3 [N, K], weight_scale f32; input_scale f32 where activation_scheme is static
    fp8, in blocks    weight e4m3 [N, K], weight_scale_inv f32 or e8m0 [ceil(N / r), ceil(K / c)]: multiplied, despite
                      its name; inputs by groups of c, scaled at run time
    fbgemm_fp8        weight e4m3 [N, K], weight_scale f32 [N, 1]; inputs by token, their scales those of magnitudes up to
                      activation_scale_ub

w = q * scale. Sources: DeepSeek-V3's config and weight_dequant, transformers' FineGrainedFP8 and FbgemmFp8 quantizers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from qcore.checkpoint.settings import Settings, check
from qcore.elements import Float, Granularity, Group, Level, PerChannel, PerTensor, PerToken, ScaleType, Tile
from qcore.layouts.scaled import Names, read_layer, shape_of
from qcore.method import CheckpointFiles, Method, ModulePlan, dense_modules, stated_method
from qcore.refusal import Refusal, Refused, bad_file
from qcore.scheme import Scheme, TensorScheme

if TYPE_CHECKING:
    from qcore.tensor import LayerTensors


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
                scheme = self._scheme(files, module)
                shape = shape_of(files, module, scheme, self._names(files))
                plan[module] = ModulePlan(scheme, "quantization_config", shape)
        if not plan:
            raise bad_file("missing-tensor", "the config says fp8, but no weight is stored in fp8", file=files.path,
                           field="quantization_config.quant_method",
                           fix="An unquantized model that is only marked is not read; quantize it first.")  # fmt: skip
        skipped = [*(config.ignored_layers or ()), *(config.modules_to_not_convert or ())]
        for module, entry in dense_modules(files.source.tensors, "").items():
            named = next((skip for skip in skipped if skip in module), None)
            plan.setdefault(
                module, ModulePlan(None, f"the config skips {named!r}" if named else "stored unquantized", entry.shape)
            )
        return plan

    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:
        return read_layer(files, module, self._scheme(files, module), self._names(files))

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

    def _names(self, files: CheckpointFiles) -> Names:
        return Names(scale="weight_scale_inv" if self._config(files).weight_block_size else "weight_scale")

    def _scheme(self, files: CheckpointFiles, module: str) -> Scheme:
        config, element = self._config(files), Float("e4m3fn")
        scale = files.source.tensors.get(f"{module}.{self._names(files).scale}")
        kind: ScaleType = "e8m0" if scale is not None and scale.dtype in ("U8", "F8_E8M0") else "float"

        def both(weight: Granularity, given: Granularity, *, dynamic: bool) -> Scheme:
            return Scheme(
                TensorScheme(element, (Level(weight, kind),)), TensorScheme(element, (Level(given),), dynamic=dynamic)
            )

        if stated_method(files.quantization) == "fbgemm_fp8":
            given = TensorScheme(element, (Level(PerToken()),), dynamic=True, bound=config.activation_scale_ub)
            return Scheme(TensorScheme(element, (Level(PerChannel(), kind),)), given)
        if config.weight_block_size:
            return both(Tile(*config.weight_block_size), Group(config.weight_block_size[1]), dynamic=True)
        return both(PerTensor(), PerTensor(), dynamic=config.activation_scheme == "dynamic")


METHOD = Fp8()
