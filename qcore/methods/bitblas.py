"""BitBLAS's own checkpoints: `quant_method: bitblas`; qcore/layouts/bitblas.py has the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import AliasChoices, Field, ValidationInfo, field_validator

from qcore.checkpoint.settings import check
from qcore.layouts.affine import integer_of, plain_inputs, unholdable
from qcore.layouts.bitblas import PARTS, BitblasSettings, pack_layer, read_layer, shape_of
from qcore.method import CheckpointFiles, Method, ModulePlan, dense_modules
from qcore.refusal import bad_file

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors


class BitblasConfig(BitblasSettings):
    """The same numbers in the spellings of a config."""

    sym: bool = Field(False, validation_alias=AliasChoices("sym", "is_sym"))
    desc_act: bool = False

    @field_validator("desc_act")
    @classmethod
    def _in_order(cls, ordered: bool, others: ValidationInfo) -> bool:
        if ordered and others.data.get("group_size", -1) > 0:
            raise ValueError("BitBLAS keeps no order of the columns, so that groups are of neighbours")
        return ordered


class Bitblas(Method):
    name = "bitblas"
    quant_methods = ("bitblas",)
    variants = ("quantized", "original", "rescale")
    written = variants
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

    def encode_config(self, plan: Mapping[str, ModulePlan], variant: str = "") -> dict[str, Any]:
        """One bits and one group size for all layers; symmetric where all of them are and no variant asks for zero points."""
        mode = variant or "quantized"
        found: dict[tuple[int, int], str] = {}
        symmetric = mode == "quantized"
        for module, entry in plan.items():
            if entry.scheme is None:
                continue
            found.setdefault(integer_of(self.name, module, entry.scheme, (2, 4, 8), floating=mode == "rescale"), module)
            symmetric = symmetric and entry.scheme.weight.zero is None
        if len(found) > 1:
            unholdable(self.name, min(found.values()), f"bits and groups of {sorted(found)}", "the same for all layers")
        bits, size = next(iter(found))
        return {"quant_method": "bitblas", "bits": bits, "group_size": size, "desc_act": False, "sym": symmetric,
                "zeros_mode": mode, "lm_head": bool(plan.get("lm_head") and plan["lm_head"].scheme)}  # fmt: skip

    def encode(self, module: str, layer: LayerTensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        plain_inputs(self.name, module, layer)
        values = {key: config[key] for key in ("bits", "group_size", "sym", "zeros_mode")}
        return pack_layer(module, layer, BitblasSettings(**values), self.name)

    def _config(self, files: CheckpointFiles) -> BitblasConfig:
        return files.once(
            "config", lambda: check(BitblasConfig, files.quantization or {}, file=files.quantization_file)
        )


METHOD = Bitblas()
