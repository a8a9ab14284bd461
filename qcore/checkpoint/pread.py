"""Reading byte ranges of files into memory, and saying what a wrong file looks like."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.checkpoint.source import TensorInfo
from qcore.pool import lent_bytes
from qcore.refusal import Refusal, Refused, bad_file

if TYPE_CHECKING:
    import torch

_PIECE = 1 << 30
"""Bytes asked for in one call: Linux reads at most 2 GiB at once."""

_PICKLE_FIX = "Convert it to safetensors with the tool that wrote it."
_LOOKS = (
    (
        rb"version https://git-lfs",
        "a git-lfs pointer, not the file itself",
        "Run `git lfs pull` in the model's folder.",
    ),
    (rb"(?i)\s*<(!doctype|html|\?xml)", "a web page", "The download failed or needs a login; download the file again."),
    (rb"PK\x03\x04", "a zip archive, which torch's pickled weights are", _PICKLE_FIX),
    (rb"\x80[\x02-\x05][^\0]", "a pickle", _PICKLE_FIX),
    (rb"GGUF", "a GGUF file", "Name it with the ending .gguf."),
    (rb"lmgg|tjgg|fmgg|algg", "a ggml file from before GGUF", "Convert the model again with a current llama.cpp."),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "a compressed file", "Decompress it first."),
    (rb".{8}\{\s*\"", "a safetensors file", "Name it with the ending .safetensors."),
    (rb"\s*\{\s*[\"}]", "a JSON text", "Name the folder or the file that holds the weights."),
    (rb"[\t\n\r -~]+\Z", "a text file", "Name the folder or the file that holds the weights."),
)
"""Patterns of a file's first bytes, what they tell and what to do."""


@dataclass(frozen=True)
class FileState:
    """What a file was when its header was read: later reads must find the same. `modified` is in nanoseconds."""

    size: int
    modified: int


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, FileState]]:
    """The descriptor of a regular file, open for reading, and the file's state; closed at the end.

    Raises Refused: path-not-found where the file cannot be read, within the block as well; bad-magic where it is a
    folder, pipe or device.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe without writers must not wait
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
                raise bad_file("bad-magic", f"it is {kind}, not a file", file=path, found=kind,
                               expected="a regular file", fix="Name the file itself.")  # fmt: skip
            yield descriptor, FileState(status.st_size, status.st_mtime_ns)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise Refused(
            Refusal("path-not-found", "bad-file", str(path), "the file cannot be read", str(error),
                    "Check that it exists and that you may read it.", str(path))
        ) from error  # fmt: skip


def read_pieces(path: Path, descriptor: int, offset: int, count: int, piece: int = 1 << 20) -> Iterator[bytes]:
    """`count` bytes from `offset` on, piece by piece. Raises Refused (truncated) where the file ends before."""
    end = offset + count
    while offset < end:
        data = os.pread(descriptor, min(piece, end - offset), offset)
        if not data:
            raise _ends_early(path, end - offset, offset)
        offset += len(data)
        yield data


def read_tensor_bytes(path: Path, state: FileState, offset: int, count: int) -> torch.Tensor:
    """uint8 [count], in memory of its own; the file is closed again.

    Raises Refused: truncated where the file has changed, not-enough-memory, path-not-found.
    """
    with opened(path) as (descriptor, now):
        if now != state:
            raise bad_file("truncated", "the file has changed since it was opened", file=path, found=now, expected=state,
                           fix="Open the checkpoint again once nothing writes to it.")  # fmt: skip
        try:
            buffer = lent_bytes(count)
        except (OSError, RuntimeError) as error:  # RuntimeError is torch's word for it
            raise Refused(
                Refusal("not-enough-memory", "never", str(path), "a tensor is larger than the memory that is free",
                        f"found {count} bytes", "Use a machine with more memory.", str(path))
            ) from error  # fmt: skip
        view = memoryview(buffer.numpy().data)
        done = 0
        while done < count:
            got = os.preadv(descriptor, [view[done : done + _PIECE]], offset + done)
            if got == 0:
                raise _ends_early(path, count - done, offset + done)
            done += got
    return buffer


def row_span(info: TensorInfo, start: int, stop: int) -> tuple[int, int, tuple[int, ...]]:
    """Where rows start..stop of the first dimension lie: offset in the file, bytes, shape. Counted as slices count.

    Raises Refused (bad-shape) for a tensor without rows, or with rows that do not begin at whole bytes.
    """
    rows = info.shape[0] if info.shape else 0
    row, rest = divmod(info.nbytes, rows) if rows else (0, 0)
    if not info.shape or rest:
        raise bad_file("bad-shape", "the tensor cannot be read by rows", file=info.file, tensor=info.name,
                       found=f"{info.dtype} {list(info.shape)}", expected="rows of whole bytes")  # fmt: skip
    first, last, _ = slice(start, stop).indices(rows)
    count = max(0, last - first)
    return info.offset + first * row, count * row, (count, *info.shape[1:])


def wrong_magic(path: Path, start: bytes, expected: str) -> Refused:
    """The refusal for a file of another kind, with a guess at what it is."""
    for pattern, look, fix in _LOOKS:
        if re.match(pattern, start, re.DOTALL):
            return bad_file("bad-magic", f"it is {look}", file=path, field="magic", found=start[:24], expected=expected,
                            fix=fix)  # fmt: skip
    reason = "it does not begin as such a file does" if start else "the file is empty"
    return bad_file("bad-magic", reason, file=path, field="magic", found=start[:24], expected=expected)


def _ends_early(path: Path, missing: int, offset: int) -> Refused:
    return bad_file("truncated", f"the file ends too early (byte {offset})", file=path, found="the end of the file",
                    expected=f"{missing} more bytes")  # fmt: skip
