"""qcore verify: the conformance suite on this host's devices; with --record, the evidence of the matrix."""

from __future__ import annotations

import importlib.metadata
import re
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcore.cli import options
from qcore.cli.output import note, print_json, print_table, progress_bar, writing
from qcore.refusal import Refusal, Refused
from qcore.support.rows import known_row

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qcore.discovery import Plugin, Registry
    from qcore.kernel import Kernel
    from qcore.platform import Device, Platform
    from qcore.support.evidence import Grade
    from qcore.testing.compiled import Build
    from qcore.testing.verify import Finding, Question


def verify_command(
    plugin: Annotated[str | None, typer.Option(help="Only the platforms of this plugin, such as cpu.")] = None,
    platform: Annotated[str | None, typer.Option(help="Only this column of the matrix.")] = None,
    row: Annotated[str | None, typer.Option(help="Only the schemes of this row of the matrix.")] = None,
    kernel: Annotated[str | None, typer.Option(help="Only this kernel.")] = None,
    compile_only: Annotated[
        bool,
        typer.Option(
            "--compile-only",
            help="No device: run kernels' sources on the CPU, and compile them for every architecture.",
        ),
    ] = False,
    isa: Annotated[
        bool,
        typer.Option(
            "--isa",
            help="No device: compile alone (without --row: some schemes), and show instructions, registers and memory.",
        ),
    ] = False,
    simulate: Annotated[
        bool,
        typer.Option("--simulate", help="No device: run kernels on what --plugin has to stand in for its hardware."),
    ] = False,
    record: Annotated[bool, typer.Option("--record", help="Write the plugin's evidence.json.")] = False,
    json: options.Json = False,
) -> None:
    """Run every kernel of this host against the definition: all schemes, data types, shapes and batch sizes it claims.

    Example: qcore verify --plugin cpu --row gptq
    """
    from qcore.discovery import registry
    from qcore.testing.verify import Question, verify

    plugins = registry()
    question = Question(plugin, platform, known_row(row) if row else None, kernel)
    _check(plugins, question)
    ways = [way for way, given in (("--compile-only", compile_only), ("--isa", isa), ("--simulate", simulate)) if given]
    if len(ways) > 1:
        raise Refused(Refusal("bad-argument", "usage", ways[-1], "kernels are either compiled or run on a stand-in",
                              f"found {ways[0]} too", "Give one of the two."))  # fmt: skip
    if isa and record:
        raise Refused(Refusal("bad-argument", "usage", "--record", "evidence is of kernels that ran, too",
                              "found --isa", "Give --compile-only for --isa."))  # fmt: skip
    if isa:
        _show_isa(plugins, question, json)
        return
    builds: list[Build] = []
    if compile_only:
        findings, builds = _compiled(plugins, question)
    else:
        devices = _stand_ins(plugins, plugin) if simulate else None
        with progress_bar("verifying") as progress:
            findings = list(verify(plugins, question, progress, devices))
    if not findings:
        raise Refused(_nothing(question, "--compile-only" if compile_only else ""))
    if record:
        _record(plugins, findings, "compiled" if compile_only else None)
    if json:
        document: dict[str, Any] = {"findings": [_document(finding) for finding in findings]}
        print_json(document | ({"builds": [build.to_dict() for build in builds]} if compile_only else {}))
    else:
        _print_builds(builds)
        _print(findings)
    if any(finding.failures for finding in findings):
        raise typer.Exit(3)


def _compilable(plugins: Registry, question: Question) -> Iterator[tuple[Plugin, Kernel, list[Platform]]]:
    """Kernels, said as they come; those without a package that they need are left out. Raises Refused (missing-package) where none are left for that."""
    from qcore.select import missing_requirement
    from qcore.testing.compiled import compilable

    missing: dict[str, str] = {}
    taken = False
    for plugin, kernel, platforms in compilable(plugins, question):
        if absent := missing_requirement(kernel.requires):
            missing[absent] = _brings(plugin, absent)
            note(f"{kernel.name}: left out, for it needs {absent}")
            continue
        taken = True
        note(f"{kernel.name}: {', '.join(platform.title for platform in platforms)}")
        yield plugin, kernel, platforms
    if missing and not taken:
        names = ", ".join(missing)
        raise Refused(Refusal("missing-package", "missing-dep", "--compile-only", "kernels are compiled by packages that are not installed", names,
                              f"pip install {' '.join(dict.fromkeys(missing.values()))}"))  # fmt: skip


