"""JSON from files, bounded: the size is checked before reading, deep nesting and repeated keys are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qcore.checkpoint import limits
from qcore.checkpoint.pread import FileState, unreadable, wrong_magic
from qcore.refusal import bad_file


def read_json(path: Path, max_bytes: int = limits.JSON_FILE) -> dict[str, Any]:
    """The object in a JSON file. Raises Refused (path-not-found, limit-exceeded, bad-json, bad-text)."""
    size = FileState.of(path).size
    if size > max_bytes:
        raise bad_file("limit-exceeded", "the JSON file is larger than any real one", file=path, field="size",
                       found=size, expected=f"at most {max_bytes} bytes")  # fmt: skip
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    if data.startswith(b"version https://git-lfs"):
        raise wrong_magic(path, data, "a JSON object")
    return parse_json(data, file=path)


def parse_json(data: bytes, *, file: Path, field: str | None = None) -> dict[str, Any]:
    """The object that `data` spells. Raises Refused (bad-json, bad-text)."""

    def refuse(reason: str, found: object, expected: str) -> Exception:
        return bad_file("bad-json", reason, file=file, field=field, found=found, expected=expected)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise bad_file("duplicate", "a key stands twice in an object", file=file, tensor=None,
                           field=field or twice, found=twice, expected="every key once")  # fmt: skip
        return found

    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=pairs)
    except UnicodeDecodeError as error:
        raise bad_file("bad-text", "it is not UTF-8", file=file, field=field, found=data[error.start : error.start + 8],
                       expected="UTF-8 text") from error  # fmt: skip
    except RecursionError as error:  # the parser stops at about a thousand levels; real configs have ten
        raise refuse("it nests too deeply", "about a thousand levels", "a config's few levels") from error
    except ValueError as error:
        raise refuse("it is not JSON", str(error), "a JSON object") from error
    if not isinstance(parsed, dict):
        raise refuse("it is not a JSON object", type(parsed).__name__, "an object")
    return parsed
