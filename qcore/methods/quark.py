"""AMD Quark's exports: fp8, int8, 4-bit integers in AWQ's order, MX and NVFP4, with numbers of their own for some layers.

    fp8_e4m3, fp8_e5m2  weight [N, K]; weight_scale one number, [N] or a number a block; input_scale where inputs are static
    int8                weight int8 [N, K]; weight_scale one number or [N]; zero points are stored, and are 0
    int4, uint4         by groups: weight int32 [K, N / 8], weight_scale [G, N], weight_zero_point int32 [G, N / 8], AWQ's
                        gemm layout; else weight int32 [N, K / 8]; nibbles in order where pack_method is `order`
    fp4, fp6_*          weight uint8 [N, K bits / 8], first code low; weight_scale uint8 [N, K / 32] (e8m0)
    [fp4, fp8_e4m3]     NVFP4: weight_scale e4m3 [N, K / 16], weight_scale_2 and input_scale_2 one number
    [fp8_e4m3, int4]    W4A8: int4 of fp8: weight_scale one number, weight_scale_2 [N]

w = (q - z) * weight_scale (* weight_scale_2). Read from Quark's exporter and its checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from qcore.checkpoint.kv_scales import unknown_kv_cache
from qcore.checkpoint.patterns import check_count, matches, wildcard
from qcore.checkpoint.settings import Settings, check
from qcore.elements import (
    Element,
    Float,
    Granularity,
    Group,
    Int,
    Level,
    PerChannel,
    PerTensor,
    PerToken,
    ScaleType,
    Tile,
    scale_shape,
)
from qcore.layouts.awq import unpack_words
from qcore.layouts.scaled import Names, read_layer, shape_of
from qcore.method import SCALE_DTYPES, CheckpointFiles, Method, ModulePlan, dense_modules, read_scale, require_tensor
from qcore.refusal import Refusal, Refused, bad_file
from qcore.scheme import Scheme, TensorScheme

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors

_NAMES = Names(input_whole="input_scale_2")


@dataclass(frozen=True)
class _Kind:
    """What a dtype's codes are, and the granularities that its scales may have."""

    element: Element
    schemes: tuple[str, ...]
    affine: bool = False
    scale: ScaleType = "float"


_WHOLE = ("per_tensor", "per_channel")
_KINDS: dict[str, _Kind] = {
    "fp8_e4m3": _Kind(Float("e4m3fn"), (*_WHOLE, "per_block")),
    "fp8_e5m2": _Kind(Float("e5m2"), (*_WHOLE, "per_block")),
    "int8": _Kind(Int(8, signed=True), _WHOLE),
    "int4": _Kind(Int(4, signed=True), (*_WHOLE, "per_group")),
    "uint4": _Kind(Int(4, signed=False), (*_WHOLE, "per_group"), affine=True),
    "fp4": _Kind(Float("e2m1"), ("per_group",), scale="e8m0"),
    "fp6_e3m2": _Kind(Float("e3m2"), ("per_group",), scale="e8m0"),
    "fp6_e2m3": _Kind(Float("e2m3"), ("per_group",), scale="e8m0"),
}


class Spec(Settings):
    """How one tensor is quantized."""

    dtype: str
    qscheme: str
    group_size: int | None = Field(None, ge=1)
    symmetric: bool | None = True
    is_dynamic: bool = False
    scale_format: str | None = None
    block_size: tuple[int, int] | None = None
    is_scale_quant: bool = False

    @property
    def level(self) -> tuple[str, str, bool]:
        """What tells the two levels of a pair."""
        return self.dtype, self.qscheme, self.is_scale_quant


class LayerSpec(Settings):
    """A layer's tensors; lists of two are two-level scales."""

    weight: Spec | list[Spec] | None = None
    input_tensors: Spec | list[Spec] | None = None
    output_tensors: Any = None


