"""Kernels on the stand-in for Gaudi2's operators, and what the stand-in refuses."""

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
from qcore.discovery import registry
from qcore.kernel import Kernel
from qcore.kernels.activations import quantize_input
from qcore.kernels.kv_cache import KvRounding
from qcore.platform import Device
from qcore.scheme import Scheme
from qcore.select import LayerRequest, select
from qcore.support.rows import ROWS
from qcore.tensor import LayerTensors
from qcore.testing.cases import catalogue, claimed, row_schemes
from qcore.testing.checks import smallest_shape
from qcore.testing.layers import random_layer
from qcore.testing.verify import Question, verify
from qcore.testing.watch import watched
from qcore_gaudi import stand_in
from qcore_gaudi.devices import stand_ins
from qcore_gaudi.kernels import e4m3
from qcore_gaudi.kernels.fp8 import Fp8Linear, Fp8ProductLinear
from qcore_gaudi.kernels.int4 import Int4Linear
from qcore_gaudi.kernels.kv_cache import KvCache
from qcore_gaudi.operators import SCHEMAS, TORCH, VIEWS

KERNELS = [kernel for kernel, plugin in registry().kernels if plugin == "gaudi"]
E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
ALL_BYTES = torch.arange(256, dtype=torch.uint8)


@pytest.fixture(scope="module", autouse=True)
def operators() -> None:
    """They are new names, in no one's way."""
    stand_in.load()


def codes(*shape: int) -> torch.Tensor:
    return torch.ones(shape).to(E4M3)


