"""AWS's torch_neuronx, told from the placeholder of that name in the package index by what it has."""

from __future__ import annotations

import importlib
from types import ModuleType

_NAME = "torch_neuronx"


def sdk() -> ModuleType | None:
    """The module, imported; None where there is none, or one that traces nothing. Raises whatever its import raises."""
    try:
        module = importlib.import_module(_NAME)
    except ModuleNotFoundError as error:
        if error.name == _NAME:
            return None
        raise
    return module if callable(getattr(module, "trace", None)) else None
