"""qcore verify: the conformance suite on this host's devices; with --record, the evidence of the matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcore.cli import options
from qcore.cli.output import note, print_json, print_table, progress_bar, writing
from qcore.refusal import Refusal, Refused
from qcore.support.rows import known_row

if TYPE_CHECKING:
    from qcore.discovery import Registry
    from qcore.testing.verify import Finding, Question


def verify_command(
    plugin: Annotated[str | None, typer.Option(help="Only the platforms of this plugin, such as cpu.")] = None,
    platform: Annotated[str | None, typer.Option(help="Only this column of the matrix.")] = None,
    row: Annotated[str | None, typer.Option(help="Only the schemes of this row of the matrix.")] = None,
    kernel: Annotated[str | None, typer.Option(help="Only this kernel.")] = None,
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
    with progress_bar("verifying") as progress:
        findings = list(verify(plugins, question, progress))
    if not findings:
        raise Refused(_nothing(question))
    if record:
        _record(plugins, findings)
    if json:
        print_json({"findings": [_document(finding) for finding in findings]})
    else:
        _print(findings)
    if any(finding.failures for finding in findings):
        raise typer.Exit(3)


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


def _nothing(question: Question) -> Refusal:
    asked = ", ".join(f"{name} {value}" for name, value in vars(question).items() if value) or "this host"
    return Refusal("no-device", "missing-dep", asked, "no device of this host runs what was asked for",
                   fix="`qcore doctor` lists the devices; run it on a machine that has one.")  # fmt: skip


def _record(plugins: Registry, findings: list[Finding]) -> None:
    from qcore.support.evidence import merged, read_evidence, write_evidence
    from qcore.testing.verify import records

    for plugin in plugins.plugins:
        new = records([finding for finding in findings if finding.plugin == plugin.name])
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
