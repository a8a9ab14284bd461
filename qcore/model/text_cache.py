"""The cache that a model's forward gives where a decoder reads its texts."""

from __future__ import annotations

import inspect
import weakref
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import DynamicCache

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qcore.decoder import TokenSteps

_ZERO_CROPS_NOTHING = "tokens_to_remove" in inspect.signature(DynamicCache.crop).parameters
"""Else the argument of `crop` is the length that is left."""


class TextCache(DynamicCache):  # type: ignore[misc]
    """The cache of texts that a decoder reads. It is made of an empty DynamicCache, in place, because callers go on with the object that they gave;
    and it is one again, with keys and values, once its layers are asked for.

    _read: tokens of each text, with those in front that only fill up the shorter ones, of which there are _padding.
    """

    _steps: TokenSteps
    _read: int
    _padding: list[int]
    _of: weakref.ref[PreTrainedModel]

    @classmethod
    def adopt(cls, cache: Any, model: PreTrainedModel, steps: TokenSteps, read: int, padding: list[int]) -> TextCache:
        cache.__class__ = cls
        cache._steps, cache._read, cache._padding, cache._of = steps, read, padding, weakref.ref(model)
        adopted: TextCache = cache
        return adopted

    def goes_on(self, model: PreTrainedModel, padding: list[int]) -> bool:
        """Whether it is of this model, and of texts that began with so much padding."""
        return self._of() is model and self._padding == padding

    @property
    def _before(self) -> list[Any]:
        """The layers that the empty cache had, which tell what there is but not what is in it."""
        layers: list[Any] = vars(self)["layers"]
        return layers

    def _leave(self) -> None:
        steps, read = self._steps, self._read
        del self._steps, self._read, self._padding, self._of
        self.__class__ = DynamicCache
        self.layers = steps.to_cache(read).layers

    @property
    def layers(self) -> Any:
        self._leave()
        return self.layers

    @layers.setter
    def layers(self, layers: Any) -> None:
        self._leave()
        self.layers = layers

    def __len__(self) -> int:
        return len(self._before)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._read

    def crop(self, tokens: int) -> None:
        """Below zero, of all versions of transformers', so many tokens less; what else there is depends on the version."""
        if 0 < -tokens < self._read - max(self._padding):
            self._steps.forget(-tokens)
            self._read += tokens
        elif tokens or not _ZERO_CROPS_NOTHING:
            self._leave()
            self.crop(tokens)

    def take(self, texts: list[list[int]], keep: int) -> list[torch.Tensor]:
        """Of each text the logits [keep, vocabulary] behind its next tokens, as many as of the others."""
        logits = self._steps.take(texts, keep)
        self._read += len(texts[0])
        return logits

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def is_sliding(self) -> list[bool]:
        return [layer.is_sliding for layer in self._before]

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._leave()  # a copy is an ordinary cache
        return self.__reduce_ex__(protocol)
