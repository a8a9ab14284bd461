"""Kernels in Triton, in its interpreter against the definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import qcore.testing.interpreter  # noqa: F401  the first to import Triton
from qcore.discovery import registry
from qcore.elements import Block
from qcore.kernel import Kernel
from qcore.kernels.activations import quantize_input
from qcore.kernels.triton.eights import EightsLinear
from qcore.kernels.triton.planes import pack_planes, parts_of, planes_of
from qcore.kernels.triton.rounding import Rounding, round_input
from qcore.kernels.triton.rows import triton_fp8, triton_int8, triton_kernels
from qcore.kernels.triton.tilings import tilings_on
from qcore.kernels.triton.whole import WholeEightsLinear
from qcore.platform import Device
from qcore.refusal import Refused
from qcore.scheme import Scheme, TensorScheme
from qcore.testing.cases import catalogue, claimed, row_schemes
from qcore.testing.checks import CHECKS, Bench
from qcore.testing.layers import random_layer
from qcore.testing.verify import applies

_FAMILIES = triton_kernels("triton", ("ampere",), ("bfloat16", "float16"))
_EIGHTS = [triton_int8("triton", ("ampere",)), *triton_fp8("triton", ("ampere",))]
KERNELS = {kernel.name: kernel for kernel in (*_FAMILIES, *_EIGHTS)}
GPU = Device("gpu", "ampere", "Triton's interpreter", "cpu", "sm_80", simulated=True)
CASES = [(name, str(scheme)) for name, kernel in KERNELS.items() for scheme in claimed(kernel, catalogue())]
DENSE_FROM = tilings_on(torch.device("cpu"))[-1].most + 1


def kernel_of(scheme: str) -> Kernel:
    """The first, where 8-bit products have another that multiplies in 16 bits."""
    return next(kernel for kernel in KERNELS.values() if kernel.accepts.refuse(Scheme.parse(scheme)) is None)


def test_the_rows_take_every_scheme() -> None:
    """Of the catalogue, all but those of 12 bits; and by one family each."""
    taken = [scheme for name, scheme in CASES if name in {kernel.name for kernel in _FAMILIES}]
    left = set(map(str, catalogue())) - set(taken)
    assert len(set(taken)) == len(taken) > 350
    assert left and all("e4m7" in scheme for scheme in left)


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_products(name: str, scheme: str) -> None:
    """Of every scheme that a row takes: one row of x, few, and so many that the weight is made dense, with a last group that is not whole."""
    parsed = Scheme.parse(scheme)
    ragged = not isinstance(parsed.weight.element, Block) and "actorder" not in scheme and "flat" not in scheme
    layer = random_layer(parsed, 37, 203 if ragged and KERNELS[name].ragged else 512)
    for dtype, rows in ((torch.bfloat16, 1), (torch.float16, 5), (torch.bfloat16, DENSE_FROM)):
        bench = Bench(KERNELS[name], parsed, str(dtype).removeprefix("torch."), "odd", GPU, layer)
        x = torch.randn(rows, layer.weight.shape[1], generator=torch.Generator().manual_seed(3)).to(dtype)
        bench.compare(f"{rows} rows", bench.run(x), bench.product(x))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "scheme",
    ["W4A16-g128-sym", "W3A16-g32-asym", "W8A16-channel-sym", "W4A16-g128-asym-actorder", "W2A16-g64-zfloat", "W8A16-fp8-block128",
     "W6A16-e3m2-g512", "W4A16-nvfp4", "W4A16-nf4-flat64:dynamic8+flat16384", "W4A16-gguf:q4_k", "W2A16-gguf:iq2_xs", "W4A8-int4-g128-sym/int8-token-asym-dyn",
     "W8A8-int8-channel-sym/int8-token-sym-dyn-outliers6.0", "W4A4-nvfp4"],
)  # fmt: skip
def test_conformance(scheme: str, dtype: str, check: str) -> None:
    conforms(kernel_of(scheme), scheme, dtype, check)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("name", "scheme"), [(kernel.name, str(scheme)) for kernel in _EIGHTS for scheme in claimed(kernel, row_schemes())]
)
def test_conformance_of_eight_bits(name: str, scheme: str, dtype: str, check: str) -> None:
    conforms(KERNELS[name], scheme, dtype, check)


def conforms(kernel: Kernel, scheme: str, dtype: str, check: str) -> None:
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


@pytest.mark.parametrize("scheme", ["int8-token-sym-dyn", "fp8-token-dyn", "fp8-token-dyn-bound2.5", "fp8-g128-dyn", "int8-tensor-sym", "fp8-tensor",
                                    "e2m1-g32:e8m0-dyn", "e2m1-g32:e8m0floor-dyn", "fp8-g32:e8m0-dyn", "e3m2-g32:e8m0-dyn", "e2m3-g32:e8m0-dyn",
                                    "e2m1-g16:e4m3fn+tensor-dyn"])  # fmt: skip
def test_inputs_are_rounded_to_the_bit(scheme: str) -> None:
    """As qcore.kernels.activations rounds them: rows of zeros, of the smallest numbers and of the largest too."""
    given = TensorScheme.parse(scheme)
    how = Rounding.of(given)
    assert how is not None
    x = torch.randn(9, 300, generator=torch.Generator().manual_seed(5)) * torch.logspace(-6, 3, 9)[:, None]
    x[1], x[2, ::2], x[3, :4] = 0, 0, torch.tensor([448.0, 464.0, 0.75, -2.5])
    x = x.to(torch.bfloat16)
    scale = torch.tensor([0.03]) if not given.dynamic or "tensor-dyn" in scheme else None
    want = quantize_input(x.float(), given, scale)
    got, _ = round_input(x, scale, how.element, how.group, how.scale, how.dynamic, how.bound, False)
    assert torch.equal(got, want.to(torch.bfloat16))
    if how.element in ("int8", "e4m3fn") and how.scale == "float":
        codes, scales = round_input(x, scale, how.element, how.group, how.scale, how.dynamic, how.bound, True)
        numbers = (codes if how.element == "int8" else codes.view(torch.float8_e4m3fn)).float()
        spread = scales.repeat_interleave(how.group, 1)[:, :300] if how.group else scales[:, None]
        assert torch.equal(numbers * spread, want)
        assert not (codes == 0x80).any() or how.element == "int8"


@pytest.mark.parametrize("columns", [4000, 20000])
@pytest.mark.parametrize(
    "scheme", ["int8-token-sym-dyn", "int8-tensor-sym", "fp8-token-dyn", "fp8-token-dyn-bound2.5", "fp8-tensor"]
)
def test_rows_are_rounded_to_the_bit_however_long(scheme: str, columns: int) -> None:
    """Held by a program, or read twice; and near the ends of bfloat16's range, with infinities under scales that are finite."""
    given = TensorScheme.parse(scheme)
    how = Rounding.of(given)
    assert how is not None
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(5))
    x = (x * torch.tensor([1.0, 1e-32, 1e-20, 1e35, 10.0])[:, None]).to(torch.bfloat16)
    x[0, 7] = float("nan")
    if not how.dynamic or how.bound < float("inf"):
        x[4, 5:7] = torch.tensor([float("inf"), -float("inf")])
    scale = None if given.dynamic else torch.tensor([0.03])
    want = quantize_input(x.float(), given, scale)
    codes, scales = round_input(x, scale, how.element, how.group, how.scale, how.dynamic, how.bound, True)
    numbers = (codes if how.element == "int8" else codes.view(torch.float8_e4m3fn)).float() * scales[:, None]
    assert torch.equal(numbers[1:], want[1:]) and bool(numbers[0].isnan().all())


