"""Which of this host's NVIDIA GPUs this environment can use, and what is missing for the others.

The driver's library is asked first, then torch's version.py, and torch itself only where these do not settle what CUDA
will show.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qcore.host import Host
from qcore.platform import Device
from qcore_cuda import nvml
from qcore_cuda.columns import architecture, built_for, column, fast_dtype, features
from qcore_cuda.nvml import Facts, Gpu, NvmlError
from qcore_cuda.visible import visible

_INSTALL = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/"


@dataclass(frozen=True)
class Finding:
    """The usable devices, and what `qcore doctor` prints."""

    devices: tuple[Device, ...] = ()
    report: Mapping[str, str] = field(default_factory=dict)


def examine(host: Host | None = None, probe: Callable[[], Facts] = nvml.probe) -> Finding:
    """Looks at the host; never raises. `probe` answers for the driver."""
    host = host or Host()
    try:
        facts = probe()
    except NvmlError as error:
        return Finding(report=_without_driver(host, error))
    report = describe(facts, host.torch_build())
    problem = obstacle(facts, host)
    if problem:
        return Finding(report={**report, "missing": problem})
    built: list[str] = []
    if _loaded_torch() is not None or not settled(facts, host):
        try:
            gpus, built = ask_torch(facts)
        except Exception as error:  # whatever torch and the driver make of each other is no fault of the caller's
            return Finding(report={**report, "missing": f"torch cannot reach the GPUs: {error}"[:500]})
    else:
        shown = visible(host.environment.get("CUDA_VISIBLE_DEVICES"), [gpu.uuid for gpu in facts.gpus])
        gpus = [facts.gpus[index] for index in shown]
    if not gpus:
        hidden = host.environment.get("CUDA_VISIBLE_DEVICES")
        why = "torch finds none of them" if hidden is None else f"CUDA_VISIBLE_DEVICES={hidden!r} hides all; unset it"
        return Finding(report={**report, "missing": why})
    devices = []
    for index, gpu in enumerate(gpus):
        unfit = misfit(gpu, built)
        if unfit:
            report[f"cuda:{index}"] = unfit
        else:
            devices.append(as_device(index, gpu, facts, _version(host.torch_build()["cuda"])))
    return Finding(tuple(devices), report)


def as_device(index: int, gpu: Gpu, facts: Facts, cuda: tuple[int, int]) -> Device:
    """The row of a GPU whose capability has a column. cuda: that torch is built for."""
    capability = gpu.capability
    assert capability is not None
    known = {
        "driver": facts.driver,
        "cuda": _dotted(facts.cuda),
        "uuid": gpu.uuid,
        "compute capability": _dotted(capability),
    }
    return Device(
        id=f"cuda:{index}",
        platform=column(capability) or "",
        name=gpu.name or architecture(capability),
        torch_device=f"cuda:{index}",
        architecture=architecture(capability),
        features=features(capability, cuda),
        memory=gpu.free,
        fast_dtype=fast_dtype(capability),
        facts={name: value for name, value in known.items() if value},
    )


def misfit(gpu: Gpu, built: list[str]) -> str:
    """Why a GPU is left out; empty where it is not. built: the targets that torch was compiled for, if it was asked."""
    capability = gpu.capability
    if capability is None:
        return f"{gpu.name or 'GPU'}: its compute capability is unknown{': ' + gpu.fault if gpu.fault else ''}"
    if column(capability) is None:
        reason = "older than Volta" if capability < (7, 0) else "not known to this version; install a newer qcore-cuda"
        return f"{gpu.name} ({architecture(capability)}) has no column: {reason}"
    if not built_for(capability, built):
        fix = f"{_INSTALL}{'cu126' if capability < (7, 5) else 'cu130'}"
        return f"torch is compiled for {' '.join(built)}, not for {gpu.name} ({architecture(capability)}): {fix}"
    return ""


def describe(facts: Facts, torch: Mapping[str, str]) -> dict[str, str]:
    """The report's first lines."""
    report = {
        "driver": facts.driver or "of an unknown version",
        "cuda": f"up to {_dotted(facts.cuda)}" if facts.cuda else "of an unknown version",
        "torch": f"{torch['version']}, for {_build(torch)}" if torch.get("version") else "not installed",
    }
    for index, gpu in enumerate(facts.gpus):
        what = f"{gpu.name} ({architecture(gpu.capability)})" if gpu.capability else gpu.name or gpu.fault
        report[f"gpu {index}"] = f"{what}, cut into MIG instances" if gpu.mig else what
    return report


