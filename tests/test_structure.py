"""The shape of the code, kept by tests: who may import whom, and how long a file may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "qcore").rglob("*.py"), *(ROOT / "plugins").glob("*/qcore_*/**/*.py")])

FORBIDDEN = {
    "layouts": ("qcore.kernels", "qcore.algorithms", "qcore.methods", "qcore.model", "qcore.cli", "qcore.select"),
    "methods": ("qcore.kernels", "qcore.algorithms", "qcore.cli", "qcore.select", "qcore.discovery", "qcore.methods."),
    "kernels": (
        "qcore.methods",
        "qcore.algorithms",
        "qcore.checkpoint",
        "qcore.model",
        "qcore.cli",
        "qcore.gguf",
        "qcore.select",
    ),
    "algorithms": (
        "qcore.methods",
        "qcore.kernels",
        "qcore.checkpoint",
        "qcore.model",
        "qcore.cli",
        "qcore.gguf",
        "qcore.select",
        "qcore.platform",
    ),
    "checkpoint": ("qcore.kernels", "qcore.model", "qcore.cli", "qcore.methods", "qcore.select"),
    "gguf": ("qcore.kernels", "qcore.model", "qcore.cli", "qcore.methods", "qcore.tensor", "qcore.select"),
    "blocks": (
        "qcore.kernels",
        "qcore.model",
        "qcore.cli",
        "qcore.methods",
        "qcore.checkpoint",
        "qcore.tensor",
        "qcore.scheme",
    ),
    "model": ("qcore.methods", "qcore.cli"),
}
VENDOR_WORDS = ("cuda", "rocm", "gaudi", "neuron", "tpu", "xpu", "hpu", "avx", "amx")


def module_name(path: Path) -> str:
    """The name that the file is imported by."""
    base = ROOT if path.is_relative_to(ROOT / "qcore") else path.parents[len(path.relative_to(ROOT).parts) - 3]
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


NAMES = {module_name(path): path for path in SOURCES}


def imports(path: Path) -> set[str]:
    """Every module that the file imports, wherever the import stands, but for those that only type checkers read."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in NAMES else node.module for name in whole}
    return found


@pytest.mark.parametrize("part", sorted(FORBIDDEN))
def test_parts_do_not_import_each_other(part: str) -> None:
    for path in (ROOT / "qcore" / part).rglob("*.py"):
        for module in imports(path):
            assert not module.startswith(FORBIDDEN[part]), f"{path.relative_to(ROOT)} imports {module}"


def test_the_core_imports_no_plugin_and_plugins_do_not_import_each_other() -> None:
    for path in SOURCES:
        own = next((part for part in path.parts if part.startswith("qcore_")), "qcore")
        for module in imports(path):
            assert not module.startswith("qcore_") or module.split(".")[0] == own, f"{path} imports {module}"


def test_no_import_circles() -> None:
    graph = {name: imports(path) & NAMES.keys() for name, path in NAMES.items()}
    assert sum(map(len, graph.values())) > 100, "the imports were not found"
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 420


TRITONS_WORDS = {("tilings.py", "target.backend == 'cuda'"), ("halves.py", "target.backend != 'cuda'")}
"""What Triton calls a compiler's backend, as `Target.backend` has it."""


def test_the_core_names_no_vendor() -> None:
    """Device names belong to the plugin that owns them; platform.py holds the one table of column names."""
    for path in (ROOT / "qcore").rglob("*.py"):
        if path.name == "platform.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                text = ast.unparse(node).lower()
                if (path.name, text) in TRITONS_WORDS:
                    continue
                assert not any(f"'{word}" in text for word in VENDOR_WORDS), f"{path.name}: {text}"


@pytest.mark.parametrize(
    "module", ["qcore", "qcore.discovery", "qcore.explanation", "qcore.select", "qcore.scheme", "qcore.builtin"]
)
def test_facts_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*(name for name in ('torch', 'transformers', 'numpy') if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
