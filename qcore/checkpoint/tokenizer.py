"""The tokenizer whose files lie beside a checkpoint's weights, by way of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qcore.checkpoint import limits
from qcore.checkpoint.json_file import check_json, check_size
from qcore.refusal import bad_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
         "chat_template.json")  # fmt: skip
_OTHERS = ("tokenizer.model", "vocab.txt", "merges.txt", "chat_template.jinja")
_ENOUGH = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""Files one of which a tokenizer has."""


def tokenizer_from_folder(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer whose files lie in `folder`; code from the checkpoint is never run, and nothing is downloaded.

    Raises Refused: not-a-checkpoint, bad-field; limit-exceeded and bad-json before other libraries parse the files.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not any((folder / name).is_file() for name in _ENOUGH):
        raise bad_file("not-a-checkpoint", "the folder holds no tokenizer", file=folder, expected="tokenizer.json",
                       fix="Copy tokenizer.json and tokenizer_config.json from the original model.")  # fmt: skip
    for name in (*_JSON, *_OTHERS):
        if (file := folder / name).is_file():
            check_size(file, file.stat().st_size, limits.TOKENIZER_FILE)
            if name in _JSON:
                check_json(file, max_bytes=limits.TOKENIZER_FILE)
    tokenizer: PreTrainedTokenizerBase
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        except ValueError:  # a class that this transformers does not know; tokenizer.json describes it all the same
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except BaseException as error:
        if not is_fault(error):
            raise
        raise bad_file("bad-field", "the tokenizer cannot be read", file=folder, field="tokenizer.json",
                       found=f"{type(error).__name__}: {error}") from error  # fmt: skip
    return tokenizer


def is_fault(error: BaseException) -> bool:
    """Whether it comes of what a tokenizer was given: tokenizers raises bare Exception, and panics, which are none."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
