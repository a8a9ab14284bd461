"""AutoRound: which way each weight is rounded, and each group's scale, learned by the signs of gradients of what a whole block gives.

Source: SignRound (arXiv 2309.05516). It starts from weights that another algorithm has made, so that what is learned is what makes the block better than these.
"""

from __future__ import annotations

import torch

from qcore.algorithms.grids import Fit, grid_of, local_step
from qcore.algorithms.put_together import quantized_tensor, taken_apart
from qcore.algorithms.seen import Seen
from qcore.algorithms.symmetric import damped
from qcore.tensor import QuantizedTensor

_SCALES = 0.1
"""How fast scales go beside roundings, in parts of a scale and of a step."""


class Rounding:
    """One weight while it is learned. offset: [N, K], what is added before it is rounded, from -1/2 to 1/2 of the distance between numbers there. factor: [N, groups], of the scales."""

    def __init__(self, weight: torch.Tensor, packed: QuantizedTensor, seen: Seen) -> None:
        """weight: float32 [N, K], that was to be quantized. packed: what it has become for inputs that were `seen`."""
        self.packed = packed
        self.grid = grid_of(packed.scheme.weight, weight)
        units, self.scale, self.zero, self.groups = taken_apart(packed)
        self.local = local_step(self.grid, units)
        scale, gram = self.scale[:, self.groups], seen.gram
        diagonal = gram.diagonal()
        diagonal.copy_(damped(diagonal))
        # What each weight would be, were it alone not rounded; where it was rounded to something else, just that.
        made = units * scale
        self.wanted = made + ((weight - made) @ gram).div_(diagonal)
        near = self.grid.nearest(self.wanted, Fit(scale, self.zero[:, self.groups])) == units
        self.wanted = torch.where(near, self.wanted, made)
        self.offset, self.factor = torch.zeros_like(weight), torch.ones_like(self.scale)

    def weight(self) -> torch.Tensor:
        """float32 [N, K]."""
        units, scale = self._units()
        return units * scale[:, self.groups]

    def step(self, gradient: torch.Tensor, rate: float) -> None:
        """gradient: [N, K], of the loss by the weight. Roundings and scales go against its sign; where a number is the last there is, rounding has none."""
        units, small = self._units()
        scale = small[:, self.groups]
        position = self.wanted / scale + self.offset * self.local
        inside = ((position - units).abs() <= 0.5001 * self.local).float()
        self.offset -= rate * (gradient * scale).sign() * inside
        self.offset.clamp_(-0.5, 0.5)
        slope = torch.zeros_like(small).index_add_(1, self.groups, gradient * (units - inside * self.wanted / scale))
        if self.grid.scales.together != 1:
            slope = torch.cat([self.grid.pooled(group[None]) for group in slope.T]).T
        self.factor -= _SCALES * rate * (slope * self.scale).sign()

    def quantized(self) -> QuantizedTensor:
        units, scale = self._units()
        return quantized_tensor(self.packed.scheme, self.grid, units, scale, self.zero, self.packed.index)

    def _units(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, K], and the scales [N, groups]."""
        scale = self.grid.stored(self.scale * self.factor)
        spread = scale[:, self.groups]
        position = self.wanted + self.offset * self.local * spread
        return self.grid.nearest(position, Fit(spread, self.zero[:, self.groups])), scale
