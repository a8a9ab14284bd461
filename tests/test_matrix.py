"""The computed matrix: its logic with simulated hardware, and its truth on this host."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import qcore
from commands import command
from makers import too_slow
from qcore.discovery import registry
from qcore.methods.gptq import Gptq
from qcore.platform import COLUMNS, PLATFORM_PLUGINS, Device
from qcore.refusal import CODES
from qcore.select import LayerRequest, select
from qcore.support.digest import source_digest
from qcore.support.evidence import Record, read_evidence, write_evidence
from qcore.support.matrix import Matrix, matrix, summary
from qcore.support.rows import BASELINE, ROWS, Row
from sim import ANY, Reader, Sim, columns_of, kernel, sim_registry

SEED = """
awq            . x x x x . x . x . .
gptq           x x x x x . x . x . .
marlin         . . x x x . . . . . .
int8_w8a8      . x x x x . . . x x x
fp8_w8a8       . . . x x x . . . x .
bitblas        x x x x x . . . . . .
bitblas_gptq   . . x x x . . . . . .
bitsandbytes   x x x x x . . . . . .
deepspeedfp    x x x x x . . . . . .
gguf           x x x x x x . . . . .
inc_w8a8       . . . . . . . x . . .
"""
SEED_PLATFORMS = ["volta", "turing", "ampere", "ada", "hopper", "amd", "xpu", "gaudi", "x86_cpu", "neuron", "tpu"]
ROW: dict[str, Row] = {row.id: row for row in ROWS}
CORE = {method.name for plugin in registry().plugins if plugin.name == "core" for method in plugin.methods}
READERS = [Reader(name) for name in ("bitblas", "deepspeedfp", "inc") if name not in CORE]
"""The seed's formats that the core does not read by itself."""


def record(row: str, platform: str, name: str, grade: str = "measured", **rest: object) -> Record:
    """A record for all schemes of the row."""
    facts = {
        "schemes": {scheme: {"error": 0.001, "bound": 0.01} for scheme in ROW[row].schemes},
        "cases": 3, "command": "qcore verify", "device": "sim", "versions": {"torch": "2.13.0"},
        "source": source_digest(kernel(name, platform)), "date": "2026-01-01", **rest,
    }  # fmt: skip
    return Record(row, platform, name, grade, **facts)  # type: ignore[arg-type]


def test_the_seed_is_as_published() -> None:
    ticks = {
        (row, platform): mark == "x"
        for row, *marks in (line.split() for line in SEED.strip().splitlines())
        for platform, mark in zip(SEED_PLATFORMS, marks, strict=True)
    }
    assert ticks == BASELINE and len(ticks) == 121 and sum(ticks.values()) == 52
    found = {(c["row"], c["platform"]): c["baseline"] for c in qcore.matrix().to_dict()["cells"]}
    assert {place: found[place] for place in ticks} == ticks
    assert not any(baseline for place, baseline in found.items() if place not in ticks)


