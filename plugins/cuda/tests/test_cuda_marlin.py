"""Kernels in CUDA C++: their source on a CPU, thread by thread, against the definition, and compiled for GPUs that are not here."""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

import qcore.testing.interpreter  # noqa: F401  the first to import Triton
from qcore.discovery import registry
from qcore.platform import Device
from qcore.refusal import Refused
from qcore.scheme import Scheme
from qcore.select import LayerRequest, select
from qcore.tensor import LayerTensors, QuantizedTensor
from qcore.testing.cases import catalogue, claimed
from qcore.testing.checks import CHECKS, Bench
from qcore.testing.layers import random_layer
from qcore.testing.verify import applies
from qcore_cuda import driver, nvrtc
from qcore_cuda.cpp import CppProgram
from qcore_cuda.kernels import marlin_experts, marlin_product
from qcore_cuda.kernels.marlin import permuted

KERNELS = {kernel.name: kernel for kernel, _ in registry().kernels if kernel.family == "marlin"}
GPU = Device("gpu", "ampere", "its source on a CPU", "cpu", "sm_80", frozenset({"bf16"}), simulated=True)
HOPPER = (4, 227 << 10, True)
"""What the launcher is told of a GPU with Hopper's matrix unit."""
CASES = [(n, str(s)) for n, k in KERNELS.items() if k.platforms != ("turing",) for s in claimed(k, catalogue())]


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_products(name: str, scheme: str) -> None:
    """One row of x, every number of blocks of eight, and so many rows that the weight is made dense."""
    layer = random_layer(Scheme.parse(scheme), 48, 1024)
    for dtype, rows in (
        ("float16", 1),
        ("bfloat16", 2),
        ("float16", 9),
        ("bfloat16", 32),
        ("float16", 100),
        ("bfloat16", 257),
    ):
        _compare(name, scheme, layer, dtype, rows)


def _compare(name: str, scheme: str, layer: LayerTensors, dtype: str, rows: int) -> None:
    bench = Bench(KERNELS[name], Scheme.parse(scheme), dtype, "odd", GPU, layer)
    x = torch.randn(rows, layer.weight.shape[1], generator=torch.Generator().manual_seed(3)).to(getattr(torch, dtype))
    bench.compare(f"{rows} rows", bench.run(x), bench.product(x))


@pytest.mark.parametrize(
    ("name", "scheme", "columns"),
    [
        ("marlin_int4", "W4A16-g16-sym", 320), ("marlin_int4", "W4A16-g32-asym", 832), ("marlin_int4", "W4A16-g64-sym", 192),
        ("marlin_int4", "W4A16-g128-asym", 1408), ("marlin_int4", "W4A16-g192-sym", 1920), ("marlin_int4", "W4A16-g512-asym", 2560),
        ("marlin_int4", "W4A16-channel-sym", 832), ("marlin_eights", "W8A16-g128-sym", 640), ("marlin_eights", "W8A16-fp8-channel", 64),
        ("marlin_tables", "W4A16-nf4-g64", 832), ("marlin_tables", "W4A16-nvfp4", 320), ("marlin_tables", "W4A16-mxfp4", 832),
        ("marlin_blocks", "W4A16-gguf:q4_0", 832), ("marlin_blocks", "W4A16-gguf:iq4_xs", 768), ("marlin_blocks", "W8A16-gguf:q8_0", 320),
    ],
)  # fmt: skip
def test_products_of_warpgroups(monkeypatch: pytest.MonkeyPatch, name: str, scheme: str, columns: int) -> None:
    """Every size of a block, rows and steps that are not whole, and groups longer and shorter than a step."""
    monkeypatch.setattr(marlin_product, "_limits", lambda place: HOPPER)
    layer = random_layer(Scheme.parse(scheme), 208, columns)
    for dtype, rows in (("bfloat16", 2), ("float16", 17), ("bfloat16", 64), ("float16", 130)):
        _compare(name, scheme, layer, dtype, rows)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("marlin_fp16_int4", "W4A16-g128-asym"), ("marlin_fp16_eights", "W8A16-g128-sym"), ("marlin_fp16_tables", "W4A16-nvfp4"),
     ("marlin_fp16_blocks", "W4A16-gguf:mxfp4"), ("marlin_fp16_blocks", "W8A16-gguf:q8_0")],
)  # fmt: skip
def test_products_in_little_memory(name: str, scheme: str) -> None:
    """Every size of a block; a small GPU shares columns among a block's warps, as far as two steps fit."""
    layer = random_layer(Scheme.parse(scheme), 48, 1408)
    for rows in (1, 2, 9, 30, 61, 100, 257):
        _compare(name, scheme, layer, "float16", rows)
    form = KERNELS[name].load().from_layer(layer, torch.float16).form
    for tokens in marlin_product.TOKENS:
        for deep in (1, 2, 4):
            program, fewer = form.wide_in(tokens, deep, 64 << 10)
            assert 1 <= fewer <= deep and program.shared <= 64 << 10
            assert f", {fewer}, 1>" not in program.body


