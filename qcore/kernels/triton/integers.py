"""Weight-only integers on GPUs: y = x W^T, w = (q - z) * s or q * s + z, of 1 to 8 bits in groups of columns or whole rows.

Whole numbers are multiplied: q - z is exact in float16 and bfloat16, and tensor cores sum its products with x in float32. A sum of
at most 64 columns, none of them of another group, is scaled before it is added to the others; the weight itself is never
rounded. Where there are few rows of x, several programs share a column block's sum, and a second step adds
their parts in a fixed order, so that results do not change from run to run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from qcore.bits import unpack
from qcore.elements import Group, Int
from qcore.kernels.triton.planes import LONGEST, pack_planes, parts_of, together_of
from qcore.kernels.triton.program import Program
from qcore.refusal import Refusal, Refused

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors, QuantizedTensor

CONSTANT, WHOLE, FLOATING = 0, 1, 2
"""What zero points are: a constant for all codes, whole numbers of each group, or floats that are added."""

_ROWS = 256
"""Rows of a weight repacked at a time."""


@dataclass(frozen=True)
class Tiling:
    """A program's block: rows of x, rows of the weight. For up to `most` rows of x."""

    most: int
    rows: int
    outputs: int
    warps: int
    stages: int


TILINGS = (
    Tiling(16, 16, 64, 4, 4),
    Tiling(32, 32, 128, 8, 3),
    Tiling(64, 64, 64, 8, 3),
    Tiling(1 << 30, 64, 128, 8, 2),
)
_PROGRAMS = 512
"""Programs that there should be at least, by sharing sums: some for each of a large GPU's processors."""
_MOST_SHARES = 16


