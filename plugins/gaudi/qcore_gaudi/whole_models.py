"""Whole models by optimum-habana: its classes of models, whose shapes are static and which HPU graphs take, with qcore's layers inside.

from qcore_gaudi.whole_models import load_model
model = load_model(PATH)
model.generate(**inputs, hpu_graphs=True, lazy_mode=True)   # its generation config needs static_shapes=True and the rest that optimum-habana asks for
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.refusal import Refusal, Refused

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qcore.platform import Device

_NEEDED = (
    ("habana_frameworks", "Use Intel's Gaudi container image, or install its software; it is not on the index."),
    ("optimum.habana", "pip install 'qcore-gaudi[optimum]'"),
)


def load_model(path: str | Path, device: str | Device = "auto", **options: Any) -> PreTrainedModel:
    """`qcore.load_model` of one of optimum-habana's classes, which hold caches of their own: `kv_cache` is none unless it is given. transformers builds no others
    in this process from then on.

    Raises Refused (missing-package, where Intel's software or optimum-habana is not installed; and what qcore.load_model raises).
    """
    for module, fix in _NEEDED:
        if not _is_there(module):
            raise Refused(Refusal("missing-package", "missing-dep", module, "whole models run by it, and it is not installed", fix=fix))  # fmt: skip
    from optimum.habana.transformers.modeling_utils import adapt_transformers_to_gaudi

    adapt_transformers_to_gaudi()
    import torch

    import qcore
    from qcore.model.linear import QuantizedLinear

    model: PreTrainedModel = qcore.load_model(path, device, **{"kv_cache": "none", **options})
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):  # attention asks its projections' weights for type and device alone
            layer.weight = torch.empty(0, dtype=model.dtype, device=model.device)
    return model


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False
