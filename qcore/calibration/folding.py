"""Factors of columns (AWQ, SmoothQuant), folded into what makes the columns: a norm's gain, or the rows of a linear layer.

What makes a layer's input is not known by any name: modules that ran before it and have as many outputs are tried, with factors at random; that is right which leaves the block's output as it was.
Where queries share keys and values, a row of the values' layer makes a column for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qcore.calibration.trace import Trace

if TYPE_CHECKING:
    from qcore.calibration.blocks import Blocks

_NEAR = 1e-4
"""What factors may change of a block's output, in parts of its largest number: what float32 leaves behind a few layers."""


@dataclass(frozen=True)
class Fold:
    """before: the module that makes the input. spread: int64 [K], which of its outputs each column is. added: what a norm adds to its weight (Gemma's: 1)."""

    before: torch.nn.Module
    spread: torch.Tensor
    added: float = 0.0


class Folding:
    """One block, which has its weights. trace: of a run on `states`, [1, tokens, hidden]."""

    def __init__(self, blocks: Blocks, number: int, states: torch.Tensor, trace: Trace) -> None:
        self.blocks, self.number, self.states, self.trace = blocks, number, states, trace

    def find(self, readers: Sequence[torch.nn.Linear]) -> Fold | None:
        """What makes their input; None where nothing does that factors can be folded into."""
        factors = torch.linspace(0.7, 1.4, 97)
        for fold in self._candidates(readers):
            kept = [(part, part.detach().clone()) for part in _parts(fold, readers)]
            outputs = int(fold.spread.max()) + 1
            scale(fold, readers, factors.repeat(-(-outputs // 97))[:outputs])
            apart = (self.blocks.run(self.number, self.states) - self.trace.output).abs().amax()
            for part, values in kept:
                part.data.copy_(values)
            if apart <= _NEAR * self.trace.output.abs().amax():
                return fold
        return None

    def _candidates(self, readers: Sequence[torch.nn.Linear]) -> Iterator[Fold]:
        """The likeliest first: what gives the very input, then what ran last."""
        place, first = next((place, ran) for place, ran in enumerate(self.trace.ran) if ran.module is readers[0])
        columns = readers[0].in_features
        before = self.trace.ran[:place]
        before.reverse()
        before.sort(key=lambda ran: ran.gave is not first.given)
        for ran in before:
            module, outputs, own = ran.module, ran.gave.shape[-1], ran.module._parameters["weight"]
            if isinstance(module, torch.nn.Linear):
                yield from (Fold(module, spread) for spread in self._spreads(outputs, columns))
            elif outputs == columns and own is not None and own.shape == (columns,):
                yield from (Fold(module, torch.arange(columns), added) for added in (0.0, 1.0))

    def _spreads(self, outputs: int, columns: int) -> Iterator[torch.Tensor]:
        if outputs == columns:
            yield torch.arange(columns)
        config = self.blocks.model.config.get_text_config(decoder=True)
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if columns > outputs and columns % outputs == 0 and outputs % head == 0:
            column = torch.arange(columns)
            yield column // head // (columns // outputs) * head + column % head


def scale(fold: Fold, readers: Sequence[torch.nn.Linear], factors: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:  # fmt: skip
    """Divides the outputs of what is before by factors, one for each, and multiplies the readers' columns. dtype: that a norm's gain is kept in; the factors that it holds exactly are
    taken in place of those that were asked for. Returns those [K] of the columns."""
    before = fold.before
    weight, bias = before._parameters["weight"], before._parameters.get("bias")
    assert weight is not None
    if isinstance(before, torch.nn.Linear):
        weight.data /= factors[:, None]
    else:
        gain = weight.data + fold.added
        new = (gain / factors - fold.added).to(dtype).to(torch.float32)
        held = gain / (new + fold.added)
        usable = (held > 0) & held.isfinite()
        factors = torch.where(usable, held, torch.ones(1))
        weight.data = torch.where(usable, new, weight.data)
    if bias is not None:
        bias.data /= factors
    columns = factors[fold.spread]
    for reader in readers:
        reader.weight.data *= columns
    return columns


def tied(fold: Fold, factors: torch.Tensor) -> torch.Tensor:
    """Of columns' factors [K] one for each output of what is before: the geometric mean of its columns'."""
    outputs = int(fold.spread.max()) + 1
    sums = torch.zeros(outputs).index_add_(0, fold.spread, factors.log())
    return (sums / fold.spread.bincount(minlength=outputs)).exp()


def _parts(fold: Fold, readers: Sequence[torch.nn.Linear]) -> list[torch.Tensor]:
    parts = [
        *(fold.before._parameters.get(name) for name in ("weight", "bias")),
        *(reader.weight for reader in readers),
    ]
    return [part for part in parts if part is not None]
