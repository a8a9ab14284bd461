"""Kernels in Triton compiled for GPUs that are not here: the builds, and the evidence that comes of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from commands import command
from qcore.discovery import registry
from qcore.kernels.triton.program import Compiled, Program
from qcore.scheme import Scheme
from qcore.testing import compiled
from qcore.testing.compiled import Build, compilable, verify_compiled
from qcore.testing.verify import Question, records

AWQ = Question(plugin="cuda", platform="hopper", row="awq", kernel="triton_integers")


def test_tensor_cores_multiply() -> None:
    """Products are the matrix unit's, hardly anything is spilled, and a block's memory is there."""
    task = {
        "kernel": "triton_integers",
        "schemes": ["W4A16-g128-sym", "W3A16-g32-asym", "W8A16-channel-sym"],
        "platforms": ["ada", "hopper"],
    }
    builds = [Build(**row) for row in compiled._answer(compiled._start("compile"), json.dumps([task]))]
    # One row, few and some, and made dense; codes of several planes are dense from some on. Of experts one row, few and many, and what makes
    # their tables; and sums of shares.
    assert len(builds) == 2 * (4 + 3 + 4 + 3 * 3 + 2 + 1)
    for build in builds:
        multiplies = not any(words in build.program for words in (", 1 x", "made dense", "blocks of", "sums of shares"))
        assert (
            not build.fault and ("mma" in build.matrix) == multiplies and build.registers >= 16 and build.spilled <= 16
        ), build


def test_the_command() -> None:
    done = command("verify", "--plugin", "cuda", "--platform", "ada", "--row", "awq", "--compile-only", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert {finding["kernel"] for finding in document["findings"]} == {"triton_integers", "marlin_int4"}
    assert all(finding["platform"] == "ada" and finding["cases"] > 10 for finding in document["findings"])
    assert {build["architecture"] for build in document["builds"]} == {"sm_89"}


@pytest.mark.parametrize(
    ("made", "fault"),
    [
        (Compiled("", 4, 0, 4096), "which does nothing"),
        (Compiled("mma", 90, 0, 228 << 10), "bytes of shared memory"),
        (Compiled("mma", 90, 64, 4096), ""),
    ],
)
def test_what_a_compiler_made_is_looked_at(made: Compiled, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcore.kernels.triton.program.compile_program", lambda *_: made)
    ((_, kernel, (platform,)),) = compilable(registry(), AWQ)
    (target,) = platform.targets
    monkeypatch.setattr(compiled, "_TASKS", [(kernel, platform, target, Program("W4", None, {}, {}))])
    build = compiled._build(0)
    assert fault in build.fault and bool(fault) == bool(build.fault) and build.registers == made.registers


def test_the_table_of_instructions() -> None:
    """The compilers alone: no findings, and no evidence."""
    asked = ("verify", "--plugin", "cuda", "--platform", "ada", "--kernel", "triton_kv_cache", "--isa")
    done = command(*asked, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert list(document) == ["builds"] and {build["architecture"] for build in document["builds"]} == {"sm_89"}
    for more in ("--record", "--compile-only", "--simulate"):
        assert "bad-argument" in command(*asked, more).stderr


def test_the_table_has_every_architecture() -> None:
    """A column's first those schemes that differ in their elements, and others one; of a row that is named, all."""
    kernel = next(kernel for kernel, _ in registry().kernels if kernel.name == "triton_integers")
    schemes = [
        Scheme.parse(text) for text in ("W4A16-g128-sym", "W4A16-g32-sym", "W8A16-g128-sym", "W4A16-channel-sym")
    ]
    for name in ("ampere", "blackwell"):
        platform = registry().platforms[name]
        assert len(list(compiled._places(kernel, schemes, platform, True))) == 4 * len(platform.targets)
        some: dict[str, list[str]] = {target.architecture: [] for target in platform.targets}
        for target, scheme in compiled._places(kernel, schemes, platform, False):
            some[target.architecture].append(str(scheme))
        first, *others = some.values()
        assert first == ["W4A16-g128-sym", "W8A16-g128-sym"] and others == [first[:1]] * len(others) != []


def test_where_nothing_is_compiled() -> None:
    done = command("verify", "--plugin", "cpu", "--compile-only")
    assert done.returncode == 3 and "no kernel can be compiled" in done.stderr and not done.stdout


def answers(monkeypatch: pytest.MonkeyPatch, builds: list[Build]) -> None:
    """What the two processes say, without them."""
    found = [{"scheme": "W4A16-g128-asym", "error": 0.001, "bound": 0.016, "cases": 18, "failures": []}]
    said: dict[str, list[dict[str, Any]]] = {"interpret": found, "compile": [vars(build) for build in builds]}
    monkeypatch.setattr(compiled, "_start", lambda what: what)
    monkeypatch.setattr(compiled, "_answer", lambda what, tasks: said[what])


def test_evidence_says_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(
        monkeypatch,
        [Build("triton_integers", "hopper", "sm_90", "W4", "wgmma.mma_async.sync.aligned.m64", 90, 0, 4096)],
    )
    ((plugin, kernel, platforms),) = compilable(registry(), AWQ)
    findings, _ = verify_compiled(plugin, kernel, platforms, AWQ)
    (record,) = [record for record in records(findings, grade="compiled") if record.row == "awq"]
    assert (record.grade, record.platform, record.kernel) == ("compiled", "hopper", "triton_integers")
    assert "sm_90: wgmma.mma_async.sync, 90 registers, 0 bytes spilled, 4 KiB shared" in record.device
    assert record.command.endswith("--kernel triton_integers --compile-only")


def test_what_cannot_be_launched_is_no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    good = Build("triton_integers", "hopper", "sm_90", "small", "mma", 90, 0, 4096)
    answers(monkeypatch, [good, Build("triton_integers", "hopper", "sm_90", "large", fault="too much shared memory")])
    ((plugin, kernel, platforms),) = compilable(registry(), AWQ)
    findings, _ = verify_compiled(plugin, kernel, platforms, AWQ)
    assert findings[0].failures == ("sm_90, large: too much shared memory",)
    assert not records(findings, grade="compiled")


def test_what_was_not_compiled_is_no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, [])
    ((plugin, kernel, platforms),) = compilable(registry(), AWQ)
    findings, _ = verify_compiled(plugin, kernel, platforms, AWQ)
    assert findings[0].failures == ("hopper: nothing was compiled for any of its architectures",)
    assert not records(findings, grade="compiled")
