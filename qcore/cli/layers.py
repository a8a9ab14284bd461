"""Printing hundreds of layers in a few lines: modules that differ only in their number share one."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from typing import TypeVar

F = TypeVar("F", bound=Hashable)
_NUMBER = re.compile(r"(?<![\w-])\d+(?![\w-])")


def collapse(rows: Iterable[tuple[str, F]]) -> list[tuple[str, F]]:
    """(module, facts) pairs, those with equal facts and names that differ in their first number joined:
    `model.layers.{0-29}.mlp.up_proj`. Facts that carry the same number (a tensor's name) are compared without it."""
    groups: dict[tuple[str, object], tuple[F, list[int]]] = {}
    for module, facts in rows:
        number = _NUMBER.search(module)
        key = (_NUMBER.sub("#", module, count=1), _without(facts, number[0] if number else None))
        group = groups.setdefault(key, (facts, []))
        if number:
            group[1].append(int(number[0]))
    return [
        (name.replace("#", _ranges(numbers), 1) if numbers else name, facts)
        for (name, _), (facts, numbers) in groups.items()
    ]


def _without(facts: object, number: str | None) -> object:
    if isinstance(facts, tuple):
        return tuple(_without(fact, number) for fact in facts)
    return re.sub(rf"\b{number}\b", "#", facts, count=1) if number and isinstance(facts, str) else facts


def _ranges(numbers: list[int]) -> str:
    """Sorted numbers as `{0-3,7}`; a single one as it is."""
    ordered = sorted(numbers)
    runs: list[list[int]] = []
    for number in ordered:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return text if len(ordered) == 1 else f"{{{text}}}"
