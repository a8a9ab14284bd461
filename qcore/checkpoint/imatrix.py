"""Reads llama.cpp's importance matrices: for every weight the mean square of each input channel's activations.

Two forms (llama.cpp's tools/imatrix/imatrix.cpp). The binary one: i32 entries; each an i32 length and a name, i32 calls,
i32 values, and so many float32 sums over the calls; little-endian, and what follows the entries tells of the run. The
GGUF one: tensors `<name>.in_sum2`, float32 [matrices, columns] sums, and `<name>.counts`, float32 [matrices, 1].
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from qcore.checkpoint import limits
from qcore.checkpoint.gguf import GgufSource
from qcore.checkpoint.pread import FileState, opened, read_tensor_bytes, wrong_magic
from qcore.refusal import Refused, bad_file

if TYPE_CHECKING:
    import torch

_SUMS, _COUNTS = ".in_sum2", ".counts"
_LEAST_ENTRY = 17
"""Bytes of the shortest entry: a name of one byte and one value."""
_FIX = "Make the importance matrix again with llama.cpp's llama-imatrix."


def read_imatrix(path: Path) -> dict[str, torch.Tensor]:
    """Float32 [columns] by weight name; merged experts' follow each other, [experts * columns]. None is negative.

    A matrix that no token reached (an expert that was never chosen) has ones. Raises Refused.
    """
    with opened(path) as (descriptor, state):
        magic = os.pread(descriptor, 40, 0)
        entries = [] if magic.startswith(b"GGUF") else _entries(path, descriptor, state.size, magic)
    return _binary(path, state, entries) if entries else _gguf(path)


# --- The binary form ---


def _entries(path: Path, descriptor: int, size: int, magic: bytes) -> list[tuple[str, int, int, int]]:
    """Name, calls, values and the values' place, of each entry."""
    at = 0

    def take(count: int, field: str) -> bytes:
        nonlocal at
        data = os.pread(descriptor, count, at)
        if len(data) < count:
            raise _no(
                path, "truncated", field, f"the file ends here (byte {at})", f"{len(data)} bytes", f"{count} bytes"
            )
        at += count
        return data

    def number(field: str, least: int, most: int) -> int:
        value = int.from_bytes(take(4, field), "little", signed=True)
        if not least <= value <= most:
            raise _no(
                path, "bad-field", field, f"a count is not a real one (byte {at - 4})", value, f"{least} to {most}"
            )
        return value

    if int.from_bytes(magic[:4], "little", signed=True) not in range(1, size // _LEAST_ENTRY + 1):
        raise wrong_magic(path, magic, "GGUF, or the number of entries")
    found: list[tuple[str, int, int, int]] = []
    names = set()
    for _ in range(number("entries", 1, limits.GGUF_TENSORS)):
        name = _name(path, take(number("name", 1, limits.GGUF_KEY), "name"), at)
        if name in names:
            raise _no(path, "duplicate", "name", "two entries have the same name", name, "each name once", name)
        names.add(name)
        calls, values = number("calls", 0, (1 << 31) - 1), number("values", 1, (1 << 31) - 1)
        if 4 * values > size - at:
            raise _no(path, "truncated", "values", f"the values point past the end of the file (byte {at})", values,
                      f"at most {(size - at) // 4}", name)  # fmt: skip
        found.append((name, calls, values, at))
        at += 4 * values
    return found


def _name(path: Path, data: bytes, at: int) -> str:
    name = data.decode("utf-8", "replace")
    if not name.isprintable() or "\ufffd" in name:
        raise _no(path, "bad-text", "name", f"a name is not printable text (byte {at})", ascii(name), "a weight's name")
    return name


def _binary(path: Path, state: FileState, entries: list[tuple[str, int, int, int]]) -> dict[str, torch.Tensor]:
    import torch

    found = {}
    for name, calls, count, offset in entries:
        values = read_tensor_bytes(path, state, offset, 4 * count).view(torch.float32)
        found[name] = _checked(path, name, values) / max(calls, 1)  # without calls they are means already
    return found


# --- The GGUF form ---


def _gguf(path: Path) -> dict[str, torch.Tensor]:
    source = GgufSource.open(path)
    names = [name.removesuffix(_SUMS) for name in source.tensors if name.endswith(_SUMS)]
    if not names:
        raise _no(path, "missing-tensor", "tensors", "no tensor holds sums of squares", len(source.tensors),
                  f"tensors named *{_SUMS}")  # fmt: skip
    return {name: _means(path, source, name) for name in names}


def _means(path: Path, source: GgufSource, name: str) -> torch.Tensor:
    for part in (name + _SUMS, name + _COUNTS):
        info = source.tensors.get(part)
        if info is None:
            raise _no(path, "missing-tensor", "tensors", "sums lack their counts", "none", part, name)
        if info.dtype != "F32":
            raise _no(path, "bad-dtype", part, "sums and counts are float32", info.dtype, "F32", part)
    sums, counts = (_checked(path, part, source.read(part)) for part in (name + _SUMS, name + _COUNTS))
    if sums.numel() // sums.shape[-1] != counts.numel():
        raise _no(path, "bad-shape", name + _COUNTS, "every matrix has one count", list(counts.shape),
                  f"one for each row of {list(sums.shape)}", name + _COUNTS)  # fmt: skip
    counts = counts.view(-1, 1)
    means = sums.view(len(counts), -1) / counts.clamp(min=1)
    return means.masked_fill_(counts == 0, 1.0).flatten()


def _checked(path: Path, name: str, values: torch.Tensor) -> torch.Tensor:
    if not (values.isfinite() & (values >= 0)).all():
        raise _no(path, "bad-content", "values", "sums of squares are finite and not negative",
                  f"{values.min().item()} to {values.max().item()}", "numbers from 0 on", name)  # fmt: skip
    return values


def _no(
    path: Path, code: str, field: str, reason: str, found: object, expected: object, tensor: str | None = None
) -> Refused:
    return bad_file(code, reason, file=path, tensor=tensor, field=field, found=found, expected=expected, fix=_FIX)
