"""Detection from recorded PCI ids and device nodes of TPU machines."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from qcore.host import Host
from qcore_tpu import plugin
from qcore_tpu.devices import ARCHITECTURES, devices, report, stand_ins

XLA = frozenset({"torch_xla", "torch"})
JAX = frozenset({"torchax", "jax", "libtpu", "torch"})


def machine(folder: Path, *ids: str, node: str = "dev/accel{}") -> Path:
    for i, device in enumerate(ids):
        function = folder / f"sys/bus/pci/devices/0000:00:{4 + i:02x}.0"
        function.mkdir(parents=True)
        for name, value in (("vendor", "0x1ae0"), ("device", f"0x{device}"), ("class", "0x120000")):
            (function / name).write_text(f"{value}\n")
        if node:
            place = folder / node.format(i)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
    return folder


@pytest.mark.parametrize(
    ("device", "node", "generation", "features"),
    [
        ("0027", "dev/accel{}", "v2", set()),
        ("005e", "dev/accel{}", "v4", set()),
        ("0063", "dev/vfio/{}", "v5e", {"int8"}),
        ("0062", "dev/vfio/{}", "v5p", {"int8"}),
        ("006f", "dev/vfio/{}", "v6e", {"int8"}),
        ("0076", "dev/vfio/{}", "v7x", {"fp8"}),
    ],
)
def test_recorded_chips(tmp_path: Path, device: str, node: str, generation: str, features: set[str]) -> None:
    found = devices(Host(machine(tmp_path, *[device] * 4, node=node), {}, modules=XLA))
    assert [row.id for row in found] == [f"tpu:{i}" for i in range(4)]
    first = found[0]
    assert (first.platform, first.torch_device, first.architecture) == ("tpu", "xla:0", generation)
    assert first.features == features | {"torch_xla"} and first.fast_dtype == "bfloat16" and generation in ARCHITECTURES


def test_either_route_serves_and_torchax_comes_first(tmp_path: Path) -> None:
    root = machine(tmp_path, "0063")
    assert devices(Host(root, {}, modules=XLA))[0].features == {"int8", "torch_xla"}
    both = Host(root, {}, modules=XLA | JAX, packages={"torchax": "0.0.13", "torch_xla": "2.9.0"})
    assert devices(both)[0].facts["route"] == "torchax"
    assert devices(Host(root, {}, modules=JAX))[0].features == {"int8", "torchax"}
    for absent in ("torchax", "jax", "libtpu"):
        assert devices(Host(root, {}, modules=JAX - {absent})) == []


def test_through_torch_xla_kernels_need_jax_too(tmp_path: Path) -> None:
    root = machine(tmp_path, "0063")
    whole, bare = Host(root, {}, modules=XLA | {"jax"}), Host(root, {}, modules=XLA)
    (found,) = devices(whole)
    assert found.features == {"int8", "torch_xla", "jax"} and found.ready == "qcore_tpu.lazy:start"
    assert "missing" not in report(whole)
    said = report(bare)
    assert said["route"] == "torch_xla" and "jax" in said["missing"] and "qcore-tpu[xla]" in said["fix"]


def test_a_torch_xla_for_another_torch_is_no_way(tmp_path: Path) -> None:
    """It does not ask pip for its own."""
    root = machine(tmp_path, "0063")
    packages = {"torch_xla": "2.9.0", "torch": "2.14.1+cpu"}
    alone = Host(root, {}, modules=XLA, packages=packages)
    assert devices(alone) == [] and stand_ins(alone) == []
    assert report(alone)["missing"] == "torch-xla 2.9.0 is not for torch 2.14.1+cpu"
    assert "qcore-tpu[xla]" in report(alone)["fix"]
    both = Host(root, {}, modules=XLA | JAX, packages={**packages, "torchax": "0.0.13"})
    assert devices(both)[0].facts["route"] == "torchax"
    fits = Host(root, {}, modules=XLA, packages={**packages, "torch": "2.9.1"})
    assert devices(fits)[0].facts["route"] == "torch_xla"


def test_the_torchax_inside_of_torch_xla_is_no_way_by_itself(tmp_path: Path) -> None:
    inside = Host(machine(tmp_path, "0063"), {}, modules=XLA | JAX, packages={"torch_xla": "2.9.0"})
    assert devices(inside)[0].facts["route"] == "torch_xla"


def test_a_cpu_stands_in_for_torch_xla_where_pjrt_is_told_to_run_on_it(tmp_path: Path) -> None:
    (found,) = devices(Host(tmp_path, {"PJRT_DEVICE": "CPU"}, modules=XLA | {"jax"}))
    assert found.simulated and (found.id, found.torch_device) == ("tpu:stand-in", "xla")
    assert found.features == {"int8", "torch_xla", "jax"} and found.ready == "qcore_tpu.lazy:start_on_cpu"


def test_several_chips_are_one_device_too(tmp_path: Path) -> None:
    """Over torchax, whose models can be spread over them."""
    root = machine(tmp_path, *["006f"] * 4)
    found = devices(Host(root, {}, modules=JAX))
    assert [row.id for row in found] == [*(f"tpu:{place}" for place in range(4)), "tpu:all"]
    assert found[-1].name == "4 x TPU v6e" and found[-1].ready != found[0].ready
    (only,) = devices(Host(root, {"TPU_VISIBLE_CHIPS": "2"}, modules=JAX))
    assert only.id == "tpu:0"


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({"TPU_VISIBLE_CHIPS": "0,1"}, 2),
        ({"TPU_VISIBLE_DEVICES": "3"}, 1),
        ({"TPU_VISIBLE_CHIPS": ""}, 0),
        ({"PJRT_DEVICE": "TPU"}, 4),
        ({"PJRT_DEVICE": "CPU"}, 0),
    ],
)
def test_variables(tmp_path: Path, variables: dict[str, str], count: int) -> None:
    assert len(devices(Host(machine(tmp_path, *["006f"] * 4), variables, modules=XLA))) == count


def test_a_cpu_stands_in_where_jax_is_told_to_run_on_it(tmp_path: Path) -> None:
    root = machine(tmp_path, "0063")
    (found,) = devices(Host(root, {"JAX_PLATFORMS": "cpu"}, modules=JAX))
    assert found.simulated and (found.torch_device, found.architecture) == ("cpu", "v5e")
    (chip,) = devices(Host(root, {"JAX_PLATFORMS": "cpu"}, modules=XLA))
    assert not chip.simulated  # torch-xla does not look at it
    assert not stand_ins(Host(root, {}, modules=frozenset({"torch"})))


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    bare = Host(machine(tmp_path / "a", "0063"), {}, modules=frozenset({"torch"}))
    assert devices(bare) == [] and "qcore-tpu[xla]" in report(bare)["fix"]
    simulated = Host(machine(tmp_path / "b", "0063"), {"PJRT_DEVICE": "CPU"}, modules=XLA)
    assert "PJRT_DEVICE is CPU" in report(simulated)["missing"]
    no_node = Host(machine(tmp_path / "c", "0063", node=""), {}, modules=XLA)
    assert devices(no_node) == [] and "node" in report(no_node)["missing"]


def test_torch_xla_without_a_tpu_is_no_device(tmp_path: Path) -> None:
    assert devices(Host(tmp_path, {"PJRT_DEVICE": "CPU"}, modules=XLA)) == []
    other = machine(tmp_path, "001f")  # Google's NVMe and network functions share the vendor's id
    assert devices(Host(other, {}, modules=XLA)) == []


def test_a_host_without_any_is_answered_for_at_once(tmp_path: Path) -> None:
    began = time.perf_counter()
    assert devices(Host(tmp_path, {}, modules=XLA)) == [] and "none" in report(Host(tmp_path, {}))["chips"]
    assert time.perf_counter() - began < 0.5
    code = "import sys; from qcore_tpu import plugin as p; p.qcore_devices(), p.qcore_report(), p.qcore_platforms(); assert not {'torch', 'jax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [platform.id for platform in plugin.qcore_platforms()] == ["tpu"]
