"""A model whose own forward, and so transformers' `generate`, is taken by a plugin's decoder wherever the decoder gives the same.

Texts are begun with an empty cache, or none, and go on with the cache that came out. Whatever a decoder does not do is left to the layers: masks with
gaps, positions of one's own, hidden states and attentions, gradients, hooks, adapters. Texts may change over in the middle: their cache becomes
an ordinary one as soon as anybody looks into it.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from qcore.model.cache_name import CACHE, OLD
from qcore.model.text_cache import TextCache
from qcore.model.trial import begin_texts, is_unchanged, output_of, wants_layers

_KNOWN = {"input_ids", "attention_mask", "position_ids", "cache_position"}
_KNOWN |= {CACHE, OLD, "use_cache", "logits_to_keep", "return_dict"}
"""Arguments that a decoder's answer takes into account; of others only those that ask for nothing are allowed."""


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
    tokens, cache = given.get("input_ids"), given.get(CACHE, given.get(OLD))
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if wants_layers() or traced or model.training or torch.is_autocast_enabled(model.device.type):
        return None
    if type(tokens) is not torch.Tensor or tokens.dim() != 2 or not tokens.numel() or tokens.device != model.device:
        return None
    config, count = model.config, tokens.shape[1]
    past = cache.get_seq_length() if isinstance(cache, TextCache) else 0
    keep = given.get("logits_to_keep", 0)
    if not isinstance(keep, int) or keep < 0 or not _plain(given, config):
        return None
    padding, keep = _padding(given, past), min(keep, count) if keep else count
    if padding is None or int(tokens.min()) < 0 or int(tokens.max()) >= model.get_input_embeddings().num_embeddings:
        return None  # of a token that there is not, the layers say so
    texts: list[list[int]] = tokens.tolist()
    if isinstance(cache, TextCache):
        looked_at = count > 1  # a small model's step takes as long as looking
        if not cache.goes_on(model, padding) or (looked_at and not is_unchanged(model)):
            return None
        logits = cache.take(texts, keep)
    else:
        if cache is not None and not _is_fresh(cache):
            return None
        begun = begin_texts(model, [text[first:] for text, first in zip(texts, padding, strict=True)], keep)
        if begun is None:
            return None
        steps, logits = begun
        kept = given.get("use_cache")
        if cache is None and (config.use_cache if kept is None else kept):
            cache = DynamicCache(config=config)
        if cache is not None:
            cache = TextCache.adopt(cache, model, steps, count, padding)
    return output_of(model)(logits=_stacked(logits, keep).to(model.dtype), **{CACHE: cache})


def _stacked(logits: list[torch.Tensor], keep: int) -> torch.Tensor:
    """[texts, keep, vocabulary]; zeros where a text has no token."""
    if len(logits) == 1 and len(logits[0]) == keep:
        return logits[0][None]
    return torch.stack([torch.nn.functional.pad(rows, (0, 0, keep - len(rows), 0)) for rows in logits])


def _plain(given: dict[str, Any], config: Any) -> bool:
    """Whether nothing is asked for but logits and a cache."""
    others = (value for name, value in given.items() if name not in _KNOWN)
    if any(value is not None and value is not False for value in others):
        return False
    tuples = given.get("return_dict") is False or config.return_dict is False
    named = ("output_hidden_states", "output_attentions", "output_router_logits")
    return not (tuples or any(getattr(config, name, False) for name in named))


def _padding(given: dict[str, Any], past: int) -> list[int] | None:
    """How many tokens in front of each text only fill it up; None unless the others follow those before, all of which are looked at."""
    mask, (texts, count) = given.get("attention_mask"), given["input_ids"].shape
    padding = torch.zeros(texts, dtype=torch.int64)
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.shape != (texts, past + count):
            return None
        if not mask.all():
            seen = mask != 0
            if not seen[:, -1].all() or not (seen[:, 1:] >= seen[:, :-1]).all():
                return None
            padding = (~seen).sum(1)
            if given.get("position_ids") is None:
                return None  # the layers count the padding, too
    places = torch.arange(past, past + count, device=given["input_ids"].device)
    positions, own = given.get("position_ids"), places[None] - padding[:, None]
    if positions is not None:
        if positions.shape != own.shape and (positions.shape != places[None].shape or padding.any()):
            return None
        if not ((positions == own) | (own < 0)).all():
            return None
    wanted = given.get("cache_position")
    if wanted is not None and not torch.equal(wanted, places):
        return None
    found: list[int] = padding.tolist()
    return found


def _is_fresh(cache: Any) -> bool:
    """Whether it is a DynamicCache with nothing in it and nothing asked of it."""
    if type(cache) is not DynamicCache or "layers" not in vars(cache) or cache.get_seq_length():
        return False
    asked = getattr(cache, "offloading", False) or any(getattr(layer, "record_past", False) for layer in cache.layers)
    return not asked
