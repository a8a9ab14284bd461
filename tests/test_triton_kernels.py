"""Kernels in Triton, in its interpreter against the definition."""

from __future__ import annotations

import pytest
import torch

import qcore.testing.interpreter  # noqa: F401  the first to import Triton
from qcore.elements import Block
from qcore.kernel import Kernel
from qcore.kernels.triton.planes import pack_planes, parts_of, planes_of
from qcore.kernels.triton.rows import triton_kernels
from qcore.kernels.triton.tilings import tilings_on
from qcore.platform import Device
from qcore.refusal import Refused
from qcore.scheme import Scheme
from qcore.testing.cases import catalogue, claimed
from qcore.testing.checks import CHECKS, Bench
from qcore.testing.layers import random_layer
from qcore.testing.verify import applies

KERNELS = {kernel.name: kernel for kernel in triton_kernels("triton", ("ampere",), ("bfloat16", "float16"))}
GPU = Device("gpu", "ampere", "Triton's interpreter", "cpu", "sm_80", simulated=True)
CASES = [(name, str(scheme)) for name, kernel in KERNELS.items() for scheme in claimed(kernel, catalogue())]
DENSE_FROM = tilings_on(torch.device("cpu"))[-1].most + 1


def kernel_of(scheme: str) -> Kernel:
    (found,) = (kernel for kernel in KERNELS.values() if kernel.accepts.refuse(Scheme.parse(scheme)) is None)
    return found


def test_the_rows_take_every_weight() -> None:
    """Of the catalogue, all but those of 12 bits; and no scheme twice."""
    taken = [scheme for _, scheme in CASES]
    left = {str(scheme) for scheme in catalogue() if scheme.input is None} - set(taken)
    assert len(set(taken)) == len(taken) > 300
    assert left and all("e4m7" in scheme for scheme in left)


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_products(name: str, scheme: str) -> None:
    """Of every scheme that a row takes: few rows of x, and so many that the weight is made dense, with a last group that is not whole."""
    parsed = Scheme.parse(scheme)
    ragged = not isinstance(parsed.weight.element, Block) and "actorder" not in scheme and "flat" not in scheme
    layer = random_layer(parsed, 37, 203 if ragged else 512)
    for dtype, rows in ((torch.float16, 5), (torch.bfloat16, DENSE_FROM)):
        bench = Bench(KERNELS[name], parsed, str(dtype).removeprefix("torch."), "odd", GPU, layer)
        x = torch.randn(rows, layer.weight.shape[1], generator=torch.Generator().manual_seed(3)).to(dtype)
        bench.compare(f"{rows} rows", bench.run(x), bench.product(x))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "scheme",
    ["W4A16-g128-sym", "W3A16-g32-asym", "W8A16-channel-sym", "W4A16-g128-asym-actorder", "W2A16-g64-zfloat", "W8A16-fp8-block128",
     "W6A16-e3m2-g512", "W4A16-nvfp4", "W4A16-nf4-flat64:dynamic8+flat16384", "W4A16-gguf:q4_k", "W2A16-gguf:iq2_xs"],
)  # fmt: skip
def test_conformance(scheme: str, dtype: str, check: str) -> None:
    kernel = kernel_of(scheme)
    for size in ("tiny", "odd"):
        if applies(check, kernel, size):
            CHECKS[check](Bench(kernel, Scheme.parse(scheme), dtype, size, GPU))


@pytest.mark.parametrize(
    ("scheme", "code"), [("W8A16-fp8-channel", 0xFF), ("W8A16-e5m2-g128", 0x7C), ("W8A16-e4m3fnuz-g32:e8m0", 0x80)]
)
def test_a_weight_that_is_no_number_gives_none(scheme: str, code: int) -> None:
    layer = random_layer(Scheme.parse(scheme), 32, 256)
    layer.weight.codes.view(torch.uint8)[5, 40] = code
    packed = kernel_of(scheme).load().from_layer(layer, torch.float16)
    for rows in (1, DENSE_FROM):
        out = packed(torch.ones(rows, 256, dtype=torch.float16))
        assert bool(out[:, 5].isnan().all()) and int(out.isnan().sum()) == rows


@pytest.mark.parametrize("scheme", [scheme for _, scheme in CASES if "gguf" in scheme])
def test_blocks_take_little_more_than_they_did(scheme: str) -> None:
    """Scales and codes as they are, or close to it: never half as much again."""
    layer = random_layer(Scheme.parse(scheme), 256, 2048)
    packed = kernel_of(scheme).load().from_layer(layer, torch.float16)
    own = sum(part.numel() * part.element_size() for name, part in packed.named_buffers() if name != "table")
    assert own <= 1.5 * layer.weight.nbytes


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
        kernel_of("W4A16-g128-asym-actorder").load().from_layer(layer, torch.float16)


@pytest.mark.parametrize("scheme", ["W4A16-g128-asym", "W2A16-gguf:iq2_xs"])
def test_a_graph_has_shapes_without_running(scheme: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    packed = kernel_of(scheme).load().from_layer(random_layer(Scheme.parse(scheme), 48, 256), torch.float16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert packed(torch.empty(2, 3, 256, dtype=torch.float16)).shape == (2, 3, 48)
