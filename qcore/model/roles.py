"""Which of a model's layers read the residual stream behind which norm, and which write to it: told by the tensors that modules are given while the model runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qcore.algorithms.hadamard import Hadamard
from qcore.checkpoint.rotated import Change
from qcore.model.experts import Layout

_NEAR = 1e-3
"""How near a norm comes to its formula, in parts of its largest output; its epsilon is in the rest."""


class NotRotated(Exception):
    """What of a model does not let its stream be rotated, in words that follow `found`."""


@dataclass(frozen=True)
class Call:
    """One run of a module with parameters of its own: what it was given first, and what it gave first."""

    name: str
    module: Any
    given: torch.Tensor
    gave: torch.Tensor


@contextmanager
def recorded(model: torch.nn.Module) -> Iterator[list[Call]]:
    """The calls of all that runs inside, in their order."""
    calls: list[Call] = []

    def add(name: str, module: Any, args: Any, named: Any, out: Any) -> None:
        given = next((x for x in (*args, *named.values()) if isinstance(x, torch.Tensor)), None)
        gave = out[0] if isinstance(out, tuple) else out
        if given is not None and isinstance(gave, torch.Tensor):
            calls.append(Call(name, module, given, gave))

    hooks = [
        module.register_forward_hook(lambda *call, name=name: add(name, *call), with_kwargs=True)
        for name, module in model.named_modules()
        if any(part is not None for part in module._parameters.values())
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Roles:
    """By modules' names. norms: of the stream, with what their gain is beyond their weight. readers: with their norm. experts: as they are stacked, with their norm. writers.

    Tensors are told by the memory that they lie in, which views of them share, or by their rows where a mixture's experts are given some of them. An expert that no
    token reaches is as others of its name. Raises NotRotated.
    """

    model: Any
    calls: list[Call]
    norms: dict[str, float] = field(default_factory=dict)
    readers: dict[str, str] = field(default_factory=dict)
    writers: list[str] = field(default_factory=list)
    experts: dict[str, tuple[Layout, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.width = self.model.get_input_embeddings().weight.shape[-1]
        self._normed: dict[int, Call] = {}
        """By the memory that they have written, norms of the stream."""
        self._made: dict[int, str] = {}
        """Memory that layers have written: reads, writes or inner."""
        for call in self.calls:
            self._add(call)
        self._add_unreached()
        if idle := self.norms.keys() - {*self.readers.values(), *(norm for _, norm in self.experts.values())}:
            raise NotRotated(f"{min(idle)}, a norm that no layer reads")

    def changes(self, *, heads: bool) -> dict[str, Change]:
        """By the parameters' names. heads: attention's values are rotated too."""
        stream = Hadamard(self.width)
        embedding = self.model.get_input_embeddings()
        ends = (embedding, self.model.get_output_embeddings())
        names = {id(module): name for name, module in self.model.named_modules()}
        found = {f"{names[id(embedding)]}.weight": Change(columns=stream, wide=False)}
        for name, offset in self.norms.items():
            found[f"{name}.weight"] = Change(value=1 - offset)
        for name, norm in self.readers.items():
            wide = self.model.get_submodule(name) not in ends
            found[f"{name}.weight"] = Change(columns=stream, **self._gain(norm), wide=wide)
        for name in self.writers:
            found |= {f"{name}.weight": Change(rows=stream), f"{name}.bias": Change(columns=stream)}
        for name, (layout, norm) in self.experts.items():
            first, down = layout.stacks[:2]
            found[f"{name}.{first}"] = Change(columns=stream, **self._gain(norm), transposed=layout.transposed)
            found[f"{name}.{down}"] = Change(rows=stream, transposed=layout.transposed)
            if layout.biased:
                found[f"{name}.{layout.stack('down', bias=True)}"] = Change(columns=stream)
        for value, output, width in self._values() if heads else ():
            turned = Hadamard(width)
            found[f"{value}.weight"] = replace(found[f"{value}.weight"], rows=turned)
            found[f"{value}.bias"] = Change(columns=turned)
            found[f"{output}.weight"] = replace(found[f"{output}.weight"], columns=turned)
        held = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return {name: change for name, change in found.items() if name in held}

    def _add(self, call: Call) -> None:
        given, gave = (part.untyped_storage().data_ptr() for part in (call.given, call.gave))
        weight, origin, norm = (
            getattr(call.module, "weight", None),
            self._made.get(given),
            self._norm(call.given, given),
        )
        layout = Layout.of(call.module)
        if layout is not None:
            if norm is None:
                raise NotRotated(f"{call.name}, experts that read no norm of the stream")
            self.experts[call.name] = layout, norm
        elif not isinstance(weight, torch.Tensor) or call.module is self.model.get_input_embeddings():
            return
        elif weight.dim() == 1 and call.given.shape == call.gave.shape and weight.shape == call.given.shape[-1:]:
            if origin == "writes":
                raise NotRotated(f"{call.name}, a norm behind a layer that reads no norm")
            if origin is not None:
                self._made[gave] = "inner"
            elif len(weight) == self.width:
                self.norms[call.name] = _offset(call)
                self._normed[gave] = call
        elif weight.dim() == 2 and weight.shape[1] == call.given.shape[-1]:
            self._made[gave] = role = _role(norm, origin, writes=weight.shape[0] == self.width)
            if norm is not None:
                self.readers[call.name] = norm
            elif role == "writes":
                self.writers.append(call.name)

    def _norm(self, given: torch.Tensor, memory: int) -> str | None:
        """The norm of the stream that a tensor is from."""
        if memory in self._normed:
            return self._normed[memory].name
        if memory in self._made or given.shape[-1] != self.width or given.dim() < 2:
            return None
        rows = given.reshape(-1, 1, self.width)
        for call in self._normed.values():
            if (rows == call.gave.reshape(1, -1, self.width)).all(-1).any(-1).all():
                return call.name
        return None

    def _add_unreached(self) -> None:
        """Layers beside the stream that no token came to."""
        reached = {call.name for call in self.calls}
        alike = {re.sub(r"\.\d+\.", ".0.", name): name for name in (*self.readers, *self.writers)}
        for name, module in self.model.named_modules():
            sizes = {size for part in module.parameters(recurse=False) if part.dim() > 1 for size in part.shape}
            if name in reached or self.width not in sizes:
                continue
            known = alike.get(re.sub(r"\.\d+\.", ".0.", name))
            if known is None:
                raise NotRotated(f"{name}, which no token of a short text comes to")
            if known in self.readers:
                self.readers[name] = self.readers[known]
            else:
                self.writers.append(name)

    def _gain(self, norm: str) -> dict[str, Any]:
        return {"gain": f"{norm}.weight", "offset": self.norms[norm]}

    def _values(self) -> Iterator[tuple[str, str, int]]:
        """The layers that make attention's values and that read them again, with a head's width."""
        for name, module in self.model.named_modules():
            value, output, width = f"{name}.v_proj", f"{name}.o_proj", getattr(module, "head_dim", None)
            if value in self.readers and output in self.writers and isinstance(width, int):
                yield value, output, width


def _role(norm: str | None, origin: str | None, *, writes: bool) -> str:
    if norm is not None:
        return "reads"
    return "writes" if writes and origin != "inner" else "inner"


def _offset(call: Call) -> float:
    """Of a norm x / rms(x) * (weight + offset)."""
    x = call.given.double()
    plain = x * x.square().mean(-1, keepdim=True).rsqrt()
    for offset in (0.0, 1.0):
        if getattr(call.module, "bias", None) is None and _near(
            call.gave, plain * (call.module.weight.double() + offset)
        ):
            return offset
    raise NotRotated(f"{call.name}, a {type(call.module).__name__} whose outputs are not x / rms(x) times a gain")


def _near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return float((ours.double() - theirs).abs().max()) <= _NEAR * float(theirs.abs().max())
