"""Layers on operators of Intel Extension for PyTorch 2.8 (torch.ops.torch_ipex), where it is installed; oneDNN runs them. It is archived upstream. Their
layouts and rules are those of csrc/gpu/aten/operators and csrc/gpu/oneDNN of its repository, v2.8.10+xpu."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcore.bits import pack
from qcore.kernels.activations import dynamic_fp8, static_fp8
from qcore.kernels.eight_bits import EightBits
from qcore.refusal import Refusal, Refused
from qcore_xpu.ipex import require
from qcore_xpu.kernels.int4 import Int4Linear

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.tensor import LayerTensors


@torch.library.custom_op("qcore::ipex_int4", mutates_args=())
def int4_product(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    group: int,
    order: torch.Tensor | None,
) -> torch.Tensor:
    """x [M, K] -> [M, N] in its dtype; the others as IpexInt4Linear has them. The operator takes packed as [K / 8, N], of unit stride along K."""
    if not len(x):
        return x.new_empty(0, len(packed))
    out: torch.Tensor = torch.ops.torch_ipex.mm_int4.xpu(_rows(x), packed.t(), scales, zeros, group, order)
    return out


@torch.library.custom_op("qcore::ipex_fp8_w8a16", mutates_args=())
def fp8_product(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [M, K], codes e4m3 [N, K], scale float32 [1] -> [M, N] in x's dtype."""
    out: torch.Tensor = torch.ops.torch_ipex.fp8_gemm_w8a16.xpu(_rows(x), codes, True, scale, None)
    return out


@torch.library.custom_op("qcore::ipex_fp8", mutates_args=())
def fp8_sums(left: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """left e4m3 [M, K], codes e4m3 [N, K] -> float32 [M, N]. The operator's own transposition is not asked for: it would turn the tensor that it is given."""
    out: torch.Tensor = torch.ops.torch_ipex.fp8_gemm.Tensor(
        _rows(left), False, codes.t(), False, None, torch.float32, None, None, None, False
    )
    return out


@int4_product.register_fake
@fp8_product.register_fake
def _like_x(x: torch.Tensor, codes: torch.Tensor, *rest: object) -> torch.Tensor:
    return x.new_empty(len(x), len(codes))


@fp8_sums.register_fake
def _float32(left: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return left.new_empty(len(left), len(codes), dtype=torch.float32)


class IpexInt4Linear(Int4Linear):
    """Weight-only int4 through `mm_int4` (XEGEMM_INT4.cpp, DnnlMatmulQuant.h): w = (q - z) * s.

    packed, scales: as in Int4Linear; what oneDNN compiled is cached by shapes alone, so that scales are always in the activations' dtype. zeros: int8 [1], one
    for all; or int32 [K / group, N / 8], the first of eight rows lowest. order: int32 [K].
    """

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        """Raises Refused: missing-requirement where the extension is of no use, shape-unsupported where act-order groups are not all of one size,
        contents-unsupported where zero points are not within 0 to 15."""
        require("ipex_int4")
        made = super().from_layer(layer, dtype)
        least, most = int(made.zeros.min()), int(made.zeros.max())
        if least < 0 or most > 15:
            raise Refused(Refusal("contents-unsupported", "notimpl", "mm_int4", "zero points are stored in four bits",
                                  f"found {least} to {most}, expected 0 to 15", "Another kernel takes this layer."))  # fmt: skip
        if layer.weight.zeros is None:
            made.zeros = made.zeros.flatten()[:1].clone()
        else:
            made.zeros = pack(made.zeros.to(torch.uint8), 4).contiguous().view(torch.int32)
        made.order = None if made.order is None else made.order.to(torch.int32)
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out: torch.Tensor = int4_product(flat, self.packed, self.scales, self.zeros, self.group, self.order)
        return out.reshape(*x.shape[:-1], out.shape[-1])


class IpexFp8Linear(EightBits):
    """Weight-only e4m3 through `fp8_gemm_w8a16` (fp8/FP8Linear.cpp), which takes one scale: that of the channel with the largest, so that no product is larger
    than there. scales: float32 [N], what is left of the channels' own, and multiplies the result. largest: float32 [1]."""

    largest: torch.Tensor

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        """Raises Refused (missing-requirement) where the extension is of no use."""
        require("ipex_fp8_w8a16")
        made = super().from_layer(layer, dtype)
        largest = made.scales.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        made.register_buffer("largest", largest[None])
        made.scales = made.scales / largest
        return made

    def product(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = fp8_product(x, self.codes, self.largest)
        return (out * self.scales).to(x.dtype)


class IpexFp8ProductLinear(EightBits):
    """e4m3 x e4m3 through `fp8_gemm` (fp8/FP8Linear.cpp, FP8_Matmul.h), sums in float32; scales of both sides follow, for it takes one for each whole side."""

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        """Raises Refused (missing-requirement) where the extension is of no use."""
        require("ipex_fp8")
        return super().from_layer(layer, dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = dynamic_fp8(x) if self.input_scale is None else static_fp8(x, self.input_scale)
        sums: torch.Tensor = fp8_sums(codes, self.codes)
        return (sums * self.scales * scale).to(x.dtype)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[M, K] as rows that lie K apart: the operators read strides, and torch takes a single row of any for contiguous."""
    return x.contiguous().flatten().view(-1, x.shape[-1])
