"""Detection from the recorded facts of NVIDIA's GPUs."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from qcore.host import Host
from qcore.platform import Device
from qcore_cuda import devices
from qcore_cuda.columns import PLATFORMS, built_for
from qcore_cuda.devices import Finding, examine
from qcore_cuda.nvml import Facts, Gpu, NvmlError
from qcore_cuda.visible import visible

CUDA_126 = {"version": "2.13.0+cu126", "cuda": "12.6"}
CUDA_130 = {"version": "2.13.0", "cuda": "13.0"}
CPU_ALONE = {"version": "2.13.0+cpu"}

V100 = Gpu("Tesla V100-SXM2-16GB", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", (7, 0), 16935682048)
T4 = Gpu("Tesla T4", "GPU-2b2f3cd4-0d6f-6e9b-3a52-0a2d7a0bd8f2", (7, 5), 15642460160)
A100 = Gpu("NVIDIA A100-SXM4-40GB", "GPU-f0a1b2c3-0000-1111-2222-333344445555", (8, 0), 42298834944)
ORIN = Gpu("Orin", "GPU-0a0a0a0a-1111-2222-3333-444444444444", (8, 7))
RTX_3090 = Gpu("NVIDIA GeForce RTX 3090", "GPU-f0b1b2c3-aaaa-bbbb-cccc-ddddeeeeffff", (8, 6), 25282281472)
L4 = Gpu("NVIDIA L4", "GPU-77aa0c1d-3e2f-4b5a-8c9d-0e1f2a3b4c5d", (8, 9), 23580639232)
H100 = Gpu("NVIDIA H100 80GB HBM3", "GPU-5c8f3f1e-8a4a-5f4e-9b0e-7d7b0f1a2c3d", (9, 0), 84987740160)
B200 = Gpu("NVIDIA B200", "GPU-b2000000-1234-5678-9abc-def012345678", (10, 0), 191500000000)
RTX_5090 = Gpu("NVIDIA GeForce RTX 5090", "GPU-50900000-1234-5678-9abc-def012345678", (12, 0), 33700000000)
GB10 = Gpu("NVIDIA GB10", "GPU-11111111-2222-3333-4444-555555555555", (12, 1))
P100 = Gpu("Tesla P100-PCIE-16GB", "GPU-60000000-1234-5678-9abc-def012345678", (6, 0), 16900000000)
GTX_1080 = Gpu("NVIDIA GeForce GTX 1080", "GPU-61000000-1234-5678-9abc-def012345678", (6, 1), 8400000000)


@pytest.fixture(autouse=True)
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not imported torch; importing it fails."""
    monkeypatch.setitem(sys.modules, "torch", None)  # type: ignore[arg-type]


def look(
    *gpus: Gpu,
    torch: dict[str, str] = CUDA_130,
    cuda: tuple[int, int] | None = (13, 0),
    root: Path = Path("/nonexistent"),
    **environment: str,
) -> Finding:
    return examine(Host(root, environment, torch=torch), lambda: Facts("580.82.07", cuda, gpus))


def fake_torch(*gpus: Gpu, built: tuple[str, ...] = (), available: bool = True) -> SimpleNamespace:
    """torch.cuda of these GPUs, whose UUIDs it writes without prefix."""

    def properties(index: int) -> SimpleNamespace:
        return SimpleNamespace(uuid=gpus[index].uuid.removeprefix("GPU-"))

    return SimpleNamespace(
        cuda=SimpleNamespace(
            is_available=lambda: available,
            device_count=lambda: len(gpus),
            get_device_properties=properties,
            get_device_capability=lambda index: gpus[index].capability,
            get_device_name=lambda index: gpus[index].name,
            mem_get_info=lambda index: (4321, 9999),
            get_arch_list=lambda: list(built),
        )
    )


def only(finding: Finding) -> Device:
    (device,) = finding.devices
    return device


