"""The parts of a block's work that an engine does (qcore/calibration/engine.py): what is done with some of the windows, or with layers that have one input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qcore.calibration.precision import Roughly
from qcore.calibration.watching import Sums, Watching
from qcore.model.memory import give_back

if TYPE_CHECKING:
    from qcore.algorithm import QuantizeSeen
    from qcore.algorithms.seen import Seen
    from qcore.scheme import Scheme
    from qcore.tensor import QuantizedTensor

Run = Callable[[torch.Tensor], torch.Tensor]
"""`Blocks.alone`."""
Layers = Mapping[str, torch.nn.Linear]
WINDOWS = 8
"""In a part. Sums are made part by part, so they are the same however many parts are done at a time."""


@dataclass(frozen=True)
class OneInput:
    """Layers that are quantized as one. weight: float32 [N, K], of all. rows: of each. seen: their one input."""

    weight: torch.Tensor
    rows: list[int]
    scheme: Scheme
    seen: Seen


@dataclass(frozen=True)
class Packed:
    """A layer's weight, which are rows of a whole one from `start` on. dense: float32 [N, K], what it stands for. error: the squared distance of the layer's outputs in parts of the
    squared outputs, if it had inputs."""

    whole: QuantizedTensor
    start: int
    dense: torch.Tensor
    error: float | None

    @property
    def weight(self) -> QuantizedTensor:
        return self.whole.rows(self.start, self.start + len(self.dense))


def ran(run: Run, states: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """What a block makes of each window [1, tokens, hidden]."""
    return map(run, states)


def passed(block: tuple[Run, Layers], states: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same, as exactly as the block behind it needs it. block: with the layers that are quantized."""
    run, layers = block
    with Roughly(layers.values()):
        yield from map(run, states)


def watched(block: tuple[Run, Layers, Layers], states: Iterable[torch.Tensor]) -> Iterator[Sums]:
    """What some layers of a block see of windows [1, tokens, hidden], all together. block: with the layers that are quantized, and those that are watched."""
    run, layers, some = block
    with Roughly(layers.values()), Watching(some) as watching:
        for part in states:
            watching.read(lambda part=part: run(part))  # type: ignore[misc]
    yield watching.sums()


def packed(quantize: QuantizeSeen, group: OneInput) -> Iterator[Packed]:
    """The layers of a group, in their order."""
    give_back()  # what the group before this one took
    whole = quantize(group.weight, group.scheme, group.seen.steadied())
    start = 0
    for count, weight in zip(group.rows, group.weight.split(group.rows), strict=True):
        dense = whole.rows(start, start + count).dequantize()
        yield Packed(whole, start, dense, group.seen.error(weight, dense) if group.seen.rows else None)
        start += count