def words(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def test_every_operator_has_a_double() -> None:
    assert set(stand_in._DOUBLES) == set(SCHEMAS)


def gemm(**changed: object) -> tuple[object, ...]:
    """Arguments that the double takes, but for what is changed."""
    given = {"left": codes(3, 16), "trans_left": False, "right": codes(8, 16), "trans_right": True, "added": None, "out_dtype": BF16,
             "left_scale": torch.ones(3, 1), "right_scale": torch.ones(8), "bias": None, "accumulate": False}  # fmt: skip
    return tuple((given | changed).values())


def uint4(**changed: object) -> tuple[object, ...]:
    given = {"packed": words(64, 2), "scale": torch.ones(2, 16, dtype=BF16), "zero": words(2, 2), "out_dtype": BF16}
    return tuple((given | changed).values())


@pytest.mark.parametrize(
    ("operator", "given", "fault"),
    [
        ("cast_to_fp8_v2", lambda: (torch.ones(2, 4, dtype=torch.float16), None, False, False, E4M3), "float32 or bfloat16"),
        ("cast_to_fp8_v2", lambda: (torch.ones(2, 4),), "e4m3"),
        ("cast_to_fp8_v2", lambda: (torch.ones(2, 4), torch.ones(2), False, False, E4M3), "spread|broadcast|size"),
        ("cast_to_fp8_v2", lambda: (torch.ones(2, 4), torch.ones(3, 2, 4), False, False, E4M3), "spread"),
        ("cast_from_fp8", lambda: (torch.tensor([256.0]).to(E4M3), None, BF16), "240"),
        ("cast_from_fp8", lambda: (codes(2, 4), None, torch.float16), "result"),
        ("cast_from_fp8", lambda: (words(2, 4), None, BF16), "e4m3"),
        ("fp8_gemm_v2", lambda: gemm(left=torch.full((3, 16), 256.0).to(E4M3)), "240"),
        ("fp8_gemm_v2", lambda: gemm(right=torch.full((8, 16), -448.0).to(E4M3)), "240"),
        ("fp8_gemm_v2", lambda: gemm(left=torch.ones(3, 16, dtype=BF16)), "e4m3"),
        ("fp8_gemm_v2", lambda: gemm(trans_right=False), "fit"),
        ("fp8_gemm_v2", lambda: gemm(right=codes(16, 8).t()), "contiguous"),
        ("fp8_gemm_v2", lambda: gemm(right_scale=torch.ones(8, 1)), r"\[M, 1\] and \[N\]"),
        ("fp8_gemm_v2", lambda: gemm(left_scale=torch.ones(3)), r"\[M, 1\] and \[N\]"),
        ("fp8_gemm_v2", lambda: gemm(right_scale=torch.ones(8, dtype=BF16)), "float32"),
        ("convert_from_uint4", lambda: uint4(packed=torch.zeros(64, 2, dtype=torch.uint8)), "int32"),
        ("convert_from_uint4", lambda: uint4(scale=torch.ones(16, 2, dtype=BF16)), "scales are"),
        ("convert_from_uint4", lambda: uint4(scale=torch.ones(2, 16)), "type"),
        ("convert_from_uint4", lambda: uint4(scale=torch.ones(3, 16, dtype=BF16)), "scales are"),
        ("convert_from_uint4", lambda: uint4(zero=torch.zeros(2, 2, dtype=torch.uint8)), "packed"),
        ("convert_from_uint4", lambda: uint4(zero=words(2, 16)), "zero points are"),
    ],
)  # fmt: skip
def test_a_double_takes_what_the_operator_takes(
    operator: str, given: Callable[[], tuple[Any, ...]], fault: str
) -> None:
    with pytest.raises((ValueError, RuntimeError), match=fault):
        getattr(torch.ops.hpu, operator)(*given())


def test_doubles_count_as_the_operators_do() -> None:
    """Casts multiply, in the input's type, round half to even and saturate; products are multiplied by what the sides were divided by."""
    x = torch.tensor([[1.0, 3.0, 100.0, -1000.0]])
    cast, amax = torch.ops.hpu.cast_to_fp8_v2(x, torch.tensor(2.0), False, True, E4M3)
    assert cast.float().tolist() == [[2.0, 6.0, 192.0, -240.0]] and amax.item() == 1000.0
    assert torch.ops.hpu.cast_to_fp8_v2(x, None, False, False, E4M3)[1].numel() == 0
    assert torch.ops.hpu.cast_from_fp8(cast, torch.tensor(0.5), BF16).tolist() == [[1.0, 3.0, 96.0, -120.0]]
    scales = torch.tensor([[1.0], [2.0], [4.0]]), torch.arange(8.0)
    product = torch.ops.hpu.fp8_gemm_v2(*gemm(left_scale=scales[0], right_scale=scales[1]))
    assert product.dtype == BF16 and torch.equal(product.float(), 16 * scales[0] * scales[1])
    packed = torch.tensor([[0x76543210]] * 2 + [[-1]] * 2, dtype=torch.int32)
    weight = torch.ops.hpu.convert_from_uint4(
        packed, torch.tensor([[1.0] * 8, [2.0] * 8], dtype=BF16), torch.tensor([[0x11111111], [0]], dtype=torch.int32), BF16
    )  # fmt: skip
    assert weight[0].tolist() == [-1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0] and weight[3].tolist() == [30.0] * 8


def test_nothing_stands_in_for_software_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_in, "find_spec", lambda name: object() if name == "habana_frameworks" else None)
    with pytest.raises(RuntimeError, match="nothing stands in"):
        stand_in.load.__wrapped__()


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    ("call", "fault"),
    [
        (lambda x: x.sort(-1)[0], "sort.* is not among"),
        (lambda x: torch.linalg.qr(x)[0], "qr.* is not among"),
        (lambda x: x.to(torch.int8) @ x.to(torch.int8), "mm.* of int8"),
        (lambda x: x.double(), "to_copy.* of float64|of float64"),
        (lambda x: torch._int_mm(x.to(torch.int8), x.to(torch.int8)), "_int_mm.* is not among"),
    ],
)
def test_kernels_may_call_what_intel_lists_and_nothing_else(
    call: Callable[[torch.Tensor], torch.Tensor], fault: str, inference: bool
) -> None:
    x = torch.ones(32, 32)
    with torch.inference_mode(inference):
        with pytest.raises(ValueError, match=fault):
            watched(lambda x: call(x) + 1, stand_in.only_gaudis)(x)
        call(x)  # outside of a kernel all is as ever
        assert torch.equal(watched(lambda x: x.abs() @ x.t(), stand_in.only_gaudis)(x), torch.full((32, 32), 32.0))
    everywhere = torch.nn.modules.module  # a hook there would keep all models from their decoders
    assert not everywhere._global_forward_hooks and not everywhere._global_forward_pre_hooks


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_kernel_is_watched(kernel: Kernel) -> None:
    assert kernel.load().forward.__wrapped__  # type: ignore[attr-defined]


def test_no_product_of_integers_is_listed() -> None:
    assert "mm" in TORCH and not {"int8", "uint8", "int32"} & set(TORCH["mm"]) and not VIEWS & set(TORCH)
    assert not any("int" in name and "mm" in name for name in (*TORCH, *SCHEMAS))


