"""Which bits each layer gets so that a model has so many on average, and the least is lost: by what is measured of each layer in each of some schemes.

A unit is the layers that have one input, which serving engines hold as one and want in one scheme. What a unit costs in a scheme is an estimate of the Kullback-Leibler divergence that it
alone makes: how far its block's states are apart when it is rounded to nearest, times what the divergence is by how far they are apart, as measured for the whole block in the middle scheme.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from qcore.algorithms.rtn_mse import rtn_mse
from qcore.calibration.trace import Trace
from qcore.convert import check_written
from qcore.elements import Group, Int
from qcore.refusal import Refusal, Refused
from qcore.scheme import Scheme

if TYPE_CHECKING:
    from qcore.calibration.blocks import Blocks
    from qcore.calibration.work import Work
    from qcore.checkpoint.calibrated import Calibrated
    from qcore.checkpoint.open import Checkpoint

_BITS = (2, 3, 4, 5, 6, 8)
_WINDOWS = 2
"""Of the calibration text that are looked at."""


@dataclass(frozen=True)
class Unit:
    """modules: of the checkpoint. weights: how many they have. bits, costs: per weight, and of all of them, in each scheme; bits rise."""

    modules: tuple[str, ...]
    weights: int
    bits: tuple[float, ...]
    costs: tuple[float, ...]


def mixable(source: Checkpoint, asked: Calibrated, formats: Sequence[str]) -> tuple[Scheme, ...]:
    """The schemes that differ from the one that is asked for in their width alone, the narrowest first, as far as the formats hold models of several of them.

    Raises Refused (scheme-unsupported, not-representable) where there are less than two.
    """
    targets = list(asked.targets(source.layers))
    held: list[Scheme] = []
    refused: Refused | None = None
    if asked.scheme is None:
        raise Refused(Refusal("bad-argument", "usage", "--target-bpw", "without a scheme there are no bits to choose",
                              fix="Name a scheme of integers, such as W4A16-g64."))  # fmt: skip
    for scheme in _choices(asked.scheme):
        schemes = [*held, scheme]
        turns = {module: schemes[turn % len(schemes)] for turn, module in enumerate(targets)}
        try:
            for name in formats:
                check_written(source.overlaid(replace(asked, mixed=turns)), name)
            held.append(scheme)
        except Refused as error:
            refused = error
    if len(held) < 2 and refused is not None:
        raise refused
    return tuple(held)


def mixed(
    source: Checkpoint, blocks: Blocks, asked: Calibrated, windows: torch.Tensor, schemes: Sequence[Scheme], target: float, work: Work
) -> Calibrated:  # fmt: skip
    """With a scheme for each layer; what was chosen is kept in the run's folder. Raises Refused (bad-argument)."""
    targets = asked.targets(source.layers)

    def choose() -> dict[str, str]:
        with torch.no_grad():
            units = measured(blocks, windows, targets, schemes)
        return {
            module: str(schemes[choice])
            for unit, choice in zip(units, chosen(units, target), strict=True)
            for module in unit.modules
        }

    found = work.once("mixture", choose)
    return replace(asked, mixed={module: Scheme.parse(words) for module, words in found.items()})


def _choices(scheme: Scheme) -> tuple[Scheme, ...]:
    """The same scheme in all widths, the narrowest first. Raises Refused (scheme-unsupported) where it has none."""
    element = scheme.weight.element
    if not isinstance(element, Int):
        raise Refused(Refusal("scheme-unsupported", "notimpl", str(scheme), "bits are chosen for integer weights alone",
                              f"found {element}", "Name a scheme of integers, such as W4A16-g64."))  # fmt: skip
    return tuple(replace(scheme, weight=replace(scheme.weight, element=replace(element, bits=bits))) for bits in _BITS)


def bits_per_weight(scheme: Scheme, columns: int) -> float:
    """Of codes, scales of 16 bits and zero points."""
    granularity = scheme.weight.scales[0].granularity
    size = min(granularity.size, columns) if isinstance(granularity, Group) else columns
    return scheme.weight.bits + (16 + (scheme.weight.bits if scheme.weight.zero else 0)) / size


