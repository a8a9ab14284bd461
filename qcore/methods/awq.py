"""AWQ as AutoAWQ, AutoRound and GPTQModel write it; docs/formats.md has the details.

`version` decides: gemm and gemv (qcore/layouts/awq.py), gemv_fast and llm-awq (layouts/awq_fast.py), marlin
(layouts/marlin.py). GPTQModel's `dynamic` has the numbers of single layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import AliasChoices, Field, field_validator

from qcore.checkpoint.settings import Settings, check
from qcore.layouts import awq, awq_fast, gptqmodel, marlin
from qcore.layouts.affine import integer_of, plain_inputs, unholdable
from qcore.method import CheckpointFiles, Method, ModulePlan, dense_modules, is_embedding
from qcore.refusal import Refusal, Refused, bad_file

if TYPE_CHECKING:
    import torch

    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors

_LAYOUTS = (*awq.LAYOUTS, "marlin")
_NUMBERS = ("bits", "group_size")


class AwqConfig(Settings):
    """The keys that decide what the tensors mean, in the spellings of config.json and of the older side file."""

    bits: int = Field(validation_alias=AliasChoices("bits", "w_bit"))
    group_size: int = Field(ge=-1, validation_alias=AliasChoices("group_size", "q_group_size"))
    zero_point: bool = True
    layout: str = Field("gemm", validation_alias=AliasChoices("version", "checkpoint_format", "format"))
    pack_method: Literal["reorder", "order"] = "reorder"  # Quark's exports say it
    modules_to_not_convert: list[str] | None = None
    dynamic: dict[str, dict[str, Any]] | None = None

    @field_validator("layout")
    @classmethod
    def _lower(cls, layout: str) -> str:
        return layout.lower()


class Awq(Method):
    name = "awq"
    quant_methods = ("awq",)
    variants = _LAYOUTS
    side_files = ("quant_config.json",)
    written = ("gemm", "gemv", "gemv_fast", "marlin")
    parts = awq.PARTS | {"scaled_zeros"}

    def recognizes(self, files: CheckpointFiles) -> bool:
        """GPTQModel's rounding to nearest says GPTQ of these layouts too."""
        return super().recognizes(files) or awq.stated_under_gptq(files.quantization or {})

    def format_version(self, files: CheckpointFiles) -> str:
        return self._config(files).layout

    def plan(self, files: CheckpointFiles) -> dict[str, ModulePlan]:
        config, tensors = self._config(files), files.source.tensors
        quantized = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
        if not quantized:
            raise bad_file("missing-tensor", "the config says AWQ, but no tensor is named *.qweight", file=files.path,
                           field="quantization_config.quant_method")  # fmt: skip
        plan = {}
        for module in quantized:
            settings, pattern = self._module(files, module)
            reason = f"dynamic pattern {pattern!r}" if pattern else "quantization_config"
            scheme, shape = self._headers(files, module, settings)
            plan[module] = ModulePlan(scheme, reason, shape)
        for module, entry in dense_modules(tensors, "").items():
            named = next((skip for skip in config.modules_to_not_convert or () if skip in module), None)
            reason = f"modules_to_not_convert names {named!r}" if named else ""
            reason = reason or gptqmodel.exclusion(files, config.dynamic, module) or "stored unquantized"
            plan.setdefault(module, ModulePlan(None, reason, entry.shape))
        return plan

    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:
        settings, _ = self._module(files, module)
        if settings.layout == "marlin":
            codes, scales = f"{module}.qweight", f"{module}.scales"
            return marlin.read_layer(files, module, codes, scales, settings.group_size)
        read = awq_fast.read_layer if settings.layout in awq.FAST else awq.read_layer
        return read(files, module, settings)

    def encode_config(self, plan: Mapping[str, ModulePlan], variant: str = "") -> dict[str, Any]:
        """The commonest numbers for the whole; of gemm, `dynamic` for the layers that differ, as GPTQModel reads it."""
        layout = variant or "gemm"
        numbers = {}
        for module, entry in plan.items():
            if entry.scheme is None:
                continue
            bits = awq.BITS if layout == "gemm" else (4,)
            own = integer_of(self.name, module, entry.scheme, bits, floating=layout == "gemv_fast")
            if layout == "marlin" and (entry.scheme.weight.zero is not None or own[1] != 128):
                unholdable(self.name, module, entry.scheme, "symmetric codes in groups of 128 in Marlin's layout")
            numbers[module] = dict(zip(_NUMBERS, own, strict=True))
        common, differing = gptqmodel.spread(plan, numbers)
        mixed = [pattern for pattern in differing if pattern.startswith("+:")]
        if mixed and layout != "gemm":
            unholdable(self.name, mixed[0][2:], differing[mixed[0]], f"{common} as in all layers of {layout}")
        if layout in ("gemv", "gemv_fast") and 0 < common["group_size"] < 128 and common["group_size"] not in (32, 64):
            unholdable(self.name, next(iter(numbers)), common, f"groups of 32, 64 or at least 128 in {layout}")
        kept = _kept(plan, numbers)
        config = {"quant_method": "awq", **common, "zero_point": layout != "marlin", "version": layout,
                  "lm_head": "lm_head" in numbers, "modules_to_not_convert": kept or None}  # fmt: skip
        return {**config, "dynamic": differing} if differing else config

    def encode(self, module: str, layer: LayerTensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        plain_inputs(self.name, module, layer)
        own = {key: gptqmodel.stated(config, module)[key] for key in _NUMBERS}
        settings = awq.AwqSettings(**own, layout=config["version"])
        if settings.layout == "marlin":
            return marlin.pack_layer(module, layer, "qweight", "scales", settings.group_size, self.name)
        pack = awq_fast.pack_layer if settings.layout in awq.FAST else awq.pack_layer
        return pack(module, layer, settings)

    def _headers(
        self, files: CheckpointFiles, module: str, settings: awq.AwqSettings
    ) -> tuple[Scheme, tuple[int, int]]:
        if settings.layout == "marlin":
            shape = marlin.shape_of(files, f"{module}.qweight", f"{module}.scales", settings.group_size)
            return marlin.scheme_of(settings.group_size), shape
        if settings.layout in awq.FAST:
            shape = awq_fast.shape_of(files, module, settings)
            return awq_fast.scheme_of(settings, shape[1]), shape
        return awq.scheme_of(files, module, settings), awq.shape_of(files, module, settings)

    def _module(self, files: CheckpointFiles, module: str) -> tuple[awq.AwqSettings, str]:
        """The module's numbers, and the `dynamic` pattern that changed them, if any."""
        config = self._config(files)
        values = config.model_dump(include={"bits", "group_size", "zero_point", "layout"})
        changed, pattern = gptqmodel.overrides(files, config.dynamic, module)
        values |= {key: changed[key] for key in _NUMBERS if key in changed}
        values["ordered"] = config.pack_method == "order"
        return awq.check_settings(files, check(awq.AwqSettings, values, file=files.quantization_file)), pattern

    def _config(self, files: CheckpointFiles) -> AwqConfig:
        return files.once("config", lambda: self._checked(files))

    def _checked(self, files: CheckpointFiles) -> AwqConfig:
        assert files.quantization is not None
        config = check(AwqConfig, files.quantization, file=files.quantization_file)
        gptqmodel.refuse_computed(files, files.quantization)
        gptqmodel.agreed_layout(files, files.quantization)
        if config.layout not in _LAYOUTS:
            raise Refused(
                Refusal("unknown-variant", "notimpl", str(files.path), "this layout of AWQ is not read yet",
                        f"found {config.layout}, expected {' or '.join(_LAYOUTS)}",
                        'Save the model again with version "gemm".', str(files.quantization_file),
                        field="quantization_config.version")
            )  # fmt: skip
        return config


def _kept(plan: Mapping[str, ModulePlan], quantized: Iterable[str]) -> list[str]:
    """Parts of the names of the layers that are not quantized. Within a block, as AutoAWQ looks for them, where no quantized
    layer has the same in its name."""
    names = []
    for module, entry in plan.items():
        if entry.scheme is None and not is_embedding(module):
            inner = re.split(r"\.\d+\.", module, maxsplit=1)[-1]
            names.append(module if any(inner in other for other in quantized) else inner)
    return list(dict.fromkeys(names))


METHOD = Awq()