BLOCKS = [str(scheme) for scheme in claimed(KERNELS["marlin_blocks"], catalogue())]


@pytest.mark.parametrize("name", ["marlin_blocks", "marlin_fp16_blocks"])
@pytest.mark.parametrize("scheme", BLOCKS)
def test_products_of_blocks(name: str, scheme: str) -> None:
    """Odd numbers of rows of x, and of chunks where a block is no longer than one."""
    layer = random_layer(Scheme.parse(scheme), 48, 768 if scheme.endswith("iq4_xs") else 832)
    for dtype in KERNELS[name].dtypes:
        for rows in (1, 7, 17):
            _compare(name, scheme, layer, dtype, rows)


@pytest.mark.parametrize(("platform", "name"), [("hopper", "marlin_blocks"), ("turing", "marlin_fp16_blocks")])
@pytest.mark.parametrize("scheme", BLOCKS)
def test_blocks_are_chosen_where_their_shape_is_whole(platform: str, name: str, scheme: str) -> None:
    for rows, chosen in ((48, True), (47, False)):
        request = LayerRequest("linear", Scheme.parse(scheme), (rows, 768), "float16")
        found = select(request, platform, registry().kernels)
        assert found.kernel is not None and (found.kernel.name == name) == chosen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", BLOCKS)
