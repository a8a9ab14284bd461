"""Kernels in CUDA C++: their source on a CPU, thread by thread, against the definition, and compiled for GPUs that are not here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qcore.discovery import registry
from qcore.platform import Device
from qcore.refusal import Refused
from qcore.scheme import Scheme
from qcore.testing.cases import catalogue, claimed
from qcore.testing.checks import CHECKS, Bench
from qcore.testing.layers import random_layer
from qcore.testing.verify import applies
from qcore_cuda import nvrtc
from qcore_cuda.kernels.marlin import permuted

KERNELS = {kernel.name: kernel for kernel, _ in registry().kernels if kernel.family == "marlin"}
GPU = Device("gpu", "ampere", "its source on a CPU", "cpu", "sm_80", frozenset({"bf16"}), simulated=True)
CASES = [(n, str(s)) for n, k in KERNELS.items() if k.platforms != ("turing",) for s in claimed(k, catalogue())]


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_products(name: str, scheme: str) -> None:
    """Every number of blocks of eight rows of x, and so many rows that the weight is made dense."""
    layer = random_layer(Scheme.parse(scheme), 48, 1024)
    for dtype, rows in (("float16", 1), ("bfloat16", 9), ("float16", 32), ("bfloat16", 61), ("float16", 65)):
        bench = Bench(KERNELS[name], Scheme.parse(scheme), dtype, "odd", GPU, layer)
        x = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(3)).to(getattr(torch, dtype))
        bench.compare(f"{rows} rows", bench.run(x), bench.product(x))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("name", "scheme"),
    [("marlin_int4", "W4A16-g128-asym-actorder"), ("marlin_int4", "W4A16-channel-sym"), ("marlin_eights", "W8A16-g128-sym"),
     ("marlin_eights", "W8A16-fp8-channel")],
)  # fmt: skip
def test_conformance(name: str, scheme: str, dtype: str, check: str) -> None:
    for size in ("tiny", "odd"):
        if applies(check, KERNELS[name], size):
            CHECKS[check](Bench(KERNELS[name], Scheme.parse(scheme), dtype, size, GPU))


@pytest.mark.parametrize(("columns", "group"), [(64, 64), (192, 64), (832, 64), (1408, 128), (2560, 512)])
def test_sums_that_warps_share(columns: int, group: int) -> None:
    """Fewer groups than warps, some more, and a last round that is not whole."""
    scheme = Scheme.parse(f"W4A16-g{group}-asym")
    layer = random_layer(scheme, 16, columns)
    bench = Bench(KERNELS["marlin_int4"], scheme, "float16", "odd", GPU, layer)
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(3)).to(torch.float16)
    bench.compare("three rows", bench.run(x), bench.product(x))


@pytest.mark.parametrize(("code", "words"), [("Int4", 128), ("Int8", 256), ("Float8", 256)])
def test_every_code_has_its_place(code: str, words: int) -> None:
    """Chunks hold each code once: a code that is set alone sets bits that no other does."""
    bits = 4 if code == "Int4" else 8
    seen = torch.zeros(words * 32, dtype=torch.bool)
    for row in range(16):
        for column in range(64):
            codes = torch.zeros(16, 64, dtype=torch.uint8)
            codes[row, column] = (1 << bits) - 1
            found = (permuted(codes, code).flatten()[:, None] >> torch.arange(32) & 1).flatten().bool()
            assert int(found.sum()) == bits and not (found & seen).any()
            seen |= found
    assert seen.all()


def test_a_weight_that_is_no_number_gives_none() -> None:
    layer = random_layer(Scheme.parse("W8A16-fp8-channel"), 32, 128)
    layer.weight.codes.view(torch.uint8)[5, 40] = 0xFF
    packed = KERNELS["marlin_eights"].load().from_layer(layer, torch.float16)
    for rows in (1, 65):
        out = packed(torch.ones(rows, 128, dtype=torch.float16))
        assert bool(out[:, 5].isnan().all()) and int(out.isnan().sum()) == rows


def test_a_graph_has_shapes_without_running() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    packed = (
        KERNELS["marlin_int4"].load().from_layer(random_layer(Scheme.parse("W4A16-g128-sym"), 48, 256), torch.float16)
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert packed(torch.empty(2, 3, 256, dtype=torch.float16)).shape == (2, 3, 48)


@pytest.mark.parametrize("name", KERNELS)
def test_tensor_cores_multiply(name: str) -> None:
    """On the oldest architecture and the newest one; nothing to speak of is spilled."""
    kernel = KERNELS[name]
    targets = [target for platform in kernel.platforms for target in registry().platforms[platform].targets]
    for scheme in ("W4A16-g128-asym", "W8A16-fp8-channel"):
        if kernel.accepts.refuse(Scheme.parse(scheme)) is not None:
            continue
        for target in (targets[0], targets[-1]):
            for program in kernel.load().programs(Scheme.parse(scheme), kernel.dtypes[0], target):
                made = program.compile(target)
                assert made.matrix.startswith("mma.sync") == ("dense" not in program.name), program.name
                assert made.registers <= 255 and made.spilled <= 16 and made.shared <= 8192, (program.name, made)


def test_a_fault_of_the_compiler_is_told() -> None:
    with pytest.raises(RuntimeError, match="identifier"):
        nvrtc.compiled('extern "C" __global__ void f() { nothing(); }', "sm_80")


def test_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_NAMES", ())
    nvrtc._library.cache_clear()
    with pytest.raises(Refused, match="NVRTC"):
        nvrtc.compiled("", "sm_80")
    nvrtc._library.cache_clear()


def test_sources_are_read_by_the_digest() -> None:
    from qcore.support.digest import source_digest

    kernel = KERNELS["marlin_int4"]
    assert kernel.sources == ("native/*",) and source_digest(kernel)
    assert {path.name for path in Path(nvrtc.__file__).with_name("native").iterdir()} == {
        "device.cuh",
        "emulator.h",
        "marlin.cuh",
    }
