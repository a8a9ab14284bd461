"""Writing checkpoints: nothing is there under the name asked for until all of it is, on the disk.

Everything goes into a folder with a temporary name beside the one asked for; files are flushed, and the folder is renamed
at the end. What a killed run leaves is removed by the next one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qcore.checkpoint.safetensors import DTYPES
from qcore.refusal import Refusal, Refused

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5 << 30
"""Largest file; transformers' own default for a long time."""
_COPY_BYTES = 16 << 20
_LOCK = ".qcore-lock"
_CAUSES = {
    errno.ENOSPC: "Free some space there, or choose a folder on another disk.",
    errno.EDQUOT: "Free some space there, or choose a folder on another disk.",
    errno.EROFS: "Choose a folder that can be written to.",
    errno.EACCES: "Choose a folder that you may write to, or change its permissions.",
    errno.EPERM: "Choose a folder that you may write to, or change its permissions.",
    errno.ENOENT: "Create the folder that is to hold it.",
    errno.ENOTDIR: "Choose a path whose parent is a folder.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
}


class AtomicFolder:
    """A folder that appears under its name when the `with` block ends well, and not at all where it does not.

    Raises Refused: output-exists where the name is taken, cannot-write where the disk says no.
    """

    def __init__(self, out: Path) -> None:
        self.out = Path(out).absolute()
        self.folder = self.out
        self._lock = -1

    def __enter__(self) -> AtomicFolder:
        with writing(self.out):
            if self.out.is_symlink() or (self.out.exists() and not (self.out.is_dir() and not any(self.out.iterdir()))):
                raise taken(self.out)
            self.folder, self._lock = _beside(self.out)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with writing(self.out):
                    for file in sorted(self.folder.rglob("*")):
                        flush(file)
                    self.folder.chmod(0o777 & ~_umask())
                    (self.folder / _LOCK).unlink()  # at last: without it, others may take the folder for abandoned
                    flush(self.folder)
                    self.folder.rename(self.out)
                    _keep(self.out)
        finally:
            os.close(self._lock)
            shutil.rmtree(self.folder, ignore_errors=True)


