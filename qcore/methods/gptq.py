"""GPTQ as AutoGPTQ, GPTQModel and optimum write it, and what they serialize for Marlin's and BitBLAS's kernels.

`checkpoint_format` decides: gptq, gptq_v2 and gptq_p (qcore/layouts/gptq.py), marlin (layouts/marlin.py) and bitblas
(layouts/bitblas.py). docs/formats.md has the details.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import AliasChoices, Field

from qcore.checkpoint.patterns import check_count
from qcore.checkpoint.settings import Settings, check
from qcore.layouts import awq, bitblas, gptq, gptqmodel, marlin
from qcore.layouts.affine import integer_of, plain_inputs, unholdable
from qcore.layouts.gptq import WORDS, GptqSettings, check_settings
from qcore.method import WRITER, CheckpointFiles, Method, ModulePlan, dense_modules, is_embedding
from qcore.refusal import Refusal, Refused, bad_file

if TYPE_CHECKING:
    import torch

    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors

_NUMBERS = ("bits", "group_size", "desc_act", "sym")
_FORMATS = {"gptq": (2, 3, 4, 8), "gptq_v2": (2, 3, 4, 8), "gptq_p": gptq.BITS, "marlin": (4,), "bitblas": (2, 4, 8)}
"""The layouts by `checkpoint_format`, and the bits that each holds."""
_ORDERED = ("gptq", "gptq_v2", "gptq_p")
"""Those that GPTQModel reads: with act-order, and numbers of their own for some layers."""


class GptqConfig(Settings):
    """The keys that decide what the tensors mean; GPTQModel's `format` and optimum's spellings included."""

    bits: int
    group_size: int = Field(ge=-1)
    desc_act: bool = False
    sym: bool = True
    lm_head: bool = False
    checkpoint_format: str = Field("gptq", validation_alias=AliasChoices("checkpoint_format", "format"))
    pack_dtype: str = "int32"
    is_marlin_format: bool = False
    is_bitblas_format: bool = False
    zeros_mode: str = "quantized"
    fast_decoding: bool | None = None
    dynamic: dict[str, dict[str, Any]] | None = None
    modules_in_block_to_quantize: list[Any] | None = None
    meta: Any = None


class Gptq(Method):
    name = "gptq"
    quant_methods = ("gptq", "gptqmodel")
    variants = tuple(_FORMATS)
    written = tuple(_FORMATS)
    side_files = ("quantize_config.json",)
    # INC writes scale_bf16_to_fp8 for an fp8 unit; the weight does not depend on it
    parts = gptq.PARTS | marlin.PARTS | bitblas.PARTS | {"scale_bf16_to_fp8"}

    def recognizes(self, files: CheckpointFiles) -> bool:
        """GPTQModel's rounding to nearest says GPTQ of AWQ's layouts too; these are AWQ's."""
        return super().recognizes(files) and not awq.stated_under_gptq(files.quantization or {})

    def format_version(self, files: CheckpointFiles) -> str:
        return self._config(files).checkpoint_format

    def plan(self, files: CheckpointFiles) -> dict[str, ModulePlan]:
        config = self._config(files)
        tensors = files.source.tensors
        codes = ".B" if config.checkpoint_format == "marlin" else ".qweight"
        quantized = [name.removesuffix(codes) for name in tensors if name.endswith(codes)]
        if not quantized:
            raise bad_file("missing-tensor", f"the config says GPTQ, but no tensor is named *{codes}", file=files.path,
                           field="quantization_config.quant_method")  # fmt: skip
        plan = {}
        for module in quantized:
            if config.checkpoint_format in ("gptq", "gptq_v2"):
                _refuse_codebook(files, module)
            settings, pattern = self._module(files, config, module)
            reason = f"dynamic pattern {pattern!r}" if pattern else "quantization_config"
            plan[module] = ModulePlan(*self._shape(files, config, module, settings, reason))
        for module, entry in dense_modules(tensors, "").items():
            plan.setdefault(module, ModulePlan(None, _skip_reason(files, module, config), entry.shape))
        return plan

    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:
        config = self._config(files)
        settings, _ = self._module(files, config, module)
        if config.checkpoint_format == "marlin":
            return marlin.read_layer(files, module, f"{module}.B", f"{module}.s", settings.group_size)
        if config.checkpoint_format == "bitblas":
            return bitblas.read_layer(files, module, self._bitblas(files, config, settings))
        read = gptq.read_table if is_embedding(module) else gptq.read_layer
        return read(files, module, settings)

    def encode_config(self, plan: Mapping[str, ModulePlan], variant: str = "") -> dict[str, Any]:
        """The commonest numbers for the whole, `dynamic` for the others. Planar where a layer has 5, 6 or 7 bits, else v2 where one
        has zero points: GPTQModel takes v1 with these from its own hand only."""
        numbers: dict[str, dict[str, Any]] = {}
        known = _FORMATS[variant] if variant else gptq.BITS
        layout = variant or "gptq"
        for module, entry in plan.items():
            if entry.scheme is None:
                continue
            weight = entry.scheme.weight
            own = integer_of(self.name, module, entry.scheme, known, ordered=layout in _ORDERED)
            numbers[module] = dict(zip(_NUMBERS, (*own, weight.ordered, weight.zero is None), strict=True))
            if not variant and layout != "gptq_p":
                planar = own[0] not in _FORMATS["gptq"]
                layout = "gptq_p" if planar else "gptq_v2" if weight.zero else layout
        if layout == "bitblas" and not all(own["sym"] for own in numbers.values()):
            numbers = {module: {**own, "sym": False} for module, own in numbers.items()}
        common, differing = gptqmodel.spread(plan, numbers)
        mixed = [pattern for pattern in differing if pattern.startswith("+:")]
        if mixed and layout not in _ORDERED:
            unholdable(self.name, mixed[0][2:], differing[mixed[0]], f"{common} as in all layers of {layout}")
        config = {
            "quant_method": "gptq", **common, "checkpoint_format": layout, "pack_dtype": "int32",
            "lm_head": "lm_head" in numbers, "meta": {"quantizer": [WRITER]},
        }  # fmt: skip
        return {**config, "dynamic": differing} if differing else config

    def encode(self, module: str, layer: LayerTensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        plain_inputs(self.name, module, layer)
        layout, stated = config["checkpoint_format"], gptqmodel.stated(config, module)
        if layout == "marlin":
            return marlin.pack_layer(module, layer, "B", "s", stated["group_size"], self.name, rows_in=256)
        if layout == "bitblas":
            own = bitblas.BitblasSettings(bits=stated["bits"], group_size=stated["group_size"], sym=stated["sym"])
            return bitblas.pack_layer(module, layer, own, self.name)
        values = {key: stated[key] for key in _NUMBERS}
        return gptq.pack_layer(module, layer, GptqSettings(**values, v1=layout == "gptq", planar=layout == "gptq_p"))

    def _shape(
        self, files: CheckpointFiles, config: GptqConfig, module: str, settings: GptqSettings, reason: str
    ) -> tuple[Scheme, str, tuple[int, int]]:
        if config.checkpoint_format == "marlin":
            shape = marlin.shape_of(files, f"{module}.B", f"{module}.s", settings.group_size)
            return marlin.scheme_of(settings.group_size), reason, shape
        if config.checkpoint_format == "bitblas":
            own = self._bitblas(files, config, settings)
            return own.scheme(), reason, bitblas.shape_of(files, module, own)
        rows, columns = gptq.shape_of(files, module, settings)
        if is_embedding(module):
            return settings.table_scheme(columns), reason, (columns, rows)
        return settings.scheme(), reason, (rows, columns)

    def _bitblas(self, files: CheckpointFiles, config: GptqConfig, settings: GptqSettings) -> bitblas.BitblasSettings:
        values = settings.model_dump(include={"bits", "group_size", "sym"})
        values |= {"zeros_mode": config.zeros_mode, "fast_decoding": config.fast_decoding}
        return check(bitblas.BitblasSettings, values, file=files.quantization_file)

    def _config(self, files: CheckpointFiles) -> GptqConfig:
        return files.once("config", lambda: self._checked(files))

    def _checked(self, files: CheckpointFiles) -> GptqConfig:
        assert files.quantization is not None
        config = check(GptqConfig, files.quantization, file=files.quantization_file)
        gptqmodel.refuse_computed(files, files.quantization)
        gptqmodel.agreed_layout(files, files.quantization)
        check_count(config.dynamic or (), file=files.quantization_file, field="quantization_config.dynamic")
        layout = config.checkpoint_format
        if config.is_marlin_format or config.is_bitblas_format:
            layout = "marlin" if config.is_marlin_format else "bitblas"
        unknown = (
            layout not in _FORMATS
            or config.pack_dtype not in WORDS
            or (config.pack_dtype != "int32" and layout not in ("gptq", "gptq_v2"))
            or (layout == "bitblas" and config.desc_act and config.group_size > 0)
            or (layout == "marlin" and not (config.bits == 4 and config.sym and not config.desc_act))
        )
        if unknown:
            found = f"{layout} of {config.bits} bits, symmetric {config.sym}, desc_act {config.desc_act}, in {config.pack_dtype}"
            raise Refused(
                Refusal(
                    "unknown-variant", "notimpl", str(files.path), "this layout of GPTQ is not read",
                    f"found {found}, expected checkpoint_format {', '.join(_FORMATS)}; of marlin 4 bits, symmetric; of marlin and bitblas no desc_act",
                    "Save the model again with GPTQModel as format=gptq.",
                    str(files.quantization_file), field="quantization_config.checkpoint_format",
                )
            )  # fmt: skip
        return config.model_copy(update={"checkpoint_format": layout})

    def _module(self, files: CheckpointFiles, config: GptqConfig, module: str) -> tuple[GptqSettings, str]:
        """The module's numbers and the `dynamic` pattern that changed them, if any. The first match wins."""
        values: dict[str, Any] = config.model_dump(include={"bits", "group_size", "desc_act", "sym"})
        changed, pattern = gptqmodel.overrides(files, config.dynamic, module)
        values |= {key: changed[key] for key in values.keys() & changed.keys()}
        layout = config.checkpoint_format
        values |= {"by_word": gptqmodel.wrote(config.meta)}
        values |= {"v1": layout == "gptq", "planar": layout == "gptq_p", "pack_dtype": config.pack_dtype}
        settings = check_settings(files, module, check(GptqSettings, values, file=files.quantization_file))
        if layout in ("gptq", "gptq_v2") and (
            settings.bits in (5, 6, 7) or (settings.bits == 3 and config.pack_dtype != "int32")
        ):
            raise bad_file("bad-field", f"{module} has bits that are only stored planar", file=files.quantization_file,
                           field="quantization_config.bits", found=settings.bits,
                           expected="2, 3, 4 or 8 bits, or checkpoint_format gptq_p")  # fmt: skip
        return settings, pattern


def _refuse_codebook(files: CheckpointFiles, module: str) -> None:
    """INC saves nf4 and fp4 under GPTQ's name: rows and groups are not transposed, and nothing says which codebook it is."""
    codes, scales = (files.source.tensors.get(f"{module}.{part}") for part in ("qweight", "scales"))
    if codes is None or scales is None or f"{module}.qzeros" in files.source.tensors:
        return
    if codes.shape[:1] == scales.shape[:1] and codes.shape[1:] != scales.shape[1:]:
        raise Refused(
            Refusal("unknown-variant", "never", str(files.path), "it is INC's nf4 or fp4, and no file says which of them",
                    f"found qweight {list(codes.shape)} and scales {list(scales.shape)} without qzeros",
                    "Quantize to int4 with INC, or to nf4 with bitsandbytes.", str(codes.file), codes.name)
        )  # fmt: skip


def _skip_reason(files: CheckpointFiles, module: str, config: GptqConfig) -> str:
    """Why a module is stored unquantized, in the config's words."""
    if excluded := gptqmodel.exclusion(files, config.dynamic, module):
        return excluded
    allowed = _flatten(config.modules_in_block_to_quantize)
    if allowed and not any(entry in module for entry in allowed):
        return "not in modules_in_block_to_quantize"
    if module.endswith("lm_head") and not config.lm_head:
        return "lm_head is false"
    return "stored unquantized"


def _flatten(entries: object) -> list[str]:
    if isinstance(entries, list):
        return [name for entry in entries for name in _flatten(entry)]
    return [entries] if isinstance(entries, str) else []


METHOD = Gptq()
