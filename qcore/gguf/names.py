"""transformers' parameter names for GGUF's tensors, and what has to be done to each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qcore.checkpoint.source import TensorInfo
from qcore.gguf.architectures import OUTER, ROPE_TENSORS, UNSUFFIXED, Architecture
from qcore.gguf.fields import Fields
from qcore.refusal import bad_file

if TYPE_CHECKING:
    import torch

_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z0-9_]+)\.(weight|bias)")


@dataclass(frozen=True)
class GgufParameter:
    """Where a parameter comes from. heads: its rows are permuted within this many heads (see `row_permutation`).
    add: what is added to its values. row: it is a matrix of one row, which files may hold as a vector."""

    tensor: str
    heads: int | None = None
    add: float = 0.0
    row: bool = False


def parameter_names(metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, GgufParameter]:
    """Every parameter of the transformers model that the file holds, by name.

    Raises Refused: unknown-architecture; unexpected-tensor for a tensor that the architecture does not have; bad-field;
    bad-shape.
    """
    fields = Fields(metadata, tensors)
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
            raise bad_file("unexpected-tensor", f"a {architecture.name} model of {layers} layers has no such tensor",
                           file=info.file, tensor=tensor, fix="Use the model's safetensors checkpoint.")  # fmt: skip
        part, name = place
        if part in permuted and (not info.shape or info.shape[0] % (2 * permuted[part])):
            raise bad_file("bad-shape", "rows do not divide into heads", file=info.file, tensor=tensor, field="shape",
                           found=list(info.shape), expected=f"a multiple of {2 * permuted[part]} rows")  # fmt: skip
        offset = -architecture.norm_offset if part.endswith("norm") else 0.0
        row = part == "ffn_gate_inp_shexp"
        names[name] = GgufParameter(tensor, permuted.get(part), offset, row)
    return names


def row_permutation(rows: int, heads: int) -> torch.Tensor:
    """int64 [rows]: the file's row that each of transformers' rows is.

    ggml turns neighbouring pairs, transformers the two halves of a head: within a head of d rows, the file's row
    2 j + i is transformers' row i d / 2 + j.
    """
    import torch

    return torch.arange(rows).reshape(heads, -1, 2).transpose(1, 2).reshape(-1)


def _place(tensor: str, architecture: Architecture, layers: int) -> tuple[str, str] | None:
    """The part's name in GGUF and the parameter's in transformers; None where the architecture has no such tensor."""
    part = tensor.removesuffix(".weight")
    if part != tensor and part in OUTER:
        return part, f"{OUTER[part]}.weight"
    block = _BLOCK.fullmatch(tensor)
    if block is None or int(block[1]) >= layers or block[2] not in architecture.layer:
        return None
    if block[3] == "bias" and (block[2].endswith("norm") or block[2] in UNSUFFIXED):
        return None
    suffix = "" if block[2] in UNSUFFIXED else f".{block[3]}"
    return block[2], f"model.layers.{block[1]}.{architecture.layer[block[2]]}{suffix}"
