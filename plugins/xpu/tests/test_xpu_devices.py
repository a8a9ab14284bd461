"""Detection from recorded render nodes (PCI ids of real GPUs), with a torch that plays Intel's runtime."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from qcore.host import Host
from qcore_xpu import plugin
from qcore_xpu.devices import ARCHITECTURES, architecture, examine

XPU = {"version": "2.13.0+xpu", "xpu": "20250302"}


def machine(folder: Path, *cards: tuple[str, str]) -> Path:
    for i, (vendor, device) in enumerate(cards):
        place = folder / f"sys/class/drm/renderD{128 + i}/device"
        place.mkdir(parents=True)
        (place / "vendor").write_text(f"0x{vendor}\n")
        (place / "device").write_text(f"0x{device}\n")
    return folder


def runtime(monkeypatch: pytest.MonkeyPatch, *gpus: tuple[str, int, int], fault: Exception | None = None) -> None:
    """A torch whose xpu has GPUs of (name, device id, memory)."""

    def available() -> bool:
        if fault:
            raise fault
        return bool(gpus)

    xpu = SimpleNamespace(
        is_available=available,
        device_count=lambda: len(gpus),
        get_device_properties=lambda i: SimpleNamespace(
            name=gpus[i][0], device_id=gpus[i][1], total_memory=gpus[i][2], driver_version="1.6.33578"
        ),
    )
    dispatcher = SimpleNamespace(
        _dispatch_has_kernel_for_dispatch_key=lambda name, key: (name, key) != ("aten::_int_mm", "XPU")
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(xpu=xpu, _C=dispatcher))


@pytest.mark.parametrize(
    ("device", "name", "kind", "matrix"),
    [
        ("56a0", "Intel(R) Arc(TM) A770 Graphics", "dg2", True),
        ("56c0", "Intel(R) Data Center GPU Flex 170", "dg2", True),
        ("0bd5", "Intel(R) Data Center GPU Max 1550", "pvc", True),
        ("7d55", "Intel(R) Arc(TM) Graphics", "mtl", False),
        ("7d51", "Intel(R) Arc(TM) 140T GPU", "arl", True),
        ("64a0", "Intel(R) Arc(TM) 140V GPU", "lnl", True),
        ("e20b", "Intel(R) Arc(TM) B580 Graphics", "bmg", True),
        ("b080", "Intel(R) Graphics", "ptl", True),
        ("9a49", "Intel(R) Iris(R) Xe Graphics", "tgl", False),
        ("4905", "Intel(R) Iris(R) Xe MAX Graphics", "dg1", False),
    ],
)
def test_recorded_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, name: str, kind: str, matrix: bool
) -> None:
    runtime(monkeypatch, (name, int(device, 16), 16 << 30))
    (found,) = examine(Host(machine(tmp_path, ("8086", device)), {}, torch=XPU)).devices
    assert (found.id, found.platform, found.torch_device, found.name) == ("xpu:0", "xpu", "xpu:0", name)
    assert found.architecture == kind and kind in ARCHITECTURES and ("xmx" in found.features) == matrix
    assert found.features - {"xmx"} == {"int4pack", "int8pack", "scaled_mm"}
    assert found.memory == 16 << 30 and found.facts["driver"] == "1.6.33578"


def test_ids_next_to_each_other_are_told_apart() -> None:
    ids = {"7d41": "arl", "7d67": "arl", "7dd1": "arl", "7dd5": "mtl", "7d45": "mtl", "e223": "bmg", "b0a0": "ptl"}
    assert {device: architecture(device) for device in ids} == ids
    assert architecture("46a6") == architecture("") == ""


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = machine(tmp_path, ("8086", "e20b"))
    cpu_build = examine(Host(root, {}, torch={"version": "2.13.0+cpu"}))
    assert cpu_build.devices == () and "2.13.0+cpu is not built" in cpu_build.report["missing"]
    assert "XPU build" in cpu_build.report["fix"]
    runtime(monkeypatch)
    blind = examine(Host(root, {}, torch=XPU))
    assert blind.devices == () and "finds none" in blind.report["missing"]
    runtime(monkeypatch, fault=RuntimeError("Native API failed. -46"))
    broken = examine(Host(root, {}, torch=XPU))
    assert broken.devices == () and "-46" in broken.report["missing"] and broken.report["fix"]


def test_other_vendors_gpus_are_not_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it would fail
    assert examine(Host(machine(tmp_path, ("10de", "2330"), ("1002", "74a1")), {}, torch=XPU)).devices == ()


def test_a_host_without_any_is_answered_for_at_once(tmp_path: Path) -> None:
    began = time.perf_counter()
    assert examine(Host(tmp_path, {}, torch=XPU)).devices == ()
    assert time.perf_counter() - began < 0.5
    code = "import sys; from qcore_xpu import plugin as p; p.qcore_devices(), p.qcore_report(), p.qcore_platforms(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [platform.id for platform in plugin.qcore_platforms()] == ["xpu"]
