"""load_tokenizer: the tokenizer of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qcore.checkpoint.open import open_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint at `path`, with its chat template if it has one. Raises Refused."""
    return open_checkpoint(path).load_tokenizer()