@pytest.mark.parametrize(
    "scheme", ["W8A8-int8-dyn", "W8A8-int8-static", "W8A8-fp8-dyn", "W8A8-fp8-block128", "W4A4-mxfp4"]
)
def test_an_input_that_is_no_number_gives_none(scheme: str) -> None:
    parsed = Scheme.parse(scheme)
    for kernel in KERNELS.values():
        if kernel.accepts.refuse(parsed) is None:
            packed = kernel.load().from_layer(random_layer(parsed, 128, 256), torch.float16)
            x = torch.ones(3, 256, dtype=torch.float16)
            x[1, 40] = float("nan")
            assert packed(x).isnan().all(1).tolist() == [False, True, False], kernel.name


@pytest.mark.parametrize("weight", ["W8A8-fp8-tensor", "W4A4-e2m1-g16:e4m3fn+tensor"])
@pytest.mark.parametrize("bound", ["", "-bound0.5"])
def test_a_scale_of_all_inputs_is_that_of_an_expert_s_rows(weight: str, bound: str) -> None:
    """To the bit what torch's operators make of each expert's rows: of zeros, of the smallest numbers, of infinities, and of what is no number."""
    scheme = Scheme.parse(
        f"{weight}/fp8-tensor-dyn{bound}" if "fp8" in weight else f"{weight}/e2m1-g16:e4m3fn+tensor-dyn"
    )
    assert scheme.input is not None
    layers = [replace(random_layer(scheme, 32, 256, seed), input_scale=None) for seed in range(6)]
    rounded = KERNELS["triton_rounded_floats"].load()
    packed = [rounded.from_layer(layer, torch.bfloat16) for layer in layers]
    assert rounded.stackable(packed)  # type: ignore[attr-defined]
    counts = (3, 0, 1, 2, 2, 2)
    experts = torch.arange(6).repeat_interleave(torch.tensor(counts)).to(torch.int32)
    x = torch.randn(10, 256, generator=torch.Generator().manual_seed(5)) * torch.logspace(-3, 3, 10)[:, None]
    x[3], x[4:6], x[7, 40] = 0, x[4:6] * 1e-32, float("nan")
    if bound:
        x[9, 3] = float("inf")
    x = x.to(torch.bfloat16)
    parts = x.split(counts)
    wanted = torch.cat([quantize_input(part, scheme.input) for part in parts])
    apart = torch.cat([layer.rounded(part) for layer, part in zip(packed, parts, strict=True)])  # type: ignore[operator]
    together = rounded.stacked(packed).rounded(x, experts)  # type: ignore[attr-defined]
    for got in (apart, together):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


