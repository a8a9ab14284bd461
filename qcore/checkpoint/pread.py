"""Reading byte ranges of files into fresh memory, and saying what a wrong file looks like."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.refusal import Refusal, Refused, bad_file

if TYPE_CHECKING:
    import torch

_PIECE = 1 << 30
"""Bytes asked for in one call: Linux reads at most 2 GiB at once."""

_LOOKS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the weights", "Run `git lfs pull` in the model's folder."),
    (b"<!DOCTYPE", "a web page", "The download failed or needs a login; download the file again."),
    (b"<html", "a web page", "The download failed or needs a login; download the file again."),
    (b"PK\x03\x04", "a zip archive, which torch's pickled weights are", "Convert it to safetensors with the tool that wrote it."),
    (b"\x80\x02", "a pickle", "Convert it to safetensors with the tool that wrote it."),
    (b"\x80\x04", "a pickle", "Convert it to safetensors with the tool that wrote it."),
    (b"GGUF", "a GGUF file", "Name it with the ending .gguf."),
    (b"{", "a JSON text", "Name the folder or the file that holds the weights."),
)  # fmt: skip


@dataclass(frozen=True)
class FileState:
    """What a file was when its header was read: later reads must find the same."""

    size: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Raises Refused (path-not-found) where the file cannot be read."""
        try:
            status = path.stat()
        except OSError as error:
            raise unreadable(path, error) from error
        return cls(status.st_size, status.st_mtime_ns)


def unreadable(path: Path, error: OSError) -> Refused:
    """The refusal for a file that the system does not let us read."""
    return Refused(
        Refusal("path-not-found", "bad-file", str(path), "the file cannot be read", str(error),
                "Check that it exists and that you may read it.", str(path))
    )  # fmt: skip


def wrong_magic(path: Path, start: bytes, expected: str) -> Refused:
    """The refusal for a file of another kind, with a guess at what it is."""
    for magic, look, fix in _LOOKS:
        if start.lower().startswith(magic.lower()):
            return bad_file(
                "bad-magic", f"it is {look}", file=path, field="magic", found=start[:24], expected=expected, fix=fix
            )
    if not start:
        return bad_file("bad-magic", "the file is empty", file=path, field="magic", found="0 bytes", expected=expected)
    return bad_file("bad-magic", "it does not begin as such a file does", file=path, field="magic",
                    found=start[:24], expected=expected)  # fmt: skip


def read_tensor_bytes(path: Path, state: FileState, offset: int, count: int) -> torch.Tensor:
    """uint8 [count], in fresh memory; the file is closed again. Raises Refused where the file has changed."""
    import torch

    if FileState.of(path) != state:
        raise bad_file("truncated", "the file has changed since it was opened", file=path,
                       fix="Open the checkpoint again once nothing writes to it.")  # fmt: skip
    buffer = torch.empty(count, dtype=torch.uint8)
    view = memoryview(buffer.numpy().data)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        done = 0
        while done < count:
            got = os.preadv(descriptor, [view[done : done + _PIECE]], offset + done)
            if got == 0:
                raise bad_file("truncated", "the file ends inside a tensor", file=path, found=f"{done} bytes",
                               expected=f"{count} bytes at {offset}")  # fmt: skip
            done += got
    except OSError as error:
        raise unreadable(path, error) from error
    finally:
        os.close(descriptor)
    return buffer
