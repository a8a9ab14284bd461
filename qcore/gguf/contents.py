"""What a GGUF file made from a checkpoint holds: metadata, and each tensor as it is or as float32 rows.

A GGUF checkpoint is carried over, metadata and tokenizer unchanged. Everything else is put under GGUF's names, in the
order of rows that `parameter_names` undoes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qcore.blocks.types import BLOCK_TYPES
from qcore.checkpoint.gguf import GgufSource
from qcore.checkpoint.gguf_writer import Typed
from qcore.checkpoint.open import Checkpoint
from qcore.checkpoint.source import TensorInfo
from qcore.gguf.architectures import OUTER, Architecture
from qcore.gguf.encode_config import Values, architecture_fields, architecture_of, check_config, rotary_tensors
from qcore.gguf.encode_tokenizer import tokenizer_fields
from qcore.gguf.names import GgufParameter, parameter_names, row_permutation
from qcore.refusal import Refusal, Refused, bad_file

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors

_BUFFERS = (".rotary_emb.inv_freq",)
"""Saved by old transformers, and computed from the config."""
_WIDE = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_SPLIT = ("split.no", "split.count", "split.tensors.count")
"""Fields that tell of one shard; what is written is whole."""


@dataclass(frozen=True)
class Contents:
    """shapes: of every tensor, by GGUF's name, in the order in which they are written. parameters: transformers' names,
    and where each is. values: the tensors that belong to the config."""

    source: Checkpoint
    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    parameters: Mapping[str, GgufParameter]
    values: Values

    def exact(self, tensor: str) -> tuple[str, torch.Tensor]:
        """Its type in GGUF and what is stored: the same numbers. Raises Refused (not-representable)."""
        import torch

        if tensor in self.values:
            return "F32", torch.tensor(self.values[tensor], dtype=torch.float32)
        if isinstance(self.source.files.source, GgufSource):
            return self.source.files.source.tensors[tensor].dtype, self.source.files.source.read(tensor)
        name, place = self._origin(tensor)
        module, _, part = name.rpartition(".")
        if self.source.plan.get(module) is not None and part == "weight":
            from qcore.gguf.exact import exact_blocks

            found = exact_blocks(_weight_only(module, self.source.layer(module)).weight)
            if found is None:
                raise Refused(
                    Refusal("not-representable", "never", module, "no block type of ggml's holds its numbers unchanged",
                            f"found {self.source.plan[module]}", "Quantize the model to GGUF: qcore quantize --format gguf.")
                )  # fmt: skip
            return found[0].upper(), _in_order(found[1], place)
        return self._plain(tensor, name, place)

    def rows(self, tensor: str) -> torch.Tensor:
        """What it stands for, float32 in the order of the file."""
        import torch

        if tensor in self.values:
            return torch.tensor(self.values[tensor], dtype=torch.float32)
        held = self.source.files.source
        if isinstance(held, GgufSource):
            stored, kind = held.read(tensor), held.tensors[tensor].dtype.lower()
            if kind not in BLOCK_TYPES:
                return stored.float()
            from qcore.blocks.dequantize import dequantize_blocks

            return dequantize_blocks(kind, stored).view(self.shapes[tensor])
        name, place = self._origin(tensor)
        module, _, part = name.rpartition(".")
        if part == "weight" and module in self.source.layers:
            if self.source.plan[module] is not None:
                _weight_only(module, self.source.layer(module))
            return _in_order(self.source.dequantize(module), place)
        return self._plain(tensor, name, place)[1].float()

    def original(self, tensor: str) -> str:
        """The parameter's name in transformers, or the tensor's own."""
        return self._names.get(tensor, tensor)

    def _origin(self, tensor: str) -> tuple[str, GgufParameter]:
        name = self._names[tensor]
        return name, self.parameters[name]

    @property
    def _names(self) -> dict[str, str]:
        return {place.tensor: name for name, place in self.parameters.items()}

    def _plain(self, tensor: str, name: str, place: GgufParameter) -> tuple[str, torch.Tensor]:
        """Matrices in the dtype that they have, vectors in float32, as llama.cpp wants them."""
        import torch

        module, _, part = name.rpartition(".")
        if self.source.plan.get(module) is not None and part == "bias":
            bias = self.source.layer(module).bias
            values = torch.zeros(self.shapes[tensor]) if bias is None else bias
        else:
            values = self.source.parameter(name)
        if values.dtype == torch.float64 or values.dim() == 1:
            wide, values = values, values.float()
            if not torch.equal(wide.double(), values.double()):
                raise Refused(Refusal("not-representable", "never", name, "llama.cpp computes in float32 at most",
                                      "found float64 numbers that float32 does not hold", "Cast the model first."))  # fmt: skip
        if place.add:
            values = values - place.add
        return _WIDE[str(values.dtype).removeprefix("torch.")], _in_order(values, place)


def contents_of(source: Checkpoint) -> Contents:
    """Reads headers, configs and the tokenizer only. Raises Refused: unknown-architecture, not-representable,
    unexpected-tensor, and all that reading gives."""
    held = source.files.source
    if isinstance(held, GgufSource):
        metadata = {key: _carried(value) for key, value in held.metadata.items() if key not in _SPLIT}
        shapes = {name: info.shape for name, info in held.tensors.items()}
        return Contents(source, metadata, shapes, parameter_names(held.metadata, held.tensors), {})
    from qcore.checkpoint.architecture import model_class

    _, config = model_class(source)
    row = architecture_of(config, source.path)
    metadata = {"general.architecture": row.name, "general.type": "model", "general.name": source.path.resolve().stem}
    metadata |= architecture_fields(config, row)
    values = rotary_tensors(config, row)
    shapes = {tensor: (len(factors),) for tensor, factors in values.items()}
    for name, shape in _shapes(source).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        shapes[_tensor_name(source, row, name)] = shape
    infos = {name: TensorInfo(name, "F32", shape, source.path, 0, 0) for name, shape in shapes.items()}
    check_config(config, metadata, infos, values, source.path)
    metadata |= tokenizer_fields(source.load_tokenizer(), shapes["token_embd.weight"][0], source.path)
    return Contents(source, metadata, shapes, parameter_names(metadata, infos), values)


def _carried(value: Any) -> Any:
    """A value that was read has lost its type: a number that float32 does not hold was a float64; no matter what an empty
    list is of."""
    if value == []:
        return Typed("int32", [])
    values = value if isinstance(value, list) else [value]
    if values and all(type(one) is float for one in values) and any(_narrow(one) != one == one for one in values):
        return Typed("float64", value)
    return value


def _narrow(value: float) -> float:
    try:
        narrow: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return float("inf")
    return narrow


def _shapes(source: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Every parameter's, quantized or not, in the order of the layers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module, entry in source.layers.items():
        if entry.scheme is not None:
            shapes[f"{module}.weight"] = entry.shape
            if f"{module}.bias" in source.files.source.tensors:
                shapes[f"{module}.bias"] = entry.shape[:1]
    plain = {name: info.shape for name, info in source.parameters.items() if not name.endswith(_BUFFERS)}
    return dict(sorted((shapes | plain).items(), key=lambda entry: _by_number(entry[0])))


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _tensor_name(source: Checkpoint, row: Architecture, name: str) -> str:
    """GGUF's name of a parameter. Raises Refused (unexpected-tensor)."""
    module, _, part = name.rpartition(".")
    outer = {theirs: ours for ours, theirs in OUTER.items()}
    if part == "weight" and module in outer:
        return f"{outer[module]}.weight"
    inner = {theirs: ours for ours, theirs in row.layer.items()}
    pieces = module.split(".", 3)
    if pieces[:2] == ["model", "layers"] and len(pieces) == 4 and pieces[3] in inner:
        return f"blk.{pieces[2]}.{inner[pieces[3]]}.{part}"
    raise bad_file("unexpected-tensor", f"{row.name} has no name for this tensor in GGUF", file=source.path, tensor=name,
                   fix="Keep the model in safetensors.")  # fmt: skip


def _weight_only(module: str, layer: LayerTensors) -> LayerTensors:
    """The layer, if its weight is all there is to it. Raises Refused (not-representable)."""
    extra = "a vector that multiplies its input" if layer.input_multiplier is not None else None
    if layer.weight.scheme.input is not None:
        extra = f"quantized inputs, {layer.weight.scheme.input}"
    if extra:
        raise Refused(Refusal("not-representable", "never", module, "GGUF stores weights alone",
                              f"found {extra}", "Quantize the original model to GGUF."))  # fmt: skip
    return layer


def _in_order(tensor: torch.Tensor, place: GgufParameter) -> torch.Tensor:
    """Rows in the file's order: the inverse of `row_permutation`."""
    if place.heads is None:
        return tensor
    return tensor[row_permutation(tensor.shape[0], place.heads).argsort()]