def chosen(units: Sequence[Unit], target: float) -> list[int]:
    """The scheme of each unit. target: bits per weight of all together, at most.

    Each step goes to the unit and scheme that take off most for a bit, of those that fit; so it is the best along the convex hull of each unit's costs.
    Raises Refused (bad-argument) where even the narrowest need more.
    """
    taken = [0] * len(units)
    weights = sum(unit.weights for unit in units)
    left = target * weights - sum(unit.weights * unit.bits[0] for unit in units)
    if left < 0:
        raise Refused(Refusal("bad-argument", "usage", "--target-bpw", "the narrowest scheme needs more bits",
                              f"found {target}, expected at least {target - left / weights:.3f}", "Ask for more, or name a scheme of larger groups."))  # fmt: skip
    while True:
        steps = [
            ((unit.costs[now] - unit.costs[more]) / (unit.weights * (unit.bits[more] - unit.bits[now])), -number, more)
            for number, (unit, now) in enumerate(zip(units, taken, strict=True))
            for more in range(now + 1, len(unit.bits))
            if unit.weights * (unit.bits[more] - unit.bits[now]) <= left
        ]
        gain, number, more = max(steps, default=(0.0, 0, 0))
        if gain <= 0:
            return taken
        unit = units[-number]
        left -= unit.weights * (unit.bits[more] - unit.bits[taken[-number]])
        taken[-number] = more


def measured(blocks: Blocks, windows: torch.Tensor, modules: Collection[str], schemes: Sequence[Scheme]) -> list[Unit]:
    """Of all layers that are named. windows: tokens [windows, tokens]."""
    windows = windows[:: -(-len(windows) // _WINDOWS)]
    plain = list(blocks.first(windows))
    behind: list[list[torch.Tensor]] = []  # for each block before, what its rounding has made of the states
    apart: list[float] = []
    found: list[list[Unit]] = []
    for number in range(len(blocks)):
        blocks.fill(number)
        layers = {module: layer for module, layer in blocks.linears(number).items() if module in modules}
        behind = [[blocks.run(number, part) for part in states] for states in behind]
        units, trace = _units(layers, Trace(blocks, number, plain[0])), [blocks.run(number, part) for part in plain]
        found.append([
            Unit(unit, sum(layers[module].weight.numel() for module in unit),
                 tuple(bits_per_weight(scheme, layers[unit[0]].in_features) for scheme in schemes),
                 tuple(_distance(trace, _rounded(blocks, number, plain, layers, unit, scheme)) for scheme in schemes))
            for unit in units
        ])  # fmt: skip
        middle = _rounded(blocks, number, plain, layers, tuple(layers), schemes[len(schemes) // 2])
        behind.append(middle)
        apart.append(_distance(trace, middle))
        plain = trace
        blocks.clear(number)
    last = len(blocks)
    blocks.fill(last)
    logits = [blocks.run(last, part) for part in plain]
    slopes = [
        sum(_divergence(own, blocks.run(last, part)) for own, part in zip(logits, states, strict=True))
        / (distance or 1.0)
        for states, distance in zip(behind, apart, strict=True)
    ]
    blocks.clear(last)
    return [
        replace(unit, costs=tuple(cost * slope for cost in unit.costs))
        for units, slope in zip(found, slopes, strict=True)
        for unit in units
    ]


def _units(layers: Mapping[str, torch.nn.Linear], trace: Trace) -> list[tuple[str, ...]]:
    names = {id(layer): name for name, layer in layers.items()}
    found: dict[int, list[str]] = {}
    for ran in trace.ran:
        if id(ran.module) in names:
            found.setdefault(id(ran.given), []).append(names[id(ran.module)])
    missed = layers.keys() - {name for unit in found.values() for name in unit}
    return [*map(tuple, found.values()), *((name,) for name in sorted(missed))]


def _rounded(
    blocks: Blocks, number: int, states: Sequence[torch.Tensor], layers: Mapping[str, torch.nn.Linear], unit: Sequence[str], scheme: Scheme
) -> list[torch.Tensor]:  # fmt: skip
    """What the block makes of states when a unit's weights are in a scheme."""
    weights = {module: rtn_mse(layers[module].weight.data, Scheme(scheme.weight)).dequantize() for module in unit}
    return [blocks.run(number, part, weights) for part in states]


def _distance(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """The mean over tokens of what states are apart, squared, in parts of their squared size."""
    parts = [
        ((one - other).square().sum(-1) / one.square().sum(-1).clamp(min=1e-12)).mean()
        for one, other in zip(ours, theirs, strict=True)
    ]
    return float(torch.stack(parts).mean())


def _divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The mean over tokens, in nats, of logits [tokens, vocabulary]."""
    wanted, given = ours.log_softmax(-1), theirs.log_softmax(-1)
    return float((wanted.exp() * (wanted - given)).sum(-1).mean())
