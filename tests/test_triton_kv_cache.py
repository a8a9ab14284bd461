"""The kv cache in Triton, in its interpreter: byte for byte the reference's."""

from __future__ import annotations

import pytest
import torch

import qcore.testing.interpreter  # noqa: F401  the first to import Triton
from qcore.elements import Element, Float, Int
from qcore.kernels.kv_cache import KvRounding
from qcore.kernels.triton.kv_cache import KvCache
from qcore.kernels.triton.rows import triton_kv_cache
from qcore.platform import Device
from qcore.scheme import Scheme
from qcore.testing.checks import CHECKS, Bench
from qcore.testing.verify import applies

KERNEL = triton_kv_cache("triton", ("ampere",), ("bfloat16", "float16"))
GPU = Device("gpu", "ampere", "Triton's interpreter", "cpu", "sm_80", simulated=True)
SCALES = (None, torch.tensor([0.02]), torch.tensor([0.01, 0.02, 0.03]).view(3, 1, 1))
"""At run time, one, and one for each head."""


@pytest.mark.parametrize("element", [Float("e4m3fn"), Float("e5m2"), Int(8, signed=True)], ids=str)
@pytest.mark.parametrize("scale", SCALES, ids=["dynamic", "tensor", "heads"])
@pytest.mark.parametrize("shifted", [False, True], ids=["sym", "asym"])
def test_bytes_are_the_references(element: Element, scale: torch.Tensor | None, shifted: bool) -> None:
    if shifted and (scale is None or isinstance(element, Float)):
        pytest.skip("no such cache")
    zero = torch.full_like(scale, -3.0) if shifted and scale is not None else None
    states = torch.randn(2, 3, 5, 72, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    states[0, 0, 0], states[1, 2, 4, :2] = 0, torch.tensor([3e4, -3e4])
    reference, own = KvRounding(element, scale, zero), KvCache(element, scale, zero)
    rows = reference.encode(states)
    assert torch.equal(own.encode(states), rows)
    assert torch.equal(own.encode(states.transpose(1, 2).contiguous().transpose(1, 2)), rows)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(own.decode(rows, dtype), reference.decode(rows, dtype))
    assert own.encode(states[:, :, :0]).shape == (2, 3, 0, rows.shape[-1])


def test_scales_that_are_inverted_stay_with_the_reference() -> None:
    states = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    given = (Float("e4m3fn"), torch.tensor([0.02]), None, "inverses")
    assert torch.equal(KvCache(*given).encode(states), KvRounding(*given).encode(states))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("scheme", ["W8A16-fp8-tensor", "W8A16-tensor-sym"])
def test_conformance(scheme: str, check: str) -> None:
    if applies(check, KERNEL, "odd"):
        CHECKS[check](Bench(KERNEL, Scheme.parse(scheme), "bfloat16", "odd", GPU))
