"""AMD Quark's exports: fp8, int8, uint4 in AWQ's order, and MXFP4, with numbers of their own for some layers.

    fp8_e4m3   weight e4m3 [N, K]; weight_scale one number or [N]; input_scale where inputs are static
    int8       weight int8 [N, K]; weight_scale one number or [N]; zero points are stored, and are 0
    uint4      weight int32 [K, N / 8], weight_scale [G, N], weight_zero_point int32 [G, N / 8]: AWQ's gemm layout, with
               nibbles in order where pack_method is `order`
    fp4        weight uint8 [N, K / 2], first code low; weight_scale uint8 [N, K / 32] (e8m0)

w = (q - z) * weight_scale. Read from Quark's exporter and its checkpoints.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from pydantic import Field

from qcore.checkpoint.kv_scales import unknown_kv_cache
from qcore.checkpoint.patterns import matches
from qcore.checkpoint.settings import Settings, check
from qcore.elements import Element, Float, Granularity, Group, Int, Level, PerChannel, PerTensor, PerToken, scale_shape
from qcore.layouts.awq import unpack_words
from qcore.method import CheckpointFiles, Method, ModulePlan, dense_modules, finite, require_tensor
from qcore.refusal import Refusal, Refused, bad_file
from qcore.scheme import Scheme, TensorScheme

if TYPE_CHECKING:
    from qcore.tensor import LayerTensors

_ELEMENTS: dict[str, tuple[Element, str]] = {
    "fp8_e4m3": (Float("e4m3fn"), "F8_E4M3"),
    "int8": (Int(8, signed=True), "I8"),
    "uint4": (Int(4, signed=False), "I32"),
    "fp4": (Float("e2m1"), "U8"),
}
"""What one code is, and the type of the tensor that holds the codes."""


class Spec(Settings):
    """How one tensor is quantized."""

    dtype: str
    qscheme: str
    group_size: int | None = Field(None, ge=1)
    symmetric: bool | None = True
    is_dynamic: bool = False
    scale_format: str | None = None


class LayerSpec(Settings):
    """A layer's tensors; lists of two are two-level scales."""

    weight: Spec | list[Spec] | None = None
    input_tensors: Spec | list[Spec] | None = None
    output_tensors: Any = None


class Export(Settings):
    """How tensors were written."""

    pack_method: str = "reorder"
    kv_cache_group: list[str] = Field(default_factory=list)


class QuarkConfig(Settings):
    """The keys that decide what the tensors mean."""

    global_quant_config: LayerSpec
    layer_quant_config: dict[str, LayerSpec] = Field(default_factory=dict)
    exclude: list[str] = Field(default_factory=list)
    export: Export = Export()
    kv_cache_quant_config: dict[str, LayerSpec] = Field(default_factory=dict)
    version: str | None = None


