"""The support matrix as one self-contained HTML page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TEMPLATE = Path(__file__).with_name("page.html")
_PLACE = "/*MATRIX*/null"
_WORTH = 16
"""Characters of JSON above which a value that is there twice is named."""


def render(document: Mapping[str, Any]) -> str:
    """The page of a matrix document (`qcore.support.matrix.Matrix.to_dict`); it works offline and loads nothing.

    The document stands in the page as JSON with `<`, `>` and `&` escaped, so that no text in it can end the element or
    begin another: {"$shared": [value, ...], "matrix": document}, where {"$": n} stands for the value of that number.
    """
    text = _json(_shared(document))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    before, after = _TEMPLATE.read_text(encoding="utf-8").split(_PLACE)
    return before + text + after


def _shared(document: Mapping[str, Any]) -> dict[str, Any]:
    """What is in the document more than once, such as what a kernel's records have in common, is in the page once."""
    times: Counter[str] = Counter()

    def count(value: Any) -> None:
        if isinstance(value, Mapping | list | str):
            times[_json(value)] += 1
        for part in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
            count(part)

    values: dict[str, tuple[int, Any]] = {}

    def named(value: Any) -> Any:
        if isinstance(value, Mapping | list | str) and len(text := _json(value)) > _WORTH and times[text] > 1:
            return {"$": values.setdefault(text, (len(values), value))[0]}
        if isinstance(value, Mapping):
            return {key: named(part) for key, part in value.items()}
        return [named(part) for part in value] if isinstance(value, list) else value

    count(document)
    matrix = {key: named(part) for key, part in document.items()}
    return {"$shared": [value for _, value in values.values()], "matrix": matrix}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
