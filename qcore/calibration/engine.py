"""Where the parts of a calibrated run's work are done: in this process, or as Ray tasks in others, on this machine and on more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

from qcore.refusal import Refusal, Refused

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Found = TypeVar("Found")


class Engine(Protocol):
    """The results are the same bytes in all of them: a part is the same work wherever it is done, by as many threads, and results come in the order of the items."""

    def map(
        self, function: Callable[[Shared, Item], Iterable[Found]], items: Iterable[Item], shared: Shared
    ) -> Iterator[Found]:
        """All that `function(shared, item)` yields for the first item, then for the second, and so on. It changes neither of them, and may run several times for an item. Raises
        Refused: what it raises, and engine-failed."""


class Local:
    """A loop in this process, which has one result in memory at a time."""

    def map(
        self, function: Callable[[Shared, Item], Iterable[Found]], items: Iterable[Item], shared: Shared
    ) -> Iterator[Found]:
        for item in items:
            yield from function(shared, item)


def engine_of(name: str) -> AbstractContextManager[Engine]:
    """The engine of a name, from `with` to its end. Raises Refused: bad-argument where there is none, missing-package; and engine-failed when it is entered."""
    if name not in _ENGINES:
        raise Refused(Refusal("bad-argument", "usage", "--engine", "there is no engine of this name",
                              f"found {name!r}", f"Use one of: {', '.join(_ENGINES)}."))  # fmt: skip
    return _ENGINES[name]()


def _ray() -> AbstractContextManager[Engine]:
    from qcore.integrations.ray import RayEngine

    return RayEngine()


_ENGINES: dict[str, Callable[[], AbstractContextManager[Engine]]] = {
    "local": lambda: nullcontext(Local()),
    "ray": _ray,
}