@triton.jit  # type: ignore[untyped-decorator]
def multiply_integers(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, order_ptr, out_ptr, M, N, K, x_stride, row_bytes, group, shares,
    BITS: tl.constexpr, CENTER: tl.constexpr, ZERO: tl.constexpr, ORDERED: tl.constexpr, PARTS: tl.constexpr, TOGETHER: tl.constexpr, RUN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SECTION: tl.constexpr,
):  # fmt: skip
    """out [shares, M, N] of x [M, K], codes [N, row_bytes] in planes, scales [groups, N], zeros alike; order: int32 [K], which columns
    of x the codes stand for. SECTION divides group; TOGETHER sections share the bytes of the
    widest plane, and RUN of them in a row a group."""
    blocks = tl.cdiv(M, BM)
    m = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    n = tl.program_id(0) // blocks * BN + tl.arange(0, BN)
    share = tl.program_id(1)
    inside = tl.arange(0, SECTION)
    row = codes_ptr + tl.minimum(n, N - 1)[:, None].to(tl.int64) * row_bytes + inside[None, :]
    given = x_ptr + m[:, None].to(tl.int64) * x_stride
    turns = tl.cdiv(K, TOGETHER * SECTION)
    each = tl.cdiv(turns, shares)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for turn in range(share * each, tl.minimum(turns, share * each + each)):
        first = turn * TOGETHER % PARTS
        at = row + turn * TOGETHER // PARTS * (PARTS * SECTION * BITS // 8)
        if BITS == 8:
            codes = tl.load(at).to(tl.int32)
        if BITS & 4:
            fours = tl.load(at + first // 2 * SECTION).to(tl.int32)
        if BITS & 2:
            twos = tl.load(at + ((BITS & 4) * PARTS // 8 + first // 4) * SECTION).to(tl.int32)
        if BITS & 1:
            ones = tl.load(at + (BITS - 1) * PARTS // 8 * SECTION).to(tl.int32)
        for section in tl.static_range(TOGETHER):
            part = first + section
            if BITS & 4:
                codes = (fours >> (4 * section)) & 15
                if BITS & 2:
                    codes = codes | (((twos >> (part % 4 * 2)) & 3) << 4)
            elif BITS & 2:
                codes = (twos >> (2 * section)) & 3
            if BITS == 1:
                codes = (ones >> part) & 1
            elif BITS & 1:
                codes = codes | (((ones >> part) & 1) << (BITS - 1))
            k = (turn * TOGETHER + section) * SECTION
            place = n + tl.minimum(k, K - 1) // group * N
            k += inside
            column = tl.load(order_ptr + k, mask=k < K, other=0) if ORDERED else k
            x = tl.load(given + column[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
            whole = codes - CENTER
            if ZERO == 1:
                whole -= tl.load(zeros_ptr + place, mask=n < N, other=0).to(tl.int32)[:, None]
            weight = tl.trans(whole.to(tl.float32).to(x.dtype))
            if section % RUN == 0:
                products = tl.dot(x, weight, input_precision="ieee")
            else:
                products = tl.dot(x, weight, products, input_precision="ieee")
            if section % RUN == RUN - 1:
                scale = tl.load(scales_ptr + place, mask=n < N, other=0.0).to(tl.float32)
                total += products * scale[None, :]
            if ZERO == 2:
                zero = tl.load(zeros_ptr + place, mask=n < N, other=0.0).to(tl.float32)
                total += tl.sum(x.to(tl.float32), 1)[:, None] * zero[None, :]
    out = out_ptr + (share * M + m[:, None]).to(tl.int64) * N + n[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@torch.library.custom_op("qcore::triton_integers", mutates_args=())
def integer_product(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, order: torch.Tensor | None,
    bits: int, center: int, group: int,
) -> torch.Tensor:  # fmt: skip
    """[M, N] in x's dtype; x [M, K] has unit stride along K. Parts as multiply_integers takes them."""
    (rows, columns), outputs = x.shape, scales.shape[1]
    if not rows:
        return x.new_empty(0, outputs)
    tiling = next(tiling for tiling in TILINGS if rows <= tiling.most)
    constants = _constants(bits, center, _kind(zeros), order is not None, group)
    programs = triton.cdiv(rows, tiling.rows) * triton.cdiv(outputs, tiling.outputs)
    shares = max(
        1,
        min(
            _MOST_SHARES, _PROGRAMS // programs, triton.cdiv(columns, 2 * constants["TOGETHER"] * constants["SECTION"])
        ),
    )
    out = x.new_empty(shares, rows, outputs, dtype=torch.float32 if shares > 1 else x.dtype)
    multiply_integers[(programs, shares)](
        x, codes, scales, scales if zeros is None else zeros, codes if order is None else order, out,
        rows, outputs, columns, x.stride(0), codes.shape[1], group, shares,
        **constants, BM=tiling.rows, BN=tiling.outputs, num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    return out[0] if shares == 1 else out.sum(0).to(x.dtype)


@integer_product.register_fake
def _(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, order: torch.Tensor | None,
    bits: int, center: int, group: int,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], scales.shape[1])


def _kind(zeros: torch.Tensor | None) -> int:
    if zeros is None:
        return CONSTANT
    return FLOATING if zeros.is_floating_point() else WHOLE


class IntegerLinear(torch.nn.Module):
    """codes: planes of [N, K], act-order columns sorted by group. scales: [groups, N], in the checkpoint's dtype. zeros: [groups, N], int16
    or float."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    order: torch.Tensor | None

    def __init__(
        self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, order: torch.Tensor | None,
        element: Int, group: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.bits, self.center, self.group = element.bits, _center(element), group
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("order", order)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        """Raises Refused (shape-unsupported) where act-order groups are not all of one size."""
        weight = layer.weight
        element, grid = weight.scheme.weight.element, weight.scheme.weight.granularity
        assert isinstance(element, Int)
        rows, columns = weight.shape
        group = grid.size if isinstance(grid, Group) else -(-columns // LONGEST) * LONGEST
        order = None if weight.index is None else _order(weight.index, group)
        zeros = weight.zeros
        if zeros is not None and weight.scheme.weight.zero == "stored":
            zeros = zeros.to(torch.int16)
        return cls(
            _planes(weight, element, math.gcd(LONGEST, group), order),
            _by_group(weight.scales[0], rows),
            None if zeros is None else _by_group(zeros, rows),
            order,
            element,
            group,
        )

    @classmethod
    def programs(cls, scheme: Scheme, dtype: str) -> list[Program]:
        """What runs a scheme, each tiling. dtype: of the activations, `float16` or `bfloat16`."""
        weight = scheme.weight
        element, grid = weight.element, weight.granularity
        assert isinstance(element, Int)
        floats = "*bf16" if dtype == "bfloat16" else "*fp16"
        kind = {None: CONSTANT, "stored": WHOLE, "float": FLOATING}[weight.zero]
        signature = {
            "x_ptr": floats, "codes_ptr": "*u8", "scales_ptr": floats, "zeros_ptr": "*i16" if kind == WHOLE else floats,
            "order_ptr": "*i32" if weight.ordered else "*u8", "out_ptr": floats,
            **dict.fromkeys(("M", "N", "K", "x_stride", "row_bytes", "group", "shares"), "i32"),
        }  # fmt: skip
        group = grid.size if isinstance(grid, Group) else LONGEST * 8
        constants = _constants(element.bits, _center(element), kind, weight.ordered, group)
        return [
            Program(
                f"{scheme} {dtype}, {tiling.rows} x {tiling.outputs}", multiply_integers, signature,
                constants | {"BM": tiling.rows, "BN": tiling.outputs}, frozenset(signature) - {"M", "shares"},
                {"num_warps": tiling.warps, "num_stages": tiling.stages},
            )
            for tiling in TILINGS
        ]  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if flat.stride(-1) != 1:
            flat = flat.contiguous()
        out: torch.Tensor = integer_product(
            flat, self.codes, self.scales, self.zeros, self.order, self.bits, self.center, self.group
        )
        return out.reshape(*x.shape[:-1], out.shape[-1])


def _constants(bits: int, center: int, kind: int, ordered: bool, group: int) -> dict[str, int]:
    """What a program of multiply_integers is made for, but for its tiling. RUN: how many sections that are multiplied together have one scale."""
    section, together = math.gcd(LONGEST, group), together_of(bits)
    return {
        "BITS": bits, "CENTER": center, "ZERO": kind, "ORDERED": ordered, "PARTS": parts_of(bits), "TOGETHER": together,
        "RUN": math.gcd(together, group // section), "SECTION": section,
    }  # fmt: skip


def _center(element: Int) -> int:
    """What codes are too great by: those of signed integers are held as whole numbers from 0 on."""
    return 1 << (element.bits - 1) if element.signed else 0


def _planes(weight: QuantizedTensor, element: Int, section: int, order: torch.Tensor | None) -> torch.Tensor:
    packed = []
    for start in range(0, weight.shape[0], _ROWS):
        block = weight.codes[start : start + _ROWS]
        if element.bits < 8:
            codes = unpack(block, element.bits, weight.shape[1]).to(torch.uint8)
        else:
            codes = block.view(torch.uint8) ^ (128 if element.signed else 0)
        packed.append(pack_planes(codes if order is None else codes[:, order], element.bits, section))
    return torch.cat(packed)


def _by_group(part: torch.Tensor, rows: int) -> torch.Tensor:
    """[N or 1, groups] -> [groups, N]. Float64 stands for numbers that no narrower type holds; their nearest float32 is taken."""
    part = part.to(torch.float32) if part.dtype == torch.float64 else part
    return part.expand(rows, -1).t().contiguous()


def _order(index: torch.Tensor, group: int) -> torch.Tensor:
    """int32 [K]: the columns, sorted by group."""
    order = index.argsort(stable=True)
    found = index[order]
    if not torch.equal(found, torch.arange(len(index), dtype=found.dtype, device=found.device) // group):
        counts = torch.bincount(index)
        raise Refused(Refusal("shape-unsupported", "notimpl", "integers in Triton", "act-order groups must all be of one size",
                              f"found groups of {int(counts.min())} to {int(counts.max())} columns, expected {group}",
                              "Another kernel takes this layer."))  # fmt: skip
    return order.to(torch.int32)
