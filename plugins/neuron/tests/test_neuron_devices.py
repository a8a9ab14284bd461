"""Detection from recorded PCI ids and device nodes of Neuron instances, and the SDK told from the index's placeholders."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from qcore.host import Host
from qcore_neuron import plugin, stand_in
from qcore_neuron.devices import ARCHITECTURES, INDEX, devices, is_placeholder, report
from qcore_neuron.operators import SETTING
from qcore_neuron.sdk import sdk

SDK = {"torch-neuronx": "2.8.0.2.10.13553+1e4dd6ca", "neuronx-cc": "2.21.18209.0"}
MODULES = frozenset({"torch_neuronx", "torch_xla", "torch"})


def machine(folder: Path, *ids: str, runtime: bool = True, nodes: bool = True) -> Path:
    for i, device in enumerate(ids):
        function = folder / f"sys/bus/pci/devices/0000:{0x10 + i:02x}:1e.0"
        function.mkdir(parents=True)
        for name, value in (("vendor", "0x1d0f"), ("device", f"0x{device}"), ("class", "0x088000")):
            (function / name).write_text(f"{value}\n")
        if nodes:
            (folder / "dev").mkdir(exist_ok=True)
            (folder / f"dev/neuron{i}").touch()
    if runtime:
        (folder / "opt/aws/neuron/lib").mkdir(parents=True)
        (folder / "opt/aws/neuron/lib/libnrt.so.1").touch()
    return folder


def host(root: Path, packages: dict[str, str] | None = None, **variables: str) -> Host:
    return Host(root, variables, packages=SDK if packages is None else packages, modules=MODULES)


@pytest.mark.parametrize(
    ("device", "count", "generation", "cores", "features"),
    [
        ("7264", 1, "inf2", "0,1", {"fp8"}),  # inf2.xlarge
        ("7164", 16, "trn1", "0,1", {"fp8"}),  # trn1.32xlarge
        ("7364", 16, "trn2", "0,1,2,3,4,5,6,7", {"fp8"}),  # trn2.48xlarge
        ("7564", 4, "trn3", "0,1,2,3,4,5,6,7", {"mxfp4", "mxfp8"}),
        ("7565", 4, "trn3", "0,1,2,3,4,5,6,7", {"mxfp4", "mxfp8"}),
    ],
)
def test_recorded_devices(
    tmp_path: Path, device: str, count: int, generation: str, cores: str, features: set[str]
) -> None:
    found = devices(host(machine(tmp_path, *[device] * count)))
    assert [row.id for row in found] == [f"neuron:{i}" for i in range(count)]
    first = found[0]
    assert (first.platform, first.torch_device, first.architecture) == ("neuron", "xla", generation)
    assert first.facts["cores"] == cores and features <= first.features and generation in ARCHITECTURES


@pytest.mark.parametrize(
    ("variables", "cores"),
    [
        ({"NEURON_RT_VISIBLE_CORES": "0"}, ["0"]),
        ({"NEURON_RT_VISIBLE_CORES": "1-2"}, ["1", "2"]),
        ({"NEURON_RT_VISIBLE_CORES": "0,3"}, ["0", "3"]),
        ({"NEURON_RT_VISIBLE_CORES": "all of them"}, []),
        ({"NEURON_RT_NUM_CORES": "2"}, ["0,1"]),
        ({"NEURON_RT_NUM_CORES": "3"}, ["0,1", "2"]),
    ],
)
def test_variables(tmp_path: Path, variables: dict[str, str], cores: list[str]) -> None:
    found = devices(host(machine(tmp_path, "7264", "7264"), **variables))
    assert [row.facts["cores"] for row in found] == cores


def test_inf1_is_not_run(tmp_path: Path) -> None:
    assert devices(host(machine(tmp_path, "7064"))) == []


def test_placeholders_are_told_from_the_sdk(tmp_path: Path) -> None:
    assert [is_placeholder(v) for v in ("1.0", "1.0.post1", "0.0.1", "2.8.0.2.10.13553", "2.1.2.2.4.0")] == [
        True, True, True, False, False
    ]  # fmt: skip
    fooled = host(machine(tmp_path, "7164"), {"torch-neuronx": "1.0", "neuronx-cc": "1.0.post1"})
    said = report(fooled)
    assert devices(fooled) == [] and "placeholder" in said["missing"] and INDEX in said["fix"]


STUBS = ('"""WRONG PACKAGE. Please install from another index."""', '__version__ = "2.9.0"', "", "this is no Python")


def stub(folder: Path, monkeypatch: pytest.MonkeyPatch, content: str, version: str = "2.9.0.2.11") -> None:
    """A torch_neuronx that is really installed, with a version that looks like the SDK's."""
    (folder / f"torch_neuronx-{version}.dist-info").mkdir(parents=True)
    (folder / f"torch_neuronx-{version}.dist-info/METADATA").write_text(f"Metadata-Version: 2.1\nName: torch-neuronx\nVersion: {version}\n")  # fmt: skip
    (folder / "torch_neuronx.py").write_text(content)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setitem(sys.modules, "torch_neuronx", None)  # which is put back afterwards
    del sys.modules["torch_neuronx"]


