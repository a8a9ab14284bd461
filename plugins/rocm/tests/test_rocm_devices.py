"""Detection from recorded topologies: node properties as amdkfd prints them, by gfx_target_version of real GPUs."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from qcore.host import Host
from qcore_rocm import plugin
from qcore_rocm.devices import ARCHITECTURES, devices, report
from qcore_rocm.topology import gfx_name, gpus_of

HIP = {"version": "2.13.0+rocm7.1", "hip": "7.1.25424"}
CPU = "cpu_cores_count 96\nsimd_count 0\nmem_banks_count 1\ngfx_target_version 0\nvendor_id 0\n"
GIB = 1 << 30


def gpu(version: int, *, simd: int = 304, unique: int = 0x1D2B8F0AE5C7, render: int = 128) -> str:
    return (
        f"cpu_cores_count 0\nsimd_count {simd}\nmem_banks_count 1\ngfx_target_version {version}\nvendor_id 4098\n"
        f"drm_render_minor {render}\nunique_id {unique}\nnum_xcc 8\nfw_version 175\n"
    )


def machine(folder: Path, *nodes: str, vram: tuple[int, int] | None = None, driver: bool = True) -> Path:
    for i, properties in enumerate(nodes):
        node = folder / f"sys/class/kfd/kfd/topology/nodes/{i}"
        (node / "mem_banks/0").mkdir(parents=True)
        (node / "properties").write_text(properties)
        (node / "mem_banks/0/properties").write_text(f"heap_type 1\nsize_in_bytes {192 * GIB}\nflags 0\nwidth 8192\n")
    if vram:
        card = folder / "sys/class/drm/renderD128/device"
        card.mkdir(parents=True)
        (card / "mem_info_vram_total").write_text(f"{vram[0]}\n")
        (card / "mem_info_vram_used").write_text(f"{vram[1]}\n")
    (folder / "dev").mkdir(exist_ok=True)
    if driver:
        (folder / "dev/kfd").touch()
    return folder


@pytest.mark.parametrize(
    ("version", "name", "features", "dtype"),
    [
        (90006, "gfx906", {"wave64", "dot_int8"}, "float16"),  # Radeon VII, MI50
        (90008, "gfx908", {"mfma"}, "bfloat16"),  # MI100
        (90010, "gfx90a", {"mfma"}, "bfloat16"),  # MI210, MI250
        (90402, "gfx942", {"fp8_fnuz"}, "bfloat16"),  # MI300X
        (90500, "gfx950", {"fp8", "fp4"}, "bfloat16"),  # MI350
        (100300, "gfx1030", {"wave32"}, "float16"),  # RX 6900 XT
        (110000, "gfx1100", {"wmma"}, "bfloat16"),  # RX 7900 XTX
        (110501, "gfx1151", {"wmma"}, "bfloat16"),  # Strix Halo
        (120001, "gfx1201", {"fp8"}, "bfloat16"),  # RX 9070 XT
    ],
)
def test_recorded_gpus(tmp_path: Path, version: int, name: str, features: set[str], dtype: str) -> None:
    (found,) = devices(Host(machine(tmp_path, CPU, gpu(version), vram=(64 * GIB, 4 * GIB)), {}, torch=HIP))
    assert (found.id, found.platform, found.torch_device, found.architecture) == ("rocm:0", "amd", "cuda:0", name)
    assert features <= found.features and found.fast_dtype == dtype and found.memory == 60 * GIB
    assert name in ARCHITECTURES


def test_without_amdgpus_files_all_memory_counts(tmp_path: Path) -> None:
    assert devices(Host(machine(tmp_path, gpu(90402)), {}, torch=HIP))[0].memory == 192 * GIB


def test_gpus_that_torch_has_no_code_for_are_said_and_not_run(tmp_path: Path) -> None:
    host = Host(machine(tmp_path, gpu(100306), gpu(90012)), {}, torch=HIP)  # two integrated ones
    assert devices(host) == [] and report(host)["not run"].startswith("gfx1036, gfx90c")


TWO = (CPU, gpu(90402, unique=10), gpu(90402, unique=255, render=129))


@pytest.mark.parametrize(
    ("variables", "nodes"),
    [
        ({}, ["1", "2"]),
        ({"HIP_VISIBLE_DEVICES": "1"}, ["2"]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, ["2"]),
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}, ["1"]),
        ({"ROCR_VISIBLE_DEVICES": "1,0"}, ["2", "1"]),
        ({"ROCR_VISIBLE_DEVICES": "GPU-00000000000000ff"}, ["2"]),
        ({"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "0"}, ["2"]),
        ({"HIP_VISIBLE_DEVICES": "1,7,0"}, ["2"]),
        ({"HIP_VISIBLE_DEVICES": ""}, []),
        ({"HIP_VISIBLE_DEVICES": "-1"}, []),
    ],
)
def test_variables(tmp_path: Path, variables: dict[str, str], nodes: list[str]) -> None:
    host = Host(machine(tmp_path, *TWO), variables, torch=HIP)
    assert [device.facts["node"] for device in devices(host)] == nodes
    assert [device.id for device in devices(host)] == [f"rocm:{i}" for i in range(len(nodes))]
    if not nodes:
        assert "HIP_VISIBLE_DEVICES" in report(host)["fix"]


def test_the_override_of_the_architecture_is_believed(tmp_path: Path) -> None:
    host = Host(machine(tmp_path, gpu(100301)), {"HSA_OVERRIDE_GFX_VERSION": "10.3.0"}, torch=HIP)
    assert devices(host)[0].architecture == "gfx1030"


@pytest.mark.parametrize(
    ("torch", "driver", "clue", "fix"),
    [
        ({"version": "2.13.0+cpu"}, True, "torch 2.13.0+cpu is not built for ROCm", "ROCm build"),
        ({}, True, "torch is absent", "ROCm build"),
        (HIP, False, "no /dev/kfd", "amdgpu"),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, torch: dict[str, str], driver: bool, clue: str, fix: str) -> None:
    host = Host(machine(tmp_path, gpu(90402), driver=driver), {}, torch=torch)
    said = report(host)
    assert devices(host) == [] and clue in said["missing"] and fix in said["fix"]


def test_a_node_that_may_not_be_opened_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(machine(tmp_path, gpu(90402)), {}, torch=HIP)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert devices(host) == [] and "render" in report(host)["fix"]


def test_odd_properties_harm_nobody(tmp_path: Path) -> None:
    odd = "simd_count many\ngfx_target_version\nno number here at all\n"
    host = Host(machine(tmp_path, odd, gpu(90402)), {}, torch=HIP)
    assert [gpu.node for gpu in gpus_of(host)] == ["1"]


def test_names() -> None:
    assert [gfx_name(v) for v in (90006, 90010, 90402, 100306, 120001)] == [
        "gfx906", "gfx90a", "gfx942", "gfx1036", "gfx1201"
    ]  # fmt: skip


def test_a_host_without_any_is_answered_for_at_once(tmp_path: Path) -> None:
    began = time.perf_counter()
    assert devices(Host(tmp_path, {}, torch=HIP)) == [] and "none" in report(Host(tmp_path, {}))["GPUs"]
    assert time.perf_counter() - began < 0.5
    code = "import sys; from qcore_rocm import plugin as p; p.qcore_devices(), p.qcore_report(), p.qcore_platforms(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [platform.id for platform in plugin.qcore_platforms()] == ["amd"]
