"""The digest of a kernel's source: what its evidence is tied to.

It covers what the row claims and the code that computes: the implementation's module and, of what it imports at run
time, its own package, the shared kernels and the arithmetic of the waist; and the files in other languages that the row
names. Nothing is imported for it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
from functools import cache
from pathlib import Path

from qcore.kernel import Kernel

_SHARED = ("qcore.kernels", "qcore.blocks", "qcore.bits", "qcore.tensor")
"""Parts of the core that decide what a kernel computes."""

_AT_MARGIN = re.compile(r"^(?=[^\s#)\]}])", re.MULTILINE)
"""Where a statement may begin, or a line of a text that goes on."""

_BLOCKS = ("body", "orelse", "handlers", "finalbody", "cases")
"""Fields of a syntax node that hold statements; an import is never inside an expression."""


def source_digest(kernel: Kernel) -> str:
    """`sha256:` and 64 hexadecimal digits; empty where the source cannot be found."""
    module = kernel.implementation.partition(":")[0]
    claims = (kernel.op, kernel.accepts, kernel.dtypes, kernel.multiples, kernel.ragged, kernel.quantizes_input)
    digest = hashlib.sha256(repr(claims).encode())
    sources = _sources(module) | _files(module, kernel.sources)
    for name in sorted(sources):
        digest.update(f"\n{name}\n".encode() + sources[name])
    return f"sha256:{digest.hexdigest()}" if sources else ""


@cache
def _sources(module: str) -> dict[str, bytes]:
    """The sources of a module and of all that it imports from `_SHARED` and from its own package."""
    own = module.partition(".")[0]
    roots = _SHARED if own == "qcore" else (*_SHARED, own)
    found: dict[str, bytes] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        source = _read(name) if name not in found else None
        if source is not None:
            found[name] = source
            waiting += [i for i in _imports(name) if any(i == root or i.startswith(f"{root}.") for root in roots)]
    return found


@cache
def _files(module: str, patterns: tuple[str, ...]) -> dict[str, bytes]:
    """The files of the module's top package that the patterns name, by their paths in it."""
    found: dict[str, bytes] = {}
    for folder in _folders(module.partition(".")[0]) if patterns else []:
        for path in (path for pattern in patterns for path in folder.glob(pattern) if path.is_file()):
            found.setdefault(path.relative_to(folder).as_posix(), path.read_bytes().replace(b"\r\n", b"\n"))
    return found


def _folders(package: str) -> list[Path]:
    """Where a package's files are. An editable install of one with compiled parts has them apart from its sources, and the sources
    where its origin is."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return []
    origins = [Path(spec.origin).parent] if spec.origin else []
    return list(dict.fromkeys([*origins, *map(Path, spec.submodule_search_locations)]))


@cache
def _read(module: str) -> bytes | None:
    """The module's source; None where there is none in Python. Found by its path, for the import system would run its
    parent packages."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        return None
    if not spec.submodule_search_locations:
        candidates = [] if rest else [Path(spec.origin)]
    else:
        inside = [folder.joinpath(*rest) for folder in _folders(top)]
        candidates = [path for place in inside for path in (place.with_suffix(".py"), place / "__init__.py")]
    found = next((path for path in candidates if path.suffix == ".py" and path.is_file()), None)
    return found.read_bytes().replace(b"\r\n", b"\n") if found else None


@cache
def _imports(module: str) -> tuple[str, ...]:
    """What the module imports at run time, submodules by their own names."""
    found: list[str] = []
    waiting: list[ast.AST] = [*_with_imports((_read(module) or b"").decode())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and _of_types(node.test):
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for part in _BLOCKS:
            waiting += getattr(node, part, ())
    return tuple(found)


def _with_imports(source: str) -> list[ast.Module]:
    """Of a module, what begins at the left margin and has imports in it, for most of a module has none and parsing takes long; all of it where it cannot be cut there."""
    parts: list[str] = []
    inside = False
    for part in _AT_MARGIN.split(source):
        if inside:  # a text that goes on
            parts[-1] += part
        else:
            parts.append(part)
        inside ^= (part.count('"""') + part.count("'''")) % 2 == 1
    try:
        return [ast.parse(part) for part in parts if "import" in part]
    except SyntaxError:
        return [ast.parse(source)]


def _of_types(test: ast.expr) -> bool:
    """Whether a condition asks for TYPE_CHECKING."""
    names = (getattr(node, "id", getattr(node, "attr", "")) for node in ast.walk(test))
    return "TYPE_CHECKING" in names