@pytest.mark.parametrize(
    ("gpu", "torch", "column", "architecture", "dtype", "has", "lacks"),
    [
        (T4, CUDA_130, "turing", "sm_75", "float16", {"dp4a", "int8_tensor_core"}, {"bf16", "fp8"}),
        (A100, CUDA_130, "ampere", "sm_80", "bfloat16", {"bf16", "int8_tensor_core"}, {"fp8"}),
        (RTX_3090, CUDA_126, "ampere", "sm_86", "bfloat16", {"bf16"}, {"fp8"}),
        (ORIN, CUDA_130, "ampere", "sm_87", "bfloat16", {"bf16"}, {"fp8"}),
        (L4, CUDA_126, "ada", "sm_89", "bfloat16", {"fp8"}, {"fp4"}),
        (H100, CUDA_130, "hopper", "sm_90", "bfloat16", {"fp8", "cuda12.9"}, {"fp4"}),
        (H100, CUDA_126, "hopper", "sm_90", "bfloat16", {"fp8"}, {"fp4", "cuda12.9"}),
        (B200, CUDA_130, "blackwell", "sm_100", "bfloat16", {"fp8", "fp4"}, set()),
        (RTX_5090, CUDA_130, "blackwell", "sm_120", "bfloat16", {"fp4"}, set()),
        (GB10, CUDA_130, "blackwell", "sm_121", "bfloat16", {"fp4"}, set()),
        (V100, CUDA_126, "volta", "sm_70", "float16", {"dp4a", "fp16_tensor_core"}, {"int8_tensor_core", "bf16"}),
    ],
)
def test_recorded_gpus(
    gpu: Gpu, torch: dict[str, str], column: str, architecture: str, dtype: str, has: set[str], lacks: set[str]
) -> None:
    device = only(look(gpu, torch=torch))
    assert (device.id, device.torch_device, device.name) == ("cuda:0", "cuda:0", gpu.name)
    assert (device.platform, device.architecture, device.fast_dtype) == (column, architecture, dtype)
    assert has <= device.features and not lacks & device.features
    assert device.memory == gpu.free
    assert device.facts["uuid"] == gpu.uuid and device.facts["driver"] == "580.82.07"
    assert architecture in next(platform for platform in PLATFORMS if platform.id == column).architectures


@pytest.mark.parametrize("gpu", [P100, GTX_1080])
def test_older_gpus_are_reported_and_left_out(gpu: Gpu) -> None:
    finding = look(gpu, torch=CUDA_126)
    assert not finding.devices and "older than Volta" in finding.report["cuda:0"]


def test_gpus_of_the_future_are_reported_and_left_out() -> None:
    finding = look(Gpu("NVIDIA R100", "GPU-1", (14, 0)))
    assert not finding.devices and "install a newer qcore-cuda" in finding.report["cuda:0"]


@pytest.mark.parametrize(
    ("variable", "shown"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("2,1", [2, 1]),
        (" 1 , 0", [1, 0]),
        ("0,2,-1,1", [0, 2]),
        ("0,7,1", [0]),
        ("-1", []),
        ("1,1", []),
        ("1gpu2,2", [1, 2]),
        ("none", []),
        ("GPU-f0a1,GPU-8932f937", [1, 0]),
        ("GPU-f0", []),
        ("GPU-8932f937,GPU-f0,GPU-f0a1", [0]),
        ("GPU-8932f937,1", [0]),
        ("0,GPU-f0a1", [0]),
        ("GPU-89,GPU-8932", []),
    ],
)
def test_visible_devices(variable: str | None, shown: list[int]) -> None:
    assert visible(variable, [V100.uuid, A100.uuid, RTX_3090.uuid]) == shown


def test_visible_devices_number_anew() -> None:
    first = Gpu("NVIDIA L4", "GPU-1", (8, 9), 1)
    second = Gpu("NVIDIA L4", "GPU-2", (8, 9), 2)
    shown = look(first, second, CUDA_VISIBLE_DEVICES="1,0").devices
    assert [(device.id, device.memory) for device in shown] == [("cuda:0", 2), ("cuda:1", 1)]
    hidden = look(first, CUDA_VISIBLE_DEVICES="")
    assert not hidden.devices and "hides all" in hidden.report["missing"]


def test_unequal_gpus_are_numbered_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", fake_torch(H100, T4))  # type: ignore[arg-type]
    assert [device.name for device in look(T4, H100).devices] == [H100.name, T4.name]
    assert [device.memory for device in look(T4, H100).devices] == [H100.free, T4.free]


def test_unequal_gpus_in_bus_order_need_no_torch() -> None:
    names = [device.name for device in look(T4, H100, CUDA_DEVICE_ORDER="PCI_BUS_ID").devices]
    assert names == [T4.name, H100.name]
    assert "torch cannot reach" in look(T4, H100).report["missing"]


def test_mig_instances_are_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = Gpu(A100.name, A100.uuid, A100.capability, A100.free, mig=True)
    instance = Gpu("NVIDIA A100-SXM4-40GB MIG 1g.5gb", A100.uuid, (8, 0))
    monkeypatch.setitem(sys.modules, "torch", fake_torch(instance))  # type: ignore[arg-type]
    finding = look(parent)
    assert only(finding).name == instance.name and only(finding).memory == 4321
    assert "MIG" in finding.report["gpu 0"]


def test_a_gpu_that_nvml_cannot_read_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", fake_torch(L4))  # type: ignore[arg-type]
    finding = look(Gpu(fault="no permission (4)"), L4)
    assert only(finding).name == L4.name and "no permission" in finding.report["gpu 0"]


