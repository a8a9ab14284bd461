"""Intel Extension for PyTorch as an optional route: when it is used, that nothing breaks where it is broken, and its kernels on what stands in for it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qcore.discovery import registry
from qcore.host import Host
from qcore.platform import Device
from qcore.refusal import Refused
from qcore.scheme import Scheme
from qcore.select import LayerRequest, select
from qcore.testing import checks
from qcore.testing.cases import catalogue, claimed
from qcore.testing.layers import random_layer
from qcore_xpu import ipex, ipex_stand_in
from qcore_xpu.kernels.ipex import IpexFp8Linear, IpexFp8ProductLinear, IpexInt4Linear

KERNELS = {kernel.name: kernel for kernel, plugin in registry().kernels if plugin == "xpu" and kernel.family == "ipex"}
BATTLEMAGE = SimpleNamespace(has_subgroup_matrix_multiply_accumulate=True, has_subgroup_2d_block_io=True)
DEVICE = Device("xpu-stand-in", "xpu", "stand-in", "cpu", features=frozenset(ipex.OPERATORS), simulated=True)


@pytest.fixture(scope="module", autouse=True)
def operators() -> None:
    """Nothing of torch's own is overridden by it."""
    ipex_stand_in.load()


def host(version: str = "", torch_version: str = "2.8.0+xpu", **environment: str) -> Host:
    packages = {ipex.DISTRIBUTION: version} if version else {}
    return Host(Path("/nowhere"), environment, packages=packages, torch={"version": torch_version, "xpu": "20250101"})


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (host("2.8.10+xpu"), ""),
        (host("2.8.10+git0123abc"), ""),
        (host("2.9.10+xpu", "2.9.1+xpu"), ""),
        (host(), "not installed"),
        (host("2.8.0"), "2.8.0 is the build for CPUs"),
        (host("2.8.0+cpu"), "2.8.0+cpu is the build for CPUs"),
        (host("2.7.10+xpu", "2.7.0+xpu"), "2.7.10+xpu is older than 2.8"),
        (host("2.8.10+xpu", "2.13.0+xpu"), "2.8.10+xpu does not work with torch 2.13.0+xpu"),
        (host("2.8.10+xpu", IPEX_COMPUTE_ENG="XETLA"), "IPEX_COMPUTE_ENG asks for XeTLA, and kernels here are for oneDNN"),
        (host("2.8.10+xpu", IPEX_COMPUTE_ENG="2"), ""),
    ],
)  # fmt: skip
def test_when_it_is_used(given: Host, reason: str) -> None:
    assert ipex.fault(given) == reason
    assert ipex.available(given, BATTLEMAGE) == (frozenset() if reason else frozenset(ipex.OPERATORS))
    said = ipex.report(given)
    assert said.startswith(reason or "2.") and "optional" in said and "archived upstream" in said


def test_where_it_would_run_xetla_it_is_not_used() -> None:
    alchemist = SimpleNamespace(has_subgroup_matrix_multiply_accumulate=True, has_subgroup_2d_block_io=False)
    meteor_lake = SimpleNamespace(has_subgroup_matrix_multiply_accumulate=False, has_subgroup_2d_block_io=False)
    for properties in (alchemist, meteor_lake, SimpleNamespace()):
        assert ipex.available(host("2.8.10+xpu"), properties) == frozenset()


