"""`fp8` as DeepSeek and transformers write it, per tensor or in blocks, and FBGEMM's fp8 by channel.

    fp8, per tensor   weight e4m3 [N, K], one scale f32; the input's scale f32 where activation_scheme is static
    fp8, in blocks    weight e4m3 [N, K], weight_scale_inv f32 or e8m0 [ceil(N / r), ceil(K / c)]: multiplied, despite
                      its name; inputs by groups of c, scaled at run time, or static as above
    fp8, fp4 experts  weight int8 [N, K / 2], e2m1, first code low; scale e8m0 or f32 [N, K / 32]
    fp8, GPTQModel's  weight e4m3 [N, K], weight_scale_inv f32 [], [N] or in blocks, which divides; inputs stay whole
    fbgemm_fp8        weight e4m3 [N, K], weight_scale f32 [N, 1]; inputs by token, their scales those of magnitudes up to
                      activation_scale_ub

Under scale_fmt ue8m0 the scales of inputs in groups are rounded up to powers of two, as the weight's are. Under `dequantize`
transformers multiplies the weights out while it loads, and inputs stay whole.

w = q * scale. The scale's name is the writer's choice: weight_scale_inv (transformers, DeepSeek-V3), weight_scale (AutoFP8,
vLLM), scale (DeepSeek-V4), qscale_weight (Mistral); so is the input's. Experts may be stacked: <experts>.gate_up_proj
[E, N, K] and <experts>.gate_up_proj_scale_inv. Sources: DeepSeek-V3's config, weight_dequant and act_quant,
transformers' FineGrainedFP8 and FbgemmFp8 quantizers, GPTQModel's FP8Config and TorchFP8Linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import AliasChoices, Field

from qcore.checkpoint.patterns import skips
from qcore.checkpoint.settings import Settings, check
from qcore.checkpoint.source import TensorInfo
from qcore.elements import Float, Group, Level, PerChannel, PerTensor, PerToken, ScaleType, scale_shape
from qcore.layouts import fp8, gptqmodel
from qcore.layouts.scaled import Names, read_layer, shape_of
from qcore.method import (
    SCALE_DTYPES,
    CheckpointFiles,
    Method,
    ModulePlan,
    dense_modules,
    is_embedding,
    read_scale,
    require_tensor,
    stated_method,
)
from qcore.refusal import Refusal, Refused, bad_file
from qcore.scheme import Scheme, TensorScheme

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors

_SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
_INPUTS = ("input_scale", "activation_scale", "qscale_act")
_E2M1_GROUP = 32


class Fp8Config(Settings):
    """The keys that decide what the tensors mean."""

    activation_scheme: Literal["static", "dynamic"] = "dynamic"
    weight_block_size: tuple[int, int] | None = None
    fmt: str = Field("e4m3", validation_alias=AliasChoices("fmt", "format"))
    scale_fmt: str | None = None
    dequantize: bool = False
    weight_scale_semantics: Literal["inverse"] | None = None
    weight_scale_method: Literal["tensor", "row", "block"] | None = None
    dynamic: dict[str, Any] | None = None
    activation_scale_ub: float | None = Field(None, gt=0)
    ignored_layers: list[str] | None = None
    modules_to_not_convert: list[str] | None = None

    @property
    def divides(self) -> bool:
        """Whether it is GPTQModel's: scales are the reciprocals of what multiplies, and inputs stay whole."""
        return self.weight_scale_semantics is not None


