"""The layers that end a block: what they see once all others are quantized, and what their outputs lack then of those that they had before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from qcore.algorithms.seen import Lack, Seen, Watch
from qcore.calibration.trace import Trace

if TYPE_CHECKING:
    from qcore.calibration.blocks import Blocks


def ending(trace: Trace, layers: Mapping[str, torch.nn.Linear]) -> list[str]:
    """Of a block's layers those that write to its states after the last norm that layers read, and that see all tokens (a mixture's experts do not), in the order that they run."""
    names = {id(layer): name for name, layer in layers.items()}
    read = {id(ran.given) for ran in trace.ran if id(ran.module) in names}
    norms = [place for place, ran in enumerate(trace.ran) if not isinstance(ran.module, torch.nn.Linear) and id(ran.gave) in read]  # fmt: skip
    after = trace.ran[norms[-1] :] if norms else []
    whole = trace.output.shape
    return [
        names[id(ran.module)]
        for ran in after
        if id(ran.module) in names and ran.gave.shape == whole and ran.given.shape[:-1] == whole[:-1]
    ]


def second_look(
    blocks: Blocks, number: int, texts: Iterable[torch.Tensor], own: Mapping[str, torch.Tensor], last: list[str]
) -> tuple[dict[str, Seen], dict[str, Lack]]:  # fmt: skip
    """Of the layers that end a block, which is quantized but for these. own: the weights of all its layers as they were, by name; texts: the states that it is given."""
    layers = blocks.linears(number)
    quantized = {name: layers[name].weight.data for name in own}
    watches = {name: Watch(layers[name].in_features) for name in last}
    lacks = {name: Lack.none(own[name]) for name in last}
    for states in texts:
        wanted = _inputs(blocks, number, states, layers, own, last)
        given = _inputs(blocks, number, states, layers, quantized, last)
        for name in last:
            watches[name].add(given[name])
            lacks[name].add((wanted[name] - given[name]) @ own[name].T, given[name])
    _put(layers, quantized)
    return {name: watch.seen() for name, watch in watches.items()}, lacks


class _EnoughError(Exception):
    """All that is looked at was called."""


def _inputs(
    blocks: Blocks, number: int, states: torch.Tensor, layers: Mapping[str, torch.nn.Linear], weights: Mapping[str, torch.Tensor], wanted: list[str]
) -> dict[str, torch.Tensor]:  # fmt: skip
    """[tokens, K] of the layers that are asked for, in a block with these weights; what comes behind them does not run."""
    found: dict[str, torch.Tensor] = {}

    def called(name: str, x: torch.Tensor) -> None:
        found[name] = x[0]
        if len(found) == len(wanted):
            raise _EnoughError

    _put(layers, weights)
    hooks = [
        layers[name].register_forward_pre_hook(lambda _, given, name=name: called(name, given[0])) for name in wanted
    ]
    try:
        blocks.run(number, states)
    except _EnoughError:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _put(layers: Mapping[str, torch.nn.Linear], weights: Mapping[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        layers[name].weight.data = weight
