"""The support matrix as one self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TEMPLATE = Path(__file__).with_name("page.html")
_PLACE = "/*MATRIX*/null"


def render(document: Mapping[str, Any]) -> str:
    """The page of a matrix document (`qcore.support.matrix.Matrix.to_dict`); it works offline and loads nothing.

    The document stands in the page as JSON with `<`, `>` and `&` escaped, so that no text in it can end the element or
    begin another.
    """
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    before, after = _TEMPLATE.read_text(encoding="utf-8").split(_PLACE)
    return before + text + after
