"""This host's CPU: its instruction sets and the memory that is free for weights, without importing torch."""

from __future__ import annotations

import os
import platform
import resource
from pathlib import Path

from qcore.platform import Device
from qcore_cpu.library import status

_MACHINES = {"x86_64": "x86_cpu", "amd64": "x86_cpu", "aarch64": "arm_cpu", "arm64": "arm_cpu"}

FEATURES = frozenset(
    [
        "avx2",
        "fma",
        "avx_vnni",
        "avx512f",
        "avx512bw",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
        "amx_tile",
        "amx_int8",
        "amx_bf16",
        "asimd",
        "asimddp",
        "i8mm",
        "bf16",
        "sve",
        "sve2",
    ]
)
"""The flags that kernels ask for, in Linux's spelling (/proc/cpuinfo)."""

NATIVE = "native_kernels"
"""The feature of a host that this package's own kernels run on: they were built, and know one of its instruction sets."""

_FAST_BFLOAT16 = frozenset({"avx512f", "avx512_bf16", "amx_bf16", "bf16"})


def cpu_device(cpuinfo: str | None = None, machine: str | None = None) -> Device:
    """The CPU that `cpuinfo` (the text of /proc/cpuinfo) and `machine` describe; None asks this host."""
    text = _read(Path("/proc/cpuinfo")) if cpuinfo is None else cpuinfo
    kind = (platform.machine() if machine is None else machine).lower()
    flags = _field(text, "flags") or _field(text, "Features")
    features = FEATURES & set(flags.split())
    if cpuinfo is None and status().isa:
        features |= {NATIVE}
    name = _field(text, "model name") or platform.processor() or kind
    return Device(
        id="cpu",
        platform=_MACHINES.get(kind, kind),
        name=name,
        torch_device="cpu",
        features=features,
        memory=free_memory(),
        fast_dtype="bfloat16" if features & _FAST_BFLOAT16 else "float32",
        facts={"cores": str(_cores())},
    )


def free_memory() -> int | None:
    """Bytes that this process may still take: the host's, its control group's and its own limit; None if unknown."""
    limits = [_host_memory(), _group_memory(), _process_memory()]
    known = [limit for limit in limits if limit is not None]
    return max(0, min(known)) if known else None


def _host_memory() -> int | None:
    available = _field(_read(Path("/proc/meminfo")), "MemAvailable")
    return int(available.split()[0]) * 1024 if available else None


def _group_memory() -> int | None:
    """Limit less use of the control group (version 2, then 1), page cache counted as free."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        root = Path("/sys/fs/cgroup")
        most, current = _read(root / limit).strip(), _read(root / used).strip()
        if most.isdigit() and current.isdigit() and int(most) < 1 << 60:
            statistics = _read((root / used).parent / "memory.stat")
            reclaimable = next((int(w[1]) for w in map(str.split, statistics.splitlines()) if w[0] == cache), 0)
            return int(most) - int(current) + reclaimable
    return None


def _process_memory() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    pages = _read(Path("/proc/self/statm")).split()
    return limit - (int(pages[0]) * resource.getpagesize() if pages else 0)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _field(text: str, name: str) -> str:
    """The value of the first `name : value` line, or an empty string."""
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
