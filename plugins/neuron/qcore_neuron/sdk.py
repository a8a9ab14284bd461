"""AWS's torch_neuronx, told from the placeholder of that name in the package index, which is a line of text."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

_NAME = "torch_neuronx"
_CODE = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Try, ast.If)


def has_code() -> bool:
    """Whether a module of that name does anything. It is read and not imported, which takes seconds of torch's and of AWS's own."""
    try:
        spec = importlib.util.find_spec(_NAME)
        if spec is None or spec.origin is None:
            return False
        parsed = ast.parse(Path(spec.origin).read_bytes())
    except (ImportError, OSError, SyntaxError, ValueError):
        return False
    return any(isinstance(node, _CODE) for node in parsed.body)


def sdk() -> ModuleType | None:
    """The module, imported; None where there is none, or one that has not what traces a model. Raises whatever its import raises."""
    try:
        module = importlib.import_module(_NAME)
    except ModuleNotFoundError as error:
        if error.name == _NAME:
            return None
        raise
    return module if callable(getattr(module, "trace", None)) else None
