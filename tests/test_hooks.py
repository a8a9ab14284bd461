"""Every hook, asked through its typed wrapper: its right answer, no answer, a wrong one, and a fault."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import qcore.hookspecs
from qcore.algorithm import Algorithm
from qcore.decoder import Decoder
from qcore.hooks import HookFault, Hooks
from qcore.hookspecs import hookimpl
from qcore.kernel import Accepts
from qcore.platform import Device, Platform
from sim import Reader, kernel

SPECS = [name for name in vars(qcore.hookspecs) if name.startswith("qcore_")]
PLATFORM = Platform("toyland", "Toy")
KERNEL = kernel("toy", "toyland")
METHOD = Reader("toy-format")
ALGORITHM = Algorithm("toy-rounding", Accepts(("int4",)), "qcore.algorithms.rtn:rtn")
DECODER = Decoder("toy-steps", "cpu", "toy:Steps")
DEVICE = Device("toy:0", "toyland", "Toy", "cpu")


def asked(hook: str, answer: Callable[[], Any] | None) -> Any:
    """What the wrapper of a hook makes of a plugin's answer; a plugin that answers otherwise stands beside it."""
    hooks = Hooks()
    for name, what in (("other", lambda: pytest.fail("another plugin was asked")), ("toy", answer)):
        module = ModuleType(name)
        if what is not None:
            what.__name__ = hook
            setattr(module, hook, hookimpl(what))
        hooks.register(name, module)
    found = getattr(hooks, hook.removeprefix("qcore_"))("toy")
    return found() if callable(found) else found


@pytest.mark.parametrize(
    ("hook", "answer", "found", "nothing"),
    [
        ("qcore_platforms", (PLATFORM,), [PLATFORM], []),
        ("qcore_kernels", (KERNEL,), [KERNEL], []),
        ("qcore_methods", [METHOD], [METHOD], []),
        ("qcore_algorithms", [ALGORITHM], [ALGORITHM], []),
        ("qcore_decoders", [DECODER], [DECODER], []),
        ("qcore_evidence", Path("evidence.json"), Path("evidence.json"), None),
        ("qcore_devices", [DEVICE], [DEVICE], []),
        ("qcore_stand_ins", [DEVICE], [DEVICE], None),
        ("qcore_report", {"driver": 7}, {"driver": "7"}, {}),
    ],
)
def test_a_hook(hook: str, answer: Any, found: Any, nothing: Any) -> None:
    assert asked(hook, lambda: answer) == found
    assert asked(hook, None) == nothing
    with pytest.raises(HookFault, match="must return"):
        asked(hook, lambda: 7)
    with pytest.raises(HookFault, match="driver gone"):
        asked(hook, lambda: (_ for _ in ()).throw(OSError("driver gone")))
    with pytest.raises(HookFault, match="SystemExit"):
        asked(hook, lambda: exec("raise SystemExit(3)"))


def test_every_hook_has_its_case() -> None:
    marks = {m.name: m for m in test_a_hook.pytestmark}  # type: ignore[attr-defined]
    assert [case[0] for case in marks["parametrize"].args[1]] == SPECS


def test_rows_of_another_kind_are_no_answer() -> None:
    with pytest.raises(HookFault, match="sequence of Kernel"):
        asked("qcore_kernels", lambda: [PLATFORM])


def test_an_unknown_hook_and_an_unknown_argument_are_refused() -> None:
    for name, source in (
        ("qcore_magic", "def qcore_magic(): return 1"),
        ("colour", "def qcore_report(colour): return {}"),
    ):
        module = ModuleType("toy")
        exec(source, module.__dict__)
        hook = next(value for key, value in vars(module).items() if key.startswith("qcore_"))
        hookimpl(hook)
        hooks = Hooks()
        with pytest.raises(HookFault, match=name):
            hooks.register("toy", module)
        assert not hooks.has("toy")