def test_a_world_with_exactly_the_seeds_evidence_gives_exactly_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formats and kernel families by one path, over all plugins."""
    plugins = []
    for name in dict.fromkeys(PLATFORM_PLUGINS.values()):
        own = [column.id for column in COLUMNS if column.plugin == name]
        any_of = kernel(f"{name}_any", *own)
        marlin = kernel(f"{name}_marlin", *own, family="marlin")
        proofs = [
            record(row, platform, f"{name}_marlin" if row == "marlin" else f"{name}_any")
            for (row, platform), tick in BASELINE.items()
            if tick and platform in own
        ]
        plugins.append(Sim(name, columns_of(name), [any_of, marlin], records=proofs, evidence=tmp_path / f"{name}.json",
                           methods=READERS if name == "cpu" else ()))  # fmt: skip
    monkeypatch.setattr(Gptq, "variants", ("bitblas",))
    found = matrix(sim_registry(*plugins))
    for (row, platform), tick in BASELINE.items():
        cell = found.cell(row, platform)
        assert cell.supported == tick, cell
        assert (cell.refusal is None) == tick
        if cell.row.platforms and platform not in cell.row.platforms:
            assert cell.refusal is not None and (cell.refusal.code, cell.refusal.kind) == ("wrong-platform", "never")
        elif not tick:
            assert cell.refusal is not None and cell.refusal.code == "unproved" and "qcore verify" in cell.refusal.fix
    assert summary(found) == {
        "baseline_ticks": 52, "baseline_supported": 52, "beyond_baseline": 0,
        "by_evidence": summary(found)["by_evidence"],
    }  # fmt: skip


@pytest.fixture
def hopper(tmp_path: Path) -> Path:
    return tmp_path / "evidence.json"


def world(evidence: Path, *records: Record, kernels: object = None) -> Matrix:
    rows = kernels or [kernel("fast", "hopper")]
    return matrix(sim_registry(Sim("cuda", columns_of("cuda"), rows, records=records, evidence=evidence)))  # type: ignore[arg-type]


def refusal_code(found: Matrix, row: str = "gptq", platform: str = "hopper") -> str:
    refusal = found.cell(row, platform).refusal
    return refusal.code if refusal else ""


def test_without_evidence_a_kernel_is_declared_and_not_supported(hopper: Path) -> None:
    cell = world(hopper).cell("gptq", "hopper")
    assert (cell.evidence, cell.supported, cell.kernels) == ("declared", False, ["fast"])
    assert refusal_code(world(hopper)) == "unproved"


@pytest.mark.parametrize("grade", ["measured", "compiled", "simulated"])
def test_evidence_of_any_grade_supports(hopper: Path, grade: str) -> None:
    cell = world(hopper, record("gptq", "hopper", "fast", grade)).cell("gptq", "hopper")
    assert cell.supported and cell.evidence == grade and cell.records[0].grade == grade


def test_changed_source_drops_the_evidence(hopper: Path) -> None:
    found = world(hopper, record("gptq", "hopper", "fast", source="sha256:" + "0" * 64))
    assert refusal_code(found) == "stale-evidence" and found.cell("gptq", "hopper").evidence == "declared"


def test_changed_claims_drop_the_evidence_too(hopper: Path) -> None:
    wider = replace(kernel("fast", "hopper"), multiples=(8, 8))
    assert refusal_code(world(hopper, record("gptq", "hopper", "fast"), kernels=[wider])) == "stale-evidence"


def test_a_cell_is_as_strong_as_its_weakest_scheme(hopper: Path) -> None:
    part = dict(list(record("gptq", "hopper", "fast").schemes.items())[:-1])
    found = world(hopper, record("gptq", "hopper", "fast", schemes=part))
    assert refusal_code(found) == "unproved"
    both = [record("gptq", "hopper", "fast", schemes=part), record("gptq", "hopper", "fast", "compiled")]
    hopper.unlink()
    assert world(hopper, *both).cell("gptq", "hopper").evidence == "compiled"


def test_the_best_proved_kernel_stands_for_the_cell_then_the_cheapest(hopper: Path) -> None:
    kernels = [kernel("dear", "hopper", cost=9.0), kernel("cheap", "hopper", cost=0.1)]
    assert world(hopper, kernels=kernels).cell("gptq", "hopper").kernels == ["cheap"]
    hopper.unlink()
    found = world(hopper, record("gptq", "hopper", "dear"), kernels=kernels)
    assert found.cell("gptq", "hopper").kernels == ["dear"] and found.cell("gptq", "hopper").supported


def test_a_plugin_vouches_only_for_its_own_platforms(hopper: Path) -> None:
    assert not world(hopper, record("gptq", "tpu", "fast")).cell("gptq", "tpu").supported


def test_a_family_row_counts_only_that_family(hopper: Path) -> None:
    kernels = [kernel("fast", "hopper"), kernel("perm", "hopper", family="marlin")]
    found = world(hopper, record("marlin", "hopper", "fast"), record("marlin", "hopper", "perm"), kernels=kernels[:1])
    assert refusal_code(found, "marlin") == "no-kernel"
    assert world(hopper, kernels=kernels).cell("marlin", "hopper").kernels == ["perm"]


def test_a_format_that_nothing_reads_is_not_supported_whatever_the_kernels(
    hopper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert world(hopper, record("gptq", "hopper", "fast")).cell("gptq", "hopper").supported
    monkeypatch.setattr(Gptq, "name", "another-format")
    found = world(hopper, record("gptq", "hopper", "fast"))
    assert refusal_code(found) == "unknown-method" and found.cell("gptq", "hopper").evidence == "none"


def test_a_scheme_without_a_kernel_is_named(hopper: Path) -> None:
    narrow = kernel("fast", "hopper", accepts=replace(ANY, elements=("int4",)))
    refusal = world(hopper, kernels=[narrow]).cell("gptq", "hopper").refusal
    assert refusal is not None and refusal.code == "no-kernel" and "W8A16-g128-sym" in refusal.reason


def test_an_absent_plugin_is_named_with_what_to_install(hopper: Path) -> None:
    refusal = world(hopper).cell("gptq", "gaudi").refusal
    assert refusal is not None and refusal.code == "plugin-missing" and "qcore[gaudi]" in refusal.fix


def test_broken_evidence_is_said_and_counts_for_nothing(hopper: Path) -> None:
    hopper.write_text('{"format": 1, "records": [{"row": "gptq"}]}')
    cell = world(hopper).cell("gptq", "hopper")
    assert not cell.supported and cell.refusal is not None and cell.refusal.code == "bad-field"
    assert "qcore verify --record" in cell.refusal.fix


def test_portable_kernels_run_where_torch_does_and_nothing_is_claimed_by_it(hopper: Path) -> None:
    cell = matrix(sim_registry(Sim("tpu", columns_of("tpu", portable=True)))).cell("gguf", "tpu")
    assert cell.kernels == ["reference_linear"] and not cell.supported
    cell = matrix(sim_registry(Sim("tpu", columns_of("tpu")))).cell("gguf", "tpu")
    assert cell.kernels == [] and cell.refusal is not None and cell.refusal.code == "no-kernel"


# --- On this host ----------------------------------------------------------------------------------------------------


def test_every_refusal_is_whole_and_its_fix_is_true() -> None:
    found = qcore.matrix()
    titles = {row.title: row.id for row in found.rows}
    for cell in found.cells:
        assert cell.supported == (cell.refusal is None) == (cell.evidence in ("measured", "compiled", "simulated"))
        if cell.refusal is None:
            continue
        assert cell.refusal.code in CODES and cell.refusal.reason and cell.refusal.fix, cell
        if named := re.search(r"Supported on (\w+): (.*)\.$", cell.refusal.fix):
            assert all(found.cell(titles[title], named[1]).supported for title in named[2].split(", "))
        if verify := re.search(r"qcore verify --plugin (\w+)", cell.refusal.fix):
            assert verify[1] == PLATFORM_PLUGINS[cell.platform]


def test_every_tick_rests_on_a_record_whose_command_reproduces_it() -> None:
    commands = set()
    for cell in qcore.matrix().cells:
        if cell.supported:
            assert cell.records
            for proof in cell.records:
                assert proof.worst["error"] <= proof.worst["bound"] and proof.cases > 0
                plugin = PLATFORM_PLUGINS[cell.platform]
                where = f"--plugin {plugin} --platform {cell.platform} --row {cell.row.id} --kernel {proof.kernel}"
                flag = {"compiled": " --compile-only", "simulated": " --simulate"}.get(proof.grade, "")
                assert proof.command == f"qcore verify {where}{flag}"
                if proof.grade == "measured" and proof.kernel != "reference_linear" and plugin == "cpu":
                    commands.add(proof.command)
    assert commands
    for words in sorted(commands):
        done = command(*shlex.split(words)[1:], "--json")
        assert done.returncode == 0, done.stderr
        findings = json.loads(done.stdout)["findings"]
        assert findings and all(not f["failures"] and f["error"] <= f["bound"] for f in findings)


def test_the_cpu_cells_of_the_seed_that_can_be_read_are_measured() -> None:
    found = qcore.matrix()
    for row in ("awq", "gptq", "int8_w8a8", "gguf", "int4_w4a16", "fp8_w8a8"):
        assert found.cell(row, "x86_cpu").evidence == "measured"


SEED_OF_GPUS = [
    place
    for place, ticked in BASELINE.items()
    if ticked and place[1] in ("volta", "turing", "ampere", "ada", "hopper", "amd")
]


@pytest.mark.parametrize(("row", "platform"), SEED_OF_GPUS, ids=" ".join)
def test_the_gpus_cells_of_the_seed_are_compiled_or_measured(row: str, platform: str) -> None:
    assert qcore.matrix().cell(row, platform).evidence in ("measured", "compiled")


@pytest.mark.parametrize(("row", "platform"), [("awq", "xpu"), ("gptq", "xpu"), ("inc_w8a8", "gaudi")])
def test_intels_cells_of_the_seed_are_simulated_at_least(row: str, platform: str) -> None:
    assert qcore.matrix().cell(row, platform).evidence in ("measured", "compiled", "simulated")


@pytest.mark.parametrize("platform", ["volta", "turing", "ampere", "ada", "hopper", "blackwell", "amd", "xpu"])
def test_what_can_be_on_a_gpu_is_there_and_what_cannot_is_never(platform: str) -> None:
    for cell in qcore.matrix().part(platform=platform).cells:
        if cell.refusal is not None:
            assert (
                cell.refusal.kind == "never"
                and cell.row.id == "marlin"
                and "compute capability 7.5" in cell.refusal.reason
            ), cell.refusal


def test_every_architecture_of_every_platform_selects_something() -> None:
    """Simulated devices, oldest to newest, of all that the plugins declare."""
    asked = LayerRequest("linear", ROW["gptq"].parsed[0], (256, 256), "float32")
    seen = 0
    for platform in registry().platforms.values():
        for architecture in platform.architectures or ("",):
            device = Device(f"{platform.id}:0", platform.id, architecture, "cpu", architecture)
            found = select(asked, platform.id, registry().kernels, device)
            assert found.kernel is not None and found.kernel.runs_on(architecture)
            assert all(c.refusal.reason and c.refusal.fact and c.refusal.fix for c in found.candidates if c.refusal)
            seen += 1
    assert seen > 45


def test_evidence_files_of_all_plugins_are_current() -> None:
    kernels = {kernel.name: kernel for kernel, _ in registry().kernels}
    for plugin in registry().plugins:
        for proof in read_evidence(plugin.evidence) if plugin.evidence else []:
            digest = source_digest(kernels[proof.kernel])
            assert digest and proof.source == digest, f"{plugin.name}: {proof.kernel}: verify again"


def test_every_kernel_has_a_digest_of_its_sources() -> None:
    """Evidence that is tied to nothing would never be stale."""
    for row, _ in registry().kernels:
        assert source_digest(row).startswith("sha256:"), row.name


def test_evidence_is_written_whole_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "evidence.json"
    records = [record("gptq", "hopper", "b"), record("awq", "hopper", "a")]
    write_evidence(path, records)
    assert read_evidence(path) == sorted(records, key=lambda r: r.place)
    assert [p.name for p in tmp_path.iterdir()] == ["evidence.json"]
    assert read_evidence(tmp_path / "none.json") == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"grade": "declared"}, "bad-field"),
        ({"schemes": {}}, "bad-field"),
        ({"schemes": {"W4A16-g128-sym": {"error": 0.5, "bound": 0.01}}}, "bad-field"),
        ({"cases": "many"}, "bad-field"),
        ({"colour": "red"}, "bad-field"),
    ],
)
def test_evidence_that_was_tampered_with_is_refused(tmp_path: Path, change: dict[str, object], code: str) -> None:
    path = tmp_path / "evidence.json"
    write_evidence(path, [record("gptq", "hopper", "fast")])
    document = json.loads(path.read_text())
    document["records"][0] |= change
    path.write_text(json.dumps(document))
    with pytest.raises(qcore.Refused, match=code):
        read_evidence(path)


@pytest.mark.alone
def test_the_command_is_quick_and_needs_no_torch() -> None:
    code = "import sys; from qcore.cli.main import app; app(['matrix'], standalone_mode=False); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False") and "AWQ" in done.stdout
    assert not too_slow([sys.executable, "-c", code], 0.5, 3)


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_the_terminals_table_fits(width: int) -> None:
    from qcore.cli.matrix import table

    found = qcore.matrix()
    lines = table(found, width)
    assert max(map(len, lines)) <= max(width, 54) and len(lines) >= len(found.rows) + 1
    assert all(any(title in line for line in lines) for title in found.titles.values())
    row = next(line for line in lines if line.startswith("GPTQ "))
    assert row.split()[1:] == [
        {"measured": "M", "compiled": "C", "simulated": "S", "declared": "d", "none": "-"}[c.evidence]
        + "*" * c.baseline
        for c in found.part("gptq").cells
    ]
