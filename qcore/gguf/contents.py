"""What a GGUF file made from a checkpoint holds: metadata, and each tensor as it is or as float32 rows.

A GGUF checkpoint is carried over, metadata and tokenizer unchanged. Everything else is put under GGUF's names, in the
order of rows that `parameter_names` undoes. Experts that a file stacks come one after the other, so that one of them, or
one stack of the checkpoint's, is in memory at a time.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from qcore.blocks.types import BLOCK_TYPES
from qcore.checkpoint.gguf import GgufSource
from qcore.checkpoint.gguf_writer import Typed
from qcore.checkpoint.open import Checkpoint
from qcore.checkpoint.source import TensorInfo
from qcore.gguf.architectures import ROUTERS
from qcore.gguf.encode_config import Values, architecture_fields, architecture_of, check_config, rotary_tensors
from qcore.gguf.encode_tokenizer import tokenizer_fields
from qcore.gguf.names import GgufParameter, parameter_names, row_permutation
from qcore.gguf.origins import Origin, Origins, origins_of
from qcore.layouts.experts import expert_of
from qcore.refusal import Refusal, Refused

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors

_WIDE = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_SPLIT = ("split.no", "split.count", "split.tensors.count")
"""Fields that tell of one shard; what is written is whole."""


@dataclass(frozen=True)
class Contents:
    """shapes: of every tensor, by GGUF's name, in the order in which they are written. parameters: transformers' names,
    and where each is. origins: what of the checkpoint each tensor is made of; empty of a GGUF checkpoint. values: the
    tensors that belong to the config."""

    source: Checkpoint
    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    parameters: Mapping[str, GgufParameter]
    origins: Origins
    values: Values

    def exact_type(self, tensor: str) -> str:
        """Its type in GGUF where its numbers stay the same. Raises Refused (not-representable)."""
        if tensor in self.values:
            return "F32"
        if isinstance(self.source.files.source, GgufSource):
            return self.source.files.source.tensors[tensor].dtype
        origins = self.origins[tensor]
        plain = [origin for origin in origins if not self._in_blocks(tensor, origin)]
        if len(plain) == len(origins):
            kinds = {_WIDE[str(values.dtype).removeprefix("torch.")] for values in self._values(tensor, exact=True)}
            return kinds.pop() if len(kinds) == 1 else "F32"
        if plain:
            raise self._in_no_block(plain[0], "the numbers of all experts")
        return self._block_type(origins)

    def exact(self, tensor: str, kind: str) -> Iterator[torch.Tensor]:
        """What is stored in this type, which `exact_type` gave: the same numbers, piece by piece."""
        import torch

        if tensor not in self.values and isinstance(self.source.files.source, GgufSource):
            yield self.source.files.source.read(tensor)
        elif kind.lower() in BLOCK_TYPES:
            from qcore.gguf.exact import exact_blocks

            for origin in self.origins[tensor]:
                for layer in self._layers(origin):
                    _, blocks = next(exact_blocks(layer.weight, [kind.lower()]))
                    yield in_order(blocks[origin.rows], self._places[tensor])
        else:
            wide = {name: dtype for dtype, name in _WIDE.items()}[kind]
            for values in self._values(tensor, exact=True):
                yield values.to(getattr(torch, wide))

    def rows(self, tensor: str) -> Iterator[torch.Tensor]:
        """What it stands for, float32 in the order of the file, piece by piece: experts' matrices, or the whole tensor."""
        held = self.source.files.source
        if tensor not in self.values and isinstance(held, GgufSource):
            yield from stored_rows(held, tensor)
        else:
            for values in self._values(tensor, exact=False):
                yield values.float()

    def original(self, tensor: str) -> str:
        """The checkpoint's name of it or of its first part, or the tensor's own."""
        return self.origins[tensor][0].name if tensor in self.origins else tensor

    @cached_property
    def _places(self) -> dict[str, GgufParameter]:
        return {place.tensor: place for place in self.parameters.values()}

    def _in_blocks(self, tensor: str, origin: Origin) -> bool:
        """Whether it is a quantized weight that stays one; routers do not."""
        return self._quantized(origin) and origin.part == "weight" and tensor.split(".")[-2] not in ROUTERS

    def _quantized(self, origin: Origin) -> bool:
        return self.source.plan.get(origin.module) is not None

    def _block_type(self, origins: tuple[Origin, ...]) -> str:
        """The smallest type that holds all of them. Raises Refused (not-representable)."""
        from qcore.gguf.exact import exact_blocks

        kinds: list[str] | None = None
        alone = len(origins) == 1 and not origins[0].stacked
        for origin in origins:
            for layer in self._layers(origin):
                found = (name for name, _ in exact_blocks(layer.weight, kinds))
                kinds = list(islice(found, 1) if alone else found)
                if not kinds:
                    raise self._in_no_block(
                        origin, "its numbers" if alone else "the numbers of all experts up to this one"
                    )
        assert kinds, "a tensor has origins"
        return kinds[0].upper()

    def _in_no_block(self, origin: Origin, what: str) -> Refused:
        return Refused(Refusal("not-representable", "never", origin.module, f"no block type of ggml's holds {what} unchanged",
                               f"found {self.source.plan.get(origin.module) or 'plain numbers among quantized experts'}",
                               "Quantize the model to GGUF: qcore quantize --format gguf."))  # fmt: skip

    def _layers(self, origin: Origin) -> Iterator[LayerTensors]:
        """A quantized layer, or each of stacked experts."""
        layer = _weight_only(origin.module, self.source.layer(origin.module))
        if not origin.stacked:
            yield layer
            return
        for number in range(layer.weight.shape[0]):
            yield expert_of(layer, number)

    def _values(self, tensor: str, *, exact: bool) -> Iterator[torch.Tensor]:
        """Numbers without blocks, in the file's order and shape, each expert's for themselves: matrices in the dtype that
        they have, vectors and routers in float32, as llama.cpp wants them. exact: matrices too lose none of their bits."""
        import torch

        if tensor in self.values:
            yield torch.tensor(self.values[tensor], dtype=torch.float32)
            return
        place, shape = self._places[tensor], self.shapes[tensor]
        wide = tensor.split(".")[-2] in ROUTERS
        for origin in self.origins[tensor]:
            for values in self._matrices(origin):
                values = values[origin.rows]
                if values.dtype == torch.float64 or values.dim() == 1 or wide:
                    before, values = values, values.float()
                    if (exact or values.dim() == 1) and not torch.equal(before.double(), values.double()):
                        raise Refused(Refusal("not-representable", "never", origin.name, "llama.cpp computes in float32 at most",
                                              "found float64 numbers that float32 does not hold", "Cast the model first."))  # fmt: skip
                if place.add:
                    values = values - place.add
                yield in_order(values, place).reshape(shape[1:] if is_stack(tensor) else shape)

    def _matrices(self, origin: Origin) -> Iterator[torch.Tensor]:
        """What the parameter stands for, as the checkpoint has it: [N, K] or [N]; of stacked experts one after the other."""
        import torch

        if self._quantized(origin) and origin.part == "weight":
            yield from (layer.weight.dequantize() for layer in self._layers(origin))
            return
        if self._quantized(origin) and origin.part == "bias":
            bias = self.source.layer(origin.module).bias
            whole = torch.zeros(self.source.layers[origin.module].shape[:-1]) if bias is None else bias
        else:
            whole = self.source.parameter(origin.name)
        for values in whole if origin.stacked else (whole,):
            yield values.t() if origin.transposed else values


