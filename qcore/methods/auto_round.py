"""AutoRound's own format: integer weights in the GPTQ or AWQ layout, with other bits for some layers.

`packing_format` decides: `auto_round:auto_gptq` (also where it is absent) stores zero points as GPTQ v1 does, less one;
`auto_round:auto_awq` is AWQ's gemm layout; `auto_round` and its other forms store zero points as they are, like GPTQ v2.
Read from AutoRound's exporter and layers (export_to_autoround, qlinear_torch, qlinear_torch_zp).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from qcore.checkpoint.patterns import matches
from qcore.checkpoint.settings import Settings, check
from qcore.layouts import awq, gptq
from qcore.method import CheckpointFiles, Method, ModulePlan, dense_modules, stated_method
from qcore.refusal import Refusal, Refused, bad_file

if TYPE_CHECKING:
    from qcore.tensor import LayerTensors


class AutoRoundConfig(Settings):
    """The keys that decide what the tensors mean."""

    bits: int
    group_size: int = Field(ge=-1)
    sym: bool = True
    data_type: str = "int"
    act_bits: int = 16
    packing_format: str = "auto_round:auto_gptq"
    extra_config: dict[str, dict[str, Any]] | None = None


class AutoRound(Method):
    name = "auto-round"
    quant_methods = ("auto-round", "auto_round", "intel/auto-round")
    variants = ("auto_round", "auto_round:auto_gptq", "auto_round:auto_awq")
    side_files = ("quantization_config.json",)
    parts = gptq.PARTS | awq.PARTS

    def recognizes(self, files: CheckpointFiles) -> bool:
        """INC's name means AutoRound's tensors where the config has AutoRound's keys."""
        stated, config = stated_method(files.quantization), files.quantization or {}
        return super().recognizes(files) or (stated == "inc" and "bits" in config)

    def format_version(self, files: CheckpointFiles) -> str:
        return self._config(files).packing_format

    def plan(self, files: CheckpointFiles) -> dict[str, ModulePlan]:
        tensors = files.source.tensors
        quantized = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
        if not quantized:
            raise bad_file("missing-tensor", "the config says AutoRound, but no tensor is named *.qweight",
                           file=files.path)  # fmt: skip
        plan = {}
        for module in quantized:
            settings, named = self._module(files, module)
            reason = f"extra_config {named!r}" if named else "quantization_config"
            if isinstance(settings, awq.AwqSettings):
                scheme, shape = awq.scheme_of(files, module, settings), awq.shape_of(files, module, settings)
            else:
                scheme, shape = settings.scheme(), gptq.shape_of(files, module, settings)
            plan[module] = ModulePlan(scheme, reason, shape)
        for module, entry in dense_modules(tensors, "").items():
            overrides, named = self._overrides(files, module)
            kept = f"extra_config {named!r} keeps {overrides['bits']} bits" if overrides.get("bits", 0) >= 16 else ""
            plan.setdefault(module, ModulePlan(None, kept or "stored unquantized", entry.shape))
        return plan

    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:
        settings, _ = self._module(files, module)
        if isinstance(settings, awq.AwqSettings):
            return awq.read_layer(files, module, settings)
        return gptq.read_layer(files, module, settings)

    def _module(self, files: CheckpointFiles, module: str) -> tuple[gptq.GptqSettings | awq.AwqSettings, str]:
        """The module's numbers, and the entry of extra_config that changed them, if any."""
        config = self._config(files)
        overrides, named = self._overrides(files, module)
        values = config.model_dump(include={"bits", "group_size", "sym"}) | overrides
        if "awq" in config.packing_format:
            stated = check(awq.AwqSettings, {**values, "zero_point": not values["sym"]}, file=files.quantization_file)
            return awq.check_settings(files, stated), named
        values["v1"] = "gptq" in config.packing_format and "gptqmodel" not in config.packing_format
        settings = check(gptq.GptqSettings, values, file=files.quantization_file)
        return gptq.check_settings(files, module, settings), named

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
        return {key: found[key] for key in ("bits", "group_size", "sym") if found.get(key) is not None}, named

    def _config(self, files: CheckpointFiles) -> AutoRoundConfig:
        return files.once("config", lambda: self._checked(files))

    def _checked(self, files: CheckpointFiles) -> AutoRoundConfig:
        assert files.quantization is not None
        config = check(AutoRoundConfig, files.quantization, file=files.quantization_file)
        for field, found, known in (
            ("data_type", config.data_type, config.data_type in ("int", "int_sym", "int_asym")),
            ("act_bits", config.act_bits, config.act_bits >= 16),
            ("packing_format", config.packing_format, config.packing_format.startswith("auto_round")),
        ):
            if not known:
                raise Refused(
                    Refusal("unknown-variant", "notimpl", str(files.path), "this form of AutoRound is not read yet",
                            f"found {field} {found!r}, expected integer weights, activations of 16 bits, auto_round",
                            "Export the model with AutoRound as auto_round, auto_gptq or auto_awq.",
                            str(files.quantization_file), field=f"quantization_config.{field}")
                )  # fmt: skip
        return config


def _is_layer(files: CheckpointFiles, name: str) -> bool:
    return f"{name}.qweight" in files.source.tensors or f"{name}.weight" in files.source.tensors


METHOD = AutoRound()
