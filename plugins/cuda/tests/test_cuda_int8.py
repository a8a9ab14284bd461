"""int8 x int8 in CUDA C++: its source on a CPU, thread by thread, to the last bit, and compiled for Volta and Turing. `QCORE_DEVICE=cuda:0` has a GPU compute
instead, which need be neither: all later ones have the instructions."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from qcore.accuracy import worst_error
from qcore.discovery import registry
from qcore.kernels import llm_int8
from qcore.kernels.activations import dynamic_int8, static_int8
from qcore.platform import Device
from qcore.refusal import Refused
from qcore.scheme import Scheme
from qcore.select import LayerRequest, select
from qcore.testing.cases import catalogue, claimed
from qcore.testing.checks import CHECKS, Bench
from qcore.testing.layers import random_layer
from qcore.testing.verify import applies
from qcore_cuda import nvrtc
from qcore_cuda.cpp import CppProgram
from qcore_cuda.kernels import int8, int8_outliers

KERNELS = {kernel.name: kernel for kernel, _ in registry().kernels if kernel.family == "cuda"}
LLM_INT8 = "W8A8-int8-channel-sym/int8-token-sym-dyn-outliers6.0"
PLACE = torch.device(os.environ.get("QCORE_DEVICE", "cpu"))
CPU = Device("gpu", "turing", "its source on a CPU", "cpu", "sm_75", frozenset({"dp4a"}), simulated=True)


def _rounded(x: torch.Tensor, given: torch.Tensor | None, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = int8.round_input(x.to(PLACE), None if given is None else given.to(PLACE), columns)
    return codes.cpu(), scales.cpu()


def _product(*parts: torch.Tensor, unit: str) -> torch.Tensor:
    found: torch.Tensor = int8.product(*(part.to(PLACE) for part in parts), unit)
    return found.cpu()


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _inputs(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes with zeros behind them, and scales."""
    codes, scales = dynamic_int8(3 * _random(rows, columns))
    return torch.nn.functional.pad(codes, (0, -columns % int8.STEP)), scales.flatten()


def _weight(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    codes = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=random)
    return torch.nn.functional.pad(codes, (0, -columns % int8.STEP)), torch.rand(rows, generator=random) * 1e-3