BROKEN = """
import sys
from pathlib import Path
import torch
from qcore.host import Host
from qcore.refusal import Refused
from qcore_xpu import devices, ipex
import qcore.testing.layers as layers
from qcore.scheme import Scheme
from types import SimpleNamespace

facts = SimpleNamespace(name="Intel(R) Arc(TM) B580 Graphics", total_memory=12 << 30, has_subgroup_matrix_multiply_accumulate=True,
                        has_subgroup_2d_block_io=True)  # torch 2.8 tells no device id
torch.xpu.is_available, torch.xpu.device_count, torch.xpu.get_device_properties = lambda: True, lambda: 2, lambda place: facts
host = Host(Path(sys.argv[1]), {}, packages={ipex.DISTRIBUTION: "2.8.10+xpu"}, torch={"version": "2.8.0+xpu", "xpu": "1"})
found = devices.examine(host)
assert "intel_extension_for_pytorch" not in sys.modules
assert [device.architecture for device in found.devices] == ["bmg", "bmg"]
assert all(set(ipex.OPERATORS) < device.features for device in found.devices)
assert found.report[ipex.DISTRIBUTION].startswith("2.8.10+xpu (optional")
if sys.argv[2] == "asked":
    ipex.fault = lambda host: ""  # the import is tried
from qcore_xpu.kernels import ipex as kernels
for kernel, scheme in ((kernels.IpexInt4Linear, "W4A16-g32-sym"), (kernels.IpexFp8Linear, "W8A16-fp8-channel"), (kernels.IpexFp8ProductLinear, "W8A8-fp8-dyn")):
    try:
        kernel.from_layer(layers.random_layer(Scheme.parse(scheme), 8, 32), torch.float16)
    except Refused as error:
        print(error.refusal.code, error.refusal.fact)
"""


