"""The product that weights in planes share, as an operator of torch's: y = x W^T with W in codes of 1 to 8 bits under scales of groups of columns or
of whole rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from qcore.kernels.triton.launch import multiplied, programs, routed
from qcore.kernels.triton.multiply import multiply_codes
from qcore.kernels.triton.planes import parts_of, section_of, together_of
from qcore.kernels.triton.vector import VECTOR_BYTES, multiply_vector

if TYPE_CHECKING:
    from qcore.kernels.triton.program import Program
    from qcore.platform import Target


@dataclass(frozen=True)
class Form:
    """What a weight's parts hold.

    bits: of a code, which is a whole number above `center`, or a small float with `exponent` bits of exponent above `bias`, or a place in a table. group: columns
    under one scale; 0: all. scale: `plain`, floats or whole numbers as torch has them, or the bytes of `e8m0` or `e4m3fn`. coarse_group: columns under one of the
    scales that multiply these; 0: there are none. zero: empty, `stored` (a whole number that is subtracted from
    codes) or `added` (times its own coarse scale, where there is one). ordered: columns are permuted.
    """

    bits: int
    group: int
    center: int = 0
    exponent: int = 0
    bias: int = 0
    table: bool = False
    scale: str = "plain"
    coarse_group: int = 0
    zero: str = ""
    ordered: bool = False

    @cached_property
    def section(self) -> int:
        """Columns of one matrix product."""
        return section_of(self.bits, self.group)

    @cached_property
    def turn(self) -> int:
        """Columns of one turn of the loop."""
        return self.section * together_of(self.bits)

    @property
    def slow(self) -> bool:
        """Whether a weight takes long to decode, or its scales to find."""
        return self.table or self.exponent > 0 or self.bits not in (1, 2, 4, 8) or self.coarse_group > 0

    @cached_property
    def constants(self) -> dict[str, object]:
        """What a program is made for, but for its tiling. RUN: how many sections of a turn have one scale."""
        together = together_of(self.bits)
        return {
            "BITS": self.bits, "CENTER": self.center, "EXPONENT": self.exponent, "BIAS": self.bias, "TABLE": self.table,
            "GROUP": self.group, "COARSE_GROUP": self.coarse_group, "SCALE": self.scale, "ZERO": self.zero, "ORDERED": self.ordered,
            "PARTS": parts_of(self.bits), "TOGETHER": together, "SECTION": self.section,
            "RUN": math.gcd(together, self.group // self.section),
        }  # fmt: skip


@torch.library.custom_op("qcore::triton_product", mutates_args=())
def product(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, coarse: torch.Tensor | None, zeros: torch.Tensor | None,
    table: torch.Tensor | None, order: torch.Tensor | None, bits: int, group: int, center: int, exponent: int, bias: int, scale: str, coarse_group: int,
    experts: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """[M, N] in x's dtype; x [M, K] has unit stride along K. Parts as multiply_codes takes them, the rest as Form has it. experts: int32 [M], ascending,
    the rows' own of the weights that are stacked in the parts; None: there is one weight."""
    zero = "" if zeros is None else "added" if zeros.is_floating_point() or coarse is not None else "stored"
    form = Form(bits, group, center, exponent, bias, table is not None, scale, coarse_group, zero, order is not None)
    # Parts that there are not are stood for by others, which are not looked at.
    stand_ins = (
        scales if coarse is None else coarse,
        scales if zeros is None else zeros,
        x if table is None else table,
    )

    def launch(
        grid: tuple[int, int], x: torch.Tensor, blocks: torch.Tensor, out: torch.Tensor, rows: int, start: int, constants: dict[str, Any]
    ) -> None:  # fmt: skip
        kernel = multiply_vector if constants["BM"] == 1 else multiply_codes
        kernel[grid](
            x, codes, scales, *stand_ins, codes if order is None else order, blocks, out, rows, outputs, x.shape[1], start, x.stride(0),
            codes.shape[-1], grid[1], **form.constants, **constants,
        )  # fmt: skip

    outputs, vector = codes.shape[-2], VECTOR_BYTES * parts_of(bits)
    if experts is not None:
        return routed(x, experts, len(codes), outputs, form.turn, launch, vector)
    return multiplied(x, outputs, form.turn, launch, vector, form.slow)


@product.register_fake
def _(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, coarse: torch.Tensor | None, zeros: torch.Tensor | None,
    table: torch.Tensor | None, order: torch.Tensor | None, bits: int, group: int, center: int, exponent: int, bias: int, scale: str, coarse_group: int,
    experts: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], codes.shape[-2])


def programs_of(
    form: Form,
    name: str,
    scales: torch.dtype,
    coarse: torch.dtype | None,
    zeros: torch.dtype | None,
    dtype: str,
    target: Target,
) -> list[Program]:
    """All that a layer of this form may run on the target. scales, coarse, zeros: their types. dtype: of the activations, `float16` or `bfloat16`."""
    parts = {
        "codes_ptr": torch.uint8, "scales_ptr": scales, "coarse_ptr": coarse or scales, "zeros_ptr": zeros or scales,
        "table_ptr": getattr(torch, dtype), "order_ptr": torch.int32 if form.ordered else torch.uint8,
    }  # fmt: skip
    return programs(
        name, multiply_codes, parts, ("row_bytes",), form.constants, dtype, target, multiply_vector, form.slow
    )
