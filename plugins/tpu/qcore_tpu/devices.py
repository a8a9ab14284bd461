"""This host's TPUs: the PCI bus and the driver's nodes say what is there, torch-xla or torchax whether it can be used.

Sources: the PCI ids of jax's hardware detection (jax/_src/hardware_utils.py); nodes are /dev/accel* up to v4 and in most images, /dev/vfio/* from v5e on.
"""

from __future__ import annotations

from dataclasses import replace

from qcore.host import Host, visible
from qcore.platform import Device
from qcore_tpu.chips import CHIPS, STAND_IN

ARCHITECTURES = ("v2", "v3", "v4", "v5e", "v5p", "v6e", "v7x")

_VENDOR = "1ae0"
_GENERATIONS = {"0027": "v2", "005e": "v4", "0063": "v5e", "0062": "v5p", "006f": "v6e", "0076": "v7x"}
"""PCI device ids. v2 and v3 share one; the older is taken."""

_FEATURES = {row.architecture: frozenset(name for name in ("int8", "fp8") if getattr(row, name)) for row in CHIPS}
"""Number formats of the matrix unit besides bfloat16."""

_NODES = ("/dev/accel*", "/dev/vfio/[0-9]*")
ROUTES: dict[str, tuple[str, ...]] = {"torchax": ("torchax", "jax", "libtpu"), "torch_xla": ("torch_xla",)}
"""Ways for torch to reach a TPU, the first that is installed being taken, and the modules that each needs. This plugin's kernels run on both; through torch-xla they need jax
besides, which lowers them."""
_ON_CPU = {"torchax": ("JAX_PLATFORMS", "cpu"), "torch_xla": ("PJRT_DEVICE", "CPU")}
"""The variable, and its value, that has each of them run on the host's CPU."""
_FIX = "pip install 'qcore-tpu[jax]', or 'qcore-tpu[xla]' with torch 2.9"
_FIX_KERNELS = "pip install 'qcore-tpu[xla]', which brings the version of jax that torch-xla takes"


def devices(host: Host | None = None) -> list[Device]:
    """The chips that this environment can run on, and all of them as one; a host that has torch-xla and no TPU has none. Where the way to them is told to run on the CPU
    (JAX_PLATFORMS=cpu, PJRT_DEVICE=CPU), what stands in for one."""
    looked_at = host or Host()
    found = chips(looked_at)
    variable, value = _ON_CPU.get(route(looked_at), ("", ""))
    if variable and looked_at.environment.get(variable) == value:
        return stand_ins(looked_at)
    if not found or unusable(looked_at):
        return []
    listed = looked_at.environment.get("TPU_VISIBLE_CHIPS", looked_at.environment.get("TPU_VISIBLE_DEVICES"))
    own, ways = [found[chip] for chip in visible(len(found), listed)], _ways(looked_at)
    each = [_device(f"tpu:{place}", generation, ways, f"xla:{place}") for place, generation in enumerate(own)]
    return each if len(own) < 2 or "torchax" not in ways else [*each, _all(each)]


def report(host: Host | None = None) -> dict[str, str]:
    """What `qcore doctor` prints."""
    looked_at = host or Host()
    found = chips(looked_at)
    if not found:
        return {"chips": "none: no TPU on the PCI bus"}
    said = {"chips": f"{len(found)} x TPU {found[0]}", "route": route(looked_at) or "none"}
    if problem := unusable(looked_at):
        said["missing"], said["fix"] = problem
    elif said["route"] == "torch_xla" and not looked_at.has_module("jax"):
        said["missing"], said["fix"] = (
            "jax, which this plugin's kernels need; the core's portable ones run",
            _FIX_KERNELS,
        )
    return said


def chips(host: Host) -> list[str]:
    """The generation of every chip on the bus."""
    return [_GENERATIONS[function.device] for function in host.pci(_VENDOR) if function.device in _GENERATIONS]


def route(host: Host) -> str:
    """How torch reaches the TPU here; empty where nothing for it is installed, or torch-xla for another torch. torch-xla's package has a torchax inside of it that is no way by itself, so that beside
    torch-xla the package of that name must be there."""
    inside = host.has_module("torch_xla") and not host.package("torchax")
    ways = (name for name, modules in ROUTES.items() if all(map(host.has_module, modules)))
    barred = {"torchax": inside, "torch_xla": bool(misfit(host))}
    return next((name for name in ways if not barred[name]), "")


def misfit(host: Host) -> str:
    """What is wrong where torch-xla is not the installed torch's: it does not ask pip for that, and cannot be imported then."""
    own, torch = host.package("torch_xla"), host.package("torch")
    apart = own and torch and own.split(".")[:2] != torch.split(".")[:2]
    return f"torch-xla {own} is not for torch {torch}" if apart else ""


def unusable(host: Host) -> tuple[str, str] | None:
    """Why this environment cannot use the chips, and the fix; None where it can."""
    if not any(host.paths(pattern) for pattern in _NODES):
        return "the driver has made no device node", "In a container, pass /dev/accel* or /dev/vfio in."
    if host.environment.get("PJRT_DEVICE", "TPU").upper() != "TPU":
        return f"PJRT_DEVICE is {host.environment['PJRT_DEVICE']}", "Unset PJRT_DEVICE, or set it to TPU."
    if not route(host):
        if problem := misfit(host):
            return problem, _FIX
        return "neither torch-xla nor torchax with jax and libtpu is installed", _FIX
    return None


def stand_ins(host: Host | None = None) -> list[Device]:
    """A CPU on which Pallas's programs are interpreted, where jax is installed: by jax itself, or in torch-xla's graphs."""
    looked_at = host or Host()
    ways = _ways(looked_at)
    if not ways & {"torchax", "jax"}:
        return []
    lazy = "torch_xla" in ways
    return [
        Device(
            id="tpu:stand-in",
            platform="tpu",
            name="Pallas's programs interpreted on a CPU",
            torch_device="xla" if lazy else "cpu",
            architecture=STAND_IN,
            features=_FEATURES[STAND_IN] | ways,
            fast_dtype="bfloat16",
            simulated=True,
            ready="qcore_tpu.lazy:start_on_cpu" if lazy else "qcore_tpu.ahead:prepare",
        )
    ]


def _ways(host: Host) -> frozenset[str]:
    """The way to the chips as a device's features: its name and, where kernels need jax beside it, whether that is there."""
    way = route(host)
    return frozenset({way, "jax"} if way == "torch_xla" and host.has_module("jax") else {way} - {""})


def _device(name: str, generation: str, ways: frozenset[str], place: str) -> Device:
    lazy = "torch_xla" in ways
    return Device(
        id=name,
        platform="tpu",
        name=f"TPU {generation}",
        torch_device=place if lazy else "jax",
        architecture=generation,
        features=_FEATURES.get(generation, frozenset()) | ways,
        fast_dtype="bfloat16",
        facts={"route": "torch_xla" if lazy else "torchax"},
        ready="qcore_tpu.lazy:start" if lazy else "qcore_tpu.sharding:on_one",
    )


def _all(chips: list[Device]) -> Device:
    """A model spread over all chips."""
    one = chips[0]
    return replace(one, id="tpu:all", name=f"{len(chips)} x {one.name}", ready="qcore_tpu.sharding:on_all")
