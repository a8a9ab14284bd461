"""This host's AMD GPUs: the kernel driver's topology says what is there, torch's build whether it can be used."""

from __future__ import annotations

from qcore.host import Host, visible
from qcore.platform import Device, Target
from qcore_rocm.topology import Gpu, gpus_of

ARCHITECTURES = ("gfx906", "gfx908", "gfx90a", "gfx942", "gfx950", "gfx1030", "gfx1100", "gfx1101", "gfx1102",
                 "gfx1150", "gfx1151", "gfx1200", "gfx1201")  # fmt: skip
"""Those that torch's ROCm builds have code for, from the oldest to the newest of each family."""

TARGETS = tuple(
    Target(name, "hip", name, warp, kib << 10, fp8=fp8)
    for name, warp, kib, fp8 in (
        ("gfx90a", 64, 64, ""), ("gfx942", 64, 64, "e4m3fnuz"), ("gfx950", 64, 160, "e4m3fn"), ("gfx1100", 32, 64, ""), ("gfx1201", 32, 64, "e4m3fn"),
    )
)  # fmt: skip
"""One of each family whose matrix units Triton uses. Warps, and the LDS of a workgroup: AMD's "Accelerator and GPU hardware specifications"; small
floats: the instruction set manuals."""

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

_DRIVER = "/dev/kfd"


def devices(host: Host | None = None) -> list[Device]:
    """The GPUs that this environment's torch can run on, in HIP's order."""
    looked_at = host or Host()
    gpus = gpus_of(looked_at)
    if not gpus or unusable(looked_at):
        return []
    return [
        _device(place, gpu) for place, gpu in enumerate(shown(gpus, looked_at)) if gpu.architecture in ARCHITECTURES
    ]


def report(host: Host | None = None) -> dict[str, str]:
    """What `qcore doctor` prints."""
    looked_at = host or Host()
    gpus = gpus_of(looked_at)
    if not gpus:
        return {"GPUs": "none: the kernel's topology lists no AMD GPU"}
    said = {
        "GPUs": ", ".join(gpu.architecture for gpu in gpus),
        "driver": looked_at.text("/sys/module/amdgpu/version") or "the kernel's own",
        "torch": looked_at.torch_build().get("version", "not installed"),
    }
    if strange := [gpu.architecture for gpu in gpus if gpu.architecture not in ARCHITECTURES]:
        said["not run"] = f"{', '.join(strange)}: torch's ROCm builds have no code for it"
    if problem := unusable(looked_at):
        said["missing"], said["fix"] = problem
    elif not shown(gpus, looked_at):
        said["missing"], said["fix"] = "a variable hides all GPUs", f"Unset {' and '.join(_set_variables(looked_at))}."
    return said


def unusable(host: Host) -> tuple[str, str] | None:
    """Why this environment cannot use the GPUs, and the fix; None where it can."""
    if not host.paths(_DRIVER):
        return f"there is no {_DRIVER}", "Load the amdgpu driver; in a container, pass /dev/kfd and /dev/dri in."
    if not host.may_open(_DRIVER):
        return f"{_DRIVER} may not be opened", "Add the user to the groups render and video, and log in again."
    build = host.torch_build()
    if "hip" not in build:
        return f"torch {build.get('version', 'is absent')} is not built for ROCm", "Install torch's ROCm build."
    return None


def shown(gpus: list[Gpu], host: Host) -> list[Gpu]:
    """The GPUs that the variables leave: ROCr's, which takes numbers and UUIDs, then HIP's, or CUDA's in its place, which
    count what is left (HIP documentation, GPU isolation)."""
    listed = host.environment.get("ROCR_VISIBLE_DEVICES")
    if listed is not None:
        numbers = {gpu.uuid: str(place) for place, gpu in enumerate(gpus) if gpu.uuid}
        listed = ",".join(numbers.get(entry.strip(), entry) for entry in listed.split(","))
        gpus = [gpus[place] for place in visible(len(gpus), listed)]
    variable = "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in host.environment else "CUDA_VISIBLE_DEVICES"
    return [gpus[place] for place in visible(len(gpus), host.environment.get(variable))]


def _set_variables(host: Host) -> list[str]:
    names = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
    return [name for name in names if name in host.environment]


def _device(place: int, gpu: Gpu) -> Device:
    return Device(
        id=f"rocm:{place}",
        platform="amd",
        name=f"AMD {gpu.architecture}",
        torch_device=f"cuda:{place}",  # torch's ROCm builds keep CUDA's word
        architecture=gpu.architecture,
        features=_FEATURES[gpu.architecture],
        memory=gpu.free,
        fast_dtype="bfloat16" if "bf16" in _FEATURES[gpu.architecture] else "float16",
        facts={"node": gpu.node, "uuid": gpu.uuid},
    )
