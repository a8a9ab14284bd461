"""Filling experts modules: stacked into transformers' parameters where all are plain, else as layers of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from qcore.checkpoint.open import Checkpoint
from qcore.layouts.experts import expert_of
from qcore.model.experts import Layout, Part, QuantizedExperts
from qcore.model.pack import Packer, agreed_bias
from qcore.model.places import Places, Slot
from qcore.refusal import bad_file
from qcore.tensor import LayerTensors

Step = Callable[[str, int], None]
"""Called with a tensor's or module's name and its bytes, once loaded."""


@dataclass(frozen=True)
class _Source:
    """A quantized module of the checkpoint, or one of its plain tensors."""

    name: str
    quantized: bool


class ExpertLoader:
    """Collects what the checkpoint holds of each experts module, then fills one module after the other."""

    def __init__(
        self, checkpoint: Checkpoint, model: torch.nn.Module, places: Places, packer: Packer, step: Step
    ) -> None:
        self.checkpoint, self.model, self.layouts = checkpoint, model, places.experts
        self.packer, self.step = packer, step
        self.found: dict[str, dict[Slot, _Source]] = {}

    def add(self, slot: Slot, name: str, *, quantized: bool) -> None:
        """Notes a source. Raises Refused (unexpected-tensor) for an expert too many or a weight that came before."""
        count, known = self.layouts[slot.module].count, self.found.setdefault(slot.module, {})
        if slot.expert is not None and slot.expert >= count:
            raise self.unexpected(name, f"expert {slot.expert}", f"{count} experts")
        if slot in known:
            raise self.unexpected(name, f"{known[slot].name}, which is the same weight", "every weight once")
        known[slot] = _Source(name, quantized)

    def run(self) -> set[str]:
        """Fills the modules of which something was found. Returns the names of the parameters that it gave values."""
        return {name for module, found in self.found.items() for name in _Experts(self, module, found).load()}

    def unexpected(self, name: str, found: str, expected: str) -> Exception:
        return bad_file("unexpected-tensor", "a tensor is one too many for the model's experts",
                        file=self.checkpoint.path, tensor=name, found=found, expected=expected)  # fmt: skip


class _Experts:
    """One experts module."""

    def __init__(self, loader: ExpertLoader, module: str, found: dict[Slot, _Source]) -> None:
        self.loader, self.module, self.found = loader, module, found
        self.checkpoint, self.packer = loader.checkpoint, loader.packer
        self.old: Any = loader.model.get_submodule(module)
        self.layout: Layout = loader.layouts[module]
        self.empty = [stack for stack in self.layout.stacks if getattr(self.old, stack).is_meta]
        known = {slot.part for slot in found}
        fused = "gate_up" in known or not known & {"gate", "up"}
        self.parts: tuple[Part, ...] = ("gate_up", "down") if fused else ("gate", "up", "down")
        if not self.layout.gated:
            self.parts = ("up", "down")

    def load(self) -> set[str]:
        """The names of the parameters that it gave values. Raises Refused (missing-tensor, bad-shape and others)."""
        self._check()
        filled = self.empty
        if any(source.quantized for source in self.found.values()):
            parts = {part: list(self._layers(part)) for part in self.parts}
            stacked = all(self.packer.stackable(layers) for layers in parts.values())
            parent, _, name = self.module.rpartition(".")
            made = QuantizedExperts(parts, self.old, self.layout, stacked=stacked)
            setattr(self.loader.model.get_submodule(parent), name, made)
        else:
            self._fill()
        return {f"{self.module}.{stack}" for stack in filled}

    def _check(self) -> None:
        """Every weight must be there once."""
        for slot, source in self.found.items():
            known = slot.part in self.parts and (self.layout.biased or not slot.bias)
            if not known or self.layout.stack(slot.part, bias=slot.bias) not in self.empty:
                raise self.loader.unexpected(source.name, "another form of the same weight", "every weight once")
            twin = self.found.get(replace(slot, expert=None)) if slot.expert is not None else None
            if twin is not None:
                raise self.loader.unexpected(source.name, f"{twin.name}, which has all experts", "every weight once")
        for part in self.parts:
            if self.layout.stack(part) not in self.empty or Slot(self.module, part, None) in self.found:
                continue
            for expert in range(self.layout.count):
                if Slot(self.module, part, expert) not in self.found:
                    raise self._missing(part, expert)

    def _fill(self) -> None:
        """Copies plain experts into the module's own parameters, tensor by tensor."""
        for stack in self.empty:
            shape, device = getattr(self.old, stack).shape, self.packer.device.torch_device
            empty = torch.empty(shape, dtype=self.packer.dtype, device=device)
            setattr(self.old, stack, torch.nn.Parameter(empty, requires_grad=False))
        for part in self.parts:
            for bias in (False, True) if self.layout.biased else (False,):
                if self.layout.stack(part, bias=bias) not in self.empty:
                    continue
                for expert, (_, values) in enumerate(self._each(part, bias=bias)):
                    if values is None:
                        raise self._missing(part, expert, bias=bias)
                    self.layout.view(self.old, part, bias=bias)[expert].copy_(values)

    def _layers(self, part: Part) -> Iterator[torch.nn.Module]:
        """Each expert's layer."""
        biases = list(self._each(part, bias=True)) if self.layout.biased else []
        for expert, (layer, weight) in enumerate(self._each(part)):
            bias = biases[expert][1] if biases else None
            if layer is not None and layer.bias is not None:
                bias = layer.bias
            bias = agreed_bias(self.checkpoint, self._name(part, expert), bias, wanted=self.layout.biased)
            if layer is not None:
                planned = self.checkpoint.layers.get(self._name(part, expert))
                yield self.packer.linear(replace(layer, bias=bias), planned.computes if planned else "", expert=True)
            else:
                assert weight is not None, "every weight is there"
                yield self.packer.plain(weight, bias)

    def _each(self, part: Part, *, bias: bool = False) -> Iterator[tuple[LayerTensors | None, torch.Tensor | None]]:
        """Every expert's weight or bias, quantized or plain; neither for a bias that is nowhere or with its weight."""
        shape = self.layout.shape(part)[: 1 if bias else 2]
        everything = self.found.get(Slot(self.module, part, None, bias))
        if self.layout.stack(part, bias=bias) not in self.empty:
            yield from ((None, values) for values in self.layout.view(self.old, part, bias=bias))
        elif everything is not None:
            layers, plain = self._read(everything, (self.layout.count, *shape))
            for expert in range(self.layout.count):
                yield layers and expert_of(layers, expert), None if plain is None else plain[expert]
        else:
            for expert in range(self.layout.count):
                source = self.found.get(Slot(self.module, part, expert, bias))
                yield (None, None) if source is None else self._read(source, shape)

    def _read(self, source: _Source, shape: tuple[int, ...]) -> tuple[LayerTensors | None, torch.Tensor | None]:
        """The source's values, quantized or plain. Raises Refused (bad-shape)."""
        layer = self.checkpoint.layer(source.name) if source.quantized else None
        plain = None if source.quantized else self.checkpoint.parameter(source.name)
        weight = layer.weight if layer is not None else plain
        assert weight is not None
        if tuple(weight.shape) != shape:
            raise bad_file("bad-shape", "the weight is not of the model's size", file=self.checkpoint.path,
                           tensor=source.name, field="shape", found=list(weight.shape), expected=list(shape))  # fmt: skip
        self.loader.step(source.name, weight.nbytes)
        return layer, plain

    def _name(self, part: Part, expert: int) -> str:
        """What the checkpoint calls the weight, as far as its other experts tell."""
        for slot, source in self.found.items():
            if slot.part == part and not slot.bias:
                head, number, tail = source.name.rpartition(f".{slot.expert}.")
                return f"{head}.{expert}.{tail}" if number else source.name
        stacked = all(slot.expert is None for slot in self.found)
        return f"{self.module}.{part}_proj" if stacked else f"{self.module}.{expert}.{part}_proj"

    def _missing(self, part: Part, expert: int, *, bias: bool = False) -> Exception:
        name = self._name(part, expert) + (".bias" if bias else "")
        return bad_file("missing-tensor", "the model needs more of its experts than the checkpoint holds",
                        file=self.checkpoint.path, tensor=name,
                        expected=f"{self.layout.count} experts in {self.module}")  # fmt: skip
