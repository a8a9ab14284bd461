"""The shape of the code, kept by tests: who may import whom, and how long a file may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "qcore").rglob("*.py"), *(ROOT / "plugins").glob("*/qcore_*/**/*.py")])

PARTS = {
    "methods": "qcore.methods",
    "kernels": "qcore.kernels",
    "checkpoint": "qcore.checkpoint",
    "model": "qcore.model",
    "cli": "qcore.cli",
    "gguf": "qcore.gguf",
    "blocks": "qcore.blocks",
}
FORBIDDEN = {
    "methods": ("qcore.kernels", "qcore.cli", "qcore.select", "qcore.discovery", "qcore.methods."),
    "kernels": ("qcore.methods", "qcore.checkpoint", "qcore.model", "qcore.cli", "qcore.gguf", "qcore.select"),
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


def imports(path: Path) -> set[str]:
    """Every module that the file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
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


def test_no_import_circles_at_module_level() -> None:
    graph = {}
    for path in SOURCES:
        name = ".".join(
            path.relative_to(ROOT if path.is_relative_to(ROOT / "qcore") else path.parents[-2]).with_suffix("").parts
        )
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom) and node.module]
        graph[name.removesuffix(".__init__")] = {node.module for node in top if node.module.startswith("qcore")}
    state: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert state.get(name) != 1, " -> ".join([*trail, name])
        if name in graph and name not in state:
            state[name] = 1
            for other in graph[name]:
                visit(other or "", (*trail, name))
            state[name] = 2

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 420


def test_the_core_names_no_vendor() -> None:
    """Device names belong to the plugin that owns them; platform.py holds the one table of column names."""
    for path in (ROOT / "qcore").rglob("*.py"):
        if path.name == "platform.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                text = ast.unparse(node).lower()
                assert not any(f"'{word}" in text for word in VENDOR_WORDS), f"{path.name}: {text}"


@pytest.mark.parametrize(
    "module", ["qcore", "qcore.discovery", "qcore.explanation", "qcore.select", "qcore.scheme", "qcore.builtin"]
)
def test_facts_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*(name for name in ('torch', 'transformers', 'numpy') if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
