"""GPTQ as AutoGPTQ, GPTQModel and optimum write it; qcore/layouts/gptq.py has the tensors, docs/formats.md the details."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import AliasChoices, Field

from qcore.checkpoint.patterns import matches
from qcore.checkpoint.settings import Settings, check
from qcore.layouts.gptq import PARTS, GptqSettings, check_settings, read_layer, shape_of
from qcore.method import CheckpointFiles, Method, ModulePlan, dense_modules
from qcore.refusal import Refusal, Refused, bad_file

if TYPE_CHECKING:
    from qcore.tensor import LayerTensors

_OTHER_LAYOUTS = {
    "marlin": "serialized Marlin",
    "marlin_24": "serialized 2:4 Marlin",
    "bitblas": "serialized BitBLAS",
    "gptq_p": "GPTQModel's planar layout",
}


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
    dynamic: dict[str, dict[str, Any]] | None = None
    modules_in_block_to_quantize: list[Any] | None = None


class Gptq(Method):
    name = "gptq"
    quant_methods = ("gptq",)
    side_files = ("quantize_config.json",)
    parts = PARTS | {"scale_bf16_to_fp8"}  # INC writes it for a Gaudi's fp8 unit; the weight does not depend on it

    def format_version(self, files: CheckpointFiles) -> str:
        return self._config(files).checkpoint_format

    def plan(self, files: CheckpointFiles) -> dict[str, ModulePlan]:
        config = self._config(files)
        tensors = files.source.tensors
        quantized = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
        if not quantized:
            raise bad_file("missing-tensor", "the config says GPTQ, but no tensor is named *.qweight", file=files.path)
        plan = {}
        for module in quantized:
            settings, pattern = self._module(files, config, module)
            shape = shape_of(files, module, settings)
            reason = f"dynamic pattern {pattern!r}" if pattern else "quantization_config"
            plan[module] = ModulePlan(settings.scheme(), reason, shape)
        for module, entry in dense_modules(tensors, "").items():
            plan.setdefault(module, ModulePlan(None, _skip_reason(files, module, config), entry.shape))
        return plan

    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:
        return read_layer(files, module, self._module(files, self._config(files), module)[0])

    def _config(self, files: CheckpointFiles) -> GptqConfig:
        return files.once("config", lambda: self._checked(files))

    def _checked(self, files: CheckpointFiles) -> GptqConfig:
        assert files.quantization is not None
        config = check(GptqConfig, files.quantization, file=files.quantization_file)
        layout = config.checkpoint_format
        if config.is_marlin_format or config.is_bitblas_format:
            layout = "marlin" if config.is_marlin_format else "bitblas"
        if layout not in ("gptq", "gptq_v2") or config.pack_dtype != "int32":
            found = _OTHER_LAYOUTS.get(layout, layout) if config.pack_dtype == "int32" else config.pack_dtype
            raise Refused(
                Refusal(
                    "unknown-variant", "notimpl", str(files.path), "this layout of GPTQ is not read yet",
                    f"found {found}, expected checkpoint_format gptq or gptq_v2, packed in int32",
                    "Save the model again with GPTQModel as format=gptq.",
                    str(files.quantization_file), field="quantization_config.checkpoint_format",
                )
            )  # fmt: skip
        return config

    def _module(self, files: CheckpointFiles, config: GptqConfig, module: str) -> tuple[GptqSettings, str]:
        """The module's numbers and the `dynamic` pattern that changed them, if any. The first match wins."""
        values: dict[str, Any] = config.model_dump(include={"bits", "group_size", "desc_act", "sym"})
        matched = ""
        for pattern, overrides in (config.dynamic or {}).items():
            if _matches(files, pattern, module):
                values |= {key: overrides[key] for key in values.keys() & overrides.keys()}
                matched = pattern
                break
        values["v1"] = config.checkpoint_format == "gptq"
        settings = check_settings(files, module, check(GptqSettings, values, file=files.quantization_file))
        return settings, matched


def _matches(files: CheckpointFiles, pattern: str, module: str) -> bool:
    """GPTQModel's rule: `+:` and `-:` are prefixes of the sign, the rest is a regular expression anchored at the start."""
    bare = pattern.removeprefix("+:").removeprefix("-:")
    return matches(bare, module, file=files.quantization_file, field="quantization_config.dynamic")


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
