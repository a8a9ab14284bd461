"""AutoRound's own format: integer weights in the GPTQ or AWQ layout or small floats, with other bits for some layers.

`packing_format` decides: `auto_round:auto_gptq` (also where it is absent) stores zero points as GPTQ v1 does, less one;
`auto_round:auto_awq` is AWQ's gemm layout; `auto_round` and its other forms store zero points as they are, like GPTQ v2.

Floats are stored as compressed-tensors and DeepSeek store them:

    mx_fp, 4 bits  weight_packed uint8 [N, K / 2]; weight_scale uint8 [N, K / 32] (e8m0)
    mx_fp, 8 bits  weight e4m3 [N, K]; weight_scale uint8 [N, K / 32] (e8m0)
    nv_fp, 4 bits  weight_packed uint8 [N, K / 2]; weight_scale e4m3 [N, K / 16]; weight_global_scale and
                   input_global_scale f32 [1], which divide
    fp, 8 bits     weight e4m3 or e5m2 [N, K]; weight_scale [N] or [1], or weight_scale_inv by blocks; input_scale

Read from AutoRound's exporter and layers (export_to_autoround, qlinear_torch, qlinear_torch_zp, qlinear_fp).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from qcore.checkpoint.kv_scales import unknown_kv_cache
from qcore.checkpoint.patterns import check_count, matches
from qcore.checkpoint.settings import Settings, check
from qcore.elements import Float, Granularity, Group, Level, PerChannel, PerTensor, PerToken, ScaleType, Tile
from qcore.layouts import auto_round_writer, awq, gptq, scaled
from qcore.method import CheckpointFiles, Method, ModulePlan, dense_modules, stated_method
from qcore.refusal import Refusal, Refused, bad_file
from qcore.scheme import Scheme, TensorScheme

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors


_INTEGERS = ("int", "int_sym", "int_asym")
_FLOATS = ("mx_fp", "nv_fp", "fp")
_CODES = (".qweight", ".weight_packed")
_PLAIN_CACHES = (None, "float16", "bfloat16", "float32", "float")
_CACHE_GRIDS: dict[str | None, Granularity] = {None: PerTensor(), "tensor": PerTensor(), "head": PerChannel()}
"""What shares a scale of keys, by static_kv_granularity."""


class AutoRoundConfig(Settings):
    """The keys that decide what the tensors mean."""

    bits: int
    group_size: Annotated[int, Field(ge=-1)] | tuple[int, int]
    sym: bool = True
    data_type: str = "int"
    act_bits: int = 16
    act_data_type: str | None = None
    act_group_size: int | None = None
    act_dynamic: bool | None = None
    activation_scheme: str | None = None
    fmt: str = "e4m3"
    packing_format: str = "auto_round:auto_gptq"
    rotation_config: Any = None
    spinquant_config: Any = None
    static_kv_dtype: str | None = None
    static_kv_granularity: str | None = None
    static_attention_dtype: str | None = None
    extra_config: dict[str, dict[str, Any]] | None = None


class AutoRound(Method):
    name = "auto-round"
    quant_methods = ("auto-round", "auto_round", "intel/auto-round")
    variants = ("auto_round", "auto_round:auto_gptq", "auto_round:auto_awq", *_FLOATS)
    written = variants
    side_files = ("quantization_config.json",)
    parts = (
        gptq.PARTS
        | awq.PARTS
        | {
            "weight",
            "weight_packed",
            "weight_scale",
            "weight_scale_inv",
            "weight_global_scale",
            "input_scale",
            "input_global_scale",
        }
    )

    def recognizes(self, files: CheckpointFiles) -> bool:
        """INC's name means AutoRound's tensors where the config has AutoRound's keys."""
        stated, config = stated_method(files.quantization), files.quantization or {}
        return super().recognizes(files) or (stated == "inc" and "bits" in config)

    def format_version(self, files: CheckpointFiles) -> str:
        return self._config(files).packing_format

    def plan(self, files: CheckpointFiles) -> dict[str, ModulePlan]:
        self._config(files)  # what is not read is refused by name, whatever the tensors are
        tensors = files.source.tensors
        quantized = [
            name.rpartition(".")[0]
            for name, info in tensors.items()
            if name.endswith(_CODES) or (name.endswith(".weight") and info.dtype in ("F8_E4M3", "F8_E5M2"))
        ]
        if not quantized:
            raise bad_file("missing-tensor", "the config says AutoRound, but no weight is stored quantized",
                           file=files.path, field="quantization_config.quant_method", expected="*.qweight, *.weight_packed or fp8 weights")  # fmt: skip
        plan = {}
        for module in quantized:
            settings, named = self._module(files, module)
            reason = f"extra_config {named!r}" if named else "quantization_config"
            if isinstance(settings, AutoRoundConfig):
                scheme, names = _float_scheme(files, module, settings)
                shape = scaled.shape_of(files, module, scheme, names)
            elif isinstance(settings, awq.AwqSettings):
                scheme, shape = awq.scheme_of(files, module, settings), awq.shape_of(files, module, settings)
            else:
                scheme, shape = settings.scheme(), gptq.shape_of(files, module, settings)
            plan[module] = ModulePlan(scheme, reason, shape)
        for module, entry in dense_modules(tensors, "").items():
            overrides, named = self._overrides(files, module)
            own = self._own(files, overrides)
            kept = f"extra_config {named!r} keeps {own.bits} bits" if "bits" in overrides and own.bits >= 16 else ""
            plan.setdefault(module, ModulePlan(None, kept or "stored unquantized", entry.shape))
        return plan

    def kv_cache(self, files: CheckpointFiles) -> TensorScheme | None:
        config = self._config(files)
        if config.static_attention_dtype not in _PLAIN_CACHES:
            raise unknown_kv_cache(files, "static_attention_dtype", f"attention in {config.static_attention_dtype}")
        if config.static_kv_dtype in _PLAIN_CACHES:
            return None
        grid = _CACHE_GRIDS.get(config.static_kv_granularity)
        if config.static_kv_dtype not in ("fp8", "float8_e4m3fn") or grid is None:
            found = f"{config.static_kv_dtype}, granularity {config.static_kv_granularity}"
            raise unknown_kv_cache(files, "static_kv_dtype", found)
        return TensorScheme(Float("e4m3fn"), (Level(grid),))

    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:
        settings, _ = self._module(files, module)
        if isinstance(settings, AutoRoundConfig):
            layer = scaled.read_layer(files, module, *_float_scheme(files, module, settings))
            return _in_its_order(layer) if settings.data_type == "nv_fp" else layer
        if isinstance(settings, awq.AwqSettings):
            return awq.read_layer(files, module, settings)
        return gptq.read_layer(files, module, settings)

    def encode_config(self, plan: Mapping[str, ModulePlan], variant: str = "") -> dict[str, Any]:
        """Integers in the packing that the tool would choose, or in the variant's; floats as compressed-tensors stores them."""
        return auto_round_writer.config_of(plan, variant)

    def encode(self, module: str, layer: LayerTensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return auto_round_writer.pack_layer(module, layer, config)

    def _module(
        self, files: CheckpointFiles, module: str
    ) -> tuple[gptq.GptqSettings | awq.AwqSettings | AutoRoundConfig, str]:
        """The module's numbers, and the entry of extra_config that changed them, if any."""
        config = self._config(files)
        overrides, named = self._overrides(files, module)
        own = self._own(files, overrides)
        _check_types(files, own, f"extra_config.{named}." if named else "")
        if own.data_type in _FLOATS:
            return own, named
        values = own.model_dump(include={"bits", "group_size", "sym"})
        if "awq" in config.packing_format:
            values |= {"zero_point": not values["sym"], "woven": True}
            return awq.check_settings(files, check(awq.AwqSettings, values, file=files.quantization_file)), named
        values["v1"] = "gptq" in config.packing_format and "gptqmodel" not in config.packing_format
        settings = check(gptq.GptqSettings, values, file=files.quantization_file)
        return gptq.check_settings(files, module, settings), named

    def _own(self, files: CheckpointFiles, overrides: dict[str, Any]) -> AutoRoundConfig:
        return check(AutoRoundConfig, self._config(files).model_dump() | overrides, file=files.quantization_file)

    def _overrides(self, files: CheckpointFiles, module: str) -> tuple[dict[str, Any], str]:
        """extra_config's entry for a module: by its name, else the first that is no layer's name and is found in it as a
        pattern; of the entry only what decides the numbers."""
        entries = self._config(files).extra_config or {}
        named = module if module in entries else ""
        for pattern in entries if not named else ():
            if not _is_layer(files, pattern) and matches(
                pattern, module, file=files.quantization_file, field="quantization_config.extra_config", anywhere=True
            ):
                named = pattern
                break
        found = entries.get(named, {})
        return {key: found[key] for key in _DECISIVE if found.get(key) is not None}, named

    def _config(self, files: CheckpointFiles) -> AutoRoundConfig:
        return files.once("config", lambda: self._checked(files))

    def _checked(self, files: CheckpointFiles) -> AutoRoundConfig:
        assert files.quantization is not None
        config = check(AutoRoundConfig, files.quantization, file=files.quantization_file)
        patterns = (entry for entry in config.extra_config or () if not _is_layer(files, entry))
        check_count(patterns, file=files.quantization_file, field="quantization_config.extra_config")
        _check_types(files, config, "")
        return config


def _check_types(files: CheckpointFiles, config: AutoRoundConfig, where: str) -> None:
    """Raises Refused (unknown-variant) where the numbers are of a kind that is not read."""
    floats = config.data_type in _FLOATS
    sizes = {"mx_fp": 32, "nv_fp": 16}.get(config.data_type)
    own_inputs = {"mx_fp": ("mx_fp", "mx_fp_rceil"), "nv_fp": ("nv_fp", "nv_fp4_with_static_gs"), "fp": ("fp",)}
    for field, found, known in (
        ("data_type", config.data_type, floats or config.data_type in _INTEGERS),
        ("bits", config.bits, not floats or config.bits in {"mx_fp": (4, 8), "nv_fp": (4,)}.get(config.data_type, (8,))
         or config.bits >= 16),
        ("act_bits", config.act_bits, config.act_bits >= 16 or (floats and config.act_bits == config.bits)
         or (config.data_type == "mx_fp" and config.act_bits in (4, 8))),
        ("act_data_type", config.act_data_type, config.act_bits >= 16
         or config.act_data_type in (None, *own_inputs.get(config.data_type, ()))),
        ("packing_format", config.packing_format, floats or config.packing_format.startswith("auto_round")),
        ("fmt", config.fmt, config.fmt in ("e4m3", "e5m2")),
        ("rotation_config", config.rotation_config, not config.rotation_config),
        ("spinquant_config", config.spinquant_config, not config.spinquant_config),
        ("group_size", config.group_size, sizes is None or config.bits >= 16 or config.group_size == sizes),
        ("act_group_size", config.act_group_size, sizes is None or config.act_bits >= 16
         or config.act_group_size in (None, sizes)),
        ("act_dynamic", config.act_dynamic, sizes is None or config.act_bits >= 16 or config.act_dynamic is not False),
    ):  # fmt: skip
        if not known:
            raise Refused(
                Refusal("unknown-variant", "notimpl", str(files.path), "this form of AutoRound is not read yet",
                        f"found {field} {found!r}, expected integers with activations of 16 bits, or {', '.join(_FLOATS)}",
                        "Export the model with AutoRound in one of its presets, such as W4A16, MXFP4 or FP8_STATIC.",
                        str(files.quantization_file), field=f"quantization_config.{where}{field}")
            )  # fmt: skip


def _in_its_order(layer: LayerTensors) -> LayerTensors:
    """NVFP4 as AutoRound computes it (experimental/qmodules/nvfp4.py)."""
    return replace(layer, weight=replace(layer.weight, coarse_first=True), order="inverses")


_DECISIVE = ("bits", "group_size", "sym", "data_type", "act_bits", "act_data_type", "act_group_size", "act_dynamic",
             "rotation_config")  # fmt: skip


def _float_scheme(files: CheckpointFiles, module: str, config: AutoRoundConfig) -> tuple[Scheme, scaled.Names]:
    """The scheme of a float layer and the names of its tensors."""
    quantized_inputs = config.act_bits < 16
    if config.data_type == "fp":
        return _fp8_scheme(files, module, config)
    element = Float("e2m1" if config.bits == 4 else "e4m3fn")
    rounding: ScaleType = "e8m0ceil" if config.act_data_type == "mx_fp_rceil" else "e8m0floor"
    levels: tuple[Level, ...] = (Level(Group(32), "e8m0"),)
    given: tuple[Level, ...] = (Level(Group(32), rounding),)
    if config.data_type == "nv_fp":
        levels = given = (Level(Group(16), "e4m3fn"), Level(PerTensor()))
    weight = TensorScheme(element, levels)
    names = scaled.Names(
        codes="weight_packed" if config.bits == 4 else "weight",
        whole="weight_global_scale",
        input_whole="input_global_scale",
        divides=True,
        flat=True,
    )
    inputs = TensorScheme(Float("e2m1" if config.act_bits == 4 else "e4m3fn"), given, dynamic=True)
    return Scheme(weight, inputs if quantized_inputs else None), names


def _fp8_scheme(files: CheckpointFiles, module: str, config: AutoRoundConfig) -> tuple[Scheme, scaled.Names]:
    size, element = config.group_size, Float("e5m2" if config.fmt == "e5m2" else "e4m3fn")
    granularity: Granularity
    if isinstance(size, tuple):
        if min(size) < 1:
            raise bad_file("bad-field", "blocks have rows and columns", file=files.quantization_file,
                           field="quantization_config.group_size", found=list(size), expected="positive sizes")  # fmt: skip
        granularity = Tile(*size)
    else:
        granularity = Group(size) if size > 0 else PerChannel() if size == -1 else PerTensor()
    given: TensorScheme | None = None
    if config.act_bits < 16:
        width = config.act_group_size
        spread: Granularity = PerTensor() if width == 0 else Group(width) if width and width > 0 else PerToken()
        dynamic = config.activation_scheme != "static" if config.act_dynamic is None else config.act_dynamic
        given = TensorScheme(element, (Level(spread),), dynamic=dynamic)
    names = scaled.Names(scale="weight_scale_inv" if isinstance(size, tuple) else "weight_scale", flat=True)
    return Scheme(TensorScheme(element, (Level(granularity),)), given), names


def _is_layer(files: CheckpointFiles, name: str) -> bool:
    return f"{name}.qweight" in files.source.tensors or f"{name}.weight" in files.source.tensors


METHOD = AutoRound()
