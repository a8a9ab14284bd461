"""Perplexity of a model on a text, and its distance from a reference model.

The text is cut into windows of `context` tokens that do not overlap; every token of a window but its first is scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qcore.kept_logits import KeptLogits
from qcore.refusal import Refusal, Refused

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 256
"""Positions whose distributions are held in float32 at once."""
_DRAWS = 2000
"""Of windows, for an interval."""


@dataclass(frozen=True)
class Evaluation:
    """losses: -ln p of each scored token, [tokens] float32. divergences: KL(reference || model) of each, in nats, and
    agreements: whether both find the same token likeliest; None without a reference. windows: scored tokens of each window."""

    losses: torch.Tensor
    divergences: torch.Tensor | None
    agreements: torch.Tensor | None
    windows: tuple[int, ...]

    def summary(self) -> dict[str, Any]:
        """perplexity and tokens; with a reference also kld_mean, kld_p99, kld_p999 and top1_agreement. NAME_ci95: the interval [low, high] that 95 of 100 such texts have a mean
        in, as far as windows of this one tell; where there are two at least."""
        result: dict[str, Any] = {
            "perplexity": math.exp(float(self.losses.double().mean())),
            "tokens": self.losses.numel(),
        }
        means = {"perplexity": self.losses, "kld_mean": self.divergences, "top1_agreement": self.agreements}
        for name, values in means.items():
            if values is not None and len(self.windows) > 1:
                low, high = self._interval(values)
                result[f"{name}_ci95"] = [math.exp(low), math.exp(high)] if name == "perplexity" else [low, high]
        if self.divergences is not None and self.agreements is not None:
            result["kld_mean"] = float(self.divergences.double().mean())
            for name, part in (("kld_p99", 0.99), ("kld_p999", 0.999)):
                result[name] = float(self.divergences.double().quantile(part))
            result["top1_agreement"] = float(self.agreements.double().mean())
        return result

    def _interval(self, values: torch.Tensor) -> tuple[float, float]:
        """Of the mean: a bootstrap over whole windows (Efron 1979), for tokens of one text go together."""
        sums = torch.stack([part.double().sum() for part in values.split(list(self.windows))])
        chosen = torch.randint(len(sums), (_DRAWS, len(sums)), generator=torch.Generator().manual_seed(0))
        means = sums[chosen].sum(1) / torch.tensor(self.windows)[chosen].sum(1)
        low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return low, high


def pareto_front(points: Iterable[tuple[float, float]]) -> list[bool]:
    """Of each point, whether none other is as low in both and lower in one; never where one is not finite."""
    known = list(points)
    finite = [math.isfinite(x) and math.isfinite(y) for x, y in known]
    lower = [any(x <= a and y <= b and (x, y) != (a, b) for x, y in known) for a, b in known]
    return [there and not beaten for there, beaten in zip(finite, lower, strict=True)]


@torch.no_grad()  # torch-xla refuses the tensors of inference mode
def evaluate(
    model: PreTrainedModel,
    tokens: list[int],
    *,
    reference: PreTrainedModel | KeptLogits | None = None,
    context: int = 512,
    keep: KeptLogits | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Scores `tokens`. keep: takes the model's logits, to be the reference of others on the same tokens in the same context.

    Raises Refused: bad-argument where there is nothing to score or the vocabularies differ, cannot-write where the disk is full.
    """
    if len(tokens) < 2 or context < 2:
        raise Refused(Refusal("bad-argument", "usage", "text", "there is nothing to score",
                              f"found {len(tokens)} tokens in windows of {context}, expected at least 2",
                              "Give a longer text."))  # fmt: skip
    if reference is not None and (size := _vocabulary(reference)) != model.config.vocab_size:
        sizes = f"found {model.config.vocab_size} and {size} tokens"
        raise Refused(Refusal("bad-argument", "usage", "reference", "the models have different vocabularies", sizes,
                              "Compare with the model that the checkpoint was made from."))  # fmt: skip
    if keep is not None:
        keep.vocabulary, keep.tokens = model.config.vocab_size, tokens
    losses, divergences, agreements = [], [], []
    windows: list[int] = []
    for start in range(0, len(tokens) - 1, context):
        window = torch.tensor([tokens[start : start + context]], device=model.device)
        if window.shape[1] < 2:
            break
        logits = _logits(model, window)
        if keep is not None:
            keep.add(logits, len(tokens) - start)
        others = None
        if reference is not None:
            kept = isinstance(reference, KeptLogits)
            others = reference.window(len(windows)) if kept else _logits(reference, window)
        for row in range(0, logits.shape[0], _ROWS):
            part = logits[row : row + _ROWS].float().log_softmax(-1)
            targets = window[0, 1:][row : row + _ROWS]
            losses.append(-part.gather(-1, targets[:, None])[:, 0].cpu())
            if others is not None:
                true = others[row : row + _ROWS].to(part.device).float().log_softmax(-1)
                divergences.append((true.exp() * (true - part)).sum(-1).clamp(min=0).cpu())
                agreements.append((true.argmax(-1) == part.argmax(-1)).cpu())
        windows.append(logits.shape[0])
        if progress is not None:
            progress(start + window.shape[1], len(tokens))
    compared = reference is not None
    return Evaluation(
        torch.cat(losses),
        torch.cat(divergences) if compared else None,
        torch.cat(agreements) if compared else None,
        tuple(windows),
    )


def _logits(model: Any, window: torch.Tensor) -> torch.Tensor:
    """[tokens - 1, vocabulary]: of all tokens but the last, which has none to foretell."""
    logits: torch.Tensor = model(input_ids=window, use_cache=False).logits[0, :-1]
    return logits


def _vocabulary(reference: PreTrainedModel | KeptLogits) -> Any:
    return reference.vocabulary if isinstance(reference, KeptLogits) else reference.config.vocab_size
