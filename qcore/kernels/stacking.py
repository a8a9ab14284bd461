"""Layers of one form held as one: a mixture's experts, whose buffers are stacked, so that one call multiplies rows of x by weights of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

if TYPE_CHECKING:
    from typing_extensions import Self


class StackableLinear(torch.nn.Module):
    """A kernel's layer whose `forward` takes `experts` too where its buffers are stacked.

    forward(x [M, K], experts int32 [M]) -> [M, N]: row m by the weight of experts[m]; experts are in ascending order.
    COMMON: names of buffers that are the same for all layers of one form, and are kept once.
    """

    COMMON: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def stackable(cls, layers: Sequence[Self]) -> bool:
        """Whether they are of one form."""
        return all(_form(layer) == _form(layers[0]) for layer in layers)

    @classmethod
    def stacked(cls, layers: Sequence[Self]) -> Self:
        """One layer with the buffers [E, ...] of layers that are stackable, in their order. They give theirs up, so that memory doubles for no more than
        one buffer, and are not to be used any more."""
        first = layers[0]
        for name, _ in list(first.named_buffers()):
            path, _, leaf = name.rpartition(".")
            if leaf not in first.COMMON:
                parts = [layer.get_submodule(path)._buffers.pop(leaf) for layer in layers]
                holder = first.get_submodule(path)
                holder.register_buffer(leaf, torch.stack([part for part in parts if part is not None]))
        return first


def _form(layer: torch.nn.Module) -> list[object]:
    """What layers of one form have in common: everything but the values of their buffers."""
    facts = [
        {name: value for name, value in vars(module).items() if not name.startswith("_")} for module in layer.modules()
    ]
    tensors = [(name, part.shape, part.dtype, part.device) for name, part in layer.named_buffers()]
    return [[type(module) for module in layer.modules()], facts, tensors]
