"""`mxfp4` as gpt-oss has it: the experts of each layer stacked, all else unquantized.

    experts.gate_up_proj_blocks  uint8 [E, 2 I, H / 32, 16]  e2m1, first code low; even rows gate, odd rows up
    experts.gate_up_proj_scales  uint8 [E, 2 I, H / 32]      e8m0
    experts.gate_up_proj_bias    bf16  [E, 2 I]
    experts.down_proj_...        the same with H rows and I columns

w = e2m1(q) * 2^(scale - 127). Source: transformers' integrations/mxfp4.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qcore.checkpoint.patterns import skips
from qcore.checkpoint.settings import Settings, check
from qcore.checkpoint.source import TensorInfo
from qcore.layouts.affine import unholdable
from qcore.method import (
    PLAIN_FLOATS,
    CheckpointFiles,
    Method,
    ModulePlan,
    dense_modules,
    read_scale,
    require_tensor,
)
from qcore.refusal import bad_file
from qcore.scheme import SHORTHANDS

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors

_SCHEME = SHORTHANDS["W4A16-mxfp4"]
_GROUP, _BYTES = 32, 16
_PARTS = ("blocks", "scales", "bias")


class Mxfp4Config(Settings):
    """The tensors say all else."""

    modules_to_not_convert: list[str] | None = None


class Mxfp4(Method):
    name = "mxfp4"
    quant_methods = ("mxfp4",)
    stacked = True

    def plan(self, files: CheckpointFiles) -> dict[str, ModulePlan]:
        config = check(Mxfp4Config, files.quantization or {}, file=files.quantization_file)
        plan = {}
        for name in files.source.tensors:
            module, _, part = name.rpartition("_")
            if part in ("blocks", "scales") and module not in plan:
                plan[module] = ModulePlan(_SCHEME, "quantization_config", self._shape(files, module))
        if not plan:
            raise bad_file("missing-tensor", "the config says mxfp4, but no tensor is named *_blocks", file=files.path,
                           fix="An unquantized model that is only marked is not read; quantize it first.")  # fmt: skip
        for module, entry in dense_modules(files.source.tensors, "").items():
            skipped = config.modules_to_not_convert or ()
            named = skips(skipped, module, file=files.quantization_file, field="modules_to_not_convert")
            reason = f"the config skips {named!r}" if named else "only experts are quantized"
            plan.setdefault(module, ModulePlan(None, reason, entry.shape))
        return plan

    def decode(self, files: CheckpointFiles, module: str) -> LayerTensors:
        from qcore.tensor import LayerTensors, QuantizedTensor

        shape = self._shape(files, module)
        codes = files.source.read(f"{module}_blocks").flatten(2)
        scales = read_scale(files, f"{module}_scales", "e8m0")
        bias = f"{module}_bias"
        return LayerTensors(
            QuantizedTensor(_SCHEME, shape, codes, (scales,)),
            files.source.read(bias) if bias in files.source.tensors else None,
        )

    def encode_config(self, plan: Mapping[str, ModulePlan], variant: str = "") -> dict[str, Any]:
        for module, entry in plan.items():
            if entry.scheme is not None and (entry.scheme != _SCHEME or len(entry.shape) != 3):
                found = f"{entry.scheme} of {list(entry.shape)}"
                unholdable(self.name, module, found, f"stacked experts [E, N, K] in {_SCHEME}")
        kept = [module for module, entry in plan.items() if entry.scheme is None]
        return {"quant_method": self.name, "modules_to_not_convert": kept}

    def encode(self, module: str, layer: LayerTensors, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        if layer.input_multiplier is not None:
            unholdable(self.name, module, "a vector that multiplies the input", "none")
        codes, (scales,) = layer.weight.codes, layer.weight.scales
        tensors = {f"{module}_blocks": codes.unflatten(2, (-1, _BYTES)), f"{module}_scales": scales}
        return tensors if layer.bias is None else {**tensors, f"{module}_bias": layer.bias}

    def parameters(self, files: CheckpointFiles, plan: Mapping[str, ModulePlan]) -> dict[str, TensorInfo]:
        decoded = {f"{module}_{part}" for module, entry in plan.items() if entry.scheme for part in _PARTS}
        return {name: info for name, info in files.source.tensors.items() if name not in decoded}

    def _shape(self, files: CheckpointFiles, module: str) -> tuple[int, ...]:
        """[E, N, K], once all headers agree. Raises Refused (missing-tensor, bad-shape, bad-dtype)."""
        info = require_tensor(files, f"{module}_blocks", dtypes=["U8"])
        if len(info.shape) != 4 or info.shape[3] != _BYTES:
            raise bad_file("bad-shape", "experts are stacked, in blocks of 16 bytes", file=info.file, tensor=info.name,
                           field="shape", found=list(info.shape), expected=f"[experts, rows, blocks, {_BYTES}]")  # fmt: skip
        experts, rows, groups, _ = info.shape
        require_tensor(files, f"{module}_scales", shape=(experts, rows, groups), dtypes=["U8", "F8_E8M0"])
        if f"{module}_bias" in files.source.tensors:
            require_tensor(files, f"{module}_bias", shape=(experts, rows), dtypes=PLAIN_FLOATS)
        return experts, rows, groups * _GROUP


METHOD = Mxfp4()