def _brings(plugin: Plugin, missing: str) -> str:
    """What pip is to install for a package, `name>=version, found ..`: the plugin's extra that brings it, if one does."""
    name = missing.partition(">")[0]
    try:
        required = importlib.metadata.requires(plugin.distribution) or []
    except importlib.metadata.PackageNotFoundError:
        required = []
    for line in required:
        found = re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)", line)
        if found and found[1] == name:
            return f'"{plugin.distribution}[{found[2]}]"'
    return name


def _show_isa(plugins: Registry, question: Question, json: bool) -> None:
    from qcore.testing.compiled import builds_of

    kernels = [(kernel, platforms) for _, kernel, platforms in _compilable(plugins, question)]
    every = builds_of(kernels, question) if kernels else []
    if not every:
        raise Refused(_nothing(question, "--isa"))
    if json:
        print_json({"builds": [build.to_dict() for build in every]})
    else:
        _print_builds(every)
    faults = [f"{build.architecture}, {build.program}: {build.fault}" for build in every if build.fault]
    for fault in faults:
        note(fault)
    if faults:
        raise typer.Exit(3)


def _compiled(plugins: Registry, question: Question) -> tuple[list[Finding], list[Build]]:
    """Findings of kernels that were compiled, and their builds."""
    from qcore.testing.compiled import verify_compiled

    findings: list[Finding] = []
    builds: list[Build] = []
    for plugin, kernel, platforms in _compilable(plugins, question):
        found, built = verify_compiled(plugin, kernel, platforms, question)
        findings += found
        builds += built
    return findings, builds


def _stand_ins(plugins: Registry, plugin: str | None) -> list[Device]:
    """What stands in for the plugin's hardware; kernels in Triton are interpreted on it."""
    from qcore.hooks import HookFault

    if plugin is None:
        raise Refused(Refusal("bad-argument", "usage", "--simulate", "one plugin's hardware is stood in for at a time",
                              fix="Name it with --plugin."))  # fmt: skip
    if find_spec("triton") is not None:
        import qcore.testing.interpreter  # noqa: F401  before anything imports Triton
    try:
        devices = plugins.stand_ins(plugin)
    except HookFault as fault:
        raise Refused(Refusal("plugin-broken", "missing-dep", f"plugin {plugin}", fault.reason, fault.fact,
                              "Leave --simulate out where the hardware is there.")) from fault  # fmt: skip
    if devices is not None and not devices:
        from qcore.select import missing_requirement

        asked = next(known for known in plugins.plugins if known.name == plugin)
        if absent := next(filter(None, (missing_requirement(kernel.requires) for kernel in asked.kernels)), ""):
            raise Refused(Refusal("missing-package", "missing-dep", "--simulate", "what stands in for the hardware needs packages that are not installed",
                                  absent, f"pip install {_brings(asked, absent)}"))  # fmt: skip
    if not devices:
        raise Refused(Refusal("no-device", "notimpl", f"plugin {plugin}", "it has nothing to stand in for its hardware",
                              fix="Run it on a machine with such a device, without --simulate."))  # fmt: skip
    return devices


def _check(plugins: Registry, question: Question) -> None:
    """Raises Refused where a name is unknown; devices are looked for later."""
    if question.plugin is not None and question.plugin not in {p.name for p in plugins.plugins if p.status == "loaded"}:
        loaded = ", ".join(p.name for p in plugins.plugins if p.status == "loaded")
        raise Refused(Refusal("plugin-missing", "missing-dep", question.plugin, "no loaded plugin has this name",
                              f"found {loaded}", "`qcore plugins` lists all and why any was refused."))  # fmt: skip
    if question.platform is not None and question.platform not in plugins.platforms:
        raise Refused(Refusal("unknown-platform", "usage", question.platform, "no loaded plugin has this platform",
                              f"found {', '.join(plugins.platforms)}", "`qcore matrix` lists all columns."))  # fmt: skip
    if question.kernel is not None and question.kernel not in {kernel.name for kernel, _ in plugins.kernels}:
        raise Refused(Refusal("unknown-kernel", "usage", question.kernel, "no registered kernel has this name",
                              fix="`qcore plugins --json` lists all kernels."))  # fmt: skip


