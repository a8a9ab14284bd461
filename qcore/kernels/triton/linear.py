"""A linear layer on the shared product: a weight repacked into planes, some rows at a time, with its scales by group.

Each family of elements has a file with a subclass, whose `from_layer` takes a weight apart, and whose `programs` says what may run a scheme on a
target, for `qcore verify --compile-only`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from qcore.bits import unpack
from qcore.kernels.stacking import StackableLinear
from qcore.kernels.triton.planes import pack_planes
from qcore.kernels.triton.product import Form, product

if TYPE_CHECKING:
    from qcore.tensor import QuantizedTensor

ROWS = 256
"""Rows of a weight repacked at a time."""


class PlanesLinear(StackableLinear):
    """codes: planes of [N, K]. scales: [groups, N]. coarse: [1 or 2, coarse groups, N]. zeros: as scales. table: [2^bits], in the
    activations' dtype. order: int32 [K], the columns sorted by group. As qcore.kernels.triton.multiply takes them."""

    codes: torch.Tensor
    scales: torch.Tensor
    coarse: torch.Tensor | None
    zeros: torch.Tensor | None
    table: torch.Tensor | None
    order: torch.Tensor | None

    def __init__(
        self, form: Form, codes: Iterable[torch.Tensor], scales: torch.Tensor, *, coarse: torch.Tensor | None = None,
        zeros: torch.Tensor | None = None, table: torch.Tensor | None = None, order: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """codes: uint8 [some rows, K], one after the other."""
        super().__init__()
        packed = (pack_planes(part if order is None else part[:, order], form.bits, form.section) for part in codes)
        self.form = form
        self.register_buffer("codes", torch.cat(list(packed)))
        self.register_buffer("scales", scales)
        self.register_buffer("coarse", coarse)
        self.register_buffer("zeros", zeros)
        self.register_buffer("table", table)
        self.register_buffer("order", order)

    def forward(self, x: torch.Tensor, experts: torch.Tensor | None = None) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if flat.stride(-1) != 1:
            flat = flat.contiguous()
        form = self.form
        out: torch.Tensor = product(
            flat, self.codes, self.scales, self.coarse, self.zeros, self.table, self.order,
            form.bits, form.group, form.center, form.exponent, form.bias, form.scale, form.coarse_group, experts,
        )  # fmt: skip
        return out.reshape(*x.shape[:-1], out.shape[-1])


def rows_of(weight: QuantizedTensor) -> Iterator[torch.Tensor]:
    """uint8 [some rows, K], one after the other: codes as they are stored, a byte each."""
    bits = weight.scheme.weight.bits
    for part in weight.codes.split(ROWS):
        yield unpack(part, bits, weight.shape[1]).to(torch.uint8) if bits < 8 else part.view(torch.uint8)
