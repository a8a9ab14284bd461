"""8-bit weights times 8-bit inputs on tensor cores, by cuBLASLt: torch's `_int_mm` (int8, exact sums in int32) and `_scaled_mm` (fp8)."""

from __future__ import annotations

import torch

from qcore.kernels.activations import dynamic_int8, static_int8
from qcore.kernels.eight_bits import EightBits
from qcore.kernels.triton import eights

_LEAST_ROWS = 17
"""`_int_mm` takes more than 16 rows of inputs on a GPU."""
FEW_ROWS = 64
"""Up to so many rows the product in Triton is the quicker, for `_scaled_mm` with scales by row works on 64 rows or more."""


class Int8Linear(EightBits):
    """Codes int8, scales float32. Inputs are rounded by qcore.kernels.activations, without Triton."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Sums are exact; both scales follow in float32."""
        codes, scale = dynamic_int8(x) if self.input_scale is None else static_int8(x, self.input_scale)
        padding = max(0, _LEAST_ROWS - len(x))
        sums = torch._int_mm(torch.nn.functional.pad(codes, (0, 0, 0, padding)), self.codes.t())[: len(x)]
        return (sums.to(torch.float32) * self.scales * scale).to(x.dtype)


@torch.library.custom_op("qcore_cuda::fp8", mutates_args=())
def fp8_product(
    x: torch.Tensor, inputs: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:  # fmt: skip
    """As qcore::triton_eights, whose product it is up to FEW_ROWS rows: uint8, the bytes of e4m3fn, x [M, K] and codes [N, K]; float32, inputs [M] and
    scales [1, N]. One operator, so that a compiled graph chooses as it runs.

    Without fast accumulation, under which tensor cores of Hopper keep 14 bits of the whole sum: their sums of 128 columns are added in float32."""
    if len(x) <= FEW_ROWS:
        out: torch.Tensor = eights.product(x, inputs, codes, scales, dtype)
        return out
    fp8 = torch.float8_e4m3fn
    return torch._scaled_mm(
        x.view(fp8), codes.view(fp8).t(), scale_a=inputs[:, None], scale_b=scales, out_dtype=dtype, use_fast_accum=False
    )  # fmt: skip


@fp8_product.register_fake
def _(
    x: torch.Tensor, inputs: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return x.new_empty(x.shape[0], codes.shape[0], dtype=dtype)


class Fp8Linear(eights.EightsLinear):
    """The layer of Triton's kernels, inputs rounded by one of them; the product of many rows is cuBLASLt's."""

    def product(self, codes: torch.Tensor, inputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        out: torch.Tensor = fp8_product(codes, inputs, self.codes, self.scales, dtype)
        return out
