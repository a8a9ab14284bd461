"""verify --compile-only: what can be proved of kernels where there is no device. Their sources run on the CPU against the definition (those in Triton
in its interpreter), and the vendor's compilers make their code for every architecture of a platform.

Both need a process of their own, for Triton is either an interpreter or a compiler: `python -m qcore.testing.compiled interpret|compile|table`, with
tasks in JSON on the standard input, one for a kernel.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, cast

from qcore.platform import Device, Platform, Target
from qcore.scheme import Scheme
from qcore.testing.cases import claimed, row_schemes
from qcore.testing.verify import Finding, examine

if TYPE_CHECKING:
    from qcore.discovery import Plugin, Registry
    from qcore.kernel import Kernel
    from qcore.testing.verify import Question

_LEAST_REGISTERS = 8
"""Fewer hold nothing: where a program is too large for some architectures, Triton 3.9 makes one that does nothing, without a word. It has 4 on NVIDIA's
GPUs and none on AMD's; one that adds two numbers has 11."""


@dataclass(frozen=True)
class Build:
    """A program that was compiled. matrix: the matrix unit's instruction, empty where products are made one by one. registers, spilled, shared:
    as of qcore.kernels.triton.program.Compiled. fault: why there is no program, or none that could be launched."""

    kernel: str
    platform: str
    architecture: str
    program: str
    matrix: str = ""
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    fault: str = ""
    numbers: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; `numbers` where there are any, in place of a GPU's."""
        found = vars(self).copy()
        if numbers := found.pop("numbers"):
            found = {name: value for name, value in found.items() if name not in _OF_GPUS}
            found["numbers"] = dict(numbers)
        return found


_OF_GPUS = ("matrix", "registers", "spilled", "shared")


def compilable(plugins: Registry, question: Question) -> Iterator[tuple[Plugin, Kernel, list[Platform]]]:
    """Every kernel whose programs can be compiled for a scheme that is asked for, with those of a plugin's platforms that it is compiled for."""
    for plugin in plugins.plugins:
        if question.plugin not in (None, plugin.name):
            continue
        platforms = [p for p in plugin.platforms if p.targets and question.platform in (None, p.id)]
        for kernel, _ in plugins.kernels:
            own = [platform for platform in platforms if platform.id in kernel.platforms]
            if kernel.compiles and question.kernel in (None, kernel.name) and own and _schemes(kernel, question):
                yield plugin, kernel, own


def verify_compiled(
    plugin: Plugin, kernel: Kernel, platforms: Sequence[Platform], question: Question
) -> tuple[list[Finding], list[Build]]:
    """Findings of each platform whose every program could be launched, and all builds. Schemes: the matrix's, or the row's."""
    task = _task(kernel, platforms, question)
    running = [_start(what) for what in ("interpret", "compile")]
    with ThreadPoolExecutor(len(running)) as side_by_side:
        answers, built = side_by_side.map(lambda process: _answer(process, json.dumps([task])), running)
    builds = [Build(**row) for row in built]
    findings = []
    for platform in platforms:
        own = [build for build in builds if build.platform == platform.id]
        faults = tuple(f"{build.architecture}, {build.program}: {build.fault}" for build in own if build.fault)
        if not own:
            faults = (f"{platform.id}: nothing was compiled for any of its architectures",)
        device = Device(platform.id, platform.id, _summary(own), "cpu", simulated=True)
        for row in answers:
            scheme = Scheme.parse(row["scheme"])
            failures = (*row["failures"], *faults)
            findings.append(
                Finding(plugin.name, kernel, scheme, device, row["error"], row["bound"], row["cases"], failures)
            )
    return findings, builds


def builds_of(kernels: Sequence[tuple[Kernel, Sequence[Platform]]], question: Question) -> list[Build]:
    """What the compilers make of the same programs, none of which is run. Where no row is named, of some: for a column's first architecture those of one
    scheme for each element type, for its others those of one (`_places`). One process starts Triton for all of them."""
    tasks = [_task(kernel, platforms, question) for kernel, platforms in kernels]
    return [Build(**row) for row in _answer(_start("compile" if question.row else "table"), json.dumps(tasks))]


def _task(kernel: Kernel, platforms: Sequence[Platform], question: Question) -> dict[str, Any]:
    schemes, names = _schemes(kernel, question), [platform.id for platform in platforms]
    return {"kernel": kernel.name, "schemes": [str(scheme) for scheme in schemes], "platforms": names}


def _schemes(kernel: Kernel, question: Question) -> list[Scheme]:
    return claimed(kernel, question.schemes() if question.row else row_schemes())