@pytest.mark.parametrize(
    ("gpu", "torch", "built", "wheel"),
    [
        (V100, CUDA_130, ("sm_75", "sm_80", "sm_90"), "cu126"),
        (V100, {"version": "2.11.0+cu128", "cuda": "12.8"}, ("sm_75", "sm_80"), "cu126"),
        (B200, CUDA_126, ("sm_80", "sm_90", "sm_90a"), "cu130"),
    ],
)
def test_gpus_that_torch_is_not_compiled_for(
    gpu: Gpu, torch: dict[str, str], built: tuple[str, ...], wheel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", fake_torch(gpu, built=built))  # type: ignore[arg-type]
    finding = look(gpu, torch=torch)
    assert not finding.devices and wheel in finding.report["cuda:0"]


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80", "sm_86"], False),
        ((9, 0), ["sm_90a"], True),
        ((12, 1), ["sm_120"], True),
        ((12, 1), ["sm_120a"], False),
        ((10, 0), ["sm_90", "compute_90"], True),
        ((8, 9), ["compute_90"], False),
        ((8, 9), [], True),
        ((8, 9), ["odd"], False),
    ],
)
def test_compiled_targets(capability: tuple[int, int], built: list[str], runs: bool) -> None:
    assert built_for(capability, built) is runs


@pytest.mark.parametrize(
    ("torch", "cuda", "says"),
    [
        (CPU_ALONE, (13, 0), ["built for the CPU alone", "cu130"]),
        (CPU_ALONE, (12, 4), ["built for the CPU alone", "cu126"]),
        ({}, (13, 0), ["torch is missing", "pip install"]),
        ({"version": "2.9.1+rocm6.4", "hip": "6.4"}, (13, 0), ["built for ROCm 6.4"]),
        (CUDA_130, (12, 4), ["built for CUDA 13.0", "up to 12.4", "update the driver", "cu126"]),
        (CUDA_126, (11, 4), ["up to 11.4", "update the driver"]),
    ],
)
def test_hardware_without_a_usable_torch(torch: dict[str, str], cuda: tuple[int, int], says: list[str]) -> None:
    finding = look(L4, torch=torch, cuda=cuda)
    assert not finding.devices
    assert all(word in finding.report["missing"] for word in says), finding.report


def test_a_newer_minor_version_than_the_driver_runs() -> None:
    assert only(look(L4, torch=CUDA_126, cuda=(12, 2))).platform == "ada"


@pytest.mark.parametrize("broken", ["raises", "unavailable"])
def test_torch_that_cannot_reach_the_gpus(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = fake_torch(L4, available=False)
    if broken == "raises":

        def fail(index: int) -> None:
            raise RuntimeError("CUDA driver initialization failed")

        torch = fake_torch(L4)
        torch.cuda.get_device_properties = fail
    monkeypatch.setitem(sys.modules, "torch", torch)  # type: ignore[arg-type]
    finding = look(L4)
    assert not finding.devices
    assert ("initialization failed" if broken == "raises" else "finds none") in finding.report["missing"]


def absent() -> Facts:
    raise NvmlError("libnvidia-ml.so.1 cannot be loaded")


def test_a_gpu_without_its_driver_is_reported(tmp_path: Path) -> None:
    node = tmp_path / "sys/bus/pci/devices/0000:01:00.0"
    node.mkdir(parents=True)
    for name, text in (("vendor", "0x10de"), ("device", "0x2684"), ("class", "0x030000")):
        (node / name).write_text(f"{text}\n")
    finding = examine(Host(tmp_path, {}, torch=CUDA_130), absent)
    assert not finding.devices
    assert "10de:2684" in finding.report["gpu"] and "Install NVIDIA's driver" in finding.report["missing"]


def test_a_driver_without_gpus() -> None:
    finding = look()
    assert not finding.devices and finding.report["missing"] == "the driver finds no GPU"


def test_an_empty_host_is_quick(tmp_path: Path) -> None:
    began = time.perf_counter()
    finding = examine(Host(tmp_path, {}), absent)
    assert time.perf_counter() - began < 1
    assert not finding.devices and finding.report == {"driver": "none, and no NVIDIA GPU on the PCI bus"}


@pytest.mark.parametrize("probe", ["absent", "alike"])
def test_torch_is_not_imported(probe: str, tmp_path: Path) -> None:
    """Neither on an empty host nor where NVML settles it."""
    code = f"""
import sys
from functools import partial
from qcore.host import Host
from qcore_cuda import nvml, plugin
from qcore_cuda.devices import examine
from pathlib import Path
absent = partial(nvml.probe, "libqcore-absent.so.1")
alike = lambda: nvml.Facts("580", (13, 0), (nvml.Gpu("NVIDIA L4", "GPU-1", (8, 9), 1),) * 2)
host = Host(Path({str(tmp_path)!r}), {{}}, torch={{"version": "2.13.0", "cuda": "13.0"}})
assert len(examine(host, {probe}).devices) == {0 if probe == "absent" else 2}
assert plugin.qcore_platforms() and plugin.qcore_evidence()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_loaded_torch_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: Callable[[], object] = lambda: fake_torch(L4)  # noqa: E731
    monkeypatch.setattr(devices, "_loaded_torch", loaded)
    assert [device.memory for device in look(L4, L4).devices] == [L4.free]
