"""What layers see while a block reads: hooks on them, and one sum for those that have always had one input.

Layers are parted as their inputs part them: all are together at first, and a call with an input that only some of them get sets these apart, with what all have seen so far. So
nothing has to be known of a block, and layers that one window reaches and another does not, as a mixture's experts are, count what they get.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType

import torch

from qcore.algorithms.seen import Seen, Watch


class Watching:
    """Watches layers from `with` to its end; they are called in between, by `read`. layers: by the names that `seen` has for them."""

    def __init__(self, layers: Mapping[str, torch.nn.Linear]) -> None:
        self.layers = layers
        everything = _Alike(set(layers))
        self._alike = dict.fromkeys(layers, everything)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._missing: set[str] | None = None

    def __enter__(self) -> Watching:
        for module, layer in self.layers.items():
            self._hooks.append(
                layer.register_forward_pre_hook(lambda _, given, module=module: self._called(module, given[0]))
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for alike in {id(alike): alike for alike in self._alike.values()}.values():
            self._settle(alike)

    def read(self, run: Callable[[], object]) -> None:
        """Runs what calls the layers, to the point where each has been called."""
        self._missing = set(self.layers)
        with suppress(_EnoughError):
            run()
        self._missing = None

    def seen(self) -> dict[str, Seen]:
        """What each layer saw, one object for those that saw the same. A layer that saw nothing has no rows, and all columns count alike."""
        found = {id(alike): alike.watch.seen() for alike in self._alike.values() if alike.watch and alike.watch.rows}
        nothing = {size: Seen.nothing(size) for size in {layer.in_features for layer in self.layers.values()}}
        return {
            module: found.get(id(alike)) or copy.copy(nothing[self.layers[module].in_features])
            for module, alike in self._alike.items()
        }

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


class _EnoughError(Exception):
    """What comes behind the last layer need not run."""


class _Alike:
    """Layers that have had the same inputs. given: an input that those in `had` got, which is not counted yet."""

    def __init__(self, members: set[str], watch: Watch | None = None) -> None:
        self.members, self.watch = members, watch
        self.given: torch.Tensor | None = None
        self.had: set[str] = set()