TARGETS = {
    target.architecture: target
    for platform in ("turing", "ada", "amd")
    for target in registry().platforms[platform].targets
}


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize(
    "scheme", ["W4A16-g128-asym", "W2A16-gguf:iq2_xs", "W8A8-int8-dyn", "W8A8-fp8-dyn", "W8A8-fp8-block128"]
)
def test_products_in_the_blocks_of_other_architectures(
    scheme: str, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And e4m3 by the bytes of e4m3fnuz, where the matrix unit has that."""
    target = TARGETS[architecture]
    for module in ("tilings", "eights"):
        monkeypatch.setattr(f"qcore.kernels.triton.{module}.target_on", lambda place: target)
    parsed = Scheme.parse(scheme)
    layer = random_layer(parsed, 128, 512)
    for kernel in KERNELS.values():
        if kernel.accepts.refuse(parsed) is None:
            bench = Bench(kernel, parsed, "float16", "odd", GPU, layer)
            for rows in (1, 3, 70):
                x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(3)).to(torch.float16)
                bench.compare(f"{rows} rows", bench.run(x), bench.product(x))


def test_inputs_under_a_scale_of_run_time_take_the_programs_of_a_stored_one() -> None:
    """Which are those that are compiled for the matrix's rows."""
    schemes = [Scheme.parse(f"W8A8-fp8-channel/{text}") for text in ("fp8-tensor-dyn", "fp8-tensor")]
    found, stored = schemes
    target = TARGETS["sm_89"]
    assert WholeEightsLinear.programs(found, "bfloat16", target) == EightsLinear.programs(stored, "bfloat16", target)