class SafetensorsWriter:
    """Tensors into the shards of a folder, one at a time; no more than one of them, or a piece, is held in memory.

    Sizes are known only at a shard's end, so its data are written first and copied behind the header then.
    """

    def __init__(
        self, folder: Path, *, metadata: Mapping[str, str] | None = None, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.metadata = {"format": "pt", **(metadata or {})}
        self._entries: dict[str, dict[str, Any]] = {}
        self._shards: list[dict[str, dict[str, Any]]] = []
        self._data = self._open()
        self._size = self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor. Raises Refused (cannot-write)."""
        self.add_pieces(name, [tensor], tensor.nbytes)

    def add_pieces(self, name: str, pieces: Iterable[torch.Tensor], nbytes: int) -> None:
        """Writes one tensor, given as some of its rows after the other; there is at least one piece. nbytes: of all. Raises Refused (cannot-write)."""
        import torch

        if self._entries and self._size + nbytes > self.shard_bytes:
            self._close_shard()
        begin, shape = self._size, [0]
        for piece in pieces:
            piece = piece.detach().cpu().contiguous()
            raw = piece.reshape(-1).view(torch.uint8) if piece.numel() else torch.empty(0, dtype=torch.uint8)
            with writing(self.folder):
                self._data.write(raw.numpy().data)
            self._size += raw.numel()
            shape = [shape[0] + piece.shape[0], *piece.shape[1:]] if piece.dim() else []
            dtype = str(piece.dtype).removeprefix("torch.")
        kind = next(key for key, (_, held) in DTYPES.items() if held == dtype)
        self._entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, self._size]}
        self._total += self._size - begin

    def close(self) -> None:
        """Names the shards, and writes their index where there are several."""
        self._close_shard(last=True)
        count = len(self._shards)
        if count == 1:
            with writing(self.folder):
                (self.folder / "0.shard").rename(self.folder / "model.safetensors")
            return
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        for i, name in enumerate(names):
            with writing(self.folder):
                (self.folder / f"{i}.shard").rename(self.folder / name)
        placed = {tensor: names[i] for i, entries in enumerate(self._shards) for tensor in entries}
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(placed.items()))}
        write_json(self.folder / "model.safetensors.index.json", index)

    def _open(self) -> Any:
        with writing(self.folder):
            return (self.folder / ".data").open("wb")

    def _close_shard(self, *, last: bool = False) -> None:
        header = json.dumps({"__metadata__": self.metadata, **self._entries}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        data, shard = self.folder / ".data", self.folder / f"{len(self._shards)}.shard"
        with writing(self.folder):
            self._data.close()
            with shard.open("wb") as out, data.open("rb") as held:
                out.write(len(header).to_bytes(8, "little") + header)
                shutil.copyfileobj(held, out, _COPY_BYTES)
            data.unlink()
        self._shards.append(self._entries)
        self._entries, self._size = {}, 0
        if not last:
            self._data = self._open()


class writing:  # noqa: N801
    """Turns what the operating system says about a write into a Refusal (cannot-write)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError):
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # another process was faster
                raise taken(self.path) from error
            fix = _CAUSES.get(error.errno or 0, "Choose another folder.")
            raise Refused(
                Refusal("cannot-write", "usage", str(self.path), "the checkpoint cannot be written there",
                        f"found {error.strerror or error}", fix)
            ) from error  # fmt: skip


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """A config file, indented as transformers writes it. Raises Refused (cannot-write)."""
    with writing(path):
        path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def atomic_file(out: Path, write: Callable[[Path], None]) -> None:
    """`write` makes a file, which appears under its name once it is whole. Raises Refused (output-exists, cannot-write)."""
    out = out.absolute()
    with writing(out):
        if out.exists() or out.is_symlink():
            raise taken(out)
        folder, lock = _beside(out)
    try:
        with writing(out):
            write(folder / out.name)
            flush(folder / out.name)
            _appear(folder / out.name, out)
            _keep(out)
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def taken(out: Path) -> Refused:
    """For an output whose name is taken."""
    return Refused(
        Refusal("output-exists", "usage", str(out), "there is something under this name already",
                fix="Choose a new name, or remove what is there; nothing is overwritten.")
    )  # fmt: skip


def _beside(out: Path) -> tuple[Path, int]:
    """A folder with a temporary name beside `out`, and the lock that its maker holds while it lives. Raises OSError."""
    prefix = f".{out.name}.partial-"
    _remove_abandoned(out.parent, prefix)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    try:
        lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder, lock


def _appear(made: Path, out: Path) -> None:
    """The file under its own name, and never in another's place, as a rename would put it. Raises OSError."""
    try:
        os.link(made, out)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if out.exists():
            raise FileExistsError(errno.EEXIST, "File exists") from None
        made.rename(out)


def _keep(out: Path) -> None:
    """Its name onto the disk; where the disk cannot keep it, it goes again. Raises OSError."""
    try:
        flush(out.parent)
    except OSError:
        if out.is_dir():
            shutil.rmtree(out, ignore_errors=True)
        else:
            out.unlink(missing_ok=True)
        raise


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """What earlier runs left that were killed: a living one holds its lock."""
    for left in parent.iterdir():
        if not left.name.startswith(prefix) or not re.fullmatch(r"\w+", left.name[len(prefix) :]):
            continue
        try:
            lock = os.open(left / _LOCK, os.O_RDWR)
        except OSError:  # killed before the lock was there, or in the last moment before the rename
            if left.is_dir() and not left.is_symlink() and _is_old(left):
                shutil.rmtree(left, ignore_errors=True)
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        except OSError:
            pass
        finally:
            os.close(lock)


def _is_old(folder: Path) -> bool:
    """Not one that another process has made this minute."""
    import time

    return time.time() - folder.stat().st_mtime > 60


def flush(path: Path) -> None:
    """A file or folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
