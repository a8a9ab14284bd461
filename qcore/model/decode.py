"""Reading a text: by a plugin's decoder once it is trusted, else by the model itself."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from qcore.model.cache_name import CACHE
from qcore.model.trial import Trial, logits_of, read_by_layers, trial_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qcore.decoder import TokenSteps


class Stepper:
    """One text: its prompt, then token after token."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.arguments = last_only(model)
        self.cache: Any = None
        self.trial: Trial | None = None
        self.steps: TokenSteps | None = None

    @property
    def decoder(self) -> str:
        """The name of the decoder that reads the text; empty where the model does."""
        return self.trial.name if self.trial is not None and self.steps is not None else ""

    def prompt(self, tokens: list[int]) -> torch.Tensor:
        """The logits [vocabulary] behind the first tokens, float32 on the CPU."""
        self.trial = trial_of(self.model)
        begun = self.trial.begin(self.model, [tokens], 1)
        if begun is None:
            return self._by_model(tokens)
        self.steps, (logits,) = begun
        return logits[-1]

    def step(self, token: int) -> torch.Tensor:
        """The same behind one more."""
        return self._by_model([token]) if self.steps is None else self.steps.take([[token]])[0][-1]

    def _by_model(self, tokens: list[int]) -> torch.Tensor:
        out = read_by_layers(self.model, torch.tensor([tokens], device=self.model.device), self.cache, **self.arguments)
        self.cache = getattr(out, CACHE)
        return logits_of(out)[-1]


def last_only(model: PreTrainedModel) -> dict[str, int]:
    """Arguments that ask for the last position's logits alone, where the model's forward can (transformers 4.55 and later can)."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
