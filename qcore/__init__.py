"""qcore: which quantization runs here, how well, and why not the others - and then runs it.

    ckpt = qcore.open_checkpoint(path)        configs and headers only
    model = qcore.load_model(path)            a transformers model
    tokenizer = qcore.load_tokenizer(path)

Importing this package imports neither torch nor transformers nor numpy: every name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcore.calibration.run import quantize
    from qcore.checkpoint.open import Checkpoint, open_checkpoint
    from qcore.explanation import explain
    from qcore.hookspecs import hookimpl
    from qcore.inventory import devices, plugins
    from qcore.model.load import load_model
    from qcore.model.tokenizer import load_tokenizer
    from qcore.refusal import Refusal, Refused
    from qcore.scheme import Scheme, TensorScheme
    from qcore.support.matrix import Matrix, matrix
    from qcore.tensor import QuantizedTensor

__version__ = "2.0.0"

_HOMES = {
    "Checkpoint": "qcore.checkpoint.open",
    "Matrix": "qcore.support.matrix",
    "QuantizedTensor": "qcore.tensor",
    "Refusal": "qcore.refusal",
    "Refused": "qcore.refusal",
    "Scheme": "qcore.scheme",
    "TensorScheme": "qcore.scheme",
    "devices": "qcore.inventory",
    "explain": "qcore.explanation",
    "hookimpl": "qcore.hookspecs",
    "load_model": "qcore.model.load",
    "load_tokenizer": "qcore.model.tokenizer",
    "matrix": "qcore.support.matrix",
    "open_checkpoint": "qcore.checkpoint.open",
    "plugins": "qcore.inventory",
    "quantize": "qcore.calibration.run",
}

__all__ = [
    "Checkpoint",
    "Matrix",
    "QuantizedTensor",
    "Refusal",
    "Refused",
    "Scheme",
    "TensorScheme",
    "devices",
    "explain",
    "hookimpl",
    "load_model",
    "load_tokenizer",
    "matrix",
    "open_checkpoint",
    "plugins",
    "quantize",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'qcore' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
