"""Experts that a checkpoint stacks in one layer [E, N, K], one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcore.tensor import LayerTensors

_BESIDE = ("bias", "input_scale", "input_zero", "input_multiplier")
"""What each of stacked experts has beside its weight."""


def expert_of(layers: LayerTensors, number: int) -> LayerTensors:
    """One of stacked experts, sharing their memory; what experts have in common (a table, an index) stays whole."""
    whole = layers.weight
    zeros = None if whole.zeros is None else whole.zeros[number]
    scales = tuple(scale[number] for scale in whole.scales)
    weight = replace(whole, shape=whole.shape[1:], codes=whole.codes[number], scales=scales, zeros=zeros)
    own = {name: part[number] for name in _BESIDE if (part := getattr(layers, name)) is not None}
    return replace(layers, weight=weight, **own)
