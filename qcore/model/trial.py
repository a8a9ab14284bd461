"""Whether a plugin's decoder is right about a model: what it makes of some tokens is held against the model's layers before it is trusted."""

from __future__ import annotations

import logging
import math
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from qcore.discovery import registry
from qcore.model.cache_name import CACHE
from qcore.model.state import is_altered, state_of
from qcore.refusal import Refused

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from qcore.decoder import TokenDecoder, TokenSteps

log = logging.getLogger("qcore")

_BY_LAYERS: ContextVar[bool] = ContextVar("by_layers", default=False)

_BOUNDS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""How far logits may be off at least (`_distance`): a whole model's rounding in its type."""

_NOISIEST = 4
"""Times that, at most, where the model is as far from itself: logits that have nothing to do with each other are 1.4 apart."""

_SAMPLE = 16
"""Tokens that a decoder reads beside the model before it is trusted."""
_STRIDE = 7919
"""Between the tokens of another sample: a prime, so that none is met twice and few are of a kind."""

_DECODERS: WeakKeyDictionary[torch.nn.Module, Trial] = WeakKeyDictionary()


class Trial:
    """A model's decoder, and whether it was seen to be right. state: what the model was when it was made (`state_of`). output: the class of the
    model's answers."""

    def __init__(self, model: PreTrainedModel, name: str = "", decoder: TokenDecoder | None = None) -> None:
        self.name, self.decoder, self.trusted = name, decoder, False
        self.state = state_of(model)
        self.held = [part for part in (*model.modules(), *model.parameters(), *model.buffers()) if part is not model]
        """Which keeps others from being taken for them."""
        self.output: Any = None

    def begin(
        self, model: PreTrainedModel, texts: list[list[int]], keep: int
    ) -> tuple[TokenSteps, list[torch.Tensor]] | None:
        """Texts, and of each the logits [at most keep, vocabulary] behind its first tokens; None where there is no decoder that can be trusted."""
        if self.decoder is None:
            return None
        if not self.trusted:
            tried = self._tried(model, self.decoder, texts[0], keep)
            if tried is None or len(texts) == 1:
                return tried
        steps = self.decoder.begin(len(texts))
        return steps, steps.take(texts, keep)

    def _tried(
        self, model: PreTrainedModel, decoder: TokenDecoder, tokens: list[int], keep: int
    ) -> tuple[TokenSteps, list[torch.Tensor]] | None:
        """The decoder's first text of all. What it makes of some tokens is held against the model's answers, at the beginning of a text and
        once more behind these tokens, for which the model gets the decoder's keys and values: a part that matters only far into a
        text shows there. Some texts no two narrow computations agree on (in SmolLM2's bfloat16 layers, the tokens that training never met come out
        a third off); there, other tokens decide."""
        vocabulary = model.get_input_embeddings().num_embeddings
        samples = (tokens * _SAMPLE)[:_SAMPLE], [_STRIDE * (place + 1) % vocabulary for place in range(_SAMPLE)]
        with decoder.exact():
            excess = self._least_excess(model, decoder.begin(), samples)
        steps = decoder.begin()
        logits = steps.take([tokens], keep)
        with decoder.exact():
            excess = max(excess, self._least_excess(model, steps, samples))
        self.state = state_of(model)  # looking at it has changed nothing but counts of changes
        if excess <= 1:
            self.trusted = True
            return steps, logits
        self.decoder = None
        log.warning(
            "decoder %s does not give this model's logits (%.3g times the error allowed) and is not used",
            self.name,
            excess,
        )
        return None

    def _least_excess(self, model: PreTrainedModel, steps: TokenSteps, samples: tuple[list[int], ...]) -> float:
        """That of the first sample that is within bounds, or the least."""
        least = math.inf
        for sample in samples:
            least = min(least, self._excess(model, steps, sample))
            if least <= 1:
                break
        return least

    def _excess(self, model: PreTrainedModel, steps: TokenSteps, tokens: list[int]) -> float:
        """How far the decoder's logits are from the model's, in parts of what they may be: `_BOUNDS`, or three times as far as the model is
        from itself where it reads the same tokens in two calls, up to `_NOISIEST`. The steps are left as they were."""
        given, half = torch.tensor([tokens], device=model.device), len(tokens) // 2
        bound = _BOUNDS.get(model.dtype, 0.0)
        out = read_by_layers(model, given, steps.to_cache())
        self.output, expected = type(out), logits_of(out)
        error = _distance(steps.take([tokens], len(tokens))[0], expected)
        steps.forget(len(tokens))
        if not error <= bound:  # only then is the model's own noise worth the time
            cache = getattr(read_by_layers(model, given[:, :half], steps.to_cache()), CACHE)
            noise = _distance(logits_of(read_by_layers(model, given[:, half:], cache)), expected[half:])
            bound = max(bound, min(3 * noise, _NOISIEST * bound))
        found = error / bound if bound else math.inf
        return found if math.isfinite(found) else math.inf


def begin_texts(
    model: PreTrainedModel, texts: list[list[int]], keep: int
) -> tuple[TokenSteps, list[torch.Tensor]] | None:
    """As Trial.begin, of the model's decoder."""
    return trial_of(model).begin(model, texts, keep)


def is_unchanged(model: PreTrainedModel) -> bool:
    """Whether the model is still what its decoder was made for."""
    found = _DECODERS.get(model)
    return found is not None and found.state == state_of(model)


def output_of(model: PreTrainedModel) -> Any:
    """The class of the model's answers, once a text has begun."""
    return _DECODERS[model].output


@contextmanager
def by_layers() -> Iterator[None]:
    """Inside of it, models are what their layers make of them."""
    before = _BY_LAYERS.set(True)
    try:
        yield
    finally:
        _BY_LAYERS.reset(before)


def wants_layers() -> bool:
    """Whether this is inside of `by_layers`."""
    return _BY_LAYERS.get()


def read_by_layers(model: PreTrainedModel, tokens: torch.Tensor, cache: Any, **arguments: int) -> Any:
    """The answer of the model's layers."""
    with by_layers():
        return model(input_ids=tokens, use_cache=True, **{CACHE: cache}, **arguments)


def logits_of(out: Any) -> torch.Tensor:
    """float32 [tokens, vocabulary], on the CPU."""
    logits: torch.Tensor = out.logits[0].float().cpu()
    return logits


def trial_of(model: PreTrainedModel) -> Trial:
    """The model's decoder; another one once the model is not what it was."""
    found = _DECODERS.get(model)
    if found is None or found.state != state_of(model):
        found = _DECODERS[model] = _first(model)
    return found


def _first(model: PreTrainedModel) -> Trial:
    """The first decoder that knows the model."""
    if is_altered(model):
        return Trial(model)
    for row in registry().decoders:
        if row.device != model.device.type:
            continue
        try:
            return Trial(model, row.name, row.load().from_model(model))
        except Refused as refused:
            log.info("%s is not used: %s", row.name, refused)
        except Exception as fault:  # a plugin's fault is to harm nobody
            log.warning("decoder %s failed: %s: %s", row.name, type(fault).__name__, fault)
    return Trial(model)


def _distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the errors, relative to that of the logits about their mean, in the median of the tokens."""
    rows = zip(logits, expected, strict=True)  # one by one: all tokens' logits are much memory
    squares = [(one - other).square().mean() / other.var(correction=0) for one, other in rows]
    return float(torch.stack(squares).sqrt().median())
