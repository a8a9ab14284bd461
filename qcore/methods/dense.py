"""Unquantized safetensors checkpoints: bf16, f16 or f32 matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcore.checkpoint.safetensors import SafetensorsSource
from qcore.method import PLAIN_FLOATS, CheckpointFiles, Method, ModulePlan, dense_modules
from qcore.refusal import bad_file

if TYPE_CHECKING:
    from qcore.tensor import LayerTensors

_INTEGER_BUFFERS = ("position_ids", "token_type_ids", "num_batches_tracked")
"""Integer tensors that unquantized models legitimately save."""


class Dense(Method):
    """No quantization config, and nothing in the headers that looks quantized."""

    name = "dense"

    def recognizes(self, files: CheckpointFiles) -> bool:
        return files.quantization is None and isinstance(files.source, SafetensorsSource)

    def plan(self, files: CheckpointFiles) -> dict[str, ModulePlan]:
        for name, info in files.source.tensors.items():
            if info.dtype not in PLAIN_FLOATS and name.rpartition(".")[2] not in _INTEGER_BUFFERS:
                raise bad_file(
                    "unknown-method", "its tensors are quantized, but no config says how",
                    file=info.file, tensor=name, field="dtype", found=info.dtype,
                    expected=f"{', '.join(PLAIN_FLOATS)} where there is no quantization_config",
                    fix="Restore the quantization_config that the quantizing tool wrote into config.json or beside it.",
                )  # fmt: skip
        return dense_modules(files.source.tensors, "the checkpoint is not quantized")

    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:
        raise LookupError(f"{module} is not quantized")


METHOD = Dense()
