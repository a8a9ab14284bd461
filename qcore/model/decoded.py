"""A model whose own forward, and so transformers' `generate`, is taken by a plugin's decoder wherever the decoder gives the same.

A text is begun with an empty cache, or none, and goes on with the cache that came out. Whatever a decoder does not do is left to the layers: several
texts at once, masks with gaps, positions of one's own, hidden states and attentions, gradients, hooks, adapters. A text may change over in the
middle: its cache becomes an ordinary one as soon as anybody looks into it.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from qcore.model.trial import begin_text, is_unchanged, output_of, wants_layers

if TYPE_CHECKING:
    from qcore.decoder import TokenSteps

_KNOWN = {"input_ids", "attention_mask", "position_ids", "cache_position"}
_KNOWN |= {"past_key_values", "use_cache", "logits_to_keep", "return_dict"}
"""Arguments that a decoder's answer takes into account; of others only those that ask for nothing are allowed."""


_ZERO_CROPS_NOTHING = "tokens_to_remove" in inspect.signature(DynamicCache.crop).parameters
"""Else the argument of `crop` is the length that is left."""


class TextCache(DynamicCache):  # type: ignore[misc]
    """The cache of a text that a decoder reads. It is made of an empty DynamicCache, in place, because callers go on with the object that they gave;
    and it is one again, with keys and values, once its layers are asked for."""

    _steps: TokenSteps
    _read: int
    _of: weakref.ref[PreTrainedModel]

    @classmethod
    def adopt(cls, cache: Any, model: PreTrainedModel, steps: TokenSteps, read: int) -> TextCache:
        cache.__class__ = cls
        cache._steps, cache._read, cache._of = steps, read, weakref.ref(model)
        adopted: TextCache = cache
        return adopted

    def is_of(self, model: PreTrainedModel) -> bool:
        return self._of() is model

    @property
    def _before(self) -> list[Any]:
        """The layers that the empty cache had, which tell what there is but not what is in it."""
        layers: list[Any] = vars(self)["layers"]
        return layers

    def _leave(self) -> None:
        steps = self._steps
        del self._steps, self._read, self._of
        self.__class__ = DynamicCache
        self.layers = steps.to_cache().layers

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
        if 0 < -tokens < self._read:
            self._steps.forget(-tokens)
            self._read += tokens
        elif tokens or not _ZERO_CROPS_NOTHING:
            self._leave()
            self.crop(tokens)

    def take(self, tokens: list[int], keep: int) -> torch.Tensor:
        """As TokenSteps.take."""
        logits = self._steps.take(tokens, keep)
        self._read += len(tokens)
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


def read_by_decoder(model: PreTrainedModel) -> None:
    """From now on the model's forward is a decoder's where it can be."""
    model.__class__ = _decoded(type(model))  # type: ignore[arg-type]


@functools.cache
def _decoded(base: Any) -> type[Any]:
    """The class, under its own name, with another forward."""
    parameters = list(inspect.signature(base.forward).parameters.values())[1:]
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]

    @functools.wraps(base.forward)
    def forward(self: PreTrainedModel, *args: Any, **given: Any) -> Any:
        placed = dict(zip(names, args, strict=False))
        wrong = len(placed) < len(args) or placed.keys() & given.keys()  # which the layers' forward says
        answer = None if wrong else _answer(self, placed | given)
        return base.forward(self, *args, **given) if answer is None else answer

    def reduce(self: PreTrainedModel, protocol: Any) -> Any:
        return _restored, (base,), vars(self)

    named = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, (base,), named | {"forward": forward, "__reduce_ex__": reduce})


def _restored(base: type[PreTrainedModel]) -> Any:
    made: Any = _decoded(base)  # type: ignore[arg-type]
    return made.__new__(made)


def _answer(model: PreTrainedModel, given: dict[str, Any]) -> Any:
    """The decoder's answer to a call of forward; None where the layers have to give it."""
    tokens, cache = given.get("input_ids"), given.get("past_key_values")
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if wants_layers() or traced or model.training or torch.is_autocast_enabled(model.device.type):
        return None
    if type(tokens) is not torch.Tensor or tokens.dim() != 2 or tokens.shape[0] != 1 or not tokens.shape[1]:
        return None
    if tokens.device != model.device:
        return None
    config, count = model.config, tokens.shape[1]
    past = cache.get_seq_length() if isinstance(cache, TextCache) else 0
    keep = given.get("logits_to_keep", 0)
    if not isinstance(keep, int) or keep < 0 or not _plain(given, config) or not _in_order(given, past, count):
        return None
    keep, taken = min(keep, count) if keep else count, tokens[0].tolist()
    if min(taken) < 0 or max(taken) >= model.get_input_embeddings().num_embeddings:
        return None  # the layers say so
    if isinstance(cache, TextCache):
        looked_at = count > 1  # a small model's step takes as long as looking
        if not cache.is_of(model) or (looked_at and not is_unchanged(model)):
            return None
        logits = cache.take(taken, keep)
    else:
        if cache is not None and not _is_fresh(cache):
            return None
        begun = begin_text(model, taken, keep)
        if begun is None:
            return None
        steps, logits = begun
        kept = given.get("use_cache")
        if cache is None and (config.use_cache if kept is None else kept):
            cache = DynamicCache(config=config)
        if cache is not None:
            cache = TextCache.adopt(cache, model, steps, count)
    return output_of(model)(logits=logits.to(model.dtype)[None], past_key_values=cache)


def _plain(given: dict[str, Any], config: Any) -> bool:
    """Whether nothing is asked for but logits and a cache."""
    others = (value for name, value in given.items() if name not in _KNOWN)
    if any(value is not None and value is not False for value in others):
        return False
    tuples = given.get("return_dict") is False or config.return_dict is False
    named = ("output_hidden_states", "output_attentions", "output_router_logits")
    return not (tuples or any(getattr(config, name, False) for name in named))


def _in_order(given: dict[str, Any], past: int, count: int) -> bool:
    """Whether the tokens are those that follow the ones before, all of which are looked at."""
    mask = given.get("attention_mask")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.shape == (1, past + count) and mask.all()):
        return False
    places = torch.arange(past, past + count, device=given["input_ids"].device)
    wanted = ((given.get("position_ids"), places[None]), (given.get("cache_position"), places))
    return all(
        one is None or (one.shape == expected.shape and bool((one == expected).all())) for one, expected in wanted
    )


def _is_fresh(cache: Any) -> bool:
    """Whether it is a DynamicCache with nothing in it and nothing asked of it."""
    if type(cache) is not DynamicCache or "layers" not in vars(cache) or cache.get_seq_length():
        return False
    asked = getattr(cache, "offloading", False) or any(getattr(layer, "record_past", False) for layer in cache.layers)
    return not asked
