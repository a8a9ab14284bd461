"""Roundings of a block's layers learned together (AutoRound): for each of some steps the block reads a few windows, and roundings go against the signs of the gradients
of what its states are apart from those that it gave before.

What tokens are apart counts in parts of how large their states are, as what reads the states next brings all to one size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qcore.calibration import ITERATIONS

_HELD = 8
"""One window of so many tells whether what was learned holds for others."""

if TYPE_CHECKING:
    from qcore.algorithms.auto_round import Rounding
    from qcore.calibration.blocks import Blocks
    from qcore.calibration.states import States


@dataclass(frozen=True)
class Tuning:
    """steps: how many, 0 for none. windows: read in each. travel: how far roundings may go in all steps together, in parts of a number's distance to the next; it gets less to the end."""

    steps: int = ITERATIONS
    windows: int = 8
    travel: float = 0.5
    seed: int = 0


def held_out(samples: int) -> range:
    """Windows of which neither roundings nor what they begin with learn anything; none of a single one."""
    return range(0, samples if samples > 1 else 0, _HELD)


def tune(
    blocks: Blocks, number: int, roundings: Mapping[str, Rounding], states: States, wanted: States, tuning: Tuning
) -> bool:  # fmt: skip
    """Whether the block is nearer to what is wanted than before, on the windows that are held out. roundings: by the layers' names. states, wanted: [1, tokens, hidden] each, what the block is given, and
    what it should give."""
    layers = blocks.linears(number)
    held = held_out(len(states))
    read = torch.tensor([sample for sample in range(len(states)) if sample not in held])
    before = _apart(blocks, number, states, wanted, held, {})
    generator = torch.Generator().manual_seed(tuning.seed + number)
    kept = {name: layers[name].weight.data for name in roundings}
    for step in range(tuning.steps):
        chosen = read[torch.randperm(len(read), generator=generator)[: tuning.windows]].tolist()
        weights = {name: rounding.weight().requires_grad_() for name, rounding in roundings.items()}
        _apart(blocks, number, states, wanted, chosen, weights)
        rate = 2 * tuning.travel / tuning.steps * (1 - step / tuning.steps)
        for name, rounding in roundings.items():
            if (gradient := weights[name].grad) is not None:
                rounding.step(gradient, rate)
    for name, rounding in roundings.items():
        layers[name].weight.data = rounding.weight()
    if _apart(blocks, number, states, wanted, held, {}) < before:
        return True
    for name, weight in kept.items():
        layers[name].weight.data = weight
    return False


def _apart(
    blocks: Blocks, number: int, states: States, wanted: States, chosen: Sequence[int], weights: Mapping[str, torch.Tensor]
) -> float:  # fmt: skip
    """The mean over the windows that are chosen. weights: in place of the layers', by name; they get gradients."""
    total = 0.0
    for sample in chosen:
        with torch.set_grad_enabled(bool(weights)):
            given = blocks.run(number, states[sample], weights)
            target = wanted[sample]
            sizes = target.square().mean(-1, keepdim=True).clamp(min=1e-12)
            loss = ((given - target).square() / sizes).mean() / len(chosen)
        if weights:
            loss.backward()
        total += float(loss.detach())
    return total
