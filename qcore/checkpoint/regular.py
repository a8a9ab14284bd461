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
    known = _Text(text)
    return bool(known.through(tree, known.everywhere if anywhere else 1))


class _Text:
    """One text; each method gives the places that a node leads to from `places` or, backwards, those from which it leads
    to one of them."""

    def __init__(self, text: str) -> None:
        self.text, self.ends = text, 1 << len(text)
        self.everywhere = 2 * self.ends - 1
        self._known: dict[tuple[str, int], int] = {}
        """By a node's kind and identity: what of it does not depend on places."""

    def through(self, nodes: Any, places: int, back: bool = False) -> int:
        for kind, value in reversed(nodes) if back else nodes:
            if not places:
                break
            step = getattr(self, f"_{str(kind).lower()}", None)
            if step is None:
                raise ValueError(f"no {str(kind).lower().replace('_', ' ')}")
            places = step(value, places, back)
        return places

    def _once(self, kind: str, node: object, find: Callable[[], int]) -> int:
        if (found := self._known.get((kind, id(node)))) is None:
            found = self._known[kind, id(node)] = find()
        return found

    def _where(self, kind: str, node: object, fits: Callable[[str], bool], places: int, back: bool) -> int:
        """One character that fits."""
        chars = self._once(kind, node, lambda: sum(1 << i for i, char in enumerate(self.text) if fits(char)))
        return places >> 1 & chars if back else (places & chars) << 1

    def _literal(self, code: int, places: int, back: bool) -> int:
        return self._where("is", code, lambda char: ord(char) == code, places, back)

    def _not_literal(self, code: int, places: int, back: bool) -> int:
        return self._where("is not", code, lambda char: ord(char) != code, places, back)

    def _any(self, node: object, places: int, back: bool) -> int:
        return self._where("any", node, lambda char: char != "\n", places, back)

    def _in(self, items: list[tuple[Any, Any]], places: int, back: bool) -> int:
        negated = str(items[0][0]) == "NEGATE"
        return self._where(
            "in", items, lambda char: any(_holds(item, char) for item in items[negated:]) != negated, places, back
        )

    def _branch(self, value: tuple[None, list[Any]], places: int, back: bool) -> int:
        found = 0
        for branch in value[1]:
            found |= self.through(branch, places, back)
        return found

    def _subpattern(self, value: tuple[int | None, int, int, Any], places: int, back: bool) -> int:
        if value[1] or value[2]:
            raise ValueError("no flags")
        return self.through(value[3], places, back)

    def _max_repeat(self, value: tuple[int, int, Any], places: int, back: bool) -> int:
        least, most, body = value
        for _ in range(least):
            if (after := self.through(body, places, back)) == places:
                break
            places = after
        found = new = places
        for _ in range(most - least):
            new = self.through(body, new, back) & ~found  # each place is left once
            if not new:
                break
            found |= new
        return found

    _min_repeat = _max_repeat  # which of the matches comes first is all that they differ in

    def _assert(self, value: tuple[int, Any], places: int, back: bool, wanted: bool = True) -> int:
        """Where the body matches from a place on, or up to it: the same places wherever one comes from."""
        ahead, body = value[0] > 0, value[1]
        holds = self._once("assert", value, lambda: self.through(body, self.everywhere, back=ahead))
        return places & (holds if wanted else ~holds)

    def _assert_not(self, value: tuple[int, Any], places: int, back: bool) -> int:
        return self._assert(value, places, back, wanted=False)

    def _at(self, code: object, places: int, back: bool) -> int:
        name = str(code)
        if name in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return places & 1
        if name in ("AT_END", "AT_END_STRING"):
            before_line_end = self.ends >> 1 if name == "AT_END" and self.text.endswith("\n") else 0
            return places & (self.ends | before_line_end)
        edges = self._once("edges", None, self._edges)
        return places & (edges if name == "AT_BOUNDARY" else ~edges)

    def _edges(self) -> int:
        """Where a word begins or ends."""
        inside = [False, *map(_CATEGORIES["CATEGORY_WORD"], self.text), False]
        return sum(1 << i for i in range(len(self.text) + 1) if inside[i] != inside[i + 1])


def _holds(item: tuple[Any, Any], char: str) -> bool:
    """Whether an item of a class such as [a-z_\\d] holds the character."""
    kind, value = str(item[0]), item[1]
    if kind == "LITERAL":
        return ord(char) == int(value)
    if kind == "RANGE":
        return bool(value[0] <= ord(char) <= value[1])
    name = str(value)
    return _CATEGORIES[name.replace("_NOT_", "_")](char) != ("_NOT_" in name)