class Quark(Method):
    name = "quark"
    quant_methods = ("quark",)
    variants = ("fp8_e4m3", "int8", "uint4", "fp4")
    parts = frozenset(
        ["weight", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point", "bias", "output_scale"]
    )

    def format_version(self, files: CheckpointFiles) -> str:
        return self._config(files).version or ""

    def plan(self, files: CheckpointFiles) -> dict[str, ModulePlan]:
        config, plan = self._config(files), {}
        for name in files.source.tensors:
            module, _, part = name.rpartition(".")
            if part == "weight_scale":
                scheme, named = self._scheme(files, module)
                reason = f"layer_quant_config {named!r}" if named else "global_quant_config"
                plan[module] = ModulePlan(scheme, reason, self._shape(files, module, scheme))
        if not plan:
            raise bad_file("missing-tensor", "the config says Quark, but no tensor is named *.weight_scale",
                           file=files.path)  # fmt: skip
        for module, entry in dense_modules(files.source.tensors, "").items():
            named = next((skip for skip in config.exclude if _names(files, skip, module)), "")
            plan.setdefault(
                module, ModulePlan(None, f"exclude names {named!r}" if named else "stored unquantized", entry.shape)
            )
        return plan

    def kv_cache(self, files: CheckpointFiles) -> TensorScheme | None:
        config = self._config(files)
        if not config.export.kv_cache_group:
            return None
        for spec in config.kv_cache_quant_config.values():
            given = spec.output_tensors
            found = f"{given['dtype']} {given.get('qscheme')}" if isinstance(given, dict) and "dtype" in given else ""
            if found not in ("", "fp8_e4m3 per_tensor"):
                raise unknown_kv_cache(files, "kv_cache_quant_config", found)
        return TensorScheme.parse("fp8-tensor")

    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:
        from qcore.bits import pack
        from qcore.tensor import LayerTensors, QuantizedTensor

        scheme, _ = self._scheme(files, module)
        rows, columns = self._shape(files, module, scheme)
        read, tensors, weight = files.source.read, files.source.tensors, scheme.weight
        codes, scales = read(f"{module}.weight"), read(f"{module}.weight_scale")
        zeros = None
        if weight.bits == 4 and isinstance(weight.element, Int):
            reorder = self._config(files).export.pack_method == "reorder"
            codes = pack(unpack_words(codes, reorder=reorder).t().contiguous(), 4)
            zeros = unpack_words(read(f"{module}.weight_zero_point"), reorder=reorder).t().contiguous()
            scales = scales.t().contiguous()
        else:
            self._no_zero_points(files, module)
        if weight.scales[0].type == "float":
            finite(files, f"{module}.weight_scale", scales)
        fine = scales.reshape(scale_shape(weight.scales[0].granularity, rows, columns))
        static = scheme.input is not None and not scheme.input.dynamic
        bias = f"{module}.bias"
        return LayerTensors(
            QuantizedTensor(scheme, (rows, columns), codes, (fine,), zeros),
            read(bias) if bias in tensors else None,
            input_scale=finite(files, f"{module}.input_scale", read(f"{module}.input_scale")).reshape(1)
            if static
            else None,
        )

    def _config(self, files: CheckpointFiles) -> QuarkConfig:
        return files.once("config", lambda: check(QuarkConfig, files.quantization or {}, file=files.quantization_file))

    def _scheme(self, files: CheckpointFiles, module: str) -> tuple[Scheme, str]:
        """The module's scheme, and the pattern of layer_quant_config that decided it, if any."""
        config = self._config(files)
        named = next((pattern for pattern in config.layer_quant_config if fnmatchcase(module, pattern)), "")
        spec = config.layer_quant_config[named] if named else config.global_quant_config
        weight = self._tensor(files, spec.weight, "weight", inputs=False)
        given = spec.input_tensors
        return Scheme(
            weight, None if given is None else self._tensor(files, given, "input_tensors", inputs=True)
        ), named

    def _tensor(
        self, files: CheckpointFiles, spec: Spec | list[Spec] | None, field: str, *, inputs: bool
    ) -> TensorScheme:
        """Raises Refused (unknown-variant) where the combination is not read."""
        if not isinstance(spec, Spec) or spec.dtype not in _ELEMENTS:
            found = spec.dtype if isinstance(spec, Spec) else f"{len(spec)} levels" if spec else "none"
            raise self._variant(files, field, found)
        element, _ = _ELEMENTS[spec.dtype]
        granularity: Granularity
        if spec.qscheme == "per_group" and spec.group_size:
            granularity = Group(spec.group_size)
        elif spec.qscheme in ("per_tensor", "per_channel"):
            channel = PerToken() if inputs else PerChannel()
            granularity = PerTensor() if spec.qscheme == "per_tensor" else channel
        else:
            raise self._variant(files, field, f"{spec.dtype} {spec.qscheme}")
        shared = spec.dtype == "fp4"
        affine = spec.dtype == "uint4"
        fits = {"fp4": isinstance(granularity, Group) and spec.scale_format == "e8m0", "uint4": not inputs}
        if not fits.get(spec.dtype, not isinstance(granularity, Group)) or (not affine and spec.symmetric is False):
            raise self._variant(files, field, f"{spec.dtype} {spec.qscheme}, symmetric {spec.symmetric}")
        level = Level(granularity, "e8m0" if shared else "float")
        return TensorScheme(
            element, (level,), "stored" if affine else None, dynamic=inputs and (spec.is_dynamic or shared)
        )

    def _variant(self, files: CheckpointFiles, field: str, found: str) -> Refused:
        return Refused(
            Refusal("unknown-variant", "notimpl", str(files.path), "this scheme of Quark is not read yet",
                    f"found {found}, expected {', '.join(_ELEMENTS)}, of one level", "Export the model in one of these.",
                    str(files.quantization_file), field=f"quantization_config.{field}")
        )  # fmt: skip

    def _shape(self, files: CheckpointFiles, module: str, scheme: Scheme) -> tuple[int, int]:
        """[N, K], once all headers agree. Raises Refused (missing-tensor, bad-shape, bad-dtype)."""
        weight = scheme.weight
        held = next(kind for element, kind in _ELEMENTS.values() if element == weight.element)
        info = require_tensor(files, f"{module}.weight", dtypes=[held])
        if len(info.shape) != 2:
            raise bad_file("bad-shape", "the weight is a matrix", file=info.file, tensor=info.name, field="shape",
                           found=list(info.shape), expected="two dimensions")  # fmt: skip
        outer, inner = info.shape
        if held == "I32":
            rows, columns = inner * 8, outer
            groups = scale_shape(weight.scales[0].granularity, rows, columns)[1]
            require_tensor(files, f"{module}.weight_scale", shape=(groups, rows), dtypes=["F32", "BF16", "F16"])
            require_tensor(files, f"{module}.weight_zero_point", shape=(groups, inner), dtypes=["I32"])
            return rows, columns
        rows, columns = outer, inner * 2 if held == "U8" else inner
        wanted = scale_shape(weight.scales[0].granularity, rows, columns)
        floats = ["U8"] if weight.scales[0].type == "e8m0" else ["F32", "BF16", "F16"]
        scale = require_tensor(files, f"{module}.weight_scale", dtypes=floats)
        if scale.shape not in (wanted, wanted[:1] if wanted[1] == 1 else wanted, () if wanted == (1, 1) else wanted):
            raise bad_file("bad-shape", "the scales do not fit the weight", file=scale.file, tensor=scale.name,
                           field="shape", found=list(scale.shape), expected=list(wanted))  # fmt: skip
        if scheme.input is not None and not scheme.input.dynamic:
            given = require_tensor(files, f"{module}.input_scale", dtypes=["F32", "BF16", "F16"])
            if given.shape not in ((), (1,)):
                raise bad_file("bad-shape", "the scale is one number", file=given.file, tensor=given.name, field="shape",
                               found=list(given.shape), expected="[] or [1]")  # fmt: skip
        return rows, columns

    def _no_zero_points(self, files: CheckpointFiles, module: str) -> None:
        """Symmetric tensors come with zero points all the same. Raises Refused (bad-content) where one is not 0."""
        for part in ("weight_zero_point", "input_zero_point"):
            info = files.source.tensors.get(f"{module}.{part}")
            if info is not None and bool(files.source.read(info.name).any()):
                raise bad_file("bad-content", "a symmetric tensor has a zero point", file=info.file, tensor=info.name,
                               field="values", found="other than 0", expected="0")  # fmt: skip


def _names(files: CheckpointFiles, entry: str, module: str) -> bool:
    """exclude's rule: a name, wildcards, or a regular expression after `re:`."""
    if entry.startswith("re:"):
        return matches(entry[3:], module, file=files.quantization_file, field="quantization_config.exclude")
    return fnmatchcase(module, entry)


METHOD = Quark()
