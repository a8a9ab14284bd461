"""BitBLAS's own checkpoints: `quant_method: bitblas`; qcore/layouts/bitblas.py has the tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import AliasChoices, Field

from qcore.checkpoint.settings import check
from qcore.layouts.bitblas import PARTS, BitblasSettings, read_layer, shape_of
from qcore.method import CheckpointFiles, Method, ModulePlan, dense_modules
from qcore.refusal import bad_file

if TYPE_CHECKING:
    from qcore.tensor import LayerTensors


class BitblasConfig(BitblasSettings):
    """The same numbers in the spellings of a config."""

    sym: bool = Field(False, validation_alias=AliasChoices("sym", "is_sym"))


class Bitblas(Method):
    name = "bitblas"
    quant_methods = ("bitblas",)
    variants = ("quantized", "original", "rescale")
    parts = PARTS

    def plan(self, files: CheckpointFiles) -> dict[str, ModulePlan]:
        settings = self._config(files)
        names = [name.removesuffix(".qweight") for name in files.source.tensors if name.endswith(".qweight")]
        if not names:
            raise bad_file("missing-tensor", "the config says BitBLAS, but no tensor is named *.qweight",
                           file=files.path, field="quantization_config.quant_method")  # fmt: skip
        plan = {
            module: ModulePlan(settings.scheme(), "quantization_config", shape_of(files, module, settings))
            for module in names
        }
        return {**dense_modules(files.source.tensors, "stored unquantized"), **plan}

    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:
        return read_layer(files, module, self._config(files))

    def _config(self, files: CheckpointFiles) -> BitblasConfig:
        return files.once(
            "config", lambda: check(BitblasConfig, files.quantization or {}, file=files.quantization_file)
        )


METHOD = Bitblas()
