"""e4m3 x e4m3 with scales of 128 columns, on Hopper by cuBLASLt: torch's `_scaled_mm` by blocks, of CUDA 12.9 and newer.

What it asks of scales is cuBLAS's ("128-element 1D and 128x128 2D Block Scaling For FP8 Data Types", "Scaling factors layouts"), and torch tells what
they are by their shapes and strides alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcore.elements import Tile
from qcore.kernels.triton import eights

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.tensor import LayerTensors

FEW_ROWS = 64
"""Up to so many rows the product is Triton's, beyond them it is the slower one on an H200."""
TILED_ROWS = 256
"""From so many rows on it is quicker to read a tile's scale than one for each of its rows (H200: 135 us instead of 163 for 4096 rows of 4096 x 4096, but 19 instead of 13 for
128)."""
_ROWS = 4
"""cuBLASLt takes multiples of so many rows of x."""
_STEP = 512
"""Columns of four tiles. cuBLASLt takes it that scales of a row of tiles begin at a multiple of four; some versions of torch refuse those that do, and others those
that do not. Where rows are of whole fours they all agree."""


@torch.library.custom_op("qcore_cuda::fp8_blocks", mutates_args=())
def product(
    x: torch.Tensor, inputs: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, tiles: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:  # fmt: skip
    """[M, N] in dtype. As qcore::triton_eights, whose product it is up to FEW_ROWS rows: uint8, the bytes of e4m3fn, x [M, K] and codes [N, K]; float32,
    inputs [M, K / 128] and scales [K / 128, N]. tiles: float32 [N / 128, K / 128], K a multiple of 512, the scales of tiles of 128 rows, which many rows of x are
    multiplied with; None where rows have their own. One operator, so that a compiled graph chooses as it runs.

    Without fast accumulation, which torch refuses here: sums of 128 columns are scaled and added in float32."""
    rows = len(x)
    if rows <= FEW_ROWS:
        out: torch.Tensor = eights.product(x, inputs, codes, scales, dtype)
        return out
    across = inputs.t()
    if more := -rows % _ROWS:
        x, across = torch.nn.functional.pad(x, (0, 0, 0, more)), torch.nn.functional.pad(across, (0, more))
    fp8 = torch.float8_e4m3fn
    return torch._scaled_mm(
        x.view(fp8),
        codes.view(fp8).t(),
        scale_a=across.contiguous().t(),
        scale_b=scales if tiles is None or rows < TILED_ROWS else tiles.t(),
        out_dtype=dtype,
        use_fast_accum=False,
    )[:rows]


@product.register_fake
def _(
    x: torch.Tensor, inputs: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, tiles: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], codes.shape[0], dtype=dtype)


class BlocksLinear(eights.EightsLinear):
    """The layer of Triton's kernels, which rounds inputs by one of them and multiplies experts by another; the product of many rows is cuBLASLt's.

    tiles: float32 [N / 128, K / 128], scales as they are stored, where cuBLASLt reads those; else it reads what Triton does, a scale for each row."""

    tiles: torch.Tensor | None

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        made, weight = super().from_layer(layer, dtype), layer.weight
        grid = weight.scheme.weight.granularity
        whole = isinstance(grid, Tile) and grid.rows > 1 and weight.shape[1] % _STEP == 0
        made.register_buffer("tiles", weight.scales[0].to(torch.float32).contiguous() if whole else None)
        return made

    def product(self, codes: torch.Tensor, inputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        out: torch.Tensor = product(codes, inputs, self.codes, self.scales, self.tiles, dtype)
        return out
