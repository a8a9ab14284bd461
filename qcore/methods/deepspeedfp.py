"""DeepSpeedFP: plain matrices whose config asks for small floats, made while they are loaded.

    bits 8    e4m3 up to 480        bits 6    e3m2 up to 28
    bits 12   e4m7 up to 510        bits 4    e2m1 up to 6

w = q * scale, one f32 scale for each `group_size` elements of the flattened weight; qcore/algorithms/minifloat.py says how
they are rounded. Every linear layer is quantized but the output layer, as vLLM had it (its DeepSpeedFPConfig, until 2026;
it read the config from quant_config.json or quantize_config.json too). Fused layers share no scales here, and a last group
that is not whole has one of its own, where DeepSpeed drops it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from qcore.checkpoint.settings import Settings, check
from qcore.elements import FlatGroup, Float, FloatFormat, Level
from qcore.method import PLAIN_FLOATS, CheckpointFiles, Method, ModulePlan, dense_modules, in_flight, is_embedding
from qcore.refusal import Refusal, Refused, bad_file
from qcore.scheme import Scheme, weight_only

if TYPE_CHECKING:
    from qcore.tensor import LayerTensors

_FORMATS: dict[int, FloatFormat] = {4: "e2m1", 6: "e3m2", 8: "e4m3", 12: "e4m7"}
_OUTPUT_LAYER = "lm_head"


class DeepSpeedFpConfig(Settings):
    """The keys that decide what the weights become."""

    bits: int = 8
    group_size: int = Field(512, ge=1, le=1 << 31)


class DeepSpeedFp(Method):
    name = "deepspeedfp"
    quant_methods = ("deepspeedfp",)
    variants = tuple(f"fp{bits}" for bits in sorted(_FORMATS))

    def format_version(self, files: CheckpointFiles) -> str:
        return f"fp{self._config(files).bits}"

    def plan(self, files: CheckpointFiles) -> dict[str, ModulePlan]:
        for name, info in files.source.tensors.items():
            if name.endswith(".weight") and info.dtype not in PLAIN_FLOATS:
                raise bad_file("bad-dtype", "DeepSpeedFP quantizes plain weights while they are loaded", file=info.file,
                               tensor=name, field="dtype", found=info.dtype, expected=" or ".join(PLAIN_FLOATS))  # fmt: skip
        config, plan = self._config(files), dense_modules(files.source.tensors, "stored unquantized")
        for module, entry in plan.items():
            if not is_embedding(module) and module.rpartition(".")[2] != _OUTPUT_LAYER:
                reason = "quantized while loading, as the config asks"
                plan[module] = in_flight(self.name, _scheme(config), reason, entry.shape)
        return plan

    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:
        raise LookupError(f"{module} is quantized while it is loaded")

    def encode_config(self, plan: Mapping[str, ModulePlan], variant: str = "") -> dict[str, Any]:
        raise Refused(
            Refusal("format-not-written", "never", self.name, "DeepSpeedFP has no file of quantized weights: they are made "
                    "from plain ones whenever a checkpoint is loaded", "found codes and scales, which it could not keep",
                    "Write dense, which keeps the numbers, or compressed-tensors.")
        )  # fmt: skip

    def _config(self, files: CheckpointFiles) -> DeepSpeedFpConfig:
        config = check(DeepSpeedFpConfig, files.quantization or {}, file=files.quantization_file)
        if config.bits not in _FORMATS:
            raise Refused(
                Refusal("unknown-variant", "notimpl", str(files.path), "DeepSpeed has no floats of so many bits",
                        f"found {config.bits} bits, expected {', '.join(map(str, _FORMATS))}",
                        "Set bits to one of them.", str(files.quantization_file), field="quantization_config.bits")
            )  # fmt: skip
        return config


def _scheme(config: DeepSpeedFpConfig) -> Scheme:
    return weight_only(Float(_FORMATS[config.bits]), Level(FlatGroup(config.group_size)))


METHOD = DeepSpeedFp()
