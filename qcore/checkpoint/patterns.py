"""Regular expressions from configs, matched against module names without the risk that a hostile one never ends."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from qcore.refusal import bad_file

# The standard library's own parser of patterns, which 3.11 moved.
parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

_LONGEST_PATTERN, _LONGEST_NAME, _MOST_REPEATS = 1000, 512, 8
"""Characters of a pattern and of a name, and unbounded repeats in a pattern: each repeat is a factor of the name's
length in the worst case. Real patterns have one to four."""


def matches(pattern: str, name: str, *, file: Path, field: str, anywhere: bool = False) -> bool:
    """Whether the pattern matches at the beginning of the name (re.match), or anywhere in it (re.search).

    Raises Refused: bad-field where it is no regular expression, limit-exceeded where matching could take for ever.
    """
    try:
        compiled, trouble = _compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise bad_file("bad-field", "a pattern is not a regular expression", file=file, field=field, found=pattern,
                       expected=str(error)) from error  # fmt: skip
    if trouble or len(name) > _LONGEST_NAME:
        raise bad_file("limit-exceeded", "matching a pattern could take for ever", file=file, field=field, found=pattern,
                       expected=trouble or f"names of at most {_LONGEST_NAME} characters",
                       fix="Write the pattern without a repeat inside a repeat.")  # fmt: skip
    return (compiled.search(name) if anywhere else compiled.match(name)) is not None


@lru_cache(maxsize=1024)
def _compile(pattern: str) -> tuple[re.Pattern[str], str]:
    """The compiled pattern, and what makes it dangerous, if anything does."""
    if len(pattern) > _LONGEST_PATTERN:
        return re.compile(""), f"at most {_LONGEST_PATTERN} characters"
    depths = list(_repeat_depths(parser.parse(pattern), 0))
    if any(depth > 1 for depth in depths):
        return re.compile(""), "no unbounded repeat inside another"
    if len(depths) > _MOST_REPEATS:
        return re.compile(""), f"at most {_MOST_REPEATS} unbounded repeats"
    return re.compile(pattern), ""


def _repeat_depths(node: Any, depth: int) -> Iterator[int]:
    """How deep each unbounded repeat of a parsed pattern stands in others."""
    if isinstance(node, (parser.SubPattern, list, tuple)):
        operation = node[0] if isinstance(node, tuple) and node else None
        if str(operation) in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            _, most, body = node[1]
            unbounded = most == parser.MAXREPEAT or most > 100
            if unbounded:
                yield depth + 1
            yield from _repeat_depths(body, depth + unbounded)
            return
        for part in node:
            yield from _repeat_depths(part, depth)
