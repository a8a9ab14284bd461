"""Integer weights by Triton: in its interpreter against the definition, and compiled for GPUs that are not here."""

from __future__ import annotations

import pytest
import torch

import qcore.testing.interpreter  # noqa: F401  the first to import Triton
from qcore.discovery import registry
from qcore.kernels.triton.planes import pack_planes, parts_of, planes_of
from qcore.platform import Device
from qcore.refusal import Refused
from qcore.scheme import Scheme
from qcore.testing.cases import catalogue, claimed
from qcore.testing.checks import CHECKS, Bench
from qcore.testing.layers import random_layer
from qcore.testing.verify import applies

KERNEL = next(kernel for kernel, _ in registry().kernels if kernel.name == "triton_integers")
GPU = Device("gpu", "ampere", "Triton's interpreter", "cpu", "sm_80", frozenset({"bf16"}), simulated=True)
SCHEMES = [str(scheme) for scheme in claimed(KERNEL, catalogue())]


def test_the_row_takes_every_integer() -> None:
    found = {Scheme.parse(scheme).weight.bits for scheme in SCHEMES}
    assert found == set(range(1, 9)) and len(SCHEMES) > 200


@pytest.mark.parametrize("scheme", SCHEMES)
def test_products(scheme: str) -> None:
    """Of every scheme that the row takes: one batch, with a last group that is not whole."""
    layer = random_layer(Scheme.parse(scheme), 37, 203 if "actorder" not in scheme else 256)
    bench = Bench(KERNEL, Scheme.parse(scheme), "float16", "odd", GPU, layer)
    x = torch.randn(5, layer.weight.shape[1], generator=torch.Generator().manual_seed(3)).to(torch.float16)
    bench.compare("five rows", bench.run(x), bench.product(x))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("dtype", KERNEL.dtypes)
@pytest.mark.parametrize(
    "scheme", ["W4A16-g128-sym", "W3A16-g32-asym", "W8A16-channel-sym", "W4A16-g128-asym-actorder", "W2A16-g64-zfloat"]
)
def test_conformance(scheme: str, dtype: str, check: str) -> None:
    for size in ("tiny", "odd"):
        if applies(check, KERNEL, size):
            CHECKS[check](Bench(KERNEL, Scheme.parse(scheme), dtype, size, GPU))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("section", [16, 64])
def test_planes_hold_every_code(bits: int, section: int) -> None:
    codes = torch.randint(
        0, 1 << bits, (3, 2 * section * parts_of(bits) - 5), generator=torch.Generator().manual_seed(bits)
    ).to(torch.uint8)
    packed = pack_planes(codes, bits, section)
    assert packed.shape == (3, 2 * section * parts_of(bits) * bits // 8)
    chunks = packed.unflatten(1, (2, -1, section))  # [rows, chunks, vectors, section]
    found, below, first = torch.zeros(3, 2, parts_of(bits), section, dtype=torch.int64), 0, 0
    for width in planes_of(bits):
        for part in range(parts_of(bits)):
            vector = chunks[:, :, first + part * width // 8].to(torch.int64)
            found[:, :, part] |= (vector >> part * width % 8 & (1 << width) - 1) << below
        first, below = first + parts_of(bits) * width // 8, below + width
    assert torch.equal(found.flatten(1)[:, : codes.shape[1]], codes.long())
    assert not found.flatten(1)[:, codes.shape[1] :].any()


def test_uneven_act_order_groups_are_refused() -> None:
    layer = random_layer(Scheme.parse("W4A16-g128-asym-actorder"), 16, 256)
    index = layer.weight.index
    assert index is not None
    index[index.argmax()] = 0
    with pytest.raises(Refused, match="shape-unsupported"):
        KERNEL.load().from_layer(layer, torch.float16)


def test_a_graph_has_shapes_without_running() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    packed = KERNEL.load().from_layer(random_layer(Scheme.parse("W4A16-g128-asym"), 48, 256), torch.float16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert packed(torch.empty(2, 3, 256, dtype=torch.float16)).shape == (2, 3, 48)
