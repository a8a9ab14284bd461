"""The GPUs that the kernel driver's topology lists.

Sources: amdkfd's sysfs topology (simd_count, gfx_target_version, unique_id, drm_render_minor; mem_banks' heap_type and
size_in_bytes) and amdgpu's mem_info_vram_* files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qcore.host import Host

_NODES = "/sys/class/kfd/kfd/topology/nodes"
_VRAM = ("1", "2")
"""heap_type of a GPU's own memory, visible to the host or not."""


@dataclass(frozen=True)
class Gpu:
    """One GPU node. uuid: as ROCr prints it; empty where the GPU has none. free: bytes; None where it is unknown."""

    node: str
    architecture: str
    uuid: str
    free: int | None


def gpus_of(host: Host) -> list[Gpu]:
    """The GPU nodes in the topology's order, which is ROCr's; CPUs, which are nodes too, have no SIMD units."""
    found = []
    override = _override(host.environment.get("HSA_OVERRIDE_GFX_VERSION", ""))
    for node in host.paths(f"{_NODES}/*"):
        facts = _properties(host, f"{node}/properties")
        version = facts.get("gfx_target_version", 0)
        if facts.get("simd_count", 0) and version:
            unique = facts.get("unique_id", 0)
            uuid = f"GPU-{unique:016x}" if unique else ""
            found.append(Gpu(node.rpartition("/")[2], override or gfx_name(version), uuid, _free(host, node, facts)))
    return found


def gfx_name(version: int) -> str:
    """90402 -> gfx942: two decimal digits each for minor and stepping, printed in hexadecimal, after the major ones."""
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def _override(text: str) -> str:
    """10.3.0 -> gfx1030; empty where the variable does not say a version."""
    parts = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", text)
    return f"gfx{parts[1]}{int(parts[2]):x}{int(parts[3]):x}" if parts else ""


def _free(host: Host, node: str, facts: dict[str, int]) -> int | None:
    """amdgpu counts what is used; without its files, all that the GPU has."""
    card = f"/sys/class/drm/renderD{facts.get('drm_render_minor', 0)}/device"
    total, used = (host.text(f"{card}/mem_info_vram_{name}") for name in ("total", "used"))
    if total.isdigit() and used.isdigit():
        return max(0, int(total) - int(used))
    banks = [_properties(host, path) for path in host.paths(f"{node}/mem_banks/*/properties")]
    return sum(bank.get("size_in_bytes", 0) for bank in banks if str(bank.get("heap_type")) in _VRAM) or None


def _properties(host: Host, path: str) -> dict[str, int]:
    """`name value` lines; what is no number is left out."""
    words = (line.split() for line in host.text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in words if len(pair) == 2 and pair[1].isdigit()}
