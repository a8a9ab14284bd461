"""A calibration text as windows of tokens."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from qcore.refusal import Refusal, Refused

if TYPE_CHECKING:
    from qcore.checkpoint.open import Checkpoint

log = logging.getLogger("qcore")


def windows_of(checkpoint: Checkpoint, text: str, samples: int, length: int) -> torch.Tensor:
    """int64 [at most samples, length]: windows that do not overlap, spread evenly over the text where it has more. A text that is shorter than one is one.

    Raises Refused (bad-argument) where there are fewer than two tokens, or no samples are asked for.
    """
    if samples < 1 or length < 2:
        raise Refused(Refusal("bad-argument", "usage", "calibration", "there is nothing to calibrate with",
                              f"found {samples} samples of {length} tokens, expected at least 1 of 2", "Ask for more."))  # fmt: skip
    tokens = torch.tensor(list(checkpoint.load_tokenizer()(text)["input_ids"]), dtype=torch.int64)
    if len(tokens) < 2:
        raise Refused(Refusal("bad-argument", "usage", "calibration", "the text is too short to calibrate with",
                              f"found {len(tokens)} tokens, expected at least 2", "Give a text like those that the model will read; 100,000 words do well."))  # fmt: skip
    length = min(length, len(tokens))
    found = tokens[: len(tokens) // length * length].view(-1, length)
    if len(found) < samples:
        log.warning("the calibration text has %d tokens: %d of %d samples of %d tokens", len(tokens), len(found), samples, length)  # fmt: skip
        return found
    return found[torch.arange(samples) * len(found) // samples]