def test_blocks_are_what_they_are_defined_as(scheme: str, dtype: torch.dtype) -> None:
    """To the last bit: weights made dense; and of any bytes, whose scales are negative, subnormal, zero or no numbers, multiplied."""
    parsed, implementation = Scheme.parse(scheme), KERNELS["marlin_blocks"].load()
    layer = random_layer(parsed, 80, 512)
    found = implementation.from_layer(layer, dtype)(torch.eye(512, dtype=dtype)).t()
    assert torch.equal(found, layer.weight.dequantize(dtype))
    like = random_layer(parsed, 80, 256).weight
    codes = torch.randint(0, 256, like.codes.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    layer = LayerTensors(QuantizedTensor(parsed, like.shape, codes))
    found = implementation.from_layer(layer, dtype)(torch.eye(256, dtype=dtype)).t()
    finite = layer.weight.dequantize().isfinite()
    whole = finite.all(1)
    assert int(whole.sum()) > 0
    assert torch.equal(found[whole], layer.weight.dequantize(dtype)[whole])
    assert not found[~finite].isfinite().any()


@pytest.mark.parametrize("processors", [4, 132])
@pytest.mark.parametrize(
    ("name", "scheme", "columns"),
    [
        ("marlin_int4", "W4A16-g32-asym", 832), ("marlin_int4", "W4A16-g512-asym", 2560), ("marlin_int4", "W4A16-g128-asym-actorder", 1408),
        ("marlin_eights", "W8A16-g128-sym", 640), ("marlin_tables", "W4A16-nvfp4", 320), ("marlin_fp16_eights", "W8A16-g16-sym", 1408),
        ("marlin_blocks", "W4A16-gguf:iq4_xs", 768), ("marlin_blocks", "W4A16-gguf:nvfp4", 320), ("marlin_fp16_blocks", "W8A16-gguf:q8_0", 1408),
    ],
)  # fmt: skip
def test_products_of_experts(
    name: str, scheme: str, columns: int, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of one row, of eight and of sixty-four, whose sums some share where there are many processors."""
    monkeypatch.setattr(marlin_experts, "_limits", lambda place: (processors, 160 << 10, False))
    kernel, parsed = KERNELS[name], Scheme.parse(scheme)
    benches = [
        Bench(kernel, parsed, "float16", "odd", GPU, random_layer(parsed, 208, columns, seed)) for seed in range(5)
    ]
    packed = [bench.packed for bench in benches]
    stack = kernel.load().stacked(packed)  # type: ignore[attr-defined]
    for counts in ((0, 1, 0, 0, 1), (9, 0, 1, 3, 0), (0, 70, 0, 65, 1)):
        experts = torch.arange(5).repeat_interleave(torch.tensor(counts))
        x = torch.randn(len(experts), columns, generator=torch.Generator().manual_seed(3)).to(torch.float16)
        expected = torch.stack([benches[expert].product(row) for expert, row in zip(experts.tolist(), x, strict=True)])
        benches[0].compare(f"rows {counts}", stack(x, experts.to(torch.int32)), expected)


def test_experts_with_tables_of_their_own_are_not_held_as_one() -> None:
    layer = random_layer(Scheme.parse("W4A16-nf4-g64"), 48, 256)
    implementation = KERNELS["marlin_tables"].load()
    layers = [implementation.from_layer(layer, torch.float16) for _ in range(2)]
    assert implementation.stackable(layers)  # type: ignore[attr-defined]
    layers[1].get_buffer("table")[0, 3] += 1
    assert not implementation.stackable(layers)  # type: ignore[attr-defined]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("name", "scheme"),
    [("marlin_int4", "W4A16-g128-asym-actorder"), ("marlin_int4", "W4A16-channel-sym"), ("marlin_eights", "W8A16-g128-sym"),
     ("marlin_eights", "W8A16-fp8-channel"), ("marlin_blocks", "W4A16-gguf:iq4_xs"), ("marlin_blocks", "W8A16-gguf:q8_0")],
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
    for rows in (1, 3):
        _compare("marlin_int4", str(scheme), layer, "float16", rows)


@pytest.mark.parametrize(("code", "words"), [("Int4", 128), ("Table4", 128), ("Int8", 256), ("Float8", 256)])
def test_every_code_has_its_place(code: str, words: int) -> None:
    """Chunks hold each code once: a code that is set alone sets bits that no other does."""
    bits = 4 if code.endswith("4") else 8
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
    for rows in (1, 65, 257):
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
    for scheme in ("W4A16-g128-asym", "W8A16-fp8-channel", "W4A16-gguf:iq4_xs"):
        if kernel.accepts.refuse(Scheme.parse(scheme)) is not None:
            continue
        for target in (
            targets[0],
            *(target for target in targets if target.name == marlin_product.HOPPER),
            targets[-1],
        ):
            for program in kernel.load().programs(Scheme.parse(scheme), kernel.dtypes[0], target):
                if not isinstance(program, CppProgram):
                    continue  # Triton's, of the blocks of experts
                made = program.compile(target)
                multiplies = "dense" not in program.name and "add" not in program.name
                unit = "wgmma" if program.own else "mma.sync"
                assert made.matrix.startswith(unit) == multiplies, program.name
                assert (
                    made.registers <= 255 and made.spilled <= 32 and made.shared <= target.shared + target.reserved
                ), (
                    program.name,
                    made,
                )


@pytest.mark.parametrize("rows", marlin_product.WARPGROUP_ROWS)
def test_products_of_warpgroups_run_on(rows: int) -> None:
    """Four for each chunk and no wait between them: where the compiler does not see that it may, it waits for each."""
    from triton.backends import nvidia

    form = marlin_product.Form("Int4", 8, False, torch.bfloat16, torch.bfloat16)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(nvrtc.machine_code(form.warpgroup(rows, HOPPER[1]).text(), "sm_90a"))
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "nvdisasm"
        said = subprocess.run([tool, "-c", file.name], stdout=subprocess.PIPE, text=True, check=True).stdout
    products = len(re.findall(r"\bHGMMA\.64x", said))
    assert products >= 8 and products % 4 == 0
    assert len(re.findall(r"WARPGROUP\.DEPBAR", said)) <= products // 4 + 1


@pytest.mark.parametrize("scheme", ["W4A16-g128-asym", "W4A16-g512-sym"])
def test_blocks_share_long_rows(scheme: str) -> None:
    """Of a weight of few rows; what blocks have is added behind."""
    assert marlin_product.vector_grid(1, 118, *marlin_product._limits(torch.device("cpu"))[:2]) == (1, 4, 1)
    _compare("marlin_int4", scheme, random_layer(Scheme.parse(scheme), 16, 118 * 64), "bfloat16", 1)


@pytest.mark.parametrize("processors", [1, 4, 48, 132])
@pytest.mark.parametrize("tiles", [1, 12, 64, 256, 688, 1792])
@pytest.mark.parametrize("chunks", [1, 9, 64, 172, 448])
def test_every_processor_gets_work(tiles: int, chunks: int, processors: int) -> None:
    """Blocks have work, and there are no more of them than so many rows of chunks and columns give."""
    for shared in (64 << 10, 227 << 10):
        across, shares, _ = marlin_product.vector_grid(tiles, chunks, processors, shared)
        assert 1 <= across <= tiles and 1 <= shares <= max(1, chunks)
        assert -(-chunks // shares) * 128 <= shared // 3 + 128, "x has its place"
        assert across * shares >= min(tiles, processors) or across == tiles
    deep, shares = marlin_product.wide_split(tiles, chunks, 1, processors)
    assert deep in (1, 2, 4) and 1 <= shares <= max(1, chunks // deep)


def test_launches_are_laid_out_as_the_driver_has_them() -> None:
    """Sizes of cuda.h's CUlaunchAttribute and CUlaunchConfig, and where their members are."""
    assert ctypes.sizeof(driver._Attribute) == 72 and driver._Attribute.value.offset == 8
    assert ctypes.sizeof(driver._Config) == 56
    assert [getattr(driver._Config, name).offset for name in ("shared", "stream", "attributes", "count")] == [
        24,
        32,
        40,
        48,
    ]


def test_the_drivers_words_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        def cuGetErrorString(self, status: int, words: object) -> None:  # noqa: N802  the driver's own name
            ctypes.cast(words, ctypes.POINTER(ctypes.c_char_p))[0] = b"out of memory"

    monkeypatch.setattr(driver, "_driver", Driver)
    with pytest.raises(RuntimeError, match=r"out of memory \(2\)"):
        driver._checked(2)


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
    """Rows name every file that their programs are made of, and all of native/ together."""
    from qcore.support.digest import source_digest

    folder = Path(nvrtc.__file__).with_name("native")
    rows = [
        kernel for kernel, _ in registry().kernels if kernel.sources and kernel.implementation.startswith("qcore_cuda")
    ]
    assert {path.name for path in folder.iterdir()} == {Path(name).name for kernel in rows for name in kernel.sources}
    for kernel in rows:
        assert source_digest(kernel)
        scheme, needed = claimed(kernel, catalogue())[0], {"device.cuh", "emulator.h"}
        targets = [target for platform in kernel.platforms for target in registry().platforms[platform].targets]
        programs = [
            program for target in targets for program in kernel.load().programs(scheme, kernel.dtypes[0], target)
        ]
        waiting = {program.source for program in programs if isinstance(program, CppProgram)}
        while waiting:
            needed.add(name := waiting.pop())
            waiting |= set(re.findall(r'#include "(.*)"', (folder / name).read_text())) - needed
        assert {f"native/{name}" for name in needed} <= set(kernel.sources), kernel.name
