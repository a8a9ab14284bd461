"""Decoder: a way of taking a whole model's step from one token to the next, as a row of facts.

A model runs without one, layer by layer through transformers' own code. Where layers are small, what stands around them takes
longer than they do; a plugin may take the step in one piece for the models that it knows.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Decoder:
    """One row.

    device: torch's type of the devices that it runs on (`cpu`). implementation: `module:object`, a `TokenDecoder`. note: one
    sentence on what it does.
    """

    name: str
    device: str
    implementation: str
    note: str = ""

    def load(self) -> type[TokenDecoder]:
        """Imports the implementation."""
        module, _, name = self.implementation.partition(":")
        implementation: type[TokenDecoder] = getattr(importlib.import_module(module), name)
        return implementation


class TokenDecoder(Protocol):
    """What an implementation is. It is made once for a model, and compared with the model before it is trusted."""

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> TokenDecoder:
        """Raises Refused (unknown-variant) where the model has parts that it does not know."""
        ...

    def begin(self, cache: Any, length: int) -> TokenSteps:
        """One text's steps. Keys and values of its prompt of `length` tokens are taken over from transformers' cache, which stays
        as it is; several texts may be under way at once. Raises Refused (unknown-variant) for a cache of a kind that it does not know."""
        ...

    def exact(self) -> AbstractContextManager[None]:
        """Inside of it, the model's linear layers leave inputs whole that they round otherwise: a last bit decides how inputs are
        rounded, so that two right answers may differ by as much as the rounding itself."""
        ...


class TokenSteps(Protocol):
    """One text's keys and values, and the step to its next token."""

    def step(self, token: int) -> torch.Tensor:
        """The logits [vocabulary] of what follows, in float32; the token becomes part of the context."""
        ...
