"""How `qcore eval` loads and scores, for all checkpoints of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcore.cli.output import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qcore.checkpoint.open import Checkpoint
    from qcore.evaluation import Evaluation
    from qcore.kept_logits import KeptLogits
    from qcore.platform import Device


@dataclass(frozen=True)
class Loading:
    """What models are computed on and in. dtype, activations: as the options have them."""

    device: Device
    dtype: str
    activations: str

    def load(self, checkpoint: Checkpoint) -> PreTrainedModel:
        """Raises Refused."""
        from qcore.model.devices import wanted_dtype
        from qcore.model.load import load_model

        computed = wanted_dtype(self.dtype, self.device, checkpoint)
        with progress_bar(f"loading {checkpoint.path.name}") as progress:
            return load_model(checkpoint, self.device, computed, activations=self.activations, progress=progress)


@dataclass(frozen=True)
class Scoring(Loading):
    """And what they are scored on. words: the text. context, max_tokens: in tokens."""

    words: str
    context: int
    max_tokens: int | None

    def tokens(self, checkpoint: Checkpoint) -> list[int]:
        """The text in the checkpoint's own. Raises Refused."""
        return list(checkpoint.load_tokenizer()(self.words)["input_ids"])[: self.max_tokens]

    def score(
        self,
        model: PreTrainedModel,
        tokens: list[int],
        reference: PreTrainedModel | KeptLogits | None = None,
        keep: KeptLogits | None = None,
    ) -> Evaluation:
        """Raises Refused."""
        from qcore.evaluation import evaluate

        with progress_bar("scoring") as progress:
            step = (lambda done, total: progress("", done, total)) if progress else None
            return evaluate(model, tokens, reference=reference, context=self.context, keep=keep, progress=step)