@pytest.mark.parametrize(
    ("body", "asked", "said"),
    [
        ("raise OSError('libsycl.so.8: cannot open shared object file')", "asked", "importing it failed: libsycl.so.8: cannot open shared object file"),
        ("raise SystemExit('no')", "asked", "importing it failed: no"),
        ("", "asked", "this build lacks it"),
        ("import os; os._exit(127)", "never", "not installed"),
    ],
)  # fmt: skip
def test_a_broken_one_breaks_nothing(tmp_path: Path, body: str, asked: str, said: str) -> None:
    """In a process of its own. Devices are found, without importing it, and its kernels refuse their layers."""
    (tmp_path / "intel_extension_for_pytorch.py").write_text(f"{body}\n")
    for node in ("renderD128", "renderD129"):
        place = tmp_path / f"sys/class/drm/{node}/device"
        place.mkdir(parents=True)
        (place / "vendor").write_text("0x8086\n")
        (place / "device").write_text("0xe20b\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{BROKEN}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), asked], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all(line.startswith("missing-requirement") and said in line for line in lines)


def test_torchs_own_and_triton_come_first_and_a_device_without_refuses() -> None:
    kernels = registry().kernels
    for scheme, first, name in (
        ("W4A16-g128-sym", "xpu_int4pack", "xpu_ipex_int4"),
        ("W8A16-fp8-channel", "triton_xpu_floats", "xpu_ipex_fp8_w8a16"),
        ("W8A8-fp8-dyn", "xpu_fp8", "xpu_ipex_fp8"),
    ):
        request = LayerRequest("linear", Scheme.parse(scheme), (256, 256), "bfloat16")
        chosen = select(request, "xpu", kernels).kernel
        assert chosen is not None and chosen.name == first
        older = [(kernel, plugin) for kernel, plugin in kernels if kernel.name == name]
        assert select(request, "xpu", older, DEVICE).kernel == older[0][0]
        (refused,) = select(request, "xpu", older, replace(DEVICE, features=frozenset({"xmx"}))).candidates
        assert refused.refusal is not None and refused.refusal.code == "wrong-device"
        assert name.removeprefix("xpu_") in refused.refusal.fact
    odd = LayerRequest("linear", Scheme.parse("W4A16-g32-sym"), (12, 64), "bfloat16")
    (refused,) = select(odd, "xpu", [(KERNELS["xpu_ipex_int4"], "xpu")], DEVICE).candidates
    assert refused.refusal is not None and refused.refusal.code == "shape-unsupported"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", list(KERNELS))
def test_every_scheme_against_the_definition(name: str, dtype: str) -> None:
    """All groups that the row claims, act-order, zero points, 1 to 17 rows and 512, strided and empty input, bias."""
    kernel = KERNELS[name]
    schemes = claimed(kernel, catalogue())
    assert len(schemes) >= 2
    for scheme in schemes:
        for size in ("tiny", "odd"):
            bench = checks.Bench(kernel, scheme, dtype, size, DEVICE)
            for check in (checks.numbers, checks.largest_codes, checks.leading_dimensions, checks.strided_input,
                          checks.empty_input, checks.bias_and_multiplier):  # fmt: skip
                check(bench)


@pytest.mark.parametrize(("name", "scheme"), [("int4", "W4A16-g128-sym-actorder"), ("fp8_w8a16", "W8A16-fp8-channel"), ("fp8", "W8A8-fp8-dyn")])  # fmt: skip
def test_torch_compile_takes_it_whole(name: str, scheme: str) -> None:
    packed = KERNELS[f"xpu_ipex_{name}"].load().from_layer(random_layer(Scheme.parse(scheme), 32, 256), torch.bfloat16)
    compiled = torch.compile(packed, backend="aot_eager", dynamic=True, fullgraph=True)
    for rows in (3, 7):
        x = torch.randn(rows, 256, dtype=torch.bfloat16)
        assert torch.equal(compiled(x), packed(x))


def test_zero_points_beyond_four_bits_are_refused() -> None:
    layer = random_layer(Scheme.parse("W4A16-g32-asym"), 8, 64)
    assert layer.weight.zeros is not None
    layer.weight.zeros[0, 0] = 16
    with pytest.raises(Refused, match="contents-unsupported"):
        IpexInt4Linear.from_layer(layer, torch.float16)


def test_rows_cut_out_of_wider_ones() -> None:
    """The operators read strides: fp8_gemm_w8a16 lays its result out by them."""
    for kernel, scheme in (
        (IpexInt4Linear, "W4A16-g32-sym"),
        (IpexFp8Linear, "W8A16-fp8-channel"),
        (IpexFp8ProductLinear, "W8A8-fp8-dyn"),
    ):
        packed = kernel.from_layer(random_layer(Scheme.parse(scheme), 16, 64), torch.float16)
        for rows in (1, 3):
            x = torch.randn(rows, 100, dtype=torch.float16)[:, :64]
            assert torch.equal(packed(x), packed(x.clone()))


def test_channels_of_different_scales_do_not_overflow() -> None:
    """The operator takes one scale: in float16, sums of codes themselves would be too large."""
    layer = random_layer(Scheme.parse("W8A16-fp8-channel"), 16, 512)
    random = torch.Generator().manual_seed(0)
    layer.weight.codes.copy_((150 * torch.randn(16, 512, generator=random)).clamp(-448, 448))
    layer.weight.scales[0].copy_(torch.logspace(-4, -2, 16)[:, None])
    packed = IpexFp8Linear.from_layer(layer, torch.float16)
    x = (32 * torch.randn(4, 512, generator=random)).half()
    assert float((x.double() @ packed.codes.double().t()).abs().amax(0).min()) > 65504
    expected = x.double() @ layer.weight.dequantize().double().t()
    error = (packed(x).double() - expected).abs().amax(0) / expected.square().mean(0).sqrt()
    assert float(error.max()) < 2e-3


def test_the_weight_keeps_its_shape() -> None:
    """The operator's own transposition would turn the caller's tensor."""
    packed = IpexFp8ProductLinear.from_layer(random_layer(Scheme.parse("W8A8-fp8-dyn"), 16, 64), torch.float16)
    x = torch.randn(3, 64, dtype=torch.float16)
    assert torch.equal(packed(x), packed(x)) and packed.codes.shape == (16, 64)
    sides = torch.zeros(3, 64).to(torch.float8_e4m3fn), torch.zeros(16, 64).to(torch.float8_e4m3fn)
    torch.ops.torch_ipex.fp8_gemm(sides[0], False, sides[1], True, None, torch.float32, None, None, None, False)
    assert sides[1].shape == (64, 16)


E4M3 = torch.float8_e4m3fn


def int4(rows: int = 2, columns: int = 64, outputs: int = 16, group: int = 32):  # type: ignore[no-untyped-def]
    """What the operator takes: x, packed, scales, zeros, group, order."""
    return [torch.zeros(rows, columns, dtype=torch.float16), torch.zeros(outputs, columns // 8, dtype=torch.int32).t(),
            torch.ones(columns // group, outputs, dtype=torch.float16), torch.tensor([8], dtype=torch.int8), group, None]  # fmt: skip


@pytest.mark.parametrize(
    ("place", "given", "fault"),
    [
        (0, torch.zeros(2, 64), "16 bits"),
        (1, torch.zeros(8, 16, dtype=torch.int32), "contiguous along K"),
        (1, torch.zeros(16, 32, dtype=torch.uint8).t(), "int32"),
        (1, torch.zeros(16, 8, dtype=torch.int32), "K / 8"),
        (2, torch.ones(16, 2, dtype=torch.float16), "scales are"),
        (2, torch.ones(16, 2, dtype=torch.float16).t(), "scales are"),
        (2, torch.ones(2, 16), "x's type"),
        (3, torch.tensor([8]), "int8"),
        (3, torch.zeros(2, 16, dtype=torch.int8), "N / 8"),
        (3, torch.zeros(16, 2, dtype=torch.int32), "N / 8"),
        (4, 16, "groups"),
        (5, torch.arange(8), "order"),
    ],
)  # fmt: skip
def test_the_int4_double_takes_what_the_operator_takes(place: int, given: torch.Tensor | int, fault: str) -> None:
    arguments = int4()
    assert torch.ops.torch_ipex.mm_int4.xpu(*arguments).shape == (2, 16)
    arguments[place] = given
    with pytest.raises(ValueError, match=fault):
        torch.ops.torch_ipex.mm_int4.xpu(*arguments)


def test_the_fp8_doubles_take_what_the_operators_take() -> None:
    x, codes = torch.zeros(2, 64, dtype=torch.float16), torch.zeros(16, 64).to(E4M3)
    one, many = torch.ones(1), torch.ones(16)
    assert torch.ops.torch_ipex.fp8_gemm_w8a16(x, codes, True, one, None).shape == (2, 16)
    for arguments, fault in (
        ((x.float(), codes, True, one, None), "16 bits"),
        ((x, codes.half(), True, one, None), "float8"),
        ((x, codes, False, one, None), "fit"),
        ((x, codes, True, many, None), "one scale"),
        ((x.new_zeros(2, 65)[:, :64], codes, True, one, None), "whole rows"),
    ):
        with pytest.raises(ValueError, match=fault):
            torch.ops.torch_ipex.fp8_gemm_w8a16(*arguments)
    both = (False, codes.t(), False, None, torch.float32)
    assert torch.ops.torch_ipex.fp8_gemm(x.to(E4M3), *both, None, None, None, False).dtype == torch.float32
    for left, scale, fault in (
        (x.to(E4M3), many, "one scale"),
        (x[:, :32].to(E4M3), None, "fit"),
        (x.int(), None, "float8"),
    ):
        with pytest.raises(ValueError, match=fault):
            torch.ops.torch_ipex.fp8_gemm(left, *both, None, scale, None, False)


def test_nothing_stands_in_for_a_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="nothing stands in"):
        ipex_stand_in.load.__wrapped__()


def test_every_feature_has_a_double_and_a_kernel() -> None:
    assert set(ipex_stand_in._DOUBLES) == set(ipex.OPERATORS)
    assert set().union(*(need for kernel in KERNELS.values() for need in kernel.features)) == set(ipex.OPERATORS)
