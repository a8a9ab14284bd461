"""docs/plugins.md alone is enough to write a plugin: its files, as they stand there, installed and run."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qcore.hookspecs

PAGE = (Path(__file__).parent.parent / "docs" / "plugins.md").read_text()
GROUPED = Path(__file__).parent / "golden" / "gptqmodel-gptq-4bit-sym"
HOOKS = {name: hook for name, hook in vars(qcore.hookspecs).items() if name.startswith("qcore_")}


def files() -> dict[str, str]:
    """The page's files, by the name that stands above each block."""
    return dict(re.findall(r"^`([\w.]+)`[^\n]*\n\n```\w+\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def moth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The invented chip's package, installed as pip would leave it."""
    folder = tmp_path_factory.mktemp("moth")
    for name, text in files().items():
        (folder / name).write_text(text)
    info = folder / "qcore_moth-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qcore-moth\nVersion: 0.1.0\n")
    entry_points = re.search(
        r'\[project.entry-points."qcore.plugins"\]\n(.*?)\n\n', files()["pyproject.toml"], re.DOTALL
    )
    assert entry_points
    (info / "entry_points.txt").write_text("[qcore.plugins]\n" + entry_points[1].replace('"', ""))
    return folder


def run(moth: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(moth), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, env=environment, cwd=moth)


def test_the_example_is_short() -> None:
    assert sum(len(text.splitlines()) for text in files().values()) <= 100


def test_the_suite_passes_the_right_kernel_and_catches_the_wrong_one(moth: Path) -> None:
    done = run(
        moth, "pytest", "-q", "--qcore-fast", "-k", "moth or not definition", "test_moth.py", "-p", "no:cacheprovider"
    )
    failed = re.findall(r"^FAILED .*\[(.*?)\]", done.stdout, re.MULTILINE)
    assert failed and all("moth_int4" in case for case in failed), done.stdout
    assert re.search(r"\d+ failed, [1-9]\d* passed", done.stdout), done.stdout
    assert re.search(r"moth_int4.*error [\d.]+, expected at most", done.stdout)


def test_verify_catches_it_too_and_records_only_what_is_right(moth: Path) -> None:
    done = run(moth, "qcore", "verify", "--plugin", "moth", "--row", "int8_w8a8")
    assert done.returncode == 0, done.stderr
    done = run(moth, "qcore", "verify", "--plugin", "moth", "--row", "int4_w4a16", "--kernel", "moth_int4", "--record")
    assert done.returncode == 3 and "FAILED" in done.stdout
    assert not (moth / "qcore_moth_evidence.json").exists()
    done = run(moth, "qcore", "verify", "--plugin", "moth", "--row", "int4_w4a16", "--kernel", "moth_int8", "--record")
    assert done.returncode == 0 and (moth / "qcore_moth_evidence.json").read_text().count('"simulated"') == 2


def test_a_model_runs_on_it_and_the_wrong_kernel_gives_way(moth: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.py").write_text(
        "import sys, torch, qcore\n"
        "from qcore.model.load import kernel_counts\n"
        "model = qcore.load_model(sys.argv[1], device='moth:0', dtype='float32')\n"
        "torch.save(model(torch.tensor([[1, 2, 3]])).logits, sys.argv[2])\n"
        "print(kernel_counts(model))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(moth), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "ids.py"), str(GROUPED), str(tmp_path / "logits.pt")],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "reference_linear" in done.stdout and "moth_int4" not in done.stdout
    assert "kernel-wrong" in done.stderr and "moth_int4" in done.stderr
    expected = qcore.load_model(GROUPED, dtype="float32", kernel="reference_linear")(torch.tensor([[1, 2, 3]])).logits
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5)


@pytest.mark.parametrize("name", sorted(HOOKS))
def test_every_hook_is_documented_with_its_arguments(name: str) -> None:
    arguments = ", ".join(inspect.signature(HOOKS[name]).parameters)
    assert f"| `{name}({arguments})` |" in PAGE
    assert inspect.getdoc(HOOKS[name])


@pytest.mark.parametrize("name", sorted(HOOKS))
def test_every_hook_is_implemented_by_a_tested_plugin(name: str) -> None:
    """A hook that no plugin of ours answers is a promise that nothing keeps."""
    sources = [Path(__file__).parent.parent / "qcore" / "builtin.py"]
    sources += (Path(__file__).parent.parent / "plugins").glob("*/qcore_*/plugin.py")
    assert any(f"def {name}(" in path.read_text() for path in sources)
