"""Decoder: a way of reading a text through a whole model, its prompt and then token after token, as a row of facts.

A model runs without one, layer by layer through transformers' own code. Where layers are small, what stands around them takes
longer than they do; a plugin may take tokens through all of them in one piece for the models that it knows.
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

    def begin(self, texts: int = 1) -> TokenSteps:
        """Texts of which nothing has been read yet; other ones may be under way."""
        ...

    def exact(self) -> AbstractContextManager[None]:
        """Inside of it, the model's linear layers leave inputs whole that they round otherwise: a last bit decides how inputs are
        rounded, so that two right answers may differ by as much as the rounding itself."""
        ...


class TokenSteps(Protocol):
    """Keys and values of texts, and the way to their next tokens."""

    def take(self, texts: list[list[int]], keep: int = 1) -> list[torch.Tensor]:
        """Of each text the logits [at most keep, vocabulary] of what follows the last of its next tokens, in float32; the tokens, at least one of each
        text, become part of its context."""
        ...

    def forget(self, count: int) -> None:
        """The last tokens of each text are no part of its context any more."""
        ...

    def to_cache(self, length: int = 0) -> Any:
        """What has been read, as a cache of transformers' with which the model can go on. In front, texts are padded to the longest of them, and
        to `length`."""
        ...
