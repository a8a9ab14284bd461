"""CUDA_VISIBLE_DEVICES, as the driver reads it."""

from __future__ import annotations

import re
from collections.abc import Sequence


def visible(variable: str | None, uuids: Sequence[str]) -> list[int]:
    """Which of the GPUs with these UUIDs CUDA shows, in its order, for a value of the variable (None: it is unset).

    The first entry that names no GPU ends the list, and one that is named twice empties it; a UUID may be cut short as
    long as one GPU alone begins so (CUDA C++ Programming Guide, "CUDA Environment Variables"). Digits that begin an
    entry count, whatever follows them. MIG instances are not resolved here.
    """
    if variable is None:
        return list(range(len(uuids)))
    found: list[int] = []
    by_uuid = variable.startswith("GPU-")
    for entry in variable.split(","):
        index = _by_uuid(entry.strip(), uuids) if by_uuid else _by_number(entry.strip(), len(uuids))
        if index is None:
            break
        if index in found:
            return []
        found.append(index)
    return found


def _by_uuid(entry: str, uuids: Sequence[str]) -> int | None:
    matches = [index for index, uuid in enumerate(uuids) if entry.startswith("GPU-") and uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def _by_number(entry: str, count: int) -> int | None:
    digits = re.match(r"\+?(\d+)", entry)
    return int(digits[1]) if digits and int(digits[1]) < count else None
