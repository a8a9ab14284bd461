"""Evidence: what proves that a cell of the matrix is true.

A plugin carries its records in one evidence.json, which only `qcore verify --record` writes. A record names the kernel,
what was run to prove it, on what, how large the worst error was, and a digest of the kernel's source: when that source
changes, the record no longer counts until the kernel is verified again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from qcore.checkpoint.json_file import read_json
from qcore.refusal import Refused, bad_file

Grade = Literal["measured", "compiled", "simulated"]
"""measured: ran on that very hardware. compiled: the vendor's own compiler built the kernel for that target, and the
same source ran elsewhere against the reference. simulated: ran against a faithful stand-in of the vendor's operator."""

GRADES: tuple[Grade, ...] = get_args(Grade)
"""From the strongest to the weakest."""

FORMAT = 1


@dataclass(frozen=True)
class Record:
    """One kernel proved for one cell.

    schemes: for each scheme of the row that the kernel takes, the worst `error` and the `bound` that it was held against
    (qcore.accuracy). cases: comparisons made. command: what to run to get the record again. device: what it ran on.
    versions: of the software that took part. source: the kernel's digest (qcore.support.digest). date: ISO 8601.
    """

    row: str
    platform: str
    kernel: str
    grade: Grade
    schemes: Mapping[str, Mapping[str, float]]
    cases: int
    command: str
    device: str
    versions: Mapping[str, str]
    source: str
    date: str

    @property
    def worst(self) -> Mapping[str, float]:
        """Error and bound of the scheme that came nearest to its bound."""
        return max(self.schemes.values(), key=lambda met: met["error"] / met["bound"])

    @property
    def place(self) -> tuple[str, str, str, str]:
        """What there is one record for."""
        return self.row, self.platform, self.kernel, self.grade


_TYPES: Mapping[str, type] = {
    "row": str, "platform": str, "kernel": str, "grade": str, "schemes": dict, "cases": int, "command": str,
    "device": str, "versions": dict, "source": str, "date": str,
}  # fmt: skip


def read_evidence(path: Path) -> list[Record]:
    """The records of an evidence.json; none where there is no file. Raises Refused (bad-json, bad-field, bad-version)."""
    if not path.is_file():
        return []
    document = read_json(path)
    if document.get("format") != FORMAT:
        raise bad_file("bad-version", "evidence of another format", file=path, field="format",
                       found=document.get("format"), expected=FORMAT, fix=_FIX)  # fmt: skip
    records = document.get("records")
    if not isinstance(records, list):
        raise _bad(path, "records", records, "a list")
    return [_record(path, number, entry) for number, entry in enumerate(records)]


def write_evidence(path: Path, records: Iterable[Record]) -> None:
    """Writes the file whole or not at all; records in a stable order, so that a change shows as a small difference."""
    ordered = sorted(records, key=lambda record: record.place)
    text = json.dumps({"format": FORMAT, "records": [asdict(record) for record in ordered]}, indent=2)
    beside = path.with_suffix(".partial")
    beside.write_text(text + "\n")
    beside.replace(path)


def merged(old: Iterable[Record], new: Iterable[Record]) -> list[Record]:
    """`old` with the records that `new` has for the same place replaced."""
    return list({record.place: record for record in (*old, *new)}.values())


def _record(path: Path, number: int, entry: Any) -> Record:
    place = f"records[{number}]"
    if not isinstance(entry, dict) or entry.keys() != _TYPES.keys():
        raise _bad(path, place, sorted(entry) if isinstance(entry, dict) else entry, f"keys {', '.join(_TYPES)}")
    for key, kind in _TYPES.items():
        if type(entry[key]) is not kind:
            raise _bad(path, f"{place}.{key}", entry[key], kind.__name__)
    if entry["grade"] not in GRADES:
        raise _bad(path, f"{place}.grade", entry["grade"], " or ".join(GRADES))
    if not entry["schemes"] or not all(map(_is_met, entry["schemes"].values())):
        raise _bad(path, f"{place}.schemes", entry["schemes"], "an error and its bound for each scheme, the bound met")
    return Record(**entry)


def _is_met(met: Any) -> bool:
    numbers = isinstance(met, dict) and met.keys() == {"error", "bound"} and all(map(_is_number, met.values()))
    return numbers and 0 <= met["error"] <= met["bound"] and met["bound"] > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


_FIX = "Write it again with qcore verify --record; it is not to be edited by hand."


def _bad(path: Path, field: str, found: object, expected: str) -> Refused:
    return bad_file("bad-field", "this is no evidence record", file=path, field=field, found=found, expected=expected,
                    fix=_FIX)  # fmt: skip