class Fp8(Method):
    name = "fp8"
    quant_methods = ("fp8", "fbgemm_fp8")
    variants = ("tensor", "block", "channel")
    written = fp8.WRITTEN
    stacked = True
    parts = frozenset({"weight", "bias", "input_scale_ub", *_SCALES, *_INPUTS})

    def format_version(self, files: CheckpointFiles) -> str:
        return stated_method(files.quantization)

    def plan(self, files: CheckpointFiles) -> dict[str, ModulePlan]:
        config, plan = self._config(files), {}
        for name, info in files.source.tensors.items():
            module, _, part = name.rpartition(".")
            if part == "weight" and info.dtype in ("F8_E4M3", "I8"):
                scheme = self._scheme(files, module)
                shape = shape_of(files, module, scheme, self._names(files, module), shape=self._halved(files, info))
                plan[module] = ModulePlan(scheme, "quantization_config", shape)
            elif info.dtype == "F8_E4M3" and fp8.stacked_scale(name) in files.source.tensors:
                scheme = self._stacked_scheme(files, name)
                plan[name] = ModulePlan(scheme, "quantization_config", info.shape)
        if not plan:
            raise bad_file("missing-tensor", "the config says fp8, but no weight is stored in fp8", file=files.path,
                           field="quantization_config.quant_method",
                           fix="An unquantized model that is only marked is not read; quantize it first.")  # fmt: skip
        skipped = [*(config.ignored_layers or ()), *(config.modules_to_not_convert or ())]
        for module, entry in dense_modules(files.source.tensors, "").items():
            named = skips(skipped, module, file=files.quantization_file, field="modules_to_not_convert")
            plan.setdefault(
                module, ModulePlan(None, f"the config skips {named!r}" if named else "stored unquantized", entry.shape)
            )
        return plan

    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:
        if module in files.source.tensors:
            return self._read_stacked(files, module)
        import torch

        info = files.source.tensors[f"{module}.weight"]
        packed = files.source.read(info.name).view(torch.uint8) if info.dtype == "I8" else None
        names = self._names(files, module)
        layer = read_layer(
            files, module, self._scheme(files, module), names, shape=self._halved(files, info), codes=packed
        )
        return fp8.divided(files, f"{module}.{names.scale}", layer) if self._config(files).divides else layer

    def encode_config(self, plan: Mapping[str, ModulePlan], variant: str = "") -> dict[str, Any]:
        return fp8.config_of(plan, variant)

    def encode(self, module: str, layer: LayerTensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return fp8.pack_layer(module, layer, config)

    def parameters(self, files: CheckpointFiles, plan: Mapping[str, ModulePlan]) -> dict[str, TensorInfo]:
        found = super().parameters(files, plan)
        stacks = [module for module, entry in plan.items() if entry.scheme is not None and module in found]
        decoded = {name for stack in stacks for name in (stack, *fp8.stacked_parts(stack))}
        return {name: info for name, info in found.items() if name not in decoded}

    def _config(self, files: CheckpointFiles) -> Fp8Config:
        return files.once("config", lambda: self._checked(files))

    def _checked(self, files: CheckpointFiles) -> Fp8Config:
        config = check(Fp8Config, files.quantization or {}, file=files.quantization_file)
        gptqmodel.refuse_computed(files, files.quantization or {})
        own = [pattern for pattern, entry in (config.dynamic or {}).items() if entry and not pattern.startswith("-:")]
        found = [
            f"{name} {value!r}"
            for name, value, known in (
                (
                    "fmt" if "fmt" in (files.quantization or {}) else "format",
                    config.fmt,
                    config.fmt in ("e4m3", "e4m3fn", "float8_e4m3", "float8_e4m3fn"),
                ),
                ("dynamic", own, not own),
                ("scale_fmt", config.scale_fmt, config.scale_fmt in (None, "float", "ue8m0")),
                ("weight_block_size", config.weight_block_size, min(config.weight_block_size or (1,)) > 0),
            )
            if not known
        ]
        if found:
            raise Refused(
                Refusal("unknown-variant", "notimpl", str(files.path), "this form of fp8 is not read yet",
                        f"found {found[0]}, expected e4m3, float or ue8m0 scales, blocks of some size, the same for all",
                        "Export the model as fp8 e4m3.", str(files.quantization_file),
                        field=f"quantization_config.{found[0].split()[0]}")
            )  # fmt: skip
        return config

    def _names(self, files: CheckpointFiles, module: str) -> Names:
        """What the module's scales are called. Raises Refused (duplicate)."""
        config = self._config(files)
        inverse = config.weight_block_size is not None or config.divides
        return Names(
            scale=_only(files, module, _SCALES, default=_SCALES[0 if inverse else 1]),
            input=_only(files, module, _INPUTS, default=_INPUTS[0]),
        )

    def _halved(self, files: CheckpointFiles, info: TensorInfo) -> tuple[int, int] | None:
        """[N, K] of a weight that is stored two codes a byte; None of others."""
        if info.dtype != "I8":
            return None
        if len(info.shape) != 2:
            raise bad_file("bad-shape", "the weight is a matrix", file=info.file, tensor=info.name, field="shape",
                           found=list(info.shape), expected="two dimensions")  # fmt: skip
        return info.shape[0], info.shape[1] * 2

    def _scheme(self, files: CheckpointFiles, module: str) -> Scheme:
        config, element = self._config(files), Float("e4m3fn")
        scale = files.source.tensors.get(f"{module}.{self._names(files, module).scale}")
        kind: ScaleType = "e8m0" if scale is not None and scale.dtype in ("U8", "F8_E8M0") else "float"
        if files.source.tensors[f"{module}.weight"].dtype == "I8":
            return Scheme(TensorScheme(Float("e2m1"), (Level(Group(_E2M1_GROUP), kind),)), self._input(config))
        if stated_method(files.quantization) == "fbgemm_fp8":
            # A bound that is float32's largest number bounds nothing.
            stated = fp8.DEFAULT_BOUND if config.activation_scale_ub is None else config.activation_scale_ub
            bound = None if stated >= fp8.LARGEST else stated
            given = TensorScheme(element, (Level(PerToken()),), dynamic=True, bound=bound)
            return Scheme(TensorScheme(element, (Level(PerChannel(), kind),)), given)
        whole = is_embedding(module) and scale is not None and scale.nbytes == 4  # transformers' FP8Embedding
        if config.weight_block_size and not whole:
            weight = TensorScheme(element, (Level(fp8.grid_of(config.weight_block_size), kind),))
        else:
            grid = PerChannel() if config.weight_scale_method == "row" else PerTensor()
            weight = TensorScheme(element, (Level(grid, kind),))
        return Scheme(weight, None if whole else self._input(config))

    def _input(self, config: Fp8Config) -> TensorScheme | None:
        if config.dequantize or config.divides:
            return None
        element, dynamic = Float("e4m3fn"), config.activation_scheme == "dynamic"
        if not dynamic or config.weight_block_size is None:
            return TensorScheme(element, (Level(PerTensor()),), dynamic=dynamic)
        kind: ScaleType = "e8m0ceil" if config.scale_fmt == "ue8m0" else "float"
        return TensorScheme(element, (Level(Group(config.weight_block_size[1]), kind),), dynamic=True)

    def _stacked_scheme(self, files: CheckpointFiles, name: str) -> Scheme:
        """That of experts [E, N, K], once all headers agree. Raises Refused (bad-shape, bad-dtype, missing-tensor)."""
        info, config = files.source.tensors[name], self._config(files)
        if len(info.shape) != 3 or stated_method(files.quantization) != "fp8":
            raise bad_file("bad-shape", "fp8 weights without a module of their own are stacked experts", file=info.file,
                           tensor=name, field="shape", found=list(info.shape), expected="[experts, rows, columns]")  # fmt: skip
        count, rows, columns = info.shape
        scale = files.source.tensors[fp8.stacked_scale(name)]
        kind: ScaleType = "e8m0" if scale.dtype in ("U8", "F8_E8M0") else "float"
        grid = fp8.grid_of(config.weight_block_size) if config.weight_block_size else PerTensor()
        wanted = (count, *scale_shape(grid, rows, columns))
        if scale.shape != wanted and not (scale.shape == (count,) and isinstance(grid, PerTensor)):
            require_tensor(files, scale.name, shape=wanted)
        require_tensor(files, scale.name, dtypes=SCALE_DTYPES[kind])
        given = self._input(config)
        if given is not None and not given.dynamic:
            require_tensor(files, fp8.stacked_input(name), shape=(count,), dtypes=SCALE_DTYPES["float"])
        return Scheme(TensorScheme(Float("e4m3fn"), (Level(grid, kind),)), given)

    def _read_stacked(self, files: CheckpointFiles, name: str) -> LayerTensors:
        from qcore.tensor import LayerTensors, QuantizedTensor

        scheme, shape = self._stacked_scheme(files, name), files.source.tensors[name].shape
        fine = scheme.weight.scales[0]
        scales = read_scale(files, fp8.stacked_scale(name), fine.type)
        scales = scales.reshape(shape[0], *scale_shape(fine.granularity, *shape[1:]))
        static = scheme.input is not None and not scheme.input.dynamic
        given = read_scale(files, fp8.stacked_input(name)).reshape(-1, 1) if static else None
        weight = QuantizedTensor(scheme, shape, files.source.read(name), (scales,))
        return LayerTensors(weight, input_scale=given)


def _only(files: CheckpointFiles, module: str, names: tuple[str, ...], *, default: str) -> str:
    """The one of the names that is there, or the default. Raises Refused (duplicate) where there are several."""
    found = [name for name in names if f"{module}.{name}" in files.source.tensors]
    if len(found) > 1:
        info = files.source.tensors[f"{module}.{found[1]}"]
        raise bad_file("duplicate", "a scale stands there under two names", file=info.file, tensor=info.name,
                       found=" and ".join(found), expected="one of them")  # fmt: skip
    return found[0] if found else default


METHOD = Fp8()