@pytest.mark.parametrize("content", [*STUBS, "from a_torch_xla_that_is_absent import *"])
def test_a_stub_is_told_from_the_sdk_by_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    stub(tmp_path / "site", monkeypatch, content)
    there = Host(machine(tmp_path / "host", "7364"), {})
    found, said = devices(there), report(there)
    assert said["torch-neuronx"] == "2.9.0.2.11" and "torch_neuronx" not in sys.modules, "it is read, not imported"
    if content in STUBS:
        assert not found and "placeholder" in said["missing"] and INDEX in said["fix"]
    else:
        assert found and "missing" not in said


@pytest.mark.parametrize(
    ("content", "there"),
    [
        (STUBS[0], False),
        ("trace = None", False),
        ("def trace(function, inputs): ...", True),
    ],
)
def test_nothing_stands_in_beside_what_traces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, there: bool
) -> None:
    stub(tmp_path, monkeypatch, content)
    assert (sdk() is not None) == there
    if there:
        with pytest.raises(RuntimeError, match="nothing stands in"):
            stand_in.load.__wrapped__()


def test_an_sdk_that_cannot_be_imported_is_no_reason_to_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sdk() is None
    stub(tmp_path, monkeypatch, "import a_torch_xla_that_is_absent")
    with pytest.raises(ModuleNotFoundError, match="a_torch_xla"):
        stand_in.load.__wrapped__()


@pytest.mark.parametrize(
    ("device", "variables", "taken"),
    [
        ("7564", {}, True),
        ("7364", {}, False),
        ("7264", {"UNSAFE_FP8FNCAST": "0"}, False),
        ("7164", {"UNSAFE_FP8FNCAST": "1"}, True),
        ("7364", {"NEURON_CC_FLAGS": f"-O1 --internal-hlo2tensorizer-options={SETTING}"}, True),
    ],
)
def test_where_the_compiler_takes_torchs_e4m3(
    tmp_path: Path, device: str, variables: dict[str, str], taken: bool
) -> None:
    found = host(machine(tmp_path, device), **variables)
    assert ("e4m3fn" in devices(found)[0].features) == taken
    assert (SETTING in report(found).get("fp8", "")) == (not taken)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    without_sdk = host(machine(tmp_path / "a", "7164"), {})
    assert devices(without_sdk) == [] and INDEX in report(without_sdk)["fix"]
    without_runtime = host(machine(tmp_path / "b", "7164", runtime=False))
    assert devices(without_runtime) == [] and "libnrt" in report(without_runtime)["missing"]
    without_driver = host(machine(tmp_path / "c", "7164", nodes=False))
    assert devices(without_driver) == [] and "aws-neuronx-dkms" in report(without_driver)["fix"]


def test_a_host_without_any_is_answered_for_at_once(tmp_path: Path) -> None:
    began = time.perf_counter()
    assert devices(host(tmp_path)) == [] and "none" in report(host(tmp_path))["devices"]
    assert time.perf_counter() - began < 0.5
    code = "import sys; from qcore_neuron import plugin as p; p.qcore_devices(), p.qcore_report(), p.qcore_platforms(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [platform.id for platform in plugin.qcore_platforms()] == ["neuron"]