def test_every_byte_of_the_cache_is_e4m3fns() -> None:
    """All numbers go to the bytes that they have elsewhere, and come back."""
    numbers = ALL_BYTES.view(E4M3).float()
    assert torch.equal(e4m3.from_bytes(ALL_BYTES).nan_to_num(-999), numbers.nan_to_num(-999))
    finite = ALL_BYTES[~numbers.isnan()]
    assert torch.equal(e4m3.to_bytes(finite.view(E4M3).float()), finite)
    between = torch.linspace(-460, 460, 20_001)
    assert torch.equal(e4m3.to_bytes(between), between.clamp(-448, 448).to(E4M3).view(torch.uint8))
    assert bool(e4m3.from_bytes(e4m3.to_bytes(torch.tensor([float("nan")]))).isnan())


@pytest.mark.parametrize("order", ["dequantized", "inverses"])
@pytest.mark.parametrize("scale", [None, torch.tensor([132 / 448]), torch.tensor([0.01, 0.013, 3.0]).view(3, 1, 1)])
def test_the_cache_is_the_references_bit_by_bit(scale: torch.Tensor | None, order: Any) -> None:
    """With every number of bfloat16, some of which lie halfway between codes under 132 / 448."""
    states = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BF16)
    states = states[states.isfinite()].view(17, 3, 80, 16)
    element = Scheme.parse("W8A16-fp8-tensor").weight.element
    own, reference = KvCache(element, scale, order=order), KvRounding(element, scale, order=order)
    assert torch.equal(own.encode(states), reference.encode(states))
    assert torch.equal(own.forward(states), reference.forward(states))


def test_rows_of_weights_above_240_are_halved() -> None:
    numbers = ALL_BYTES.view(E4M3)
    large = numbers[~numbers.float().isnan()].repeat(2, 1)
    small = large.float().clamp(-240, 240).to(E4M3)
    held, scales = e4m3.halved_rows(torch.cat([large, small]), torch.tensor([1.0, 3.0, 1.0, 3.0]))
    assert scales.tolist() == [2.0, 6.0, 1.0, 3.0] and held.float().abs().max() == 240.0
    assert torch.equal(held[2:].float(), small.float())
    lost = (held[:2].float() * 2 - large.float()).abs()
    assert lost.max() == 2.0**-9 and not bool(lost[large.float().abs() >= 2.0**-5].any())
    held, _ = e4m3.halved_rows(torch.tensor([[0x7F, 0x7E, 0x38]], dtype=torch.uint8).view(E4M3), torch.ones(1))
    assert bool(held.float()[0, 0].isnan()) and held.float()[0, 1:].tolist() == [224.0, 0.5]


def test_static_inputs_above_240_are_halved_and_not_cut() -> None:
    """And those within it are what the definition makes of them, up to its own end."""
    x = torch.tensor([[1.0, 0.004, 2.0], [250.0, 448.0, 1.0], [900.0, -500.0, 3.0], [0.0, 0.0, 0.0]], dtype=BF16)
    held, scale = e4m3.rounded(x, torch.tensor([1.0]))
    assert scale.flatten().tolist() == [1.0, 2.0, 2.0, 1.0] and held.float().abs().max() == 224.0
    scheme = Scheme.parse("W8A8-fp8-static").input
    assert scheme is not None
    assert torch.equal(held.float() * scale, quantize_input(x.float(), scheme, torch.tensor([1.0])))


def test_run_time_scales_round_as_the_definition_does() -> None:
    """Under absmax / 448, numbers that bfloat16 has lie halfway between codes often; a product with the inverse would misplace some."""
    x = torch.arange(1.0, 257.0).unsqueeze(0).to(BF16) * torch.tensor([[140.0], [168.0], [196.0], [252.0], [1.0]]) / 256
    x = torch.cat([x.to(BF16), torch.tensor([[140.0], [168.0], [196.0], [252.0], [1.0]]).to(BF16)], 1)
    scheme = Scheme.parse("W8A8-fp8-dyn").input
    assert scheme is not None
    held, scale = e4m3.rounded(x, None)
    expected = quantize_input(x.float(), scheme)
    assert held.float().abs().max() <= 240 and torch.equal(held.float() * scale, expected)


