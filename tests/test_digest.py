"""What evidence is tied to."""

import ast
from pathlib import Path

import pytest

from qcore.support import digest

ROOT = Path(__file__).parents[1]


def modules() -> list[str]:
    folders = [ROOT, *(ROOT / "plugins").iterdir()]
    found = [path.relative_to(folder) for folder in folders for path in folder.glob("qcore*/**/*.py")]
    return [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in found]


def test_imports_are_those_of_whole_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though of a source those parts alone are parsed that have some."""
    names = modules()
    assert len(names) > 300
    cut = {name: set(digest._imports.__wrapped__(name)) for name in names}
    monkeypatch.setattr(digest, "_with_imports", lambda source: [ast.parse(source)])
    assert cut == {name: set(digest._imports.__wrapped__(name)) for name in names}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('"""A text:\n\nimport one\n"""\n\nimport two\n', {"two"}),
        ("x = '''\nimport one\n'''\nimport two\n", {"two"}),
        ("try:\n    import one\nexcept ImportError:\n    import two\n", {"one", "two"}),
        ("from qcore import (\n    one,\n)\n\n\ndef f() -> None:\n    import two\n", {"qcore", "qcore.one", "two"}),
        ("if TYPE_CHECKING:\n    import one\nelse:\n    import two\n", set()),
    ],
)
def test_imports(source: str, found: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_read", lambda module: source.encode())
    assert set(digest._imports.__wrapped__("any")) == found
