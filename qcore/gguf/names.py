"""transformers' parameter names for GGUF's tensors, and what has to be done to each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qcore.checkpoint.source import TensorInfo
from qcore.gguf.architectures import OUTER, ROPE_TENSORS, Architecture
from qcore.gguf.fields import Fields
from qcore.refusal import bad_file

if TYPE_CHECKING:
    import torch

_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_OUTER = re.compile(r"(\w+)\.(weight|bias)")


@dataclass(frozen=True)
class GgufParameter:
    """Where a parameter comes from. heads: its rows are permuted within this many heads (see `row_permutation`).
    add: what is added to its values."""

    tensor: str
    heads: int | None = None
    add: float = 0.0


def parameter_names(metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, GgufParameter]:
    """Every parameter of the transformers model that the file holds, by name.

    Raises Refused: unknown-architecture; unexpected-tensor for a tensor that the architecture does not have; bad-field.
    """
    fields = Fields(metadata, next(iter(tensors.values())).file if tensors else _nowhere())
    architecture = fields.architecture
    layers = fields.size("block_count", most=1 << 14)
    heads = fields.size("attention.head_count", most=1 << 14)
    permuted = {}
    if architecture.permuted:
        permuted = {"attn_q": heads, "attn_k": fields.size("attention.head_count_kv", heads, most=1 << 14)}
    names = {}
    for tensor, info in tensors.items():
        if tensor in ROPE_TENSORS:
            continue
        place = _place(tensor, architecture, layers)
        if place is None:
            raise bad_file("unexpected-tensor", f"a {architecture.name} model has no such tensor", file=info.file,
                           tensor=tensor, fix="Use the model's safetensors checkpoint.")  # fmt: skip
        part, name = place
        rows = info.shape[0]
        if part in permuted and rows % (2 * permuted[part]):
            raise bad_file("bad-shape", "rows do not divide into heads", file=info.file, tensor=tensor, field="shape",
                           found=list(info.shape), expected=f"a multiple of {2 * permuted[part]} rows")  # fmt: skip
        offset = -architecture.norm_offset if name.endswith("norm.weight") else 0.0
        names[name] = GgufParameter(tensor, permuted.get(part), offset)
    return names


def row_permutation(rows: int, heads: int) -> torch.Tensor:
    """int64 [rows]: the file's row that each of transformers' rows is.

    ggml rotates neighbouring pairs, transformers the two halves of a head: within a head of d rows, the file's row
    2 j + i is transformers' row i d / 2 + j.
    """
    import torch

    return torch.arange(rows).reshape(heads, -1, 2).transpose(1, 2).reshape(-1)


def _place(tensor: str, architecture: Architecture, layers: int) -> tuple[str, str] | None:
    """The part's name in GGUF and the parameter's in transformers."""
    if block := _BLOCK.fullmatch(tensor):
        inner = architecture.layer.get(block[2])
        # norms end in "layernorm", except q_norm and k_norm
        return (
            None
            if inner is None or int(block[1]) >= layers
            else (block[2], f"model.layers.{int(block[1])}.{inner}.{block[3]}")
        )
    outer = _OUTER.fullmatch(tensor)
    if outer is None or outer[1] not in OUTER:
        return None
    return outer[1], f"{OUTER[outer[1]]}.{outer[2]}"


def _nowhere() -> Any:
    raise bad_file("missing-tensor", "the file holds no tensors", file="GGUF", expected="a model's weights",
                   fix="Vocabulary-only files cannot be run; use the model's own file.")  # fmt: skip
