"""Checkpoints in several files: names such as `model-00001-of-00003.safetensors`, and which links may be followed."""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from pathlib import Path

from qcore.checkpoint import limits
from qcore.refusal import bad_file

_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})(\.\w+)")


@dataclass(frozen=True)
class Shard:
    """A file's place in a set, as its name tells it: `number` counts from 1."""

    stem: str
    number: int
    count: int
    suffix: str


def shard_of(path: Path) -> Shard | None:
    """What the file's name tells; None where it is not a shard's."""
    match = _NAME.fullmatch(path.name)
    return Shard(match[1], int(match[2]), int(match[3]), match[4]) if match else None


def gather(path: Path) -> list[Path]:
    """All shards of the set that `path` names one of; [path] where its name is not a shard's.

    Raises Refused: limit-exceeded, shard-missing, shard-unsafe.
    """
    shard = shard_of(path)
    if shard is None:
        return [path]
    if not 1 <= shard.number <= shard.count <= limits.SHARDS:
        raise bad_file("limit-exceeded", "the shard's number is not a real one", file=path, field="shard name",
                       found=f"{shard.number} of {shard.count}", expected=f"1 to {limits.SHARDS}")  # fmt: skip
    names = (f"{shard.stem}-{i:05d}-of-{shard.count:05d}{shard.suffix}" for i in range(1, shard.count + 1))
    return [path if name == path.name else safe_shard(path.parent, name, named_by=path) for name in names]


def safe_shard(folder: Path, name: str, *, named_by: Path, tensor: str | None = None) -> Path:
    """The path of a shard that the file `named_by` asks for, once it is known to be a file of this checkpoint.

    A link may lead to another file of the folder or, in Hugging Face's cache, from
    models--org--name/snapshots/<revision>/ to models--org--name/blobs/. Raises Refused: shard-unsafe, shard-missing.
    """
    if name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
        raise bad_file("shard-unsafe", "a shard's name leads out of the folder", file=named_by, tensor=tensor,
                       field="shard name", found=name, expected="a plain file name")  # fmt: skip
    file = folder / name
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise OSError("it is not a regular file")
        target, home = file.resolve(), folder.resolve()
    except OSError as error:
        raise bad_file("shard-missing", f"the shard {name:.200} is not there", file=named_by, tensor=tensor,
                       field="shard name", found=str(error), expected=name,
                       fix=f"Download {name:.200} again into the same folder.") from error  # fmt: skip
    snapshots = next((parent for parent in home.parents if parent.name == "snapshots"), None)
    cached = (
        snapshots is not None
        and snapshots.parent.name.startswith("models--")
        and target.parent == snapshots.parent / "blobs"
    )
    if not cached and not target.is_relative_to(home):
        raise bad_file("shard-unsafe", "a shard is a link that leads out of the folder", file=named_by, tensor=tensor,
                       field="shard name", found=str(target), expected=f"a file in {home}")  # fmt: skip
    return file
