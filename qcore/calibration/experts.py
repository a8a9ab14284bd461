"""Mixtures of experts while they are calibrated: experts that transformers stacks in one parameter are linear layers of their own, by the checkpoint's names."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from qcore.method import is_expert
from qcore.model.experts import Layout, Part, QuantizedExperts
from qcore.model.places import Places, Slot
from qcore.refusal import Refused, bad_file

if TYPE_CHECKING:
    from qcore.checkpoint.open import Checkpoint


log = logging.getLogger("qcore")

_SLACK = 1 << 28
"""Bytes of sums beyond the block's own size."""


class Unstacked:
    """Replaces those experts modules of a skeleton whose experts the checkpoint holds one by one; the others stay as they are, which is said.

    Raises Refused (missing-tensor, unexpected-tensor) where the checkpoint has fewer experts than the model, or more.
    """

    def __init__(self, model: Any, places: Places, checkpoint: Checkpoint) -> None:
        self._places = places
        self._known: dict[str, str | Slot] = {}
        found: defaultdict[str, dict[Slot, str]] = defaultdict(dict)
        whole: dict[str, str] = {}
        for name in (*checkpoint.parameters, *(f"{module}.weight" for module in checkpoint.layers)):
            place = self._known[name] = places.parameter(name)
            if isinstance(place, Slot) and place.expert is not None:
                found[place.module][place] = name
            elif (module := place.module if isinstance(place, Slot) else place.rpartition(".")[0]) in places.experts:
                whole[module] = name
        if both := sorted(found.keys() & whole.keys()):
            raise _unexpected(
                checkpoint, whole[both[0]], f"experts one by one, as {next(iter(found[both[0]].values()))}"
            )
        for module, slots in found.items():
            layout = places.experts[module]
            parts = _parts(layout, slots)
            _check(checkpoint, layout, parts, slots)
            parent, _, name = module.rpartition(".")
            layers = {part: [_linear(layout, part) for _ in range(layout.count)] for part in parts}
            setattr(model.get_submodule(parent), name, QuantizedExperts(layers, model.get_submodule(module), layout))
        if whole:
            log.warning(
                "the checkpoint has all experts of %d layers in one tensor each, which stay as they are: %s",
                len(whole),
                ", ".join(whole),
            )

    def parameter(self, name: str) -> str | Slot:
        """The place of a tensor, as Places has it; a Slot only where it is a stack of another form than the model's."""
        place = self._known.get(name) or self._places.parameter(name)
        if not isinstance(place, Slot) or place.expert is None:
            return place
        return f"{place.module}.parts.{place.part}.{place.expert}.{'bias' if place.bias else 'weight'}"


def portions(layers: Mapping[str, torch.nn.Linear]) -> list[dict[str, torch.nn.Linear]]:
    """A block's layers, parted so that the sums of what those of a portion see take little more memory than the block: experts, each whole, and at last all that is no expert's.

    So what is quantized in a portion changes nothing that a later one sees.
    """
    found: list[dict[str, torch.nn.Linear]] = [{}]
    limit, taken = sum(layer.weight.nbytes for layer in layers.values()) + _SLACK, 0
    for _, own in groupby(sorted(layers, key=_order), key=_order):
        together = {module: layers[module] for module in own}
        size = sum(8 * layer.in_features**2 for layer in together.values())  # of all windows, and of some
        if taken and taken + size > limit:
            found.append({})
            taken = 0
        found[-1] |= together
        taken += size
    return found


def shared(tops: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The largest magnitudes of layers' inputs, with one for all experts of a part: engines run them with the largest, and an expert that few tokens reach has not seen its own."""
    parts: dict[str, torch.Tensor] = {}
    for module, top in tops.items():
        part = _part(module)
        parts[part] = torch.maximum(parts[part], top) if part in parts else top
    return {module: parts[_part(module)] for module in tops}


def _order(module: str) -> tuple[bool, str]:
    """Of an expert's layers, the expert; all others come last, and are one."""
    expert = re.match(r"(.*\.)?experts\.\d+\.", module)
    return expert is None, expert[0] if expert else ""


def _part(module: str) -> str:
    """What all experts' layers of a part share of their name; of others, the name."""
    return re.sub(r"(^|\.)experts\.\d+\.", r"\1experts.", module) if is_expert(module) else module


def _parts(layout: Layout, slots: Mapping[Slot, str]) -> tuple[Part, ...]:
    if not layout.gated:
        return "up", "down"
    fused = any(slot.part == "gate_up" for slot in slots)
    return ("gate_up", "down") if fused else ("gate", "up", "down")


def _check(checkpoint: Checkpoint, layout: Layout, parts: tuple[Part, ...], slots: Mapping[Slot, str]) -> None:
    """Every weight of every expert must be there, and no other."""
    own, expected = next(iter(slots)), f"{', '.join(parts)} of {layout.count} experts"
    weights = [replace(own, part=part, expert=expert, bias=False) for expert in range(layout.count) for part in parts]
    known = {*weights, *(replace(slot, bias=True) for slot in weights if layout.biased)}
    for slot, name in slots.items():
        if slot not in known:
            raise _unexpected(checkpoint, name, expected)
    for slot in weights:
        if slot not in slots:
            raise bad_file("missing-tensor", "the model needs more of its experts than the checkpoint holds", file=checkpoint.path,
                           tensor=f"{slot.module}.{slot.expert}.{slot.part}", expected=expected)  # fmt: skip


def _unexpected(checkpoint: Checkpoint, name: str, expected: str) -> Refused:
    return bad_file("unexpected-tensor", "a tensor is one too many for the model's experts", file=checkpoint.path,
                    tensor=name, expected=expected)  # fmt: skip


def _linear(layout: Layout, part: Part) -> torch.nn.Module:
    """Without memory, as all of a skeleton."""
    rows, columns = layout.shape(part)
    return torch.nn.Linear(columns, rows, layout.biased, device="meta", dtype=torch.float32)
