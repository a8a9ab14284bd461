"""Patterns from configs, matched against module names without the risk that a hostile one never ends."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from qcore.checkpoint.regular import matches_regular, parser
from qcore.refusal import Refused, bad_file

_LONGEST_PATTERN, _LONGEST_NAME, _MOST_REPEATS = 1000, 512, 8
"""Characters of a pattern and of a name, and unbounded repeats in a pattern; real patterns have one to four."""
_MOST_PATTERNS, _MOST_WILDCARDS = 4096, 32768
"""In one field: what is compiled once and kept, here and by fnmatch. Every module is held against all of them."""
_MOST_NESTED = 50_000
"""Turns of repeats inside each other, of which an unbounded one has as many as a name's characters."""
_MOST_WAYS = 100_000
"""Ways to match that backtracking may have to try, a few milliseconds; beyond, it is done without (regular.py)."""


def check_count(patterns: Iterable[str], *, file: Path, field: str, wildcards: bool = False) -> None:
    """Raises Refused (limit-exceeded) where a field has more patterns than any real one."""
    most, found = _MOST_WILDCARDS if wildcards else _MOST_PATTERNS, sum(1 for _ in patterns)
    if found > most:
        raise bad_file("limit-exceeded", "the config has more patterns than any real one", file=file, field=field,
                       found=found, expected=f"at most {most}")  # fmt: skip


def matches(pattern: str, name: str, *, file: Path, field: str, anywhere: bool = False) -> bool:
    """Whether the pattern matches at the beginning of the name (re.match), or anywhere in it (re.search).

    Raises Refused: bad-field where it is no regular expression, limit-exceeded where matching could take for ever.
    """
    try:
        compiled, tree, trouble = _compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise _no_pattern(pattern, error, file, field) from error
    if trouble or len(name) > _LONGEST_NAME:
        raise _endless(pattern, trouble or f"names of at most {_LONGEST_NAME} characters", file, field)
    if _ways(tree, len(name)) * (len(name) if anywhere else 1) > _MOST_WAYS:
        try:
            return matches_regular(tree, name, anywhere=anywhere)
        except ValueError as error:
            raise _endless(pattern, f"{error} beside several repeats", file, field) from error
    return (compiled.search(name) if anywhere else compiled.match(name)) is not None


def skips(patterns: Sequence[str], name: str, *, file: Path, field: str) -> str | None:
    """The first pattern by which transformers leaves a module alone (should_convert_module): a regular expression for the
    beginning of its name, up to a dot, or the end of it. Raises Refused (bad-field, limit-exceeded)."""
    for pattern in patterns:
        bounded = rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))"
        if name.endswith(pattern) or matches(bounded, name, file=file, field=f"quantization_config.{field}"):
            return pattern
    return None


def wildcard(pattern: str, name: str, *, file: Path, field: str) -> bool:
    """Whether the whole name is as the shell's wildcards say. Raises Refused (bad-field, limit-exceeded)."""
    if len(pattern) > _LONGEST_PATTERN or len(name) > _LONGEST_NAME:
        raise _endless(pattern, f"at most {_LONGEST_PATTERN} characters, and {_LONGEST_NAME} of a name", file, field)
    try:
        return fnmatchcase(name, pattern)
    except re.error as error:
        raise _no_pattern(pattern, error, file, field) from error


def _no_pattern(pattern: str, error: Exception, file: Path, field: str) -> Refused:
    return bad_file("bad-field", "a pattern is not a regular expression", file=file, field=field, found=pattern,
                    expected=str(error))  # fmt: skip


def _endless(pattern: str, expected: str, file: Path, field: str) -> Refused:
    return bad_file("limit-exceeded", "matching a pattern could take for ever", file=file, field=field, found=pattern,
                    expected=expected, fix="Write the pattern without a repeat inside a repeat.")  # fmt: skip


@lru_cache(maxsize=_MOST_PATTERNS)
def _compile(pattern: str) -> tuple[re.Pattern[str], Any, str]:
    """The compiled pattern, its parse tree, and what makes it dangerous, if anything does."""
    if len(pattern) > _LONGEST_PATTERN:
        return re.compile(""), None, f"at most {_LONGEST_PATTERN} characters"
    tree = parser.parse(pattern)
    repeats = list(_repeats(tree, 1))
    if any(turns > _MOST_NESTED for turns in repeats):
        return re.compile(""), None, "no unbounded repeat inside another"
    if sum(turns >= _LONGEST_NAME for turns in repeats) > _MOST_REPEATS:
        return re.compile(""), None, f"at most {_MOST_REPEATS} unbounded repeats"
    return re.compile(pattern), tree, ""


_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


def _repeats(node: Any, outer: int) -> Iterator[int]:
    """How often each repeat of a parsed pattern may turn, together with those that it stands in."""
    if isinstance(node, (parser.SubPattern, list, tuple)):
        if isinstance(node, tuple) and node and str(node[0]) in _REPEATS:
            _, most, body = node[1]
            yield (turns := outer * min(int(most), _LONGEST_NAME))
            yield from _repeats(body, turns)
            return
        for part in node:
            yield from _repeats(part, outer)


@lru_cache(maxsize=_MOST_PATTERNS)
def _ways(tree: Any, length: int) -> float:
    """The number of ways that backtracking may have to try on a name of this length, at most."""
    ways = 1.0
    for kind, value in tree:
        name = str(kind)
        if name in _REPEATS:
            least, most, body = value
            most = min(int(most), length)
            inner = _ways(body, length)
            ways *= (max(most - least, 0) + 1) * (min(inner, 1e6) ** min(most, 50) if inner > 1 else 1)
        elif name == "BRANCH":
            ways *= sum(_ways(branch, length) for branch in value[1])
        elif name in ("SUBPATTERN", "ASSERT", "ASSERT_NOT", "ATOMIC_GROUP"):
            ways *= _ways(value if name == "ATOMIC_GROUP" else value[-1], length)
        elif name == "GROUPREF_EXISTS":
            ways *= sum(_ways(branch, length) for branch in value[1:] if branch is not None)
        ways = min(ways, 1e12)
    return ways
