"""GPTQ as AutoGPTQ, GPTQModel and optimum write it, and what they serialize for Marlin's and BitBLAS's kernels.

`checkpoint_format` decides: gptq, gptq_v2 and gptq_p (qcore/layouts/gptq.py), marlin (layouts/marlin.py) and bitblas
(layouts/bitblas.py). docs/formats.md has the details.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import AliasChoices, Field

from qcore.checkpoint.patterns import check_count, matches
from qcore.checkpoint.settings import Settings, check
from qcore.layouts import bitblas, gptq, marlin
from qcore.layouts.affine import integer_of
from qcore.layouts.gptq import WORDS, GptqSettings, check_settings
from qcore.method import WRITER, CheckpointFiles, Method, ModulePlan, dense_modules, is_embedding
from qcore.refusal import Refusal, Refused, bad_file

if TYPE_CHECKING:
    import torch

    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors

_NUMBERS = ("bits", "group_size", "desc_act", "sym")
_FORMATS = ("gptq", "gptq_v2", "gptq_p", "marlin", "bitblas")


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


class Gptq(Method):
    name = "gptq"
    quant_methods = ("gptq", "gptqmodel")
    variants = _FORMATS
    side_files = ("quantize_config.json",)
    # INC writes scale_bf16_to_fp8 for an fp8 unit; the weight does not depend on it
    parts = gptq.PARTS | marlin.PARTS | bitblas.PARTS | {"scale_bf16_to_fp8"}

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
        return gptq.read_layer(files, module, settings)

    def encode_config(self, plan: Mapping[str, ModulePlan], variant: str = "") -> dict[str, Any]:
        """The commonest numbers for the whole, `dynamic` for the others; planar where a layer has 5, 6 or 7 bits."""
        numbers: dict[str, tuple[int, int, bool, bool]] = {}
        for module, entry in plan.items():
            if entry.scheme is not None:
                bits, size = integer_of(self.name, module, entry.scheme, gptq.BITS, ordered=True)
                numbers[module] = (bits, size, entry.scheme.weight.ordered, entry.scheme.weight.zero is None)
        common = Counter(numbers.values()).most_common(1)[0][0] if numbers else (4, 128, False, True)
        dynamic: dict[str, dict[str, Any]] = {}
        for module, entry in plan.items():
            exact = f"^{re.escape(module)}$"
            if entry.scheme is None and not is_embedding(module) and not module.endswith("lm_head"):
                dynamic[f"-:{exact}"] = {}
            elif module in numbers and numbers[module] != common:
                dynamic[f"+:{exact}"] = dict(zip(_NUMBERS, numbers[module], strict=True))
        planar = any(bits in (5, 6, 7) for bits, *_ in numbers.values())
        config = {
            "quant_method": "gptq", **dict(zip(_NUMBERS, common, strict=True)),
            "checkpoint_format": "gptq_p" if planar else "gptq", "pack_dtype": "int32",
            "lm_head": "lm_head" in numbers, "meta": {"quantizer": [WRITER]},
        }  # fmt: skip
        return {**config, "dynamic": dynamic} if dynamic else config

    def encode(self, module: str, layer: LayerTensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        stated = config.get("dynamic", {}).get(f"+:^{re.escape(module)}$", config)
        planar = config["checkpoint_format"] == "gptq_p"
        values = {key: stated[key] for key in _NUMBERS}
        return gptq.pack_layer(module, layer, GptqSettings(**values, v1=not planar, planar=planar))

    def _shape(
        self, files: CheckpointFiles, config: GptqConfig, module: str, settings: GptqSettings, reason: str
    ) -> tuple[Scheme, str, tuple[int, int]]:
        if config.checkpoint_format == "marlin":
            shape = marlin.shape_of(files, f"{module}.B", f"{module}.s", settings.group_size)
            return marlin.scheme_of(settings.group_size), reason, shape
        if config.checkpoint_format == "bitblas":
            own = self._bitblas(files, config, settings)
            return own.scheme(), reason, bitblas.shape_of(files, module, own)
        return settings.scheme(), reason, gptq.shape_of(files, module, settings)

    def _bitblas(self, files: CheckpointFiles, config: GptqConfig, settings: GptqSettings) -> bitblas.BitblasSettings:
        values = settings.model_dump(include={"bits", "group_size", "sym"})
        values |= {"zeros_mode": config.zeros_mode, "fast_decoding": config.fast_decoding}
        return check(bitblas.BitblasSettings, values, file=files.quantization_file)

    def _config(self, files: CheckpointFiles) -> GptqConfig:
        return files.once("config", lambda: self._checked(files))

    def _checked(self, files: CheckpointFiles) -> GptqConfig:
        assert files.quantization is not None
        config = check(GptqConfig, files.quantization, file=files.quantization_file)
        check_count(config.dynamic or (), file=files.quantization_file, field="quantization_config.dynamic")
        layout = config.checkpoint_format
        if config.is_marlin_format or config.is_bitblas_format:
            layout = "marlin" if config.is_marlin_format else "bitblas"
        unknown = (
            layout not in _FORMATS
            or config.pack_dtype not in WORDS
            or (config.pack_dtype != "int32" and layout not in ("gptq", "gptq_v2"))
            or (layout == "marlin" and not (config.bits == 4 and config.sym and not config.desc_act))
        )
        if unknown:
            found = f"{layout} of {config.bits} bits, symmetric {config.sym}, desc_act {config.desc_act}, in {config.pack_dtype}"
            raise Refused(
                Refusal(
                    "unknown-variant", "notimpl", str(files.path), "this layout of GPTQ is not read",
                    f"found {found}, expected checkpoint_format {', '.join(_FORMATS)}; of marlin 4 bits, symmetric, no desc_act",
                    "Save the model again with GPTQModel as format=gptq.",
                    str(files.quantization_file), field="quantization_config.checkpoint_format",
                )
            )  # fmt: skip
        return config.model_copy(update={"checkpoint_format": layout})

    def _module(self, files: CheckpointFiles, config: GptqConfig, module: str) -> tuple[GptqSettings, str]:
        """The module's numbers and the `dynamic` pattern that changed them, if any. The first match wins."""
        values: dict[str, Any] = config.model_dump(include={"bits", "group_size", "desc_act", "sym"})
        matched = ""
        for pattern, overrides in (config.dynamic or {}).items():
            if _matches(files, pattern, module):
                values |= {key: overrides[key] for key in values.keys() & overrides.keys()}
                matched = pattern
                break
        layout = config.checkpoint_format
        values |= {"v1": layout == "gptq", "planar": layout == "gptq_p", "pack_dtype": config.pack_dtype}
        settings = check_settings(files, module, check(GptqSettings, values, file=files.quantization_file))
        if layout in ("gptq", "gptq_v2") and (
            settings.bits in (5, 6, 7) or (settings.bits == 3 and config.pack_dtype != "int32")
        ):
            raise bad_file("bad-field", f"{module} has bits that are only stored planar", file=files.quantization_file,
                           field="quantization_config.bits", found=settings.bits,
                           expected="2, 3, 4 or 8 bits, or checkpoint_format gptq_p")  # fmt: skip
        return settings, matched


def _matches(files: CheckpointFiles, pattern: str, module: str) -> bool:
    """GPTQModel's rule: `+:` and `-:` are prefixes of the sign, the rest is a regular expression anchored at the start."""
    bare = pattern.removeprefix("+:").removeprefix("-:")
    return matches(bare, module, file=files.quantization_file, field="quantization_config.dynamic")


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
    for pattern in config.dynamic or {}:
        if pattern.startswith("-:") and _matches(files, pattern, module):
            return f"excluded by dynamic pattern {pattern!r}"
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
