"""Reading a text: by a plugin's decoder once its first answers were the model's, else by the model itself."""

from __future__ import annotations

import inspect
import logging
import math
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from qcore.discovery import registry
from qcore.refusal import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qcore.decoder import TokenDecoder, TokenSteps

log = logging.getLogger("qcore")

_BOUNDS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""How far logits may be off at least (`_distance`): a whole model's rounding in its type."""

_NOISIEST = 4
"""Times that, at most, where the model is as far from itself: logits that have nothing to do with each other are 1.4 apart."""

_SAMPLE = 16
"""Tokens that a decoder reads beside the model before it is trusted."""

_DECODERS: WeakKeyDictionary[torch.nn.Module, _Trial] = WeakKeyDictionary()


class _Trial:
    """A model's decoder, and whether it was seen to be right. place: what the model was when it was made."""

    def __init__(self, name: str, decoder: TokenDecoder | None, place: tuple[str, torch.dtype]) -> None:
        self.name, self.decoder, self.place, self.trusted = name, decoder, place, False


class Stepper:
    """One text: its prompt, then token after token."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.arguments = last_only(model)
        self.cache: Any = None
        self.trial: _Trial | None = None
        self.steps: TokenSteps | None = None

    @property
    def decoder(self) -> str:
        """The name of the decoder that reads the text; empty where the model does."""
        return self.trial.name if self.trial is not None and self.steps is not None else ""

    def prompt(self, tokens: list[int]) -> torch.Tensor:
        """The logits [vocabulary] behind the first tokens, float32 on the CPU."""
        self.trial = _trial(self.model)
        if self.trial.decoder is None:
            return self._by_model(tokens)
        if not self.trial.trusted:
            return self._tried(self.trial, self.trial.decoder, tokens)
        self.steps = self.trial.decoder.begin()
        return self.steps.take(tokens)[-1]

    def step(self, token: int) -> torch.Tensor:
        """The same behind one more."""
        return self._by_model([token]) if self.steps is None else self.steps.take([token])[-1]

    def _tried(self, trial: _Trial, decoder: TokenDecoder, tokens: list[int]) -> torch.Tensor:
        """The decoder's first prompt of all. What it makes of some tokens is held against the model's answers, at the beginning of a text and
        once more behind the prompt, for which the model gets the decoder's keys and values: a part that matters only far into a
        text shows there."""
        sample = (tokens * _SAMPLE)[:_SAMPLE]
        with decoder.exact():
            excess = self._excess(decoder.begin(), sample)
        steps = decoder.begin()
        logits = steps.take(tokens)[-1]
        with decoder.exact():
            excess = max(excess, self._excess(steps, sample))
        trial.trusted = excess <= 1
        if trial.trusted:
            self.steps = steps
            return logits
        trial.decoder = None
        log.warning(
            "decoder %s does not give this model's logits (%.3g times the error allowed) and is not used",
            trial.name,
            excess,
        )
        return self._by_model(tokens)

    def _excess(self, steps: TokenSteps, tokens: list[int]) -> float:
        """How far the decoder's logits are from the model's, in parts of what they may be: `_BOUNDS`, or three times as far as the model is
        from itself where it reads the same tokens in two calls, up to `_NOISIEST`. The steps are left as they were."""
        given, half = torch.tensor([tokens], device=self.model.device), len(tokens) // 2
        bound = _BOUNDS.get(self.model.dtype, 0.0)
        expected = self._read(given, steps.to_cache())[0]
        error = _distance(steps.take(tokens, len(tokens)), expected)
        steps.forget(len(tokens))
        if not error <= bound:  # only then is the model's own noise worth the time
            _, cache = self._read(given[:, :half], steps.to_cache())
            noise = _distance(self._read(given[:, half:], cache)[0], expected[half:])
            bound = max(bound, min(3 * noise, _NOISIEST * bound))
        found = error / bound if bound else math.inf
        return found if math.isfinite(found) else math.inf

    def _read(self, tokens: torch.Tensor, cache: Any, **arguments: int) -> tuple[torch.Tensor, Any]:
        """The model's logits [tokens, vocabulary], and the cache behind them."""
        out = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, **arguments)
        return out.logits[0].float().cpu(), out.past_key_values

    def _by_model(self, tokens: list[int]) -> torch.Tensor:
        logits, self.cache = self._read(torch.tensor([tokens], device=self.model.device), self.cache, **self.arguments)
        return logits[-1]


def _distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the errors, relative to that of the logits about their mean, in the median of the tokens."""
    return float(((logits - expected).square().mean(-1) / expected.var(-1, correction=0)).sqrt().median())


def last_only(model: PreTrainedModel) -> dict[str, int]:
    """Arguments that ask for the last position's logits alone, where the model's forward can (transformers 4.55 and later can)."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _trial(model: PreTrainedModel) -> _Trial:
    """The model's decoder; another one once the model is on another device or in another type."""
    found, place = _DECODERS.get(model), (model.device.type, model.dtype)
    if found is None or found.place != place:
        found = _DECODERS[model] = _first(model, place)
    return found


def _first(model: PreTrainedModel, place: tuple[str, torch.dtype]) -> _Trial:
    """The first decoder that knows the model."""
    for row in registry().decoders:
        if row.device != place[0]:
            continue
        try:
            return _Trial(row.name, row.load().from_model(model), place)
        except Refused as refused:
            log.info("%s is not used: %s", row.name, refused)
        except Exception as fault:  # a plugin's fault is to harm nobody
            log.warning("decoder %s failed: %s: %s", row.name, type(fault).__name__, fault)
    return _Trial("", None, place)
