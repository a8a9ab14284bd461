"""verify: the conformance suite on this host's devices, and the evidence that comes of it."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from qcore.accuracy import error_bound
from qcore.discovery import Plugin, Registry
from qcore.host import Host
from qcore.kernel import Kernel
from qcore.platform import Device
from qcore.refusal import Refusal
from qcore.scheme import Scheme
from qcore.select import LayerRequest, select
from qcore.support.digest import source_digest
from qcore.support.evidence import Grade, Record
from qcore.support.rows import ROWS
from qcore.testing.cases import catalogue, claimed, row_schemes
from qcore.testing.checks import CHECKS, SIZES, Bench, smallest_shape

Progress = Callable[[str, int, int], None]
"""Called with a kernel's name, schemes done and schemes in all."""


@dataclass(frozen=True)
class Finding:
    """A kernel that ran one scheme on one device. error and bound: of the data type that came nearest to its bound.
    failures: what was wrong; empty where all is well."""

    plugin: str
    kernel: Kernel
    scheme: Scheme
    device: Device
    error: float
    bound: float
    cases: int
    failures: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """What is to be verified; None means all. row: only the schemes of this row of the matrix."""

    plugin: str | None = None
    platform: str | None = None
    row: str | None = None
    kernel: str | None = None

    def schemes(self) -> tuple[Scheme, ...]:
        """The catalogue, or the row's."""
        return next((row.parsed for row in ROWS if row.id == self.row), None) or catalogue()


def verifiable(
    plugins: Registry, question: Question, devices: Sequence[Device]
) -> Iterator[tuple[Plugin, Device, Kernel]]:
    """Every kernel with every one of the devices that it runs on, by the plugin that owns the platform."""
    kernels = [kernel for kernel, _ in plugins.kernels if question.kernel in (None, kernel.name)]
    seen = set()
    for device in devices:
        owner = next(plugin for plugin in plugins.plugins if device.platform in {p.id for p in plugin.platforms})
        kind = (device.platform, device.architecture, device.name)
        if kind in seen or question.plugin not in (None, owner.name):
            continue  # equal devices prove the same
        seen.add(kind)
        if question.platform in (None, device.platform):
            yield from ((owner, device, kernel) for kernel in kernels if device.platform in kernel.platforms)


def unable(kernel: Kernel, scheme: Scheme, device: Device) -> Refusal | None:
    """Why the device cannot run the kernel, such as an instruction set or a package that is missing."""
    request = LayerRequest(kernel.op, scheme, smallest_shape(kernel, scheme), kernel.dtypes[0], exact=False)
    return select(request, device.platform, [(kernel, "")], device).candidates[0].refusal


def examine(plugin: str, device: Device, kernel: Kernel, scheme: Scheme) -> Finding:
    """Runs every check in every data type and size. plugin: the name of the one that owns the platform."""
    device.prepare()
    nearest, cases, failures = (0.0, 1.0), 0, []
    for dtype in kernel.dtypes:
        bound = error_bound(kernel, scheme, dtype)
        for size in SIZES:
            bench = Bench(kernel, scheme, dtype, size, device)
            for name, check in CHECKS.items():
                if not applies(name, kernel, size):
                    continue
                cases += 1
                try:
                    error = check(bench)
                except AssertionError as wrong:
                    failures.append(str(wrong))
                except Exception as fault:  # whatever a kernel raises is a finding, not our fault
                    failures.append(f"{bench}: {name}: {type(fault).__name__}: {fault}"[:500])
                else:
                    nearest = max(nearest, (error, bound), key=lambda met: met[0] / met[1])
    return Finding(plugin, kernel, scheme, device, nearest[0], nearest[1], cases, tuple(failures))


def applies(check: str, kernel: Kernel, size: str) -> bool:
    """Numbers are checked at every size, what a weight takes at the large one, and everything else at the odd one; attention where a kv cache offers it."""
    if (check, kernel.op) in (("strided_input", "embedding"), ("bias_and_multiplier", "kv_cache")):
        return False
    if check == "attention" and not (kernel.op == "kv_cache" and hasattr(kernel.load(), "attends")):
        return False
    if check == "stacked_experts" and not kernel.experts:
        return False
    return check == "numbers" or size == ("large" if check == "packed_size" else "odd")


def verify(
    plugins: Registry, question: Question, progress: Progress | None = None, devices: Sequence[Device] | None = None
) -> Iterator[Finding]:
    """Findings as they come. devices: None means those of this host; what stands in for hardware is asked for the matrix's schemes, or the row's."""
    wanted = row_schemes() if devices is not None and question.row is None else question.schemes()
    for plugin, device, kernel in verifiable(plugins, question, plugins.devices() if devices is None else devices):
        schemes = [s for s in claimed(kernel, wanted) if unable(kernel, s, device) is None]
        for done, scheme in enumerate(schemes):
            if progress:
                progress(kernel.name, done, len(schemes))
            yield examine(plugin.name, device, kernel, scheme)


def records(findings: Iterable[Finding], host: Host | None = None, grade: Grade | None = None) -> list[Record]:
    """Evidence for every cell whose schemes were found right. grade: None means measured, or simulated where the device is."""
    flags = {"compiled": " --compile-only", "simulated": " --simulate"}
    by_kernel: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        if not finding.failures:
            by_kernel.setdefault((finding.kernel.name, finding.device.platform), []).append(finding)
    made = []
    for (name, platform), found in by_kernel.items():
        first = found[0]
        reached: Grade = grade or ("simulated" if first.device.simulated else "measured")
        for row in ROWS:
            part = [finding for finding in found if finding.scheme in row.parsed and finding.kernel.op == row.op]
            if not part or row.family not in ("", first.kernel.family):
                continue
            made.append(
                Record(
                    row.id, platform, name, reached,
                    schemes={str(f.scheme): {"error": _short(f.error), "bound": f.bound} for f in part},
                    cases=sum(finding.cases for finding in part),
                    command=f"qcore verify --plugin {first.plugin} --platform {platform} --row {row.id} --kernel {name}{flags.get(reached, '')}",
                    device=_device(first.device),
                    versions=_versions(first, host or Host()),
                    source=source_digest(first.kernel),
                    date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
                )
            )  # fmt: skip
    return made


def _device(device: Device) -> str:
    words = [device.architecture, *sorted(device.features)]
    return f"{device.name} ({' '.join(filter(None, words))})" if any(words) else device.name


def _versions(finding: Finding, host: Host) -> dict[str, str]:
    needed = (name for names, _ in finding.kernel.requires for name in names.split("|"))
    names = ("qcore", f"qcore-{finding.plugin}", "torch", *needed)
    return {name: version for name in dict.fromkeys(names) if (version := host.package(name))}


def _short(error: float) -> float:
    return float(f"{error:.3g}")
