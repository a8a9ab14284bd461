"""Where a checkpoint holds what the tensors of a GGUF file are made of.

Most tensors are one parameter each. A file holds a layer's experts stacked, gate and up apart; checkpoints hold them one
by one (Qwen's and Mixtral's spelling), or stacked with gate and up in one tensor, as transformers' models do:

    experts.0.gate_proj.weight [N, K]    experts.0.w1.weight [N, K]
    experts.gate_up_proj [E, 2 I, H], [gate; up]; gpt-oss's [E, H, 2 I], gate, up, gate, ...; its bias [E, 2 I]
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from qcore.checkpoint.open import Checkpoint
from qcore.gguf.architectures import OUTER, UNSUFFIXED, Architecture, Experts
from qcore.refusal import bad_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_BUFFERS = (".rotary_emb.inv_freq",)
"""Saved by old transformers, and computed from the config."""
_GATE, _UP, _DOWN = "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"
_SPELLED = MappingProxyType({
    "gate_proj": (_GATE,), "up_proj": (_UP,), "down_proj": (_DOWN,), "gate_up_proj": (_GATE, _UP),
    "w1": (_GATE,), "w3": (_UP,), "w2": (_DOWN,),
})  # fmt: skip
"""Parts of an expert as checkpoints spell them, and GGUF's."""
_EXPERT = re.compile(
    r"model\.layers\.(\d+)\.(\w+)\.experts(?:\.(0|[1-9]\d{0,5}))?\."
    rf"({'|'.join(_SPELLED)})(\.weight|[._]bias)?"
)


@dataclass(frozen=True)
class Origin:
    """A parameter of the checkpoint (of a quantized module its weight or bias) that a tensor is made of, or a part of it.

    stacked: all experts are in it. transposed: of stacks [E, K, N]. span: which of each matrix's rows are the tensor's: from,
    to and step.
    """

    name: str
    stacked: bool = False
    transposed: bool = False
    span: tuple[int, int | None, int] = (0, None, 1)

    @property
    def rows(self) -> slice:
        """`span`, to index with."""
        return slice(*self.span)

    @property
    def module(self) -> str:
        """The parameter's module."""
        return self.name.rpartition(".")[0]

    @property
    def part(self) -> str:
        """Its name within the module: weight, bias, or that of a plain stack."""
        return self.name.rpartition(".")[2]


Origins = Mapping[str, tuple[Origin, ...]]
"""By GGUF's name of a tensor: its parameter; of experts one for each, or the stack."""


@dataclass(frozen=True)
class _Expert:
    """A parameter's name, taken apart. number: None for all experts. tail: weight, bias, or nothing for a plain stack's weight."""

    layer: str
    number: int | None
    spelled: str
    tail: str
    suffixed: bool


