"""e4m3 weights with a scale for each output channel: the product of e4m3 and e4m3 (`fp8_gemm_v2`), and for inputs that stay in 16 bits `cast_from_fp8` and
torch's product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcore.elements import Group
from qcore.kernels.eight_bits import EightBits
from qcore_gaudi.kernels.e4m3 import from_codes, halved_rows, rounded
from qcore_gaudi.kernels.inputs import scale_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.scheme import TensorScheme
    from qcore.tensor import LayerTensors


class Fp8Codes(EightBits):
    """Codes up to 240. given: what inputs are rounded to."""

    given: TensorScheme | None

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        packed = super().from_layer(layer, dtype)
        packed.codes, packed.scales = halved_rows(packed.codes, packed.scales)
        packed.given = layer.weight.scheme.input
        return packed


class Fp8ProductLinear(Fp8Codes):
    """Inputs are rounded as the scheme says; both scales follow sums in float32. INC's scales of run time are powers of two by row, which is one group of all
    columns; of several each is a product."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        assert self.given is not None
        grid, columns = self.given.granularity, x.shape[1]
        if not isinstance(grid, Group) or grid.size >= columns:
            return self._part(x, self.codes, x.dtype)
        pieces = zip(x.split(grid.size, 1), self.codes.split(grid.size, 1), strict=True)
        out = x.new_zeros(len(x), len(self.codes), dtype=torch.float32)
        for piece, codes in pieces:
            out = out + self._part(piece, codes.contiguous(), torch.float32)
        return out.to(x.dtype)

    def _part(self, x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        assert self.given is not None
        values = x.to(torch.float32)
        codes, scale = rounded(values, scale_of(values, self.given) if self.given.dynamic else self.input_scale)
        out: torch.Tensor = torch.ops.hpu.fp8_gemm_v2(
            codes, False, weight, True, None, dtype, scale, self.scales, None, False
        )
        return out


class Fp8Linear(Fp8Codes):
    """Weight-only. Codes become bfloat16 as they are, which loses nothing; the scales follow the sums."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        weight = from_codes(self.codes, x.dtype)
        return (torch.mm(x, weight.t()).to(torch.float32) * self.scales).to(x.dtype)