def _exact(x: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    sums = (x.double() @ weight.double().t()).to(torch.float32)  # whole numbers below 2^53, rounded once
    return (sums * scales * inputs[:, None]).to(torch.float16)


@pytest.mark.parametrize("columns", [1, 8, 203, 264, 4096])
@pytest.mark.parametrize("static", [False, True])
def test_rounding(columns: int, static: bool) -> None:
    """Every row as the definition has it, and those behind gaps too; zeros follow."""
    wide = (3 * _random(7, columns + 24)).to(PLACE, torch.float16)
    given = torch.tensor([0.0321]) if static else None
    for x in (wide[:, :columns].contiguous(), wide[:, 8 : 8 + columns], wide[:, 3 : 3 + columns]):
        padded = -(-columns // int8.STEP) * int8.STEP
        codes, scales = _rounded(x, given, padded)
        wanted, scale = dynamic_int8(x.cpu()) if given is None else static_int8(x.cpu(), given)
        assert torch.equal(codes[:, :columns], wanted) and not codes[:, columns:].any()
        assert torch.equal(scales, scale.flatten().expand(7))


def test_rounding_of_every_float16() -> None:
    """Under one scale, and rows of one number each, which is their own scale's; what is no number leaves its row without one."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    numbers = every[every.isfinite()]
    given = torch.tensor([0.0703125])  # halves of steps are among them
    codes, _ = _rounded(numbers[None], given, 63488)
    assert torch.equal(codes[0], static_int8(numbers, given)[0])
    rows = numbers[::61, None].contiguous()
    codes, scales = _rounded(rows, None, int8.STEP)
    wanted, scale = dynamic_int8(rows)
    assert torch.equal(codes[:, :1], wanted) and torch.equal(scales, scale.flatten())
    beyond = torch.tensor([[1.0, float("nan")], [1.0, float("inf")], [1.0, 2.0]], dtype=torch.float16)
    for row, found in enumerate(_rounded(beyond, None, int8.STEP)[1].isnan().tolist()):
        assert found == (row < 2)
    assert _rounded(beyond, given, int8.STEP)[1].isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("unit", ["dots", "tensors"])
@pytest.mark.parametrize(("outputs", "columns"), [(1, 1), (37, 203), (130, 640), (40, 4160)])
def test_products(unit: str, outputs: int, columns: int) -> None:
    """Every program, to the last bit: a few rows, tiles that are not whole, and columns that warps and blocks share."""
    weight, scales = _weight(outputs, columns)
    for rows in (1, 2, 3, 8, 13, 17, 33, 70, 150):
        if rows * columns * outputs > 1 << 24:
            continue
        x, inputs = _inputs(rows, columns)
        assert torch.equal(_product(x, inputs, weight, scales, unit=unit), _exact(x, inputs, weight, scales)), rows


@pytest.mark.parametrize(("rows", "columns"), [(1, 203), (3, 5000), (40, 300)])
def test_outliers_are_kept(rows: int, columns: int) -> None:
    """Codes, scales and columns as LLM.int8 has them; rows of zeros, and threads that mark one column together."""
    x = (2 * _random(rows, columns)).to(torch.float16)
    x[0, 3], x[-1, :5] = 6.0, torch.tensor([0.0, 5.996, -6.0, 100.0, -0.0])
    x[rows // 2] = 0 if rows > 1 else x[0]
    padded = -(-columns // int8.STEP) * int8.STEP
    codes, scales, kept = (part.cpu() for part in int8_outliers.split(x.to(PLACE), padded, 0x4600))
    wanted, largest, columns_kept = llm_int8.split(x, 6.0)
    assert torch.equal(kept[:columns].bool(), columns_kept) and not kept[columns:].any() and columns_kept[3]
    assert torch.equal(codes[:, :columns].float(), wanted) and not codes[:, columns:].any()
    assert torch.equal(scales, (largest * (llm_int8.PRODUCT * 127.0)).flatten())


@pytest.mark.parametrize("name", ["dp4a_llm_int8", "mma_llm_int8"])
@pytest.mark.parametrize("spread", [0.5, 3.0, 20.0])
def test_products_beside_outliers(name: str, spread: float) -> None:
    """None, some, and nearly all columns kept; rows and outputs that are not whole, and more rows than blocks at once."""
    layer = random_layer(Scheme.parse(LLM_INT8), 37, 840)
    packed = KERNELS[name].load().from_layer(layer, torch.float16).to(PLACE)
    x = (spread * _random(263, 840)).to(torch.float16)
    for rows in (1, 19, 263):
        codes, absmax, kept = llm_int8.split(x[:rows], 6.0)
        stands_for = torch.where(kept, x[:rows].double(), codes.double() * absmax.double() * llm_int8.PRODUCT * 127)
        assert worst_error(packed(x[:rows].to(PLACE)).cpu(), stands_for @ layer.weight.dequantize().double().t()) < 2e-3


def test_outliers_that_are_no_numbers() -> None:
    layer = random_layer(Scheme.parse(LLM_INT8), 33, 100)
    packed = KERNELS["mma_llm_int8"].load().from_layer(layer, torch.float16).to(PLACE)
    x = _random(3, 100).to(torch.float16)
    x[1, 7] = float("nan")
    assert packed(x.to(PLACE)).cpu().isnan().all(1).tolist() == [False, True, False]
    x[1, 7] = float("inf")
    assert packed(x.to(PLACE)).cpu().isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("unit", ["dots", "tensors"])
def test_the_largest_sums(unit: str) -> None:
    """-128 times -128 in every place, which 32 bits hold and 16 do not."""
    weight, scales = torch.full((20, 512), -128, dtype=torch.int8), torch.full((20,), 2.0**-20)
    for rows in (1, 16, 20):
        x, inputs = torch.full((rows, 512), -128, dtype=torch.int8), torch.ones(rows)
        assert bool((_product(x, inputs, weight, scales, unit=unit) == 8).all())


@pytest.mark.parametrize("unit", ["dots", "tensors"])
def test_blocks_take_turns(unit: str) -> None:
    """More blocks of rows than take turns at once, so that each tile is somewhere."""
    weight, scales = _weight(260, 64)
    x, inputs = _inputs(1200, 64)
    assert torch.equal(_product(x, inputs, weight, scales, unit=unit), _exact(x, inputs, weight, scales))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("name", "scheme"), [(n, str(s)) for n, k in KERNELS.items() for s in claimed(k, catalogue())])
def test_conformance(name: str, scheme: str, check: str) -> None:
    for size in ("tiny", "odd"):
        if applies(check, KERNELS[name], size):
            CHECKS[check](Bench(KERNELS[name], Scheme.parse(scheme), "float16", size, CPU))


@pytest.mark.parametrize("name", KERNELS)
def test_code_for_its_gpus(name: str) -> None:
    """Products by the instruction that the row names, nothing spilled, and as many blocks as are wanted find registers and shared memory."""
    kernel = KERNELS[name]
    scheme = claimed(kernel, catalogue())[0]
    layer: Any = kernel.load()
    for target in (target for platform in kernel.platforms for target in registry().platforms[platform].targets):
        for program in layer.programs(scheme, "float16", target):
            made = program.compile(target)
            few = program.source == "int8_few.cuh"
            wanted = "dp4a" if few or "dots" in program.name else "mma.sync" if "tensors" in program.name else ""
            assert made.matrix.startswith(wanted) and bool(made.matrix) == bool(wanted), program.name
            assert made.spilled == 0, (program.name, made)
            blocks = max(1, program.resident)
            assert blocks * program.threads * made.registers <= 1 << 16 and blocks * made.shared <= target.shared


def test_code_for_xavier() -> None:
    """Capability 7.2 has dot products too, and NVRTC knows it."""
    assert nvrtc.compiled(int8.few(1).text(), "sm_72").matrix.startswith("dp4a")


def test_shared_memory_has_no_conflicts() -> None:
    """Eight threads that read 16 bytes each, of places that make up all banks: the ways in which rows are written and read."""
    program = CppProgram("int8_places", "int8_tiles.cuh", "int* out, int count",
                         "for (int i = 0; i < count; ++i) out[i] = place(i / 4, i % 4);", 1)  # fmt: skip
    places = torch.empty(64 * 4, dtype=torch.int32)
    program.run((1, 1, 1), places, places.numel())
    assert sorted(places.tolist()) == list(range(256))
    place = places.view(64, 4)
    for first in range(0, 32, 8):
        for vector in range(4):
            following, others = place[first : first + 8, vector], place[first : first + 16 : 2, vector]
            both = place[first + 2 * vector : first + 2 * vector + 2].flatten()
            for eight in (following, others, both):
                assert sorted((eight % 8).tolist()) == list(range(8))


@pytest.mark.parametrize("rows", [17, 64, 100, 4096])
@pytest.mark.parametrize("columns", [64, 896, 4096, 28672])
@pytest.mark.parametrize("places", [8, 80, 320])
def test_blocks_share_columns_where_there_are_few(rows: int, columns: int, places: int) -> None:
    for blocks in (1, 7, 32, 1000):
        shares = int8.shares_of(blocks, places, rows, columns)
        assert 1 <= shares <= max(1, columns // int8.STEP), "each has a step"
        assert shares == 1 or (shares * blocks <= places and shares * rows * 16 <= columns)
    for vectors in (4, 32, 200, 256, 4096):
        shift = int8.shift_of(vectors)
        assert 0 <= shift <= 3 and (shift == 0 or vectors >= 32 << shift)


@pytest.mark.parametrize(("platform", "name"), [("volta", "dp4a"), ("turing", "mma")])
@pytest.mark.parametrize(
    ("scheme", "kind"), [("W8A8-int8-dyn", "int8"), ("W8A8-int8-static", "int8"), (LLM_INT8, "llm_int8")]
)
def test_it_is_chosen(platform: str, name: str, scheme: str, kind: str) -> None:
    request = LayerRequest("linear", Scheme.parse(scheme), (4095, 4097), "float16")
    found = select(request, platform, registry().kernels)
    assert found.kernel is not None and found.kernel.name == f"{name}_{kind}"


def test_operators_keep_torchs_rules() -> None:
    """Schemas, shapes without running, and nothing written that is not said."""
    x, (weight, scales) = _random(3, 200).to(torch.float16), _weight(37, 200)
    torch.library.opcheck(int8.round_input, (x, None, 256))
    torch.library.opcheck(int8.product, (*int8.round_input(x, None, 256), weight, scales, "dots"))
    torch.library.opcheck(int8_outliers.llm_int8, (x, weight, scales, 0x4600, "tensors"))


def test_sums_that_do_not_fit_are_refused() -> None:
    layer = random_layer(Scheme.parse("W8A8-int8-dyn"), 1, 1 << 17)
    with pytest.raises(Refused, match="131072 columns"):
        KERNELS["dp4a_int8"].load().from_layer(layer, torch.float16)


def test_a_graph_has_shapes_without_running() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    packed = KERNELS["mma_int8"].load().from_layer(random_layer(Scheme.parse("W8A8-int8-dyn"), 48, 200), torch.float16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert packed(torch.empty(2, 3, 200, dtype=torch.float16)).shape == (2, 3, 48)
