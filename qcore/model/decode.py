"""The step from one token to the next: by a plugin's decoder once its first answer was the model's, else by the model itself."""

from __future__ import annotations

import logging
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
"""How far logits may be off, relative to their root mean square about their mean: a whole model's rounding in its type."""

_DECODERS: WeakKeyDictionary[torch.nn.Module, _Trial] = WeakKeyDictionary()


class _Trial:
    """A model's decoder, and whether it was seen to be right. place: what the model was when it was made."""

    def __init__(self, name: str, decoder: TokenDecoder | None, place: tuple[str, torch.dtype]) -> None:
        self.name, self.decoder, self.place, self.trusted = name, decoder, place, False


class Stepper:
    """One text's steps. Made once the prompt is in `cache`, a cache of transformers' with `length` tokens."""

    def __init__(self, model: PreTrainedModel, cache: Any, length: int, arguments: dict[str, Any]) -> None:
        self.model, self.cache, self.length, self.arguments = model, cache, length, arguments
        self.trial: _Trial | None = None
        self.steps: TokenSteps | None = None

    @property
    def decoder(self) -> str:
        """The name of the decoder that takes the steps; empty where the model does."""
        return self.trial.name if self.trial is not None and self.steps is not None else ""

    def step(self, token: int) -> torch.Tensor:
        """The logits [vocabulary] behind the token, float32 on the CPU."""
        if self.trial is None:
            self.trial = _trial(self.model)
            self.steps = self._begun(self.trial)
            if self.steps is not None and not self.trial.trusted:
                return self._tried(self.trial, self.steps, token)
        return self._by_model(token) if self.steps is None else self.steps.step(token)

    def _begun(self, trial: _Trial) -> TokenSteps | None:
        if trial.decoder is None:
            return None
        try:
            return trial.decoder.begin(self.cache, self.length)
        except Refused as refused:
            log.info("%s is not used: %s", trial.name, refused)
            return None

    def _tried(self, trial: _Trial, steps: TokenSteps, token: int) -> torch.Tensor:
        """The decoder's first step of all, beside the model's."""
        assert trial.decoder is not None
        with trial.decoder.exact():
            expected = self._by_model(token)
            got = steps.step(token)
        size = (expected - expected.mean()).square().mean().sqrt()
        error = float((got - expected).square().mean().sqrt() / size)
        trial.trusted = error <= _BOUNDS.get(self.model.dtype, 0.0)
        if not trial.trusted:
            trial.decoder = self.steps = None
            log.warning("decoder %s does not give this model's logits (error %.3g) and is not used", trial.name, error)
        return expected

    def _by_model(self, token: int) -> torch.Tensor:
        tokens = torch.tensor([[token]], device=self.model.device)
        out = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, **self.arguments)
        self.cache = out.past_key_values
        logits: torch.Tensor = out.logits[0, -1].float().cpu()
        return logits


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