class Export(Settings):
    """How tensors were written."""

    pack_method: Literal["reorder", "order"] = "reorder"
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
    variants = (*_KINDS, "nvfp4", "w4a8")
    parts = frozenset(
        [
            "weight",
            "weight_scale",
            "weight_scale_2",
            "weight_zero_point",
            "weight_zero_point_2",
            "input_scale",
            "input_scale_2",
            "input_zero_point",
            "input_zero_point_2",
            "bias",
            "output_scale",
        ]
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
                           file=files.path, field="quantization_config.quant_method")  # fmt: skip
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
        scheme, _ = self._scheme(files, module)
        shape = self._shape(files, module, scheme)
        if isinstance(scheme.weight.element, Int) and scheme.weight.bits == 4:
            return self._words(files, module, scheme, shape)
        self._no_zero_points(files, module)
        return read_layer(files, module, scheme, _NAMES)

    def _words(self, files: CheckpointFiles, module: str, scheme: Scheme, shape: tuple[int, int]) -> LayerTensors:
        """4-bit codes, eight to an int32."""
        import torch

        from qcore.bits import pack
        from qcore.tensor import LayerTensors, QuantizedTensor

        weight, reorder = scheme.weight, self._config(files).export.pack_method == "reorder"
        grouped = isinstance(weight.scales[0].granularity, Group)

        def codes(part: str) -> torch.Tensor:
            stored = unpack_words(files.source.read(f"{module}.{part}"), reorder=reorder)
            return stored.t().contiguous() if grouped else stored

        stored, zeros = codes("weight"), None
        if weight.zero is None:
            self._no_zero_points(files, module)
            stored = stored ^ 8  # from two's complement to q + 8
        elif grouped:
            zeros = codes("weight_zero_point")
        else:
            packed = files.source.read(f"{module}.weight_zero_point").reshape(1, -1)
            whole = unpack_words(packed, reorder=reorder) if packed.numel() > 1 else (packed & 15).to(torch.uint8)
            zeros = whole.reshape(-1, 1)
        scales = []
        for i, level in enumerate(weight.scales):
            part = "weight_scale_2" if len(weight.scales) == 2 and i == 0 else "weight_scale"
            scale = read_scale(files, f"{module}.{part}")
            scales.append(scale.t().contiguous() if grouped else scale.reshape(scale_shape(level.granularity, *shape)))
        given = scheme.input is not None and not scheme.input.dynamic
        bias = f"{module}.bias"
        return LayerTensors(
            QuantizedTensor(scheme, shape, pack(stored, 4), tuple(scales), zeros),
            files.source.read(bias) if bias in files.source.tensors else None,
            input_scale=read_scale(files, f"{module}.input_scale").reshape(1) if given else None,
        )

    def _config(self, files: CheckpointFiles) -> QuarkConfig:
        return files.once("config", lambda: self._checked(files))

    def _checked(self, files: CheckpointFiles) -> QuarkConfig:
        config = check(QuarkConfig, files.quantization or {}, file=files.quantization_file)
        for field, entries in (("exclude", config.exclude), ("layer_quant_config", [*config.layer_quant_config])):
            where: dict[str, Any] = {"file": files.quantization_file, "field": f"quantization_config.{field}"}
            check_count(entries, wildcards=True, **where)
            check_count((entry for entry in entries if entry.startswith("re:")), **where)
        return config

    def _scheme(self, files: CheckpointFiles, module: str) -> tuple[Scheme, str]:
        """The module's scheme, and the pattern of layer_quant_config that decided it, if any."""
        config = self._config(files)
        where: dict[str, Any] = {"file": files.quantization_file, "field": "quantization_config.layer_quant_config"}
        named = next((pattern for pattern in config.layer_quant_config if wildcard(pattern, module, **where)), "")
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
        if isinstance(spec, list):
            return self._two_levels(files, spec, field, inputs=inputs)
        kind = _KINDS.get(spec.dtype) if spec else None
        if spec is None or kind is None:
            raise self._variant(files, field, spec.dtype if spec else "none")
        granularity = self._granularity(spec, inputs=inputs)
        shared = kind.scale == "e8m0"
        fits = (
            granularity is not None
            and spec.qscheme in kind.schemes
            and (spec.scale_format == "e8m0") == shared
            and (kind.affine or spec.symmetric is not False)
            and not (inputs and (kind.affine or (isinstance(granularity, Group) and not (shared or spec.is_dynamic))))
        )
        if not fits or granularity is None:
            raise self._variant(files, field, f"{spec.dtype} {spec.qscheme}, symmetric {spec.symmetric}")
        return TensorScheme(
            kind.element,
            (Level(granularity, kind.scale),),
            "stored" if kind.affine else None,
            dynamic=inputs and (spec.is_dynamic or shared),
        )

    def _two_levels(self, files: CheckpointFiles, specs: list[Spec], field: str, *, inputs: bool) -> TensorScheme:
        """NVFP4, and int4 of fp8."""
        levels = [spec.level for spec in specs]
        if levels == [("fp4", "per_group", False), ("fp8_e4m3", "per_tensor", True)] and specs[0].group_size:
            fine = Level(Group(specs[0].group_size), "e4m3fn")
            return TensorScheme(Float("e2m1"), (fine, Level(PerTensor())), dynamic=inputs)
        if levels == [("fp8_e4m3", "per_tensor", False), ("int4", "per_channel", False)] and not inputs:
            return TensorScheme(Int(4, signed=True), (Level(PerChannel()), Level(PerTensor())))
        raise self._variant(files, field, " of ".join(f"{dtype} {scheme}" for dtype, scheme, _ in levels) or "nothing")

    def _granularity(self, spec: Spec, *, inputs: bool) -> Granularity | None:
        known: dict[str, Granularity | None] = {
            "per_tensor": PerTensor(),
            "per_channel": PerToken() if inputs else PerChannel(),
            "per_group": Group(spec.group_size) if spec.group_size else None,
            "per_block": Tile(*spec.block_size)
            if spec.block_size and min(spec.block_size) > 0 and not inputs
            else None,
        }
        return known.get(spec.qscheme)

    def _variant(self, files: CheckpointFiles, field: str, found: str) -> Refused:
        return Refused(
            Refusal("unknown-variant", "notimpl", str(files.path), "this scheme of Quark is not read yet",
                    f"found {found}, expected {', '.join(self.variants)}", "Export the model in one of these.",
                    str(files.quantization_file), field=f"quantization_config.{field}")
        )  # fmt: skip

    def _shape(self, files: CheckpointFiles, module: str, scheme: Scheme) -> tuple[int, int]:
        """[N, K], once all headers agree. Raises Refused (missing-tensor, bad-shape, bad-dtype)."""
        weight = scheme.weight
        if not isinstance(weight.element, Int) or weight.bits == 8:
            return shape_of(files, module, scheme, _NAMES)
        info = require_tensor(files, f"{module}.weight", dtypes=["I32"])
        if len(info.shape) != 2:
            raise bad_file("bad-shape", "the weight is a matrix", file=info.file, tensor=info.name, field="shape",
                           found=list(info.shape), expected="two dimensions")  # fmt: skip
        outer, inner = info.shape
        floats = SCALE_DTYPES["float"]
        if not isinstance(weight.scales[0].granularity, Group):
            names = Names(scale="weight_scale_2", whole="weight_scale") if len(weight.scales) == 2 else _NAMES
            if weight.zero:
                zeros = require_tensor(files, f"{module}.weight_zero_point", dtypes=["I32"])
                per_channel = isinstance(weight.scales[0].granularity, PerChannel)
                if zeros.shape not in ([(outer // 8,)] if per_channel else [(), (1,)]):
                    raise bad_file("bad-shape", "the zero points do not fit the weight", file=zeros.file,
                                   tensor=zeros.name, field="shape", found=list(zeros.shape),
                                   expected=[outer // 8] if per_channel else [])  # fmt: skip
            return shape_of(files, module, scheme, names, shape=(outer, inner * 8))
        rows, columns = inner * 8, outer
        groups = scale_shape(weight.scales[0].granularity, rows, columns)[1]
        require_tensor(files, f"{module}.weight_scale", shape=(groups, rows), dtypes=floats)
        if weight.zero:
            require_tensor(files, f"{module}.weight_zero_point", shape=(groups, inner), dtypes=["I32"])
        if scheme.input is not None and not scheme.input.dynamic:
            require_tensor(files, f"{module}.input_scale", dtypes=floats)
        return rows, columns

    def _no_zero_points(self, files: CheckpointFiles, module: str) -> None:
        """Symmetric tensors come with zero points all the same. Raises Refused (bad-content) where one is not 0."""
        for part in ("weight_zero_point", "weight_zero_point_2", "input_zero_point", "input_zero_point_2"):
            info = files.source.tensors.get(f"{module}.{part}")
            if info is not None and bool(files.source.read(info.name).any()):
                raise bad_file("bad-content", "a symmetric tensor has a zero point", file=info.file, tensor=info.name,
                               field="values", found="other than 0", expected="0")  # fmt: skip


def _names(files: CheckpointFiles, entry: str, module: str) -> bool:
    """exclude's rule: a name, wildcards, or a regular expression after `re:`."""
    if entry.startswith("re:"):
        return matches(entry[3:], module, file=files.quantization_file, field="quantization_config.exclude")
    return wildcard(entry, module, file=files.quantization_file, field="quantization_config.exclude")


METHOD = Quark()
