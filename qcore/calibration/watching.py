"""What layers see while a block reads: hooks on them, and one sum for those that have always had one input.

Layers are parted as their inputs part them: all are together at first, and a call with an input that only some of them get sets these apart, with what all have seen so far. So
nothing has to be known of a block, and layers that one window reaches and another does not, as a mixture's experts are, count what they get.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from types import TracebackType

import torch

from qcore.algorithms.seen import Seen, Watch


class Watching:
    """Watches layers from `with` to its end; they are called in between, by `read`. layers: by the names that `seen` has for them."""

    def __init__(self, layers: Mapping[str, torch.nn.Linear]) -> None:
        self.layers = layers
        everything = _Alike(set(layers))
        self._alike = dict.fromkeys(layers, everything)
        self._hooks = ExitStack()
        self._missing: set[str] | None = None

    def __enter__(self) -> Watching:
        for module, layer in self.layers.items():
            self._hooks.enter_context(
                layer.register_forward_pre_hook(lambda _, given, module=module: self._called(module, given[0]))
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()
        for alike in {id(alike): alike for alike in self._alike.values()}.values():
            self._settle(alike)

    def read(self, run: Callable[[], object]) -> None:
        """Runs what calls the layers, to the point where each has been called."""
        self._missing = set(self.layers)
        with suppress(_EnoughError):
            run()
        self._missing = None

    def sums(self) -> Sums:
        """What they saw."""
        groups = {id(alike): (alike.members, alike.watch) for alike in self._alike.values()}
        return Sums({module: layer.in_features for module, layer in self.layers.items()}, groups.values())

    def _called(self, module: str, x: torch.Tensor) -> None:
        alike = self._alike[module]
        if alike.given is not x or module in alike.had:
            self._settle(alike)
            alike = self._alike[module]
            alike.given = x
        alike.had.add(module)
        if alike.had == alike.members:
            self._settle(alike)
        if self._missing is not None:
            self._missing.discard(module)
            if not self._missing:
                raise _EnoughError

    def _settle(self, alike: _Alike) -> None:
        """Counts an input that no more layers get; those that had it are a group of their own where others did not."""
        if alike.given is None:
            return
        had = alike
        if alike.had != alike.members:
            had = _Alike(alike.had, copy.deepcopy(alike.watch))
            alike.members -= had.members
            self._alike |= dict.fromkeys(had.members, had)
        if had.watch is None:
            had.watch = Watch(alike.given.shape[-1])
        had.watch.add(alike.given)
        alike.given, alike.had = None, set()


class Sums:
    """What layers have seen of some windows. columns: of their inputs, by name. groups: those that have always had one input, and what they saw; at most one of them saw nothing."""

    def __init__(self, columns: Mapping[str, int], groups: Iterable[tuple[set[str], Watch | None]]) -> None:
        self.columns, self._groups = columns, list(groups)

    def join(self, other: Sums) -> None:
        """Adds what the same layers have seen of further windows, and takes the other's memory over: together are those that are so in both."""
        groups: list[tuple[set[str], Watch | None]] = []
        for members, watch in self._groups:
            parts = [(members & others, more) for others, more in other._groups if members & others]
            for number, (common, more) in enumerate(parts, 1):
                own = watch if number == len(parts) else copy.deepcopy(watch)
                if own is None:
                    own = more
                elif more is not None:
                    own.join(more)
                groups.append((common, own))
        self._groups = groups

    def seen(self) -> dict[str, Seen]:
        """What each layer saw, one object for those that saw the same. A layer that saw nothing has no rows, and all columns count alike."""
        nothing = {size: Seen.nothing(size) for size in {*self.columns.values()}}
        found: dict[str, Seen] = {}
        for members, watch in self._groups:
            seen = watch.seen() if watch is not None and watch.rows else None
            found |= {module: seen or copy.copy(nothing[self.columns[module]]) for module in members}
        return {module: found[module] for module in self.columns}


class _EnoughError(Exception):
    """What comes behind the last layer need not run."""


class _Alike:
    """Layers that have had the same inputs. given: an input that those in `had` got, which is not counted yet."""

    def __init__(self, members: set[str], watch: Watch | None = None) -> None:
        self.members, self.watch = members, watch
        self.given: torch.Tensor | None = None
        self.had: set[str] = set()
