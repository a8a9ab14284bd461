"""This host's Gaudi accelerators: the PCI bus and the driver's nodes say what is there, habana_frameworks whether it can
be used. `optimum.habana` is never imported: without the SDK it raises IndexError, not ImportError.

Sources: the habanalabs driver's PCI ids (pci_ids.h), Intel Gaudi's documentation of HABANA_VISIBLE_MODULES and of fp8.
"""

from __future__ import annotations

from qcore.host import Host, visible
from qcore.platform import Device

ARCHITECTURES = ("gaudi", "gaudi2", "gaudi3")

_VENDOR = "1da3"
_GENERATIONS = {
    "1000": "gaudi", "1010": "gaudi",
    "1020": "gaudi2", "1021": "gaudi2", "1030": "gaudi2",
    "1060": "gaudi3", "1061": "gaudi3", "1062": "gaudi3", "1063": "gaudi3",
}  # fmt: skip
"""PCI device ids; the second of each generation are secured or server variants."""

_FEATURES = {
    "gaudi": frozenset({"bf16"}),
    "gaudi2": frozenset({"bf16", "fp8", "fp8_max_240"}),
    "gaudi3": frozenset({"bf16", "fp8", "fp8_max_448"}),
}
"""fp8_max: the largest e4m3 value of the matrix engine."""

_NODES = ("/dev/accel/accel*", "/dev/hl*")
"""Of the driver in the kernel's accel subsystem, and of the one before it."""
_FIX = (
    "Install Intel Gaudi's software (habana_frameworks and its build of torch), or use Intel's Gaudi container image."
)


def devices(host: Host | None = None) -> list[Device]:
    """The accelerators that this environment can run on. A process has one of them, which torch calls `hpu`."""
    looked_at = host or Host()
    found = generations(looked_at)
    if not found or unusable(looked_at):
        return []
    places = visible(len(found), looked_at.environment.get("HABANA_VISIBLE_MODULES"))
    return [_device(place, found[module], module) for place, module in enumerate(places)]


def stand_ins() -> list[Device]:
    """The CPU in the place of a Gaudi2. Raises RuntimeError where Intel's software is installed."""
    from qcore_gaudi.stand_in import load

    load()
    return [Device("gaudi2-stand-in", "gaudi", "stand-in for Gaudi2's operators", "cpu", "gaudi2", _FEATURES["gaudi2"], simulated=True)]  # fmt: skip


def report(host: Host | None = None) -> dict[str, str]:
    """What `qcore doctor` prints."""
    looked_at = host or Host()
    found = generations(looked_at)
    if not found:
        return {"accelerators": "none: no PCI function of Habana Labs"}
    said = {
        "accelerators": f"{len(found)} x {found[0]}",
        "driver": looked_at.text("/sys/module/habanalabs/version") or "not loaded",
    }
    if problem := unusable(looked_at):
        said["missing"], said["fix"] = problem
    return said


def generations(host: Host) -> list[str]:
    """The generation of every accelerator on the bus."""
    return [_GENERATIONS[function.device] for function in host.pci(_VENDOR) if function.device in _GENERATIONS]


def unusable(host: Host) -> tuple[str, str] | None:
    """Why this environment cannot use the accelerators, and the fix; None where it can."""
    if not any(host.paths(pattern) for pattern in _NODES):
        return "the driver has made no device node", "Load the habanalabs driver; in a container, pass its nodes in."
    if not host.has_module("habana_frameworks"):
        return "habana_frameworks is not installed", _FIX
    return None


def _device(place: int, generation: str, module: int) -> Device:
    return Device(
        id=f"hpu:{place}",
        platform="gaudi",
        name=generation.capitalize(),
        torch_device="hpu",
        architecture=generation,
        features=_FEATURES[generation],
        fast_dtype="bfloat16",
        facts={"module": str(module)},
    )