def _start(what: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton 3.9 does anyway, and warns of
    command = [sys.executable, "-m", "qcore.testing.compiled", what]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _answer(process: subprocess.Popen[str], tasks: str) -> list[dict[str, Any]]:
    said, _ = process.communicate(tasks)
    if process.returncode:
        raise RuntimeError(f"{process.args!r} ended with status {process.returncode}")
    found: list[dict[str, Any]] = json.loads(said)
    return found


def _summary(builds: Sequence[Build]) -> str:
    """What the compilers made, architecture by architecture: the instructions, and the most of everything."""
    parts = []
    for architecture in dict.fromkeys(build.architecture for build in builds):
        own = [build for build in builds if build.architecture == architecture and not build.fault]
        if not own:
            continue
        if own[0].numbers:
            most_of = {name: max(build.numbers[name] for build in own) for name in own[0].numbers}
            parts.append(
                f"{architecture}: {len(own)} programs, at most "
                + ", ".join(f"{most:,} {name}" for name, most in most_of.items())
            )
            continue
        matrix = " ".join(dict.fromkeys(".".join(build.matrix.split(".")[:3]) or "no matrix unit" for build in own))
        most = [max(getattr(build, name) for build in own) for name in ("registers", "spilled", "shared")]
        parts.append(
            f"{architecture}: {matrix}, {most[0]} registers, {most[1]} bytes spilled, {most[2] >> 10} KiB shared"
        )
    return f"its source on a CPU, and compiled ({'; '.join(parts)})"


# --- In processes of their own ---------------------------------------------------------------------------------------


Task = tuple["Kernel", Sequence[Scheme], Sequence[Platform]]


def _interpret(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    found = []
    for kernel, schemes, platforms in tasks:
        device = Device("interpreter", platforms[0].id, "its source on a CPU", "cpu", simulated=True)
        found += [examine("", device, kernel, scheme) for scheme in schemes]
    keys = ("error", "bound", "cases", "failures")
    return [{"scheme": str(one.scheme)} | {key: getattr(one, key) for key in keys} for one in found]


def _compile(tasks: Sequence[Task], whole: bool = True) -> list[dict[str, Any]]:
    """Programs of the data type that a kernel computes in first, each once for a target. whole: all; else some (`_places`)."""
    each = {
        (kernel.name, platform.id, target.architecture, _identity(program)): (kernel, platform, target, program)
        for kernel, schemes, platforms in tasks
        for platform in platforms
        for target, scheme in _places(kernel, schemes, platform, whole)
        for program in cast("Any", kernel.load()).programs(scheme, kernel.dtypes[0], target)
        if whole or not _of_experts(program)
    }
    _TASKS[:] = each.values()
    # Processes, for Triton's own passes hold Python's lock; forked ones, which have the tasks.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as processes:
        return [asdict(build) for build in processes.map(_build, range(len(_TASKS)), chunksize=4)]


def _identity(program: Any) -> str:
    """Programs of one function and the same constants are one, whatever schemes they are for."""
    parts = ("function", "signature", "constants", "options")
    return repr([getattr(program, part) for part in parts] if hasattr(program, "signature") else program)


def _places(
    kernel: Kernel, schemes: Sequence[Scheme], platform: Platform, whole: bool
) -> Iterator[tuple[Target, Scheme]]:  # fmt: skip
    """Architectures that a kernel runs on, with the schemes that it is compiled for there. whole: all of them; else for the first architecture one scheme
    for each element type of weight and input, and for the others one."""
    targets = [target for target in platform.targets if kernel.runs_on(target.architecture)]
    kinds = {
        (scheme.weight.element, scheme.input and (scheme.input.element, scheme.input.outliers)): scheme
        for scheme in reversed(schemes)
    }
    some = [scheme for scheme in schemes if scheme in kinds.values()]
    for place, target in enumerate(targets):
        yield from ((target, scheme) for scheme in (schemes if whole else some[:1] if place else some))


def _of_experts(program: Any) -> bool:
    """Whether it is Triton's and rows of x are routed to experts by it (qcore.kernels.triton.launch): it differs from others in where it begins to read."""
    return getattr(program, "constants", {}).get("ROUTED") is True


_TASKS: list[tuple[Kernel, Platform, Target, Any]] = []
"""What is compiled: kernels' programs, each for a target of a platform."""


def _build(place: int) -> Build:
    """The program of a place in _TASKS."""
    from qcore.kernels.triton.program import Program, compile_program

    kernel, platform, target, program = _TASKS[place]
    build, most = Build(kernel.name, platform.id, target.architecture, program.name), target.shared
    try:
        if isinstance(program, Program):
            made = compile_program(program, target.backend, target.name, target.warp)
        else:  # in another language, of a plugin
            made = program.compile(target)
            most += target.reserved
    except Exception as fault:  # whatever a compiler does not take is a finding
        return replace(build, fault=f"{type(fault).__name__}: {fault}"[-500:])
    if isinstance(made, Mapping):  # of no GPU; its plugin looked at it
        return replace(build, numbers=made)
    build = replace(build, **asdict(made))
    if made.registers < _LEAST_REGISTERS:
        return replace(build, fault=f"a program of {made.registers} registers, which does nothing")
    if made.shared > most:
        return replace(build, fault=f"{made.shared} bytes of shared memory, of {most} that a block may have")
    return build


def main(what: str) -> None:
    if what == "interpret" and find_spec("triton") is not None:
        import qcore.testing.interpreter  # noqa: F401
    from qcore.discovery import registry

    kernels = {kernel.name: kernel for kernel, _ in registry().kernels}
    tasks: list[Task] = [
        (kernels[task["kernel"]], [Scheme.parse(scheme) for scheme in task["schemes"]], [registry().platforms[name] for name in task["platforms"]])
        for task in json.load(sys.stdin)
    ]  # fmt: skip
    ways: dict[str, Callable[[Sequence[Task]], list[dict[str, Any]]]] = {
        "interpret": _interpret,
        "compile": _compile,
        "table": partial(_compile, whole=False),
    }
    json.dump(ways[what](tasks), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
