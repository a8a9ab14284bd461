"""Models as Intel Neural Compressor measures and saves them, through the stand-in for Gaudi2: on the fp8 product, with the reference's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qcore
from qcore.layouts.inc_scales import METHODS
from qcore.model.load import kernel_counts
from qcore_gaudi.devices import stand_ins
from test_inc import measured, nodes, saved

BOUND = 1.1
"""How much farther logits may be from the reference's in float32 than the reference's own in bfloat16 are: inputs between two codes go to the one or the other with
its noise, which decides most of the difference."""
DYNAMIC = [name for name, method in METHODS.items() if method.input in ("pow2", "none")]
STATIC = [name for name, method in METHODS.items() if not method.tokens]


def compare(path: Path) -> None:
    tokens, device = torch.tensor([[1, 5, 9, 70, 3, 44]]), stand_ins()[0]
    own = qcore.load_model(path, device, dtype="bfloat16", kv_cache="none")
    assert set(kernel_counts(own)) == {"gaudi_fp8"}
    models = [own, *(qcore.load_model(path, device, dtype=dtype, kernel="reference_linear", kv_cache="none") for dtype in ("bfloat16", "float32"))]  # fmt: skip
    with torch.inference_mode():
        got, rounded, expected = (model(tokens).logits.float() for model in models)
    away, noise = (float((logits - expected).norm() / expected.norm()) for logits in (got, rounded))
    assert 0 < away < BOUND * noise < 0.3


@pytest.mark.parametrize("chip", ["GAUDI2", "GAUDI3"])
@pytest.mark.parametrize("method", STATIC)
def test_measured_models(tmp_path: Path, method: str, chip: str) -> None:
    compare(measured(tmp_path, found=nodes(4.0), scale_method=method, device_for_scales=chip))


@pytest.mark.parametrize("method", DYNAMIC)
def test_models_with_scales_of_run_time(tmp_path: Path, method: str) -> None:
    config: dict[str, Any] = {"scale_method": method, "device_for_scales": "GAUDI2", "dynamic_quantization": True}
    compare(measured(tmp_path, name="", dump_stats_path="", **config))


@pytest.mark.parametrize("channels", [False, True])
def test_saved_models(tmp_path: Path, channels: bool) -> None:
    compare(saved(tmp_path, channels=channels))
