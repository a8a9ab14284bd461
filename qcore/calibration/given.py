"""The model that a run is given: a path, a checkpoint, or one that is loaded already, as transformers has it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.checkpoint.open import Checkpoint, open_checkpoint
from qcore.checkpoint.writer import writing
from qcore.refusal import Refusal, Refused

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def opened(
    model: str | Path | Checkpoint | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, out: Path, *, again: bool
) -> Iterator[Checkpoint]:  # fmt: skip
    """The checkpoint, to the end of the run. A loaded model is saved beside `out` as it is now, and removed at the end; its tokenizer is the one that is given, or that of where the model
    came from, if it is there.

    again: whether a run that was stopped is gone on with. Raises Refused: bad-argument for what is no model, and for a loaded one in such a run, cannot-write, and all that opening gives.
    """
    if isinstance(model, str | Path):
        yield open_checkpoint(model)
        return
    if isinstance(model, Checkpoint):
        yield model
        return
    if not hasattr(model, "save_pretrained"):
        raise Refused(Refusal("bad-argument", "usage", "model", "this is no model", f"found {type(model).__name__}, expected a path or a model of transformers",
                              "Give the folder that the model is in."))  # fmt: skip
    if again:
        raise Refused(Refusal("bad-argument", "usage", "resume", "a run goes on with the files that it began with, and a loaded model has none",
                              fix="Save the model, and give its folder."))  # fmt: skip
    with writing(out):
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", suffix=".model", dir=out.absolute().parent))
    try:
        with writing(folder):
            _save(model, folder)
            own = tokenizer if tokenizer is not None else _tokenizer_of(model)
            if own is not None:
                own.save_pretrained(folder)
        yield open_checkpoint(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _save(model: Any, folder: Path) -> None:
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # what the operating system says is a sentence in it
        raise Refused(Refusal("cannot-write", "usage", str(folder), "the model cannot be saved there", str(error),
                              "Free some space there, or choose a folder on another disk.")) from error  # fmt: skip


def _tokenizer_of(model: Any) -> Any:
    """None where it came from nowhere that has one."""
    from transformers import AutoTokenizer

    path = str(getattr(model, "name_or_path", ""))
    if not Path(path).is_dir():
        return None
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError):
        return None