def obstacle(facts: Facts, host: Host) -> str:
    """What keeps this environment from using any GPU, and the fix; empty where nothing does."""
    torch = host.torch_build()
    if not facts.gpus:
        return "the driver finds no GPU"
    if facts.cuda and facts.cuda[0] < 12:
        return f"driver {facts.driver} runs CUDA up to {_dotted(facts.cuda)}, and torch needs 12: update the driver"
    install = f"{_INSTALL}{'cu126' if facts.cuda and facts.cuda[0] == 12 else 'cu130'}"
    if not torch.get("cuda"):
        what = f"torch {torch['version']} is built for {_build(torch)}" if torch.get("version") else "torch is missing"
        return f"{what}: {install}"
    if facts.cuda and _version(torch["cuda"])[0] > facts.cuda[0]:
        newest = f"driver {facts.driver} runs CUDA up to {_dotted(facts.cuda)}"
        return f"torch is built for CUDA {torch['cuda']}, and {newest}: update the driver, or {install}"
    return ""


def settled(facts: Facts, host: Host) -> bool:
    """Whether what CUDA will show follows from NVML's facts.

    CUDA numbers unequal GPUs by speed unless CUDA_DEVICE_ORDER says otherwise. torch's wheels leave Volta out from CUDA
    12.8 on, and have Blackwell from there on only (pytorch's RELEASE.md, "PyTorch CUDA Support Matrix").
    """
    if any(gpu.mig or gpu.capability is None for gpu in facts.gpus):
        return False
    if host.environment.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG-"):
        return False
    unequal = len({(gpu.name, gpu.capability) for gpu in facts.gpus}) > 1
    if unequal and host.environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        return False
    blackwell = _version(host.torch_build()["cuda"]) >= (12, 8)
    supported = ((7, 5) if blackwell else (7, 0)), ((13, 0) if blackwell else (10, 0))
    return all(
        column(gpu.capability) is None or supported[0] <= gpu.capability < supported[1]
        for gpu in facts.gpus
        if gpu.capability
    )


def ask_torch(facts: Facts) -> tuple[list[Gpu], list[str]]:
    """The GPUs that torch shows, and the targets that it was compiled for.

    Free memory is NVML's where torch's UUID names a whole GPU of it: torch's own answer makes a CUDA context, which takes
    hundreds of megabytes. Raises whatever torch raises.
    """
    torch: Any = _loaded_torch() or importlib.import_module("torch")
    if not torch.cuda.is_available():
        return [], []
    whole = {gpu.uuid.removeprefix("GPU-"): gpu for gpu in facts.gpus if gpu.uuid and not gpu.mig}
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        uuid = str(getattr(properties, "uuid", ""))
        known = whole.get(uuid)
        free = known.free if known else int(torch.cuda.mem_get_info(index)[0])
        capability = torch.cuda.get_device_capability(index)
        gpus.append(Gpu(torch.cuda.get_device_name(index), known.uuid if known else uuid, capability, free))
    return gpus, list(torch.cuda.get_arch_list())


def _without_driver(host: Host, error: NvmlError) -> dict[str, str]:
    present = [function for function in host.pci("10de") if function.kind.startswith("03")]
    if not present and not host.paths("/dev/nvidia[0-9]*"):
        return {"driver": "none, and no NVIDIA GPU on the PCI bus"}
    found = ", ".join(f"{function.vendor}:{function.device}" for function in present) or "a device node"
    return {"gpu": f"found {found}", "missing": f"the driver does not answer: {error}. Install NVIDIA's driver."}


def _loaded_torch() -> Any:
    return sys.modules.get("torch")


def _build(torch: Mapping[str, str]) -> str:
    names = {"cuda": "CUDA", "hip": "ROCm", "xpu": "Intel GPUs"}
    return next((f"{name} {torch[key]}" for key, name in names.items() if torch.get(key)), "the CPU alone")


def _version(text: str) -> tuple[int, int]:
    major, _, rest = text.partition(".")
    minor = rest.partition(".")[0]
    return int(major) if major.isdigit() else 0, int(minor) if minor.isdigit() else 0


def _dotted(version: tuple[int, int] | None) -> str:
    return ".".join(map(str, version)) if version else ""
