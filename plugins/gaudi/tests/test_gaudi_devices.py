"""Detection from recorded PCI ids and device nodes of Gaudi, Gaudi2 and Gaudi3 machines."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from qcore.host import Host
from qcore_gaudi import plugin
from qcore_gaudi.devices import ARCHITECTURES, devices, report

SDK = frozenset({"habana_frameworks", "torch"})


def machine(folder: Path, *ids: str, node: str = "dev/accel/accel{}", driver: str = "1.22.0-740") -> Path:
    for i, device in enumerate(ids):
        function = folder / f"sys/bus/pci/devices/0000:{0x19 + i:02x}:00.0"
        function.mkdir(parents=True)
        for name, value in (("vendor", "0x1da3"), ("device", f"0x{device}"), ("class", "0x120000")):
            (function / name).write_text(f"{value}\n")
        if node:
            place = folder / node.format(i)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
    if driver:
        (folder / "sys/module/habanalabs").mkdir(parents=True)
        (folder / "sys/module/habanalabs/version").write_text(driver + "\n")
    return folder


@pytest.mark.parametrize(
    ("device", "generation", "features"),
    [
        ("1000", "gaudi", {"bf16"}),
        ("1010", "gaudi", {"bf16"}),
        ("1020", "gaudi2", {"fp8", "fp8_max_240"}),
        ("1021", "gaudi2", {"fp8", "fp8_max_240"}),
        ("1060", "gaudi3", {"fp8", "fp8_max_448"}),
        ("1063", "gaudi3", {"fp8", "fp8_max_448"}),
    ],
)
def test_recorded_accelerators(tmp_path: Path, device: str, generation: str, features: set[str]) -> None:
    found = devices(Host(machine(tmp_path, *[device] * 8), {}, modules=SDK))
    assert [row.id for row in found] == [f"hpu:{i}" for i in range(8)]
    first = found[0]
    assert (first.platform, first.torch_device, first.architecture) == ("gaudi", "hpu", generation)
    assert features <= first.features and first.fast_dtype == "bfloat16" and generation in ARCHITECTURES
    assert ("fp8" in first.features) == (generation != "gaudi")


def test_nodes_of_the_older_driver_count_too(tmp_path: Path) -> None:
    assert len(devices(Host(machine(tmp_path, "1000", node="dev/hl{}"), {}, modules=SDK))) == 1


@pytest.mark.parametrize(("listed", "modules"), [("2,0", ["2", "0"]), ("", []), ("1", ["1"]), ("0,9,1", ["0"])])
def test_visible_modules(tmp_path: Path, listed: str, modules: list[str]) -> None:
    host = Host(machine(tmp_path, *["1020"] * 4), {"HABANA_VISIBLE_MODULES": listed}, modules=SDK)
    assert [row.facts["module"] for row in devices(host)] == modules


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    without_sdk = Host(machine(tmp_path / "a", "1020"), {}, modules=frozenset({"torch", "optimum"}))
    assert devices(without_sdk) == []
    said = report(without_sdk)
    assert "habana_frameworks" in said["missing"] and said["fix"] and said["driver"] == "1.22.0-740"
    without_driver = Host(machine(tmp_path / "b", "1020", node="", driver=""), {}, modules=SDK)
    assert devices(without_driver) == [] and "driver" in report(without_driver)["fix"]
    assert report(without_driver)["driver"] == "not loaded"


def test_other_accelerators_nodes_are_not_taken_for_gaudis(tmp_path: Path) -> None:
    machine(tmp_path, "1020")
    (tmp_path / "sys/bus/pci/devices/0000:19:00.0/vendor").write_text("0x8086\n")  # an NPU has /dev/accel too
    assert devices(Host(tmp_path, {}, modules=SDK)) == [] and "none" in report(Host(tmp_path, {}))["accelerators"]


def test_a_host_without_any_is_answered_for_at_once(tmp_path: Path) -> None:
    began = time.perf_counter()
    assert devices(Host(tmp_path, {}, modules=SDK)) == []
    assert time.perf_counter() - began < 0.5
    code = "import sys; from qcore_gaudi import plugin as p; p.qcore_devices(), p.qcore_report(), p.qcore_platforms(); assert not {'torch', 'optimum'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [platform.id for platform in plugin.qcore_platforms()] == ["gaudi"]
