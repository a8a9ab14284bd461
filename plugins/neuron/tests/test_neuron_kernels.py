"""Kernels on the stand-in for Neuron's chips, the arithmetic that they are made of, and what the stand-in refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from qcore.accuracy import worst_error
from qcore.bits import pack
from qcore.discovery import registry
from qcore.kernel import Kernel
from qcore.kernels.activations import quantize_input
from qcore.kernels.kv_cache import KvRounding
from qcore.kernels.minifloat import round_to
from qcore.platform import Device
from qcore.scheme import PRESETS, Scheme
from qcore.select import LayerRequest, select
from qcore.tensor import TORCH_FLOATS, LayerTensors, float_table
from qcore.testing.cases import claimed, row_schemes
from qcore.testing.checks import CHECKS, Bench
from qcore.testing.layers import random_layer
from qcore.testing.verify import applies, unable
from qcore_neuron import stand_in
from qcore_neuron.devices import stand_ins
from qcore_neuron.kernels import planes, rounding
from qcore_neuron.kernels.e4m3 import halved
from qcore_neuron.kernels.eight_bits import Fp8ProductLinear, WeightOnlyLinear
from qcore_neuron.kernels.floats import numbers
from qcore_neuron.kernels.inputs import rounded_values
from qcore_neuron.kernels.kv_cache import KvCache

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
ALL_BYTES = torch.arange(256, dtype=torch.uint8)
KERNELS = [kernel for kernel, plugin in registry().kernels if plugin == "neuron"]
FEATURES = frozenset({"e4m3fn"})
CHIP = Device("trn2", "neuron", "Trn2", "cpu", "trn2", FEATURES, simulated=True)
SCHEMES = tuple(dict.fromkeys((*row_schemes(), *PRESETS.values(), Scheme.parse("W8A16-e5m2-channel"))))
CASES = [(kernel, scheme) for kernel in KERNELS for scheme in claimed(kernel, SCHEMES) if unable(kernel, scheme, CHIP) is None]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def device() -> Device:
    """It checks this plugin's kernels only, and is in no one's way."""
    return stand_ins()[0]


def bfloat16s() -> torch.Tensor:
    """float32: every finite one."""
    found = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BF16).float()
    return found[found.isfinite()]


@pytest.mark.parametrize(
    ("kernel", "scheme"), CASES, ids=lambda case: case.name if isinstance(case, Kernel) else str(case)
)
def test_kernels_on_the_stand_in(kernel: Kernel, scheme: Scheme, device: Device) -> None:
    """All checks of `qcore verify` but those of large weights, which the lane has."""
    for dtype in kernel.dtypes:
        for size in ("tiny", "odd"):
            bench = Bench(kernel, scheme, dtype, size, device)
            for name, check in CHECKS.items():
                if applies(name, kernel, size):
                    check(bench)


def test_verify_asks_for_the_stand_in() -> None:
    command = [sys.executable, "-m", "qcore", "verify", "--plugin", "neuron", "--simulate", "--kernel", "neuron_int8_inputs", "--json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    findings = json.loads(done.stdout)["findings"]
    assert len(findings) == 2 and {finding["device"] for finding in findings} == {"neuron-stand-in"}
    assert not any(finding["failures"] for finding in findings) and min(finding["cases"] for finding in findings) >= 18


ONES = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("given", "call", "fault"),
    [
        (ONES, lambda x: x.round(), "not known"),
        (ONES, lambda x: x > x, "not known"),
        (ONES, lambda x: x >= 0.5, "float64"),
        (ONES.to(torch.uint8), lambda x: x >> 4, "not known"),
        (ONES.to(torch.uint8), lambda x: x.view(E4M3), "left to the CPU"),
        (ONES.to(torch.int32), lambda x: x @ x.t(), "no integers"),
        (ONES, lambda x: x.double(), "float64"),
        (ONES, lambda x: x.to(torch.float8_e4m3fnuz), "float8_e4m3fnuz"),
        (ONES * 256, lambda x: x.to(E4M3), "above 240"),
        ((ONES * 448).to(E4M3), lambda x: x.to(BF16), "above 240"),
    ],
)
def test_the_stand_in_takes_what_the_chip_takes(
    given: torch.Tensor, call: Callable[[torch.Tensor], torch.Tensor], fault: str
) -> None:
    with stand_in.Chip(), pytest.raises(ValueError, match=fault):
        call(given)


def test_the_stand_in_changes_no_numbers() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected = (x.to(BF16).abs() @ x.to(BF16).t()).float()
    with stand_in.Chip():
        got = (x.to(BF16).abs() @ x.to(BF16).t()).float()
    assert torch.equal(got, expected)


def test_whole_numbers_are_the_nearest_ones() -> None:
    halves = torch.arange(-4096.0, 4096.0) / 16
    near = torch.cat([torch.nextafter(halves, halves + 9), torch.nextafter(halves, halves - 9)])
    small = torch.arange(-(2.0**20), 2.0**20) * 2.0**-24
    for values in (halves, near, small, torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 300):
        assert torch.equal(rounding.half_to_even(values), values.round())


@pytest.mark.parametrize("name", ["e2m1", "e4m3fn", "e5m2"])
def test_small_floats_are_rounded_as_the_definition_rounds_them(name: str) -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.randn(100_000, generator=random) * torch.exp(4 * torch.randn(100_000, generator=random))
    for given in (values, bfloat16s()):
        assert torch.equal(rounding.on_grid(given, name), round_to(given, name))


def test_exponents_and_powers_of_two() -> None:
    exponents = torch.arange(-126.0, 128.0)
    powers = torch.ldexp(torch.ones(254), exponents.int())
    assert torch.equal(rounding.power_of_two(exponents), powers) and torch.equal(rounding.exponent(powers), exponents)
    below, above = torch.nextafter(powers[1:], torch.zeros(253)), torch.nextafter(powers[:-1], powers[:-1] * 2)
    assert torch.equal(rounding.exponent(below), exponents[:-1]) and torch.equal(
        rounding.exponent(above), exponents[:-1]
    )


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7])
def test_planes_hold_the_codes_in_as_many_bytes(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    held = planes.to_planes(pack(codes, bits), bits, 48)
    assert held.shape == (5, 6 * bits) and torch.equal(planes.from_planes(held, bits), codes.float())


def test_a_bytes_halves_lie_half_a_row_apart() -> None:
    codes = torch.arange(16, dtype=torch.uint8).view(1, 16)
    assert planes.to_planes(pack(codes, 4), 4, 16).tolist() == [[low | (low + 8) << 4 for low in range(8)]]


@pytest.mark.parametrize("name", ["e2m1", "e3m2", "e2m3", "e4m3", "e4m3fn", "e4m3fnuz", "e5m2"])
def test_every_code_of_a_small_float(name: str) -> None:
    expected = ALL_BYTES.view(TORCH_FLOATS[name]).float() if name in TORCH_FLOATS else float_table(name)
    got = numbers(torch.arange(len(expected)).float(), name)
    if name == "e5m2":  # which the cache's bytes never are
        got, expected = got[expected.isinf().logical_not()], expected[expected.isinf().logical_not()]
    if name == "e4m3fnuz":  # its one code that is no number, which no weight is
        got, expected = got[ALL_BYTES != 0x80], expected[ALL_BYTES != 0x80]
    assert torch.equal(got.nan_to_num(-999), expected.nan_to_num(-999))


@pytest.mark.parametrize("text", ["W8A16-fp8-tensor", "W8A16-e5m2-tensor", "W8A16-tensor-sym"])
@pytest.mark.parametrize("scale", [torch.tensor([132 / 448]), torch.tensor([0.01, 0.013, 3.0]).view(3, 1, 1)])
def test_the_caches_bytes_are_the_references(text: str, scale: torch.Tensor) -> None:
    """With every number of bfloat16, some of which lie halfway between codes under 132 / 448; but for negative zeros, which become zeros."""
    states = bfloat16s()
    states = states[states != 0].to(BF16)[: 79 * 816].view(-1, 3, 16, 17)
    element = Scheme.parse(text).weight.element
    own, reference = KvCache(element, scale), KvRounding(element, scale)
    rows = reference.encode(states)
    assert torch.equal(own.encode(states), rows)
    assert torch.equal(own.decode(rows, BF16), reference.decode(rows, BF16))


def test_what_is_no_number_stays_none_in_the_cache() -> None:
    element = Scheme.parse("W8A16-fp8-tensor").weight.element
    found = KvCache(element, torch.ones(1))(torch.tensor([[float("nan"), 1.0, -0.0, float("inf"), -1e9]]))
    assert bool(found[0, 0].isnan()) and found[0, 1:].tolist() == [1.0, 0.0, 448.0, -448.0]


def test_the_cache_has_zero_points_and_scales_of_run_time(device: Device) -> None:
    element, states = (
        Scheme.parse("W8A16-tensor-sym").weight.element,
        bfloat16s()[: 312 * 192].view(-1, 3, 4, 16).to(BF16),
    )
    for parts in [(torch.tensor([0.37]), torch.tensor([-7.0])), (None, None)]:
        own, reference = KvCache(element, *parts), KvRounding(element, *parts)
        assert torch.equal(own.decode(own.encode(states), BF16), reference(states))


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2"])
def test_scales_of_run_time_are_the_bytes_of_floats(name: str, device: Device) -> None:
    """Of rows of all sizes, zeros, infinities and what is no number: as on any other hardware."""
    element = Scheme.parse({"e4m3fn": "W8A16-fp8-tensor", "e5m2": "W8A16-e5m2-tensor"}[name]).weight.element
    own, reference = KvCache(element), KvRounding(element)
    states = torch.randn(64, 16, generator=torch.Generator().manual_seed(4)) * torch.logspace(-37, 37, 64)[:, None]
    states[3], states[4, 2], states[5, 2] = 0.0, float("inf"), float("nan")
    rows = reference.encode(states)
    mine = own.encode(states)
    assert torch.equal(mine[6:, -4:], rows[6:, -4:]) and torch.equal(mine[:4, -4:], rows[:4, -4:])
    torch.testing.assert_close(
        own.decode(rows, torch.float32), reference.decode(rows, torch.float32), rtol=0, atol=0, equal_nan=True
    )
    torch.testing.assert_close(own(states), reference(states), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "text",
    [
        "W8A8-int8-dyn", "W8A8-int8-static", "W8A8-int8-channel-sym/int8-token-asym-dyn", "W8A8-int8-channel-sym/int8-tensor-asym",
        "W8A8-fp8-dyn", "W8A8-fp8-static", "W8A8-fp8-block128", "W4A4-mxfp4", "W4A4-nvfp4",
        "W8A8-int8-channel-sym/int8-token-sym-dyn-outliers6.0",
    ],
)  # fmt: skip
def test_inputs_stand_for_what_the_definition_says(text: str) -> None:
    """Exactly, of numbers of bfloat16, which lie halfway between codes often, and in a row of zeros."""
    scheme = Scheme.parse(text)
    layer = random_layer(scheme, 8, 256)
    x = torch.randn(65, 256, generator=torch.Generator().manual_seed(2))
    x[:, 0] *= 8
    x[-1] = 0
    x = x.to(BF16).float()
    assert scheme.input is not None
    zero = None if layer.input_zero is None else layer.input_zero.float()
    got = rounded_values(x, scheme.input, layer.input_scale, zero)
    expected = quantize_input(x, scheme.input, layer.input_scale, layer.input_zero)
    torch.testing.assert_close(got, expected, rtol=2e-7, atol=0)


def test_tiles_of_weights_above_240_are_halved() -> None:
    tensor = ALL_BYTES.view(E4M3).float().nan_to_num(0.0).repeat(4, 1)
    tensor[2:] = tensor[2:].clamp(-240, 240)
    held, factors = halved(tensor.to(E4M3), 2, 128)
    assert factors.tolist() == [[2.0, 2.0], [1.0, 1.0]] and held.float().abs().max() == 240.0
    lost = (held.float() * factors.repeat_interleave(2, 0).repeat_interleave(128, 1) - tensor).abs()
    assert lost.max() == 2.0**-9 and not bool(lost[tensor.abs() >= 2.0**-5].any()) and not bool(lost[2:].any())


def large_codes(text: str) -> LayerTensors:
    """Every number of e4m3."""
    layer = random_layer(Scheme.parse(text), 32, 256)
    values = ALL_BYTES.view(E4M3).float().nan_to_num(0.0)
    rows = torch.stack([values.roll(row) for row in range(32)]).to(E4M3)
    return replace(layer, weight=replace(layer.weight, codes=rows))


@pytest.mark.parametrize(
    ("kernel", "text"), [(WeightOnlyLinear, "W8A16-fp8-channel"), (Fp8ProductLinear, "W8A8-fp8-dyn"), (Fp8ProductLinear, "W8A8-fp8-static")]
)  # fmt: skip
def test_all_of_e4m3_in_a_product(kernel: Any, text: str) -> None:
    layer = large_codes(text)
    x = torch.randn(6, 256, generator=torch.Generator().manual_seed(1)).to(BF16)
    scheme = layer.weight.scheme
    seen = x.float() if scheme.input is None else quantize_input(x.float(), scheme.input, layer.input_scale)
    expected = seen.double() @ layer.weight.dequantize().double().t()
    assert layer.weight.codes.float().abs().max() == 448
    assert worst_error(kernel.from_layer(layer, BF16)(x), expected) < 0.006


@pytest.mark.parametrize(
    ("text", "features", "taken"),
    [
        ("W8A16-fp8-channel", FEATURES, "neuron_fp8"),
        ("W8A16-fp8-channel", frozenset({"fp8"}), "neuron_floats"),
        ("W8A8-fp8-dyn", FEATURES, "neuron_fp8_inputs"),
        ("W8A8-fp8-static", frozenset(), "neuron_floats"),
        ("W8A8-fp8-block128", FEATURES, "neuron_fp8_tiles"),
        ("W8A8-fp8-block128", frozenset(), "neuron_floats"),
        ("W8A8-int8-dyn", frozenset(), "neuron_int8_inputs"),
        ("W8A16-channel-sym", frozenset(), "neuron_int8"),
        ("W4A16-g128-sym-actorder", frozenset(), "neuron_integers"),
        ("W4A16-nf4-g64", frozenset(), "neuron_codebooks"),
    ],
)
def test_e4m3_needs_the_compilers_setting_or_trn3(text: str, features: frozenset[str], taken: str) -> None:
    """Without it, arithmetic takes its place."""
    chip = replace(CHIP, features=features)
    request = LayerRequest("linear", Scheme.parse(text), (128, 256), "bfloat16")
    kernel = select(request, "neuron", registry().kernels, chip).kernel
    assert kernel is not None and kernel.name == taken
