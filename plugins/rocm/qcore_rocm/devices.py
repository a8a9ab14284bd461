"""This host's AMD GPUs: the kernel driver's topology says what is there, torch's build whether it can be used.

Sources: the amdkfd driver's sysfs topology (properties: simd_count, gfx_target_version; mem_banks: heap_type,
size_in_bytes), and HIP's documentation of ROCR_VISIBLE_DEVICES and HIP_VISIBLE_DEVICES.
"""

from __future__ import annotations

from dataclasses import dataclass

from qcore.host import Host, visible
from qcore.platform import Device

ARCHITECTURES = ("gfx906", "gfx908", "gfx90a", "gfx942", "gfx950", "gfx1030", "gfx1100", "gfx1101", "gfx1102",
                 "gfx1150", "gfx1151", "gfx1200", "gfx1201")  # fmt: skip
"""Those that torch's ROCm builds have code for, from the oldest to the newest of each family."""

_FEATURES: dict[str, frozenset[str]] = {
    "gfx906": frozenset({"wave64", "dot_int8"}),
    "gfx908": frozenset({"wave64", "mfma", "bf16"}),
    "gfx90a": frozenset({"wave64", "mfma", "bf16"}),
    "gfx942": frozenset({"wave64", "mfma", "bf16", "fp8_fnuz"}),
    "gfx950": frozenset({"wave64", "mfma", "bf16", "fp8", "fp4"}),
    "gfx1030": frozenset({"wave32", "dot_int8"}),
    **dict.fromkeys(("gfx1100", "gfx1101", "gfx1102", "gfx1150", "gfx1151"), frozenset({"wave32", "wmma", "bf16"})),
    **dict.fromkeys(("gfx1200", "gfx1201"), frozenset({"wave32", "wmma", "bf16", "fp8"})),
}
"""Matrix instructions and number formats (AMD's instruction set manuals of each architecture)."""

_TOPOLOGY = "/sys/class/kfd/kfd/topology/nodes"
_VRAM = ("1", "2")
"""heap_type of a GPU's own memory, visible to the host or not."""


@dataclass(frozen=True)
class Gpu:
    """One GPU node of the topology. memory: bytes in all; the topology does not say how many are free."""

    node: str
    name: str
    architecture: str
    memory: int


def devices(host: Host | None = None) -> list[Device]:
    """The GPUs that this environment's torch can run on, in HIP's order."""
    looked_at = host or Host()
    if unusable(looked_at):
        return []
    gpus = gpus_of(looked_at)
    for variable in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):  # the second counts what the first has left
        gpus = [gpus[place] for place in visible(len(gpus), looked_at.environment.get(variable))]
    return [_device(place, gpu) for place, gpu in enumerate(gpus) if gpu.architecture in ARCHITECTURES]


def report(host: Host | None = None) -> dict[str, str]:
    """What `qcore doctor` prints."""
    looked_at = host or Host()
    gpus = gpus_of(looked_at)
    if not gpus:
        return {"GPUs": "none: there is no /dev/kfd, or it has no GPU"}
    said = {
        "GPUs": ", ".join(f"{gpu.name} ({gpu.architecture})" for gpu in gpus),
        "driver": looked_at.text("/sys/module/amdgpu/version") or "the kernel's own",
        "torch": looked_at.torch_build().get("version", "not installed"),
    }
    if strange := [gpu.architecture for gpu in gpus if gpu.architecture not in ARCHITECTURES]:
        said["not run"] = f"{', '.join(strange)}: torch's ROCm builds have no code for it"
    if problem := unusable(looked_at):
        said["missing"], said["fix"] = problem
    return said


def unusable(host: Host) -> tuple[str, str] | None:
    """Why this environment's torch cannot use the GPUs, and the fix; None where it can."""
    build = host.torch_build()
    if "hip" not in build:
        return f"torch {build.get('version', 'is absent')} is not built for ROCm", "Install torch's ROCm build."
    return None


def gpus_of(host: Host) -> list[Gpu]:
    """The GPU nodes in the topology's order; CPUs, which are nodes too, have no SIMD units."""
    if not host.paths("/dev/kfd"):
        return []
    found = []
    for node in host.paths(f"{_TOPOLOGY}/*"):
        facts = _properties(host, f"{node}/properties")
        if int(facts.get("simd_count", "0")) and facts.get("gfx_target_version", "0") != "0":
            banks = [_properties(host, path) for path in host.paths(f"{node}/mem_banks/*/properties")]
            memory = sum(int(bank.get("size_in_bytes", "0")) for bank in banks if bank.get("heap_type") in _VRAM)
            architecture = gfx_name(int(facts["gfx_target_version"]))
            found.append(Gpu(node.rpartition("/")[2], host.text(f"{node}/name") or architecture, architecture, memory))
    return found


def gfx_name(version: int) -> str:
    """90402 -> gfx942: two decimal digits each for major, minor and stepping, the last one printed in hexadecimal."""
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def _properties(host: Host, path: str) -> dict[str, str]:
    """`name value` lines; what is no number is left out."""
    words = (line.split() for line in host.text(path).splitlines())
    return {pair[0]: pair[1] for pair in words if len(pair) == 2 and pair[1].isdigit()}


def _device(place: int, gpu: Gpu) -> Device:
    return Device(
        id=f"rocm:{place}",
        platform="amd",
        name=gpu.name,
        torch_device=f"cuda:{place}",  # torch's ROCm builds keep CUDA's word
        architecture=gpu.architecture,
        features=_FEATURES[gpu.architecture],
        memory=gpu.memory or None,
        fast_dtype="bfloat16" if "bf16" in _FEATURES[gpu.architecture] else "float16",
        facts={"node": gpu.node},
    )
