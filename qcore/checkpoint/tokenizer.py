"""The tokenizer whose files lie beside a checkpoint's weights, by way of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qcore.refusal import bad_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_from_folder(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer whose files lie in `folder`; code from the checkpoint is never run."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise bad_file("not-a-checkpoint", "the folder holds no tokenizer", file=folder, expected="tokenizer.json",
                       fix="Copy tokenizer.json and tokenizer_config.json from the original model.")  # fmt: skip
    tokenizer: PreTrainedTokenizerBase
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        except ValueError:  # a class that this transformers does not know; tokenizer.json describes it all the same
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise bad_file("bad-field", "the tokenizer cannot be read", file=folder, field="tokenizer.json",
                       found=f"{type(error).__name__}: {error}") from error  # fmt: skip
    return tokenizer
