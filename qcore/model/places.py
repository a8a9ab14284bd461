"""Where a checkpoint's tensors belong in transformers' model: what was renamed, and experts that it holds stacked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch

from qcore.model.experts import Layout, Part

PARTS: MappingProxyType[str, Part] = MappingProxyType({
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "gate_up_proj": "gate_up",
    "w1": "gate", "w3": "up", "w2": "down",
})  # fmt: skip
"""How checkpoints spell the parts of an expert: as Qwen and DeepSeek do, fused, and as Mixtral does."""

_EXPERT = re.compile(rf"(.+?)(?:\.(0|[1-9]\d{{0,5}}))?\.({'|'.join(PARTS)})(?:[._](weight|bias))?")


@dataclass(frozen=True)
class Slot:
    """One weight or bias of an experts module; expert: None where the tensor holds all experts."""

    module: str
    part: Part
    expert: int | None
    bias: bool = False


class Places:
    """The names of a model's tensors, and the checkpoint's spellings of them.

    state: every tensor that the model saves. experts: the modules that stack their experts.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.state = frozenset(model.state_dict())
        layouts = ((name, Layout.of(module)) for name, module in model.named_modules())
        self.experts = {name: layout for name, layout in layouts if layout is not None}
        self.model = model

    def module(self, name: str) -> str | Slot:
        """The place of a linear layer or embedding."""
        place = self.parameter(f"{name}.weight")
        if isinstance(place, Slot):
            return place
        return self._slot(name) or place.removesuffix(".weight")

    def parameter(self, name: str) -> str | Slot:
        """The place of a tensor; the name itself where the model has no such tensor."""
        if found := self._known(name):
            return found
        spelling = name
        for rename in self._renamings:
            spelling = rename.rename_source_key(spelling)[0]
            if found := self._known(spelling):
                return found
        return name

    @cached_property
    def _renamings(self) -> list[Any]:
        """Made where a name is not the model's: it takes a while."""
        return _renamings(self.model)

    def _known(self, name: str) -> str | Slot | None:
        return name if name in self.state else self._slot(name)

    def _slot(self, name: str) -> Slot | None:
        found = _EXPERT.fullmatch(name)
        if found is None or found[1] not in self.experts:
            return None
        return Slot(found[1], PARTS[found[3]], None if found[2] is None else int(found[2]), found[4] == "bias")


def _renamings(model: Any) -> list[Any]:
    """transformers' rules for names that older checkpoints have. Before its version 5 no module was renamed."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return []
    return [rule for rule in get_model_conversion_mapping(model, add_legacy=False) if type(rule) is WeightRenaming]
