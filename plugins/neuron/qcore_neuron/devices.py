"""This host's Neuron devices: the PCI bus and the driver's nodes say what is there, the SDK whether it can be used.

The package index has placeholders named torch-neuronx, neuronx-cc, libneuronxla and nki, which install and do nothing. They are told from the SDK by their version
numbers, for the real torch-neuronx counts as torch does (2.x), and by what the module has (qcore_neuron/sdk.py).
Sources: the Neuron driver's PCI ids (neuron_device.h), AWS's documentation of NEURON_RT_VISIBLE_CORES and of neuronx-cc's error NCC_EVRF051.
"""

from __future__ import annotations

import re

from qcore.host import Host
from qcore.platform import Device
from qcore_neuron.operators import SETTING
from qcore_neuron.sdk import has_code

ARCHITECTURES = ("inf2", "trn1", "trn2", "trn3")

_VENDOR = "1d0f"
_GENERATIONS = {"7164": "trn1", "7264": "inf2", "7364": "trn2", "7564": "trn3", "7565": "trn3"}
"""PCI device ids. Inf1 (7064 to 7067) is left out: torch-neuronx does not run it."""

_CORES = {"inf2": 2, "trn1": 2, "trn2": 8, "trn3": 8}
"""NeuronCores of a device, physical ones."""

_FEATURES = {
    "inf2": frozenset({"bf16", "fp8"}),
    "trn1": frozenset({"bf16", "fp8"}),
    "trn2": frozenset({"bf16", "fp8"}),
    "trn3": frozenset({"bf16", "fp8", "e4m3fn", "mxfp8", "mxfp4"}),
}
"""Number formats of the tensor engine; int8 is a storage format on all. fp8 is IEEE 754's e4m3, which ends at 240, and e5m2. e4m3fn: the compiler takes torch's e4m3, on
Trn3 by itself, elsewhere where the environment asks for it."""

_RUNTIMES = ("/opt/aws/neuron/lib/libnrt.so.1", "/usr/lib/libnrt.so.1", "/usr/local/lib/libnrt.so.1")
_FLAGS = f"--internal-hlo2tensorizer-options={SETTING}"
"""As AWS's neuronx-distributed passes it on."""
INDEX = "https://pip.repos.neuron.amazonaws.com"
"""AWS's own package index, which its installation guide names."""


def devices(host: Host | None = None) -> list[Device]:
    """The devices that this environment can run on."""
    looked_at = host or Host()
    found = generations(looked_at)
    if not found or unusable(looked_at):
        return []
    cores = visible_cores(sum(_CORES[name] for name in found), looked_at)
    rows, first = [], 0
    for place, name in enumerate(found):
        own = [core for core in cores if first <= core < first + _CORES[name]]
        first += _CORES[name]
        if own:
            rows.append(_device(place, name, own, looked_at))
    return rows


def stand_ins() -> list[Device]:
    """The CPU in the place of a Trn2. Raises RuntimeError where AWS's software is installed."""
    from qcore_neuron.stand_in import load

    load()
    features = _FEATURES["trn2"] | {"e4m3fn"}
    return [Device("neuron-stand-in", "neuron", "stand-in for Trn2's operations and numbers", "cpu", "trn2", features, fast_dtype="bfloat16", simulated=True)]  # fmt: skip


def report(host: Host | None = None) -> dict[str, str]:
    """What `qcore doctor` prints."""
    looked_at = host or Host()
    found = generations(looked_at)
    if not found:
        return {"devices": "none: no Neuron device on the PCI bus"}
    said = {
        "devices": f"{len(found)} x {found[0]}",
        "driver": looked_at.text("/sys/module/neuron/version") or "not loaded",
        "torch-neuronx": looked_at.package("torch-neuronx") or "not installed",
    }
    if problem := unusable(looked_at):
        said["missing"], said["fix"] = problem
    elif not takes_e4m3fn(found[0], looked_at):
        said["fp8"] = f"e4m3 runs without the chip's own; for that set NEURON_CC_FLAGS='{_FLAGS}'"
    return said


def takes_e4m3fn(generation: str, host: Host) -> bool:
    """Whether the compiler takes torch's e4m3 there."""
    asked = SETTING in host.environment.get("NEURON_CC_FLAGS", "") or host.environment.get("UNSAFE_FP8FNCAST") == "1"
    return asked or "e4m3fn" in _FEATURES[generation]


def generations(host: Host) -> list[str]:
    """The generation of every device on the bus."""
    return [_GENERATIONS[function.device] for function in host.pci(_VENDOR) if function.device in _GENERATIONS]


def is_placeholder(version: str) -> bool:
    """Whether a version of torch-neuronx is the index's empty package: the real ones are 2.x and name their SDK."""
    return re.match(r"[2-9]\.\d+\.\d+", version) is None


def unusable(host: Host) -> tuple[str, str] | None:
    """Why this environment cannot use the devices, and the fix; None where it can."""
    install = f"pip install --index-url {INDEX} torch-neuronx neuronx-cc"
    if not host.paths("/dev/neuron*"):
        return "the driver has made no device node", "Install aws-neuronx-dkms; in a container, pass /dev/neuron* in."
    if not any(map(host.paths, _RUNTIMES)):
        return (
            "the runtime libnrt.so.1 is not installed",
            "Install aws-neuronx-runtime-lib from AWS's package repository.",
        )
    version = host.package("torch-neuronx")
    if not version or not host.has_module("torch_neuronx"):
        return "torch-neuronx is not installed", install
    if is_placeholder(version) or (host.modules is None and not has_code()):  # None: the modules are this interpreter's
        return f"torch-neuronx {version} is the package index's placeholder, which does nothing", (
            f"pip uninstall torch-neuronx neuronx-cc libneuronxla; {install}"
        )
    return None


def visible_cores(count: int, host: Host) -> list[int]:
    """The cores that NEURON_RT_VISIBLE_CORES (`0`, `0-3`, `0,2-4`) or NEURON_RT_NUM_CORES leaves; what cannot be read
    leaves none."""
    listed = host.environment.get("NEURON_RT_VISIBLE_CORES")
    if listed is None:
        number = host.environment.get("NEURON_RT_NUM_CORES", str(count))
        return list(range(min(count, int(number)))) if number.isdigit() else []
    cores: list[int] = []
    for part in listed.split(","):
        ends = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if ends is None:
            return []
        cores += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    return [core for core in dict.fromkeys(cores) if core < count]


def _device(place: int, generation: str, cores: list[int], host: Host) -> Device:
    return Device(
        id=f"neuron:{place}",
        platform="neuron",
        name=f"AWS {generation.capitalize()}",
        torch_device="xla",
        architecture=generation,
        features=_FEATURES[generation] | ({"e4m3fn"} if takes_e4m3fn(generation, host) else set()),
        fast_dtype="bfloat16",
        facts={"cores": ",".join(map(str, cores))},
    )
