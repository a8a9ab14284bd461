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

    from qcore.decoder import TokenDecoder

log = logging.getLogger("qcore")

_BOUNDS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""How far logits may be off, relative to their root mean square about their mean: a whole model's rounding in its type."""

_DECODERS: WeakKeyDictionary[torch.nn.Module, _Trial] = WeakKeyDictionary()


class _Trial:
    """A model's decoder, and whether it was seen to be right."""

    def __init__(self, name: str, decoder: TokenDecoder | None) -> None:
        self.name, self.decoder, self.trusted = name, decoder, False


class Stepper:
    """One text's steps. Made once the prompt is in `cache`, a cache of transformers' with `length` tokens."""

    def __init__(self, model: PreTrainedModel, cache: Any, length: int, arguments: dict[str, Any]) -> None:
        self.model, self.cache, self.arguments = model, cache, arguments
        self.trial = _trial(model)
        if self.trial.decoder is not None:
            try:
                self.trial.decoder.begin(cache, length)
            except Refused as refused:
                log.info("%s is not used: %s", self.trial.name, refused)
                self.trial = _Trial("", None)

    @property
    def decoder(self) -> str:
        """The name of the decoder that takes the steps; empty where the model does."""
        return self.trial.name if self.trial.decoder is not None and self.trial.trusted else ""

    def step(self, token: int) -> torch.Tensor:
        """The logits [vocabulary] behind the token, float32 on the CPU."""
        trial = self.trial
        if trial.decoder is None:
            return self._by_model(token)
        if trial.trusted:
            return trial.decoder.step(token)
        with trial.decoder.exact():
            expected = self._by_model(token)
            got = trial.decoder.step(token)
        size = (expected - expected.mean()).square().mean().sqrt()
        error = float((got - expected).square().mean().sqrt() / size)
        trial.trusted = error <= _BOUNDS.get(self.model.dtype, 0.0)
        if not trial.trusted:
            trial.decoder = None
            log.warning("decoder %s does not give this model's logits (error %.3g) and is not used", trial.name, error)
        return expected

    def _by_model(self, token: int) -> torch.Tensor:
        tokens = torch.tensor([[token]], device=self.model.device)
        out = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, **self.arguments)
        self.cache = out.past_key_values
        logits: torch.Tensor = out.logits[0, -1].float().cpu()
        return logits


def _trial(model: PreTrainedModel) -> _Trial:
    found = _DECODERS.get(model)
    if found is None:
        found = _DECODERS[model] = _first(model)
    return found


def _first(model: PreTrainedModel) -> _Trial:
    """The first decoder that knows the model."""
    for row in registry().decoders:
        if row.device != model.device.type:
            continue
        try:
            return _Trial(row.name, row.load().from_model(model))
        except Refused as refused:
            log.info("%s is not used: %s", row.name, refused)
        except Exception as fault:  # a plugin's fault is to harm nobody
            log.warning("decoder %s failed: %s: %s", row.name, type(fault).__name__, fault)
    return _Trial("", None)