def origins_of(
    source: Checkpoint, config: PretrainedConfig, row: Architecture
) -> tuple[Origins, dict[str, tuple[int, ...]]]:
    """Every tensor's origins, and its shape, in the order of the layers. Raises Refused (unexpected-tensor, missing-tensor,
    bad-shape)."""
    single: dict[str, tuple[Origin, ...]] = {}
    stacks: dict[str, dict[int | None, Origin]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in _shapes(source).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        expert = _expert(name, row)
        if expert is None:
            tensor = _tensor_name(source, row, name)
            if tensor in single:
                raise _twice(source, name, single[tensor][0].name)
            single[tensor] = (Origin(name),)
            shapes[tensor] = shape[1:] if tensor.endswith("gate_inp_shexp.weight") and shape[:1] == (1,) else shape
            continue
        for tensor, origin, whole in _shares(source, config, row, expert, name, shape):
            known = stacks.setdefault(tensor, {})
            if expert.number in known or None in known or (expert.number is None and known):
                raise _twice(source, name, next(iter(known.values())).name)
            known[expert.number] = origin
            shapes[tensor] = whole
    complete = _complete(source, config, row, stacks) if row.experts is not None else {}
    return single | complete, shapes


def _shapes(source: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Every parameter's, quantized or not, in the order of the layers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module, entry in source.layers.items():
        if entry.scheme is not None:
            shapes[f"{module}.weight"] = entry.shape
            spellings = [f"{module}.bias", f"{module}_bias"]  # the second of experts' stacks
            if any(name in source.files.source.tensors and name not in source.parameters for name in spellings):
                shapes[f"{module}.bias"] = entry.shape[:-1]
    plain = {name: info.shape for name, info in source.parameters.items() if not name.endswith(_BUFFERS)}
    return dict(sorted((shapes | plain).items(), key=lambda entry: _by_number(entry[0])))


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _tensor_name(source: Checkpoint, row: Architecture, name: str) -> str:
    """GGUF's name of a parameter outside the experts. Raises Refused (unexpected-tensor)."""
    module, _, part = name.rpartition(".")
    outer = {theirs: ours for ours, theirs in OUTER.items()}
    if part == "weight" and module in outer:
        return f"{outer[module]}.weight"
    inner = {theirs: ours for ours, theirs in row.layer.items()}
    pieces = name.split(".", 3)
    if pieces[:2] == ["model", "layers"] and len(pieces) == 4:
        module = pieces[3].rpartition(".")[0]
        if pieces[3] in UNSUFFIXED.values() and pieces[3] in inner:
            return f"blk.{pieces[2]}.{inner[pieces[3]]}.weight"
        if row.experts is not None and row.experts.block:
            module = re.sub(rf"^{row.experts.block}\.", "mlp.", module)
        if module in inner and inner[module] not in UNSUFFIXED and part in ("weight", "bias"):
            return f"blk.{pieces[2]}.{inner[module]}.{part}"
    raise bad_file("unexpected-tensor", f"{row.name} has no name for this tensor in GGUF", file=source.path, tensor=name,
                   fix="Keep the model in safetensors.")  # fmt: skip


# --- Experts ---


def _expert(name: str, row: Architecture) -> _Expert | None:
    """The name taken apart, if it is of experts that the architecture has."""
    found = _EXPERT.fullmatch(name)
    if row.experts is None or found is None or found[2] not in ("mlp", row.experts.block):
        return None
    number, tail = None if found[3] is None else int(found[3]), found[5] or ""
    if number is not None and not tail.startswith("."):
        return None  # experts one by one are modules, whose parameters have names of their own
    return _Expert(found[1], number, found[4], tail[1:] or "weight", tail.startswith("."))


def _shares(
    source: Checkpoint, config: PretrainedConfig, row: Architecture, expert: _Expert, name: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, Origin, tuple[int, ...]]]:
    """The tensors that the parameter is a part of, with their shapes [E, N, K], or [E, N] of biases."""
    assert row.experts is not None
    count, hidden, inner = _sizes(source, config, row.experts)
    parts = _SPELLED[expert.spelled]
    rows, columns = (hidden, inner) if parts == (_DOWN,) else (inner * len(parts), hidden)
    bias, stacked = expert.tail == "bias", expert.number is None
    if bias and not row.experts.alternating:
        raise bad_file("unexpected-tensor", f"{row.name} has no biases of experts in GGUF", file=source.path, tensor=name,
                       fix="Keep the model in safetensors.")  # fmt: skip
    transposed = stacked and not bias and not expert.suffixed and row.experts.alternating
    one = (rows,) if bias else (columns, rows) if transposed else (rows, columns)
    expected = (count, *one) if stacked else one
    if expert.number is not None and expert.number >= count:
        raise bad_file("unexpected-tensor", "a tensor is one too many for the model's experts", file=source.path, tensor=name,
                       found=f"expert {expert.number}", expected=f"{count} experts")  # fmt: skip
    if shape != expected:
        raise bad_file("bad-shape", "the experts are not of the config's size", file=source.path, tensor=name, field="shape",
                       found=list(shape), expected=list(expected))  # fmt: skip
    rows //= len(parts)
    for half, part in enumerate(parts):
        span: tuple[int, int | None, int] = (half * rows, (half + 1) * rows, 1)
        if len(parts) > 1 and row.experts.alternating:
            span = (half, None, 2)
        origin = Origin(name, stacked, transposed, span)
        yield f"blk.{expert.layer}.{part}.{expert.tail}", origin, (count, rows) if bias else (count, rows, columns)


def _complete(
    source: Checkpoint, config: PretrainedConfig, row: Architecture, stacks: Mapping[str, Mapping[int | None, Origin]]
) -> dict[str, tuple[Origin, ...]]:
    """The experts of each layer in their order. Raises Refused (missing-tensor) where one is not there."""
    assert row.experts is not None
    count, _, _ = _sizes(source, config, row.experts)
    tails = ("weight", "bias") if row.experts.alternating else ("weight",)
    for layer in range(config.num_hidden_layers):
        for part in (_GATE, _UP, _DOWN):
            for tail in tails:
                known = stacks.get(f"blk.{layer}.{part}.{tail}", {})
                gone = next((number for number in range(count) if number not in known), None)
                if None not in known and gone is not None:
                    what = f"model.layers.{layer}.{row.layer[part]}".replace("experts.", f"experts.{gone}.")
                    raise bad_file("missing-tensor", "the model needs more of its experts than the checkpoint holds",
                                   file=source.path, tensor=f"{what}.{tail}", found=f"{len(known)} experts",
                                   expected=f"{count} experts")  # fmt: skip
    return {tensor: tuple(known[number] for number in sorted(known, key=lambda n: n or 0))
            for tensor, known in stacks.items()}  # fmt: skip


def _sizes(source: Checkpoint, config: PretrainedConfig, row: Experts) -> tuple[int, int, int]:
    """E, H and I. Raises Refused (bad-field)."""
    keys = (row.count, "hidden_size", row.inner)
    count, hidden, inner = (getattr(config, key, None) for key in keys)
    for key, value in zip(keys, (count, hidden, inner), strict=True):
        if type(value) is not int or value < 1:
            raise bad_file("bad-field", "the config has no size of the experts", file=source.path, field=key,
                           found=repr(value), expected="a whole number")  # fmt: skip
    return count, hidden, inner  # type: ignore[return-value]


def _twice(source: Checkpoint, name: str, other: str) -> Exception:
    return bad_file("unexpected-tensor", "a tensor is one too many for the model", file=source.path, tensor=name,
                    found=f"{other}, which is the same weight", expected="every weight once")  # fmt: skip