def is_stack(tensor: str) -> bool:
    """Whether it holds a layer's experts, and so comes in a piece for each: [E, N, K], or biases [E, N]."""
    return tensor.split(".")[-2].endswith("_exps")


def stored_rows(held: GgufSource, tensor: str) -> Iterator[torch.Tensor]:
    """A GGUF file's tensor in float32; of stacks one expert after the other."""
    from qcore.blocks.dequantize import dequantize_blocks

    info = held.tensors[tensor]
    kind, stacked = info.dtype.lower(), is_stack(tensor)
    for number in range(info.shape[0] if stacked else 1):
        stored = held.read_rows(tensor, number, number + 1) if stacked else held.read(tensor)
        if kind in BLOCK_TYPES:
            yield dequantize_blocks(kind, stored).view(info.shape[1:] if stacked else info.shape)
        else:
            yield (stored[0] if stacked else stored).float()


def contents_of(source: Checkpoint) -> Contents:
    """Reads headers, configs and the tokenizer only. Raises Refused: unknown-architecture, not-representable,
    unexpected-tensor, and all that reading gives."""
    held = source.files.source
    if isinstance(held, GgufSource):
        metadata = {key: _carried(value) for key, value in held.metadata.items() if key not in _SPLIT}
        shapes = {name: info.shape for name, info in held.tensors.items()}
        return Contents(source, metadata, shapes, parameter_names(held.metadata, held.tensors), {}, {})
    from qcore.checkpoint.architecture import model_class

    _, config = model_class(source)
    row = architecture_of(config, source.path)
    metadata = {"general.architecture": row.name, "general.type": "model", "general.name": source.path.resolve().stem}
    metadata |= architecture_fields(config, row, source.path)
    values = rotary_tensors(config, row)
    shapes = {tensor: (len(factors),) for tensor, factors in values.items()}
    origins, own = origins_of(source, config, row)
    shapes |= own
    infos = {name: TensorInfo(name, "F32", shape, source.path, 0, 0) for name, shape in shapes.items()}
    check_config(config, metadata, infos, values, source.path)
    metadata |= tokenizer_fields(source.load_tokenizer(), shapes["token_embd.weight"][0], source.path)
    return Contents(source, metadata, shapes, parameter_names(metadata, infos), origins, values)


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


def _weight_only(module: str, layer: LayerTensors) -> LayerTensors:
    """The layer, if its weight is all there is to it. Raises Refused (not-representable)."""
    extra = "a vector that multiplies its input" if layer.input_multiplier is not None else None
    if layer.weight.scheme.input is not None:
        extra = f"quantized inputs, {layer.weight.scheme.input}"
    if extra:
        raise Refused(Refusal("not-representable", "never", module, "GGUF stores weights alone",
                              f"found {extra}", "Quantize the original model to GGUF."))  # fmt: skip
    return layer


def in_order(tensor: torch.Tensor, place: GgufParameter) -> torch.Tensor:
    """Rows in the file's order: the inverse of `row_permutation`."""
    if place.heads is None:
        return tensor
    return tensor[row_permutation(tensor.shape[0], place.heads).argsort()]
