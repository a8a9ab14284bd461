"""Matches regular expressions without backtracking: the set of places that a match may have come to, node by node.

A set of places in the text is an integer, bit i for the place before character i; so no pattern can make the time grow
beyond places times nodes. It takes Python's own parse tree, and knows what a regular language needs; groups cannot be
referred to, and flags are not known.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

# The standard library's own parser of patterns, which 3.11 moved.
parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda char: char.isalnum() or char == "_",
}


def matches_regular(tree: Any, text: str, *, anywhere: bool) -> bool:
    """Whether the parsed pattern matches at the beginning of the text, or anywhere in it. Raises ValueError where it is
    more than a regular expression."""
    if tree.state.flags & ~32:  # 32: texts are Unicode
        raise ValueError("no flags")
    return bool(_Text(text).through(tree, (2 << len(text)) - 1 if anywhere else 1))


class _Text:
    """One text; each method gives the places that a node leads to from `places`."""

    def __init__(self, text: str) -> None:
        self.text, self.ends = text, 1 << len(text)

    def through(self, nodes: Any, places: int) -> int:
        for kind, value in nodes:
            if not places:
                break
            step = getattr(self, f"_{str(kind).lower()}", None)
            if step is None:
                raise ValueError(f"no {str(kind).lower().replace('_', ' ')}")
            places = step(value, places)
        return places

    def _where(self, fits: Callable[[str], bool], places: int) -> int:
        """One character that fits."""
        return sum(1 << i + 1 for i, char in enumerate(self.text) if places >> i & 1 and fits(char))

    def _literal(self, code: int, places: int) -> int:
        return self._where(lambda char: ord(char) == code, places)

    def _not_literal(self, code: int, places: int) -> int:
        return self._where(lambda char: ord(char) != code, places)

    def _any(self, _: object, places: int) -> int:
        return self._where(lambda char: char != "\n", places)

    def _in(self, items: list[tuple[Any, Any]], places: int) -> int:
        negated = str(items[0][0]) == "NEGATE"
        return self._where(lambda char: any(_holds(item, char) for item in items[negated:]) != negated, places)

    def _branch(self, value: tuple[None, list[Any]], places: int) -> int:
        found = 0
        for branch in value[1]:
            found |= self.through(branch, places)
        return found

    def _subpattern(self, value: tuple[int | None, int, int, Any], places: int) -> int:
        if value[1] or value[2]:
            raise ValueError("no flags")
        return self.through(value[3], places)

    def _max_repeat(self, value: tuple[int, int, Any], places: int) -> int:
        least, most, body = value
        for _ in range(least):
            if (after := self.through(body, places)) == places:
                break
            places = after
        found = new = places
        for _ in range(most - least):
            new = self.through(body, new) & ~found  # each place is left once
            if not new:
                break
            found |= new
        return found

    _min_repeat = _max_repeat  # which of the matches comes first is all that they differ in

    def _assert(self, value: tuple[int, Any], places: int, wanted: bool = True) -> int:
        direction, body = value
        if direction < 0:
            raise ValueError("no lookbehind")
        return sum(
            1 << i for i in range(len(self.text) + 1) if places >> i & 1 and bool(self.through(body, 1 << i)) == wanted
        )

    def _assert_not(self, value: tuple[int, Any], places: int) -> int:
        return self._assert(value, places, wanted=False)

    def _at(self, code: object, places: int) -> int:
        name = str(code)
        if name in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return places & 1
        if name in ("AT_END", "AT_END_STRING"):
            before_line_end = self.ends >> 1 if name == "AT_END" and self.text.endswith("\n") else 0
            return places & (self.ends | before_line_end)
        inside = [_CATEGORIES["CATEGORY_WORD"](char) for char in self.text]
        wanted = name == "AT_BOUNDARY"
        edges = (before != after for before, after in zip([False, *inside], [*inside, False], strict=True))
        return places & sum(1 << i for i, edge in enumerate(edges) if edge == wanted)


def _holds(item: tuple[Any, Any], char: str) -> bool:
    """Whether an item of a class such as [a-z_\\d] holds the character."""
    kind, value = str(item[0]), item[1]
    if kind == "LITERAL":
        return ord(char) == int(value)
    if kind == "RANGE":
        return bool(value[0] <= ord(char) <= value[1])
    name = str(value)
    return _CATEGORIES[name.replace("_NOT_", "_")](char) != ("_NOT_" in name)
