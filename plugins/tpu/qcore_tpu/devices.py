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
"""Ways for torch to reach a TPU, the first that is installed being taken, and the modules that each needs. This plugin's kernels take the first."""
_FIX = "pip install 'qcore-tpu[jax]', or 'qcore-tpu[xla]' with torch 2.9 and without this plugin's kernels"


def devices(host: Host | None = None) -> list[Device]:
    """The chips that this environment can run on, and all of them as one; a host that has torch-xla and no TPU has none. Where jax is told to run on the CPU (JAX_PLATFORMS=cpu), what stands
    in for one."""
    looked_at = host or Host()
    found = chips(looked_at)
    if looked_at.environment.get("JAX_PLATFORMS") == "cpu":
        return stand_ins(looked_at)
    if not found or unusable(looked_at):
        return []
    listed = looked_at.environment.get("TPU_VISIBLE_CHIPS", looked_at.environment.get("TPU_VISIBLE_DEVICES"))
    own, way = [found[chip] for chip in visible(len(found), listed)], route(looked_at)
    each = [_device(f"tpu:{place}", generation, way, f"xla:{place}") for place, generation in enumerate(own)]
    return each if len(own) < 2 or way != "torchax" else [*each, _all(own)]


def report(host: Host | None = None) -> dict[str, str]:
    """What `qcore doctor` prints."""
    looked_at = host or Host()
    found = chips(looked_at)
    if not found:
        return {"chips": "none: no TPU on the PCI bus"}
    said = {"chips": f"{len(found)} x TPU {found[0]}", "route": route(looked_at) or "none"}
    if problem := unusable(looked_at):
        said["missing"], said["fix"] = problem
    return said


def chips(host: Host) -> list[str]:
    """The generation of every chip on the bus."""
    return [_GENERATIONS[function.device] for function in host.pci(_VENDOR) if function.device in _GENERATIONS]


def route(host: Host) -> str:
    """How torch reaches the TPU here; empty where nothing for it is installed."""
    return next((name for name, modules in ROUTES.items() if all(map(host.has_module, modules))), "")


def unusable(host: Host) -> tuple[str, str] | None:
    """Why this environment cannot use the chips, and the fix; None where it can."""
    if not any(host.paths(pattern) for pattern in _NODES):
        return "the driver has made no device node", "In a container, pass /dev/accel* or /dev/vfio in."
    if host.environment.get("PJRT_DEVICE", "TPU").upper() != "TPU":
        return f"PJRT_DEVICE is {host.environment['PJRT_DEVICE']}", "Unset PJRT_DEVICE, or set it to TPU."
    if not route(host):
        return "neither torch-xla nor torchax with jax and libtpu is installed", _FIX
    return None


def stand_ins(host: Host | None = None) -> list[Device]:
    """A CPU on which Pallas's programs are interpreted, where jax is installed."""
    looked_at = host or Host()
    if route(looked_at) != "torchax":
        return []
    features = _FEATURES[STAND_IN] | {"torchax"}
    return [
        Device(
            id="tpu:stand-in",
            platform="tpu",
            name="Pallas's programs interpreted on a CPU",
            torch_device="cpu",
            architecture=STAND_IN,
            features=features,
            fast_dtype="bfloat16",
            simulated=True,
            ready="qcore_tpu.ahead:prepare",
        )
    ]


def _device(name: str, generation: str, way: str, place: str) -> Device:
    return Device(
        id=name,
        platform="tpu",
        name=f"TPU {generation}",
        torch_device=place if way == "torch_xla" else "jax",
        architecture=generation,
        features=_FEATURES.get(generation, frozenset()) | {way},
        fast_dtype="bfloat16",
        facts={"route": way},
        ready="" if way == "torch_xla" else "qcore_tpu.sharding:on_one",
    )


def _all(generations: list[str]) -> Device:
    """A model spread over all chips."""
    one = _device("tpu:all", generations[0], "torchax", "")
    return replace(one, name=f"{len(generations)} x {one.name}", ready="qcore_tpu.sharding:on_all")