def large_codes(text: str, scale: float) -> LayerTensors:
    """Every number of e4m3, and inputs under a static scale that need them, too."""
    layer = random_layer(Scheme.parse(text), 32, 256)
    numbers = ALL_BYTES.view(E4M3).float().nan_to_num(0.0)
    rows = torch.stack([numbers.roll(row) for row in range(32)]).to(E4M3)
    return replace(layer, weight=replace(layer.weight, codes=rows), input_scale=torch.tensor([scale]))


@pytest.mark.parametrize(
    ("kernel", "text"),
    [(Fp8ProductLinear, "W8A8-fp8-static"), (Fp8ProductLinear, "W8A8-fp8-dyn"), (Fp8Linear, "W8A16-fp8-channel")],
)
def test_all_of_e4m3_in_a_product(kernel: Any, text: str) -> None:
    layer = large_codes(text, 0.01)
    scheme = layer.weight.scheme
    if scheme.input is None or scheme.input.dynamic:
        layer = replace(layer, input_scale=None)
    x = torch.randn(6, 256, generator=torch.Generator().manual_seed(1)).to(BF16)
    assert layer.weight.codes.float().abs().max() == 448 and x.abs().max() > 2.4
    seen = x.float() if scheme.input is None else quantize_input(x.float(), scheme.input, layer.input_scale)
    expected = seen.double() @ layer.weight.dequantize().double().t()
    assert worst_error(kernel.from_layer(layer, BF16)(x), expected) < 0.005


def test_int4_is_packed_along_rows_from_the_lowest_bits() -> None:
    layer = random_layer(Scheme.parse("W4A16-g32-asym"), 16, 64)
    packed = Int4Linear.from_layer(layer, BF16)
    assert packed.packed.shape == (64, 2) and packed.zeros is not None and packed.zeros.shape == (2, 2)
    values = layer.weight.values()
    assert [int(packed.packed[5, 1]) >> 4 * i & 15 for i in range(8)] == values[8:, 5].int().tolist()


@pytest.mark.parametrize(
    "text", ["W4A16-g32-asym", "W4A16-int4-g32-asym", "W4A16-channel-sym", "W4A16-uint4-channel-sym", "W4A16-g128-asym-actorder"]
)  # fmt: skip
def test_int4_is_the_definition_in_bfloat16(text: str) -> None:
    layer = random_layer(Scheme.parse(text), 16, 256)
    weight = Int4Linear.from_layer(layer, BF16)(torch.eye(256, dtype=BF16))
    torch.testing.assert_close(weight.float(), layer.weight.dequantize().t(), rtol=0.008, atol=0)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_kernels_on_the_stand_in(kernel: Kernel) -> None:
    """For the matrix's schemes, as `qcore verify --simulate` has it."""
    findings = list(verify(registry(), Question(plugin="gaudi", kernel=kernel.name), None, stand_ins()))
    assert findings and {finding.device.id for finding in findings} == {"gaudi2-stand-in"}
    assert not [failure for finding in findings for failure in finding.failures]
    assert min(finding.cases for finding in findings) >= 8


def test_verify_asks_the_stand_in() -> None:
    command = [sys.executable, "-m", "qcore", "verify", "--plugin", "gaudi", "--simulate", "--kernel", "gaudi_int4"]
    done = subprocess.run([*command, "--row", "awq", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [finding["scheme"] for finding in json.loads(done.stdout)["findings"]] == ["W4A16-g128-asym"]


def test_no_scheme_of_the_matrix_is_left_to_portable_kernels() -> None:
    for row in ROWS:
        for scheme in row.parsed if not row.platforms else ():
            request = LayerRequest(row.op, scheme, (256, 512) if row.op == "linear" else (8, 64), "bfloat16")
            chosen = select(request, "gaudi", [(kernel, "gaudi") for kernel in KERNELS], stand_ins()[0]).kernel
            assert chosen is not None, f"{row.id}: {scheme}"


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_the_first_gaudi_is_left_to_portable_kernels(kernel: Kernel) -> None:
    scheme = claimed(kernel, row_schemes() + catalogue())[0]
    for generation, taken in (("gaudi", False), ("gaudi2", True), ("gaudi3", True)):
        device = Device("hpu:0", "gaudi", generation, "hpu", generation)
        request = LayerRequest(kernel.op, scheme, smallest_shape(kernel, scheme), "bfloat16")
        assert (select(request, "gaudi", [(kernel, "gaudi")], device).kernel is not None) == taken
