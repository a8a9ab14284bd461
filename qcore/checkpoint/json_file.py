"""JSON from files, bounded: a linear scan counts levels and values before anything is parsed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qcore.checkpoint import limits
from qcore.checkpoint.pread import opened, read_pieces, wrong_magic
from qcore.refusal import Refused, bad_file

_CONTROLS = bytes(byte for byte in range(32) if byte not in b"\t\n\r")
"""Bytes that JSON allows nowhere."""
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_STRING = re.compile(rb'"[^"]*"')
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(path: Path, *, max_bytes: int = limits.JSON_FILE, max_depth: int = limits.JSON_DEPTH) -> dict[str, Any]:
    """The object in a JSON file. NaN and Infinity are numbers, as Python's own writer has it.

    Raises Refused: path-not-found, bad-magic (a git-lfs pointer or a web page), limit-exceeded, bad-json, bad-text,
    duplicate.
    """
    with opened(path) as (descriptor, state):
        check_size(path, state.size, max_bytes)
        start = b"".join(read_pieces(path, descriptor, 0, min(state.size, 32)))
        if start.startswith((b"version https://git-lfs", b"<")):
            raise wrong_magic(path, start, "a JSON object")
        return parse_json(read_pieces(path, descriptor, 0, state.size), file=path, max_depth=max_depth)


def check_json(path: Path, *, max_bytes: int, max_depth: int = limits.JSON_DEPTH) -> None:
    """Looks at a JSON file that another library is to parse: its size, its nesting. Raises Refused: path-not-found,
    bad-magic, limit-exceeded, bad-json."""
    with opened(path) as (descriptor, state):
        check_size(path, state.size, max_bytes)
        scan = _Scan(path, None, max_depth, counted=False)
        for piece in read_pieces(path, descriptor, 0, state.size):
            scan.feed(piece)


def check_size(path: Path, size: int, max_bytes: int) -> None:
    """Raises Refused (limit-exceeded)."""
    if size > max_bytes:
        raise bad_file("limit-exceeded", "the file is larger than any real one", file=path, field="size",
                       found=size, expected=f"at most {max_bytes} bytes")  # fmt: skip


def parse_json(
    pieces: Iterable[bytes], *, file: Path, field: str | None = None, max_depth: int = limits.JSON_DEPTH
) -> dict[str, Any]:
    """The object that the bytes of `pieces` spell together; `file` and `field` are what refusals name.

    Raises Refused: limit-exceeded, bad-json, bad-text, duplicate.
    """
    scan, data = _Scan(file, field, max_depth), bytearray()
    for piece in pieces:
        scan.feed(piece)
        data += piece

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            twice = Counter(key for key, _ in items).most_common(1)[0][0]
            raise bad_file("duplicate", "a key stands twice in an object", file=file, field=field or twice, found=twice,
                           expected="every key once")  # fmt: skip
        return found

    try:
        text = data.decode("utf-8")
        escapes = _SURROGATE.search(data) is not None
        del data  # a large text need not be held twice
        parsed = json.loads(text, object_pairs_hook=pairs)
        if escapes:  # half a surrogate pair is no character: such a text could not be printed
            json.dumps(parsed, ensure_ascii=False).encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise bad_file("bad-text", "it is not UTF-8", file=file, field=field, found=error.object[error.start : error.end],
                       expected="UTF-8 text") from error  # fmt: skip
    except ValueError as error:
        raise scan.no("bad-json", "it is not JSON", str(error), "a JSON object") from error
    if not isinstance(parsed, dict):
        raise scan.no("bad-json", "it is not a JSON object", type(parsed).__name__, "an object")
    return parsed


class _Scan:
    """One pass over a JSON text, piece by piece, that refuses what would cost the parser its stack or the host memory.

    It only looks at quotes, brackets and commas: what is wrong otherwise is left for the parser to find.
    """

    def __init__(self, file: Path, field: str | None, max_depth: int, *, counted: bool = True) -> None:
        self.file, self.field, self.max_depth, self.counted = file, field, max_depth, counted
        self.carry = b""
        """What the next piece must begin with to be read right: an open quote, a backslash."""
        self.depth = self.values = self.seen = 0

    def no(self, code: str, reason: str, found: object, expected: str) -> Refused:
        return bad_file(code, reason, file=self.file, field=self.field, found=found, expected=expected)

    def feed(self, piece: bytes) -> None:
        self.seen += len(piece)
        if len(piece.translate(None, _CONTROLS)) != len(piece):
            raise self.no("bad-json", "it holds a control character", f"within its first {self.seen} bytes", "text")
        brackets, commas = self._outside_strings(piece)
        self.values += commas + brackets.count(b"[") + brackets.count(b"{")
        most = limits.JSON_FREE_VALUES + self.seen // limits.JSON_BYTES_PER_VALUE
        if self.counted and self.values > most:
            raise self.no("limit-exceeded", "it holds more values than any real text of its length", self.values,
                          f"at most {most}")  # fmt: skip
        for bracket in brackets:
            self.depth += 1 if bracket in b"[{" else -1
            if self.depth > self.max_depth:
                raise self.no("bad-json", "it nests too deeply", f"more than {self.max_depth} levels", "a few levels")

    def _outside_strings(self, piece: bytes) -> tuple[bytes, int]:
        """The brackets outside of strings, and the number of commas there."""
        text = self.carry + piece
        self.carry = b""
        if (len(text) - len(text.rstrip(b"\\"))) % 2:  # it escapes the next piece's first byte
            text, self.carry = text[:-1], b"\\"
        text = _STRING.sub(b"", text.replace(b"\\\\", b"").replace(b'\\"', b""))
        text, quote, _ = text.partition(b'"')
        self.carry = quote + self.carry
        return text.translate(None, _NO_BRACKETS), text.count(b",")