def _nothing(question: Question, way: str) -> Refusal:
    asked = ", ".join(f"{name} {value}" for name, value in vars(question).items() if value) or "this host"
    if way:
        return Refusal("no-kernel", "notimpl", asked, "no kernel can be compiled for what was asked for",
                       fix=f"Leave {way} out where a device is there; `qcore plugins --json` lists all kernels.")  # fmt: skip
    return Refusal("no-device", "missing-dep", asked, "no device of this host runs what was asked for",
                   fix="`qcore doctor` lists the devices; run it on a machine that has one.")  # fmt: skip


def _record(plugins: Registry, findings: list[Finding], grade: Grade | None) -> None:
    from qcore.support.evidence import merged, read_evidence, write_evidence
    from qcore.testing.verify import records

    for plugin in plugins.plugins:
        new = records([finding for finding in findings if finding.plugin == plugin.name], grade=grade)
        if not new:
            continue
        if plugin.evidence is None:
            raise Refused(Refusal("plugin-broken", "missing-dep", f"plugin {plugin.name}",
                                  "it names no evidence file", "qcore_evidence is not implemented",
                                  "Implement qcore_evidence in the plugin."))  # fmt: skip
        old = read_evidence(plugin.evidence)
        failed = {(f.device.platform, f.kernel.name) for f in findings if f.failures}
        kept = [r for r in old if (r.platform, r.kernel) not in failed]
        with writing(plugin.evidence):
            write_evidence(plugin.evidence, merged(kept, new))
        note(f"wrote {len(new)} records to {plugin.evidence}")


def _document(finding: Finding) -> dict[str, Any]:
    return {
        "plugin": finding.plugin,
        "kernel": finding.kernel.name,
        "scheme": str(finding.scheme),
        "device": finding.device.id,
        "platform": finding.device.platform,
        "error": finding.error,
        "bound": finding.bound,
        "cases": finding.cases,
        "failures": list(finding.failures),
    }


def _print_builds(builds: list[Build]) -> None:
    places = dict.fromkeys((build.kernel, build.architecture) for build in builds)
    gpus, others = [], []
    for kernel, architecture in places:
        own = [build for build in builds if (build.kernel, build.architecture) == (kernel, architecture)]
        made = [build for build in own if not build.fault]
        head = (kernel, architecture, f"{len(made)} of {len(own)}")
        if made and made[0].numbers:
            most = {name: max(build.numbers[name] for build in made) for name in made[0].numbers}
            others.append((*head, ", ".join(f"{number:,} {name}" for name, number in most.items())))
            continue
        matrix = sorted({build.matrix or "none" for build in made})
        sizes = [
            max((getattr(build, name) for build in made), default=0) for name in ("registers", "spilled", "shared")
        ]
        gpus.append((*head, " ".join(matrix), *sizes))
    if gpus:
        print_table(
            ("kernel", "architecture", "programs", "matrix instructions", "registers", "bytes spilled", "bytes shared"),
            gpus,
        )
    if others:
        print_table(("kernel", "architecture", "programs", "at most"), others)


def _print(findings: list[Finding]) -> None:
    places = dict.fromkeys((f.plugin, f.kernel.name, f.device.platform) for f in findings)
    rows = []
    for plugin, kernel, platform in places:
        part = [f for f in findings if (f.plugin, f.kernel.name, f.device.platform) == (plugin, kernel, platform)]
        worst = max(part, key=lambda f: f.error / f.bound)
        wrong = sum(bool(f.failures) for f in part)
        verdict = f"{wrong} schemes FAILED" if wrong else "all right"
        nearest = f"{worst.error:.2g} of {worst.bound:.2g} ({worst.scheme})"
        rows.append((kernel, platform, plugin, len(part), sum(f.cases for f in part), nearest, verdict))
    print_table(("kernel", "platform", "plugin", "schemes", "cases", "nearest to its bound", "verdict"), rows)
    failures = [failure for finding in findings for failure in finding.failures]
    for failure in failures[:20]:
        print(f"\n{failure}")
    if len(failures) > 20:
        print(f"\n... and {len(failures) - 20} more; --json has them all")
