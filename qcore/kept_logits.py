"""A reference model's logits on the disk."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import TracebackType

import numpy
import torch

from qcore.refusal import Refusal, Refused


class KeptLogits:
    """A reference's logits of all windows of one text, so that it runs once for all models that are compared with it.

    They are as the model gave them, [tokens, vocabulary] in its dtype; one window is in memory. Their file is in the system's folder for
    temporary files (TMPDIR) and has no name there, so that nothing is left of it, however the process ends. vocabulary: of the model's config. tokens: the text.
    Raises Refused (cannot-write).
    """

    def __init__(self) -> None:
        self.vocabulary = 0
        self.tokens: list[int] = []
        self.folder = Path("TMPDIR")
        self._windows: list[tuple[int, torch.Size, torch.dtype]] = []
        try:
            self.folder = Path(tempfile.gettempdir())
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise self._refused(str(error)) from error

    def __enter__(self) -> KeptLogits:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, logits: torch.Tensor, coming: int) -> None:
        """A window's. coming: tokens that are to be kept, these among them; whether they have room is asked before the first of them is written.
        Raises Refused (cannot-write)."""
        try:
            each, free = logits[0].nbytes, shutil.disk_usage(self.folder).free
            if not self._windows and each * coming > free:
                sizes = f"found {free / 2**30:.1f} GiB, expected {each * coming / 2**30:.1f} GiB"
                raise self._refused(sizes, f"--max-tokens {free // each * 9 // 10}")
            start = self._file.seek(0, 2)
            logits.cpu().contiguous().view(torch.uint8).numpy().tofile(self._file)
        except OSError as error:
            raise self._refused(str(error)) from error
        self._windows.append((start, logits.shape, logits.dtype))

    def window(self, number: int) -> torch.Tensor:
        """As it was added, on the CPU."""
        start, shape, dtype = self._windows[number]
        self._file.seek(start)
        found = numpy.fromfile(self._file, numpy.uint8, shape.numel() * dtype.itemsize)
        return torch.from_numpy(found).view(dtype).view(shape)

    def _refused(self, fact: str, fewer: str = "--max-tokens") -> Refused:
        fix = f"Set TMPDIR to a folder with more room, or score fewer tokens ({fewer})."
        reason = "the reference's logits have no room on the disk"
        return Refused(Refusal("cannot-write", "usage", str(self.folder), reason, fact, fix))
