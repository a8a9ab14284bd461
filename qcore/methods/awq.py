"""AWQ as AutoAWQ, AutoRound and GPTQModel write it; docs/formats.md has the details.

`version` decides: gemm and gemv (qcore/layouts/awq.py), gemv_fast (layouts/awq_fast.py), marlin (layouts/marlin.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import AliasChoices, Field, field_validator

from qcore.checkpoint.settings import Settings, check
from qcore.layouts import awq, awq_fast, marlin
from qcore.layouts.affine import integer_of, unholdable
from qcore.method import CheckpointFiles, Method, ModulePlan, dense_modules, is_embedding
from qcore.refusal import Refusal, Refused, bad_file

if TYPE_CHECKING:
    import torch

    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors

_LAYOUTS = (*awq.LAYOUTS, "gemv_fast", "marlin")


class AwqConfig(Settings):
    """The keys that decide what the tensors mean, in the spellings of config.json and of the older side file."""

    bits: int = Field(validation_alias=AliasChoices("bits", "w_bit"))
    group_size: int = Field(ge=-1, validation_alias=AliasChoices("group_size", "q_group_size"))
    zero_point: bool = True
    layout: str = Field("gemm", validation_alias=AliasChoices("version", "checkpoint_format", "format"))
    modules_to_not_convert: list[str] | None = None

    @field_validator("layout")
    @classmethod
    def _lower(cls, layout: str) -> str:
        return layout.lower()


class Awq(Method):
    name = "awq"
    quant_methods = ("awq",)
    variants = _LAYOUTS
    side_files = ("quant_config.json",)
    parts = awq.PARTS

    def format_version(self, files: CheckpointFiles) -> str:
        return self._config(files).layout

    def plan(self, files: CheckpointFiles) -> dict[str, ModulePlan]:
        config, settings, tensors = self._config(files), self._settings(files), files.source.tensors
        quantized = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
        if not quantized:
            raise bad_file("missing-tensor", "the config says AWQ, but no tensor is named *.qweight", file=files.path,
                           field="quantization_config.quant_method")  # fmt: skip
        plan = {}
        for module in quantized:
            scheme, shape = self._headers(files, module, settings)
            plan[module] = ModulePlan(scheme, "quantization_config", shape)
        for module, entry in dense_modules(tensors, "").items():
            named = next((skip for skip in config.modules_to_not_convert or () if skip in module), None)
            reason = f"modules_to_not_convert names {named!r}" if named else "stored unquantized"
            plan.setdefault(module, ModulePlan(None, reason, entry.shape))
        return plan

    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:
        settings = self._settings(files)
        if settings.layout == "marlin":
            codes, scales = f"{module}.qweight", f"{module}.scales"
            return marlin.read_layer(files, module, codes, scales, settings.group_size)
        if settings.layout == "gemv_fast":
            return awq_fast.read_layer(files, module, settings)
        return awq.read_layer(files, module, settings)

    def encode_config(self, plan: Mapping[str, ModulePlan], variant: str = "") -> dict[str, Any]:
        """One group size for all layers; those that are not quantized are named."""
        sizes = {
            integer_of(self.name, module, entry.scheme, (4,))[1]: module
            for module, entry in plan.items()
            if entry.scheme is not None
        }
        if len(sizes) > 1:
            unholdable(self.name, min(sizes.values()), f"groups of {sorted(sizes)}", "one group size for all layers")
        kept = [module for module, entry in plan.items() if entry.scheme is None and not is_embedding(module)]
        return {"quant_method": "awq", "bits": 4, "group_size": next(iter(sizes), 128), "zero_point": True,
                "version": "gemm", "modules_to_not_convert": kept or None}  # fmt: skip

    def encode(self, module: str, layer: LayerTensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return awq.pack_layer(module, layer)

    def _headers(
        self, files: CheckpointFiles, module: str, settings: awq.AwqSettings
    ) -> tuple[Scheme, tuple[int, int]]:
        if settings.layout == "marlin":
            shape = marlin.shape_of(files, f"{module}.qweight", f"{module}.scales", settings.group_size)
            return marlin.scheme_of(settings.group_size), shape
        if settings.layout == "gemv_fast":
            shape = awq_fast.shape_of(files, module, settings)
            return awq_fast.scheme_of(settings, shape[1]), shape
        return awq.scheme_of(files, module, settings), awq.shape_of(files, module, settings)

    def _settings(self, files: CheckpointFiles) -> awq.AwqSettings:
        config = self._config(files)
        values = config.model_dump(include={"bits", "group_size", "zero_point", "layout"})
        return awq.check_settings(files, awq.AwqSettings(**values))

    def _config(self, files: CheckpointFiles) -> AwqConfig:
        return files.once("config", lambda: self._checked(files))

    def _checked(self, files: CheckpointFiles) -> AwqConfig:
        assert files.quantization is not None
        config = check(AwqConfig, files.quantization, file=files.quantization_file)
        if config.layout not in _LAYOUTS:
            raise Refused(
                Refusal("unknown-variant", "notimpl", str(files.path), "this layout of AWQ is not read yet",
                        f"found {config.layout}, expected {' or '.join(_LAYOUTS)}",
                        'Save the model again with version "gemm".', str(files.quantization_file),
                        field="quantization_config.version")
            )  # fmt: skip
        return config


METHOD = Awq()
