"""8 bits times 8 bits on matrix units: int8 with exact sums in int32, and e4m3 with sums in float32, the inputs rounded by one kernel before.

Where scales are those of whole rows of weight and input, they multiply the whole sum; where both come by groups of columns (128 x 128 tiles of
the weight, 128 columns of an input's row), they multiply the sum of each group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from qcore.elements import Int, Tile
from qcore.kernels.scales import by_group
from qcore.kernels.stacking import StackableLinear
from qcore.kernels.triton.launch import POINTERS, built, constants_of
from qcore.kernels.triton.program import Program
from qcore.kernels.triton.rounding import Rounding, round_input
from qcore.kernels.triton.routing import blocks_of, place_of, routed_tiling, routed_tilings, routing_programs
from qcore.kernels.triton.tilings import eights_of, eights_on, target_on

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.kernels.triton.tilings import Tiling
    from qcore.platform import Target
    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors

_BLOCK = 128
"""Columns of one product, and of a group."""


_TOGETHER = 16
"""Blocks of rows of x that take turns at a block of the weight's rows: what programs that run at a time read stays in the cache."""
_PROGRAMS = 256
"""Programs that there should be at least, by sharing sums: two for each of a large GPU's processors."""
_MOST_SHARES = 16
_ADDED = 256
"""Results of one program that adds shares."""


@triton.jit(do_not_specialize=("M", "shares"))  # type: ignore[untyped-decorator]
def multiply_eights(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, scales_ptr, inputs_ptr, blocks_ptr, out_ptr, M, N, K, shares,
    FORMAT: tl.constexpr, GROUPED: tl.constexpr, EVEN: tl.constexpr, TOGETHER: tl.constexpr, ROUTED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [shares, M, N] of x [M, K] and codes [N, K], int8, or the bytes of e4m3fn. scales: float32 [groups, N]; inputs:
    float32 [M, groups]; groups of BK columns where GROUPED, else one. FORMAT: `int8`, `e4m3fn`, or `e4m3fnuz` where the matrix unit has that: the
    same bytes, which stand for half as much there, and have no other zero than 0. EVEN: K is a multiple of BK. Where ROUTED, codes and scales are
    stacked, and blocks says which rows of x meet which (qcore.kernels.triton.routing).

    Bytes are loaded as the numbers that they stand for: a cast on the way would keep a matrix unit from reading them where the load left them. Some
    keep 14 bits of their own sums of e4m3, so that those of BK columns are added in float32. Where rows of x fill the matrix unit they are its left
    side, else the weight's are."""
    if FORMAT == "e4m3fn":
        x_ptr = x_ptr.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
        codes_ptr = codes_ptr.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    if FORMAT == "e4m3fnuz":
        x_ptr = x_ptr.to(tl.pointer_type(tl.float8e4b8), bitcast=True)
        codes_ptr = codes_ptr.to(tl.pointer_type(tl.float8e4b8), bitcast=True)
    none: tl.constexpr = 0 if FORMAT == "int8" else 0.0
    kind: tl.constexpr = tl.int32 if FORMAT == "int8" else tl.float32
    left: tl.constexpr = BM >= 64
    if ROUTED:
        begin, last, expert, across = place_of(blocks_ptr, M, tl.cdiv(N, BN), BM, True)
        if begin >= last:
            return
        codes_ptr += expert * N * K
        scales_ptr += expert * N * (tl.cdiv(K, BK) if GROUPED else 1)
        m = begin + tl.arange(0, BM)
        n = across * BN + tl.arange(0, BN)
    else:
        blocks = tl.cdiv(M, BM)
        turn_of = tl.cdiv(N, BN) * TOGETHER
        first = tl.program_id(0) // turn_of * TOGETHER
        beside = tl.minimum(blocks - first, TOGETHER)
        m = (first + tl.program_id(0) % turn_of % beside) * BM + tl.arange(0, BM)
        n = tl.program_id(0) % turn_of // beside * BN + tl.arange(0, BN)
        last = M
    share = tl.program_id(1)
    inside = tl.arange(0, BK)
    row = codes_ptr + tl.minimum(n, N - 1)[:, None].to(tl.int64) * K + inside[None, :]
    given = x_ptr + tl.minimum(m, M - 1)[:, None].to(tl.int64) * K + inside[None, :]
    turns = tl.cdiv(K, BK)
    each = tl.cdiv(turns, shares)
    groups = turns if GROUPED else 1
    sums = tl.zeros((BM, BN), dtype=kind) if left else tl.zeros((BN, BM), dtype=kind)
    for turn in range(share * each, tl.minimum(turns, share * each + each)):
        if EVEN:
            weight = tl.load(row + turn * BK)
            x = tl.load(given + turn * BK)
        else:
            weight = tl.load(row + turn * BK, mask=inside[None, :] < K - turn * BK, other=none)
            x = tl.load(given + turn * BK, mask=inside[None, :] < K - turn * BK, other=none)
        if FORMAT == "int8":
            sums = (
                tl.dot(x, tl.trans(weight), sums, out_dtype=kind)
                if left
                else tl.dot(weight, tl.trans(x), sums, out_dtype=kind)
            )
        else:
            products = tl.dot(x, tl.trans(weight)) if left else tl.dot(weight, tl.trans(x))
            if GROUPED:
                scale = tl.load(scales_ptr + turn * N + n, mask=n < N, other=0.0)
                inputs = tl.load(inputs_ptr + m * groups + turn, mask=m < last, other=0.0)
                products *= inputs[:, None] * scale[None, :] if left else scale[:, None] * inputs[None, :]
            sums += products
    total = sums.to(tl.float32)
    if not GROUPED:
        scale = tl.load(scales_ptr + n, mask=n < N, other=0.0)
        inputs = tl.load(inputs_ptr + m, mask=m < last, other=0.0)
        total = total * scale[None, :] * inputs[:, None] if left else total * scale[:, None] * inputs[None, :]
    if FORMAT == "e4m3fnuz":
        total *= 4.0
    if not left:
        total = tl.trans(total)
    out = out_ptr + (share * M + m[:, None]).to(tl.int64) * N + n[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(m[:, None] < last) & (n[None, :] < N))


@triton.jit  # type: ignore[untyped-decorator]
def add_shares(parts_ptr, out_ptr, size, SHARES: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out: [size], in its type, of parts, float32 [SHARES, size]."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    share = tl.arange(0, SHARES).to(tl.int64)
    parts = tl.load(parts_ptr + share[:, None] * size + place[None, :], mask=place[None, :] < size, other=0.0)
    tl.store(out_ptr + place, tl.sum(parts, 0).to(out_ptr.dtype.element_ty), mask=place < size)


@torch.library.custom_op("qcore::triton_eights", mutates_args=())
def product(
    x: torch.Tensor, inputs: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, experts: torch.Tensor | None = None
) -> torch.Tensor:  # fmt: skip
    """[M, N] in dtype. x, inputs: codes and scales as round_input gives them. codes, scales: as multiply_eights takes them. experts: as
    qcore::triton_product."""
    (rows, columns), outputs = x.shape, codes.shape[-2]
    out = x.new_empty(rows, outputs, dtype=dtype)
    if not rows:
        return out
    if experts is None:
        tiling, blocks = next(tiling for tiling in eights_on(x.device) if rows <= tiling.most), x
        along, each = triton.cdiv(rows, tiling.rows), rows
    else:
        tiling = routed_tiling(routed_tilings(eights_on(x.device), False), rows, len(codes))
        blocks = blocks_of(experts, len(codes), tiling.rows)
        along, each = len(blocks), triton.cdiv(rows, len(codes))
    target = target_on(x.device)
    form = "int8" if x.dtype == torch.int8 else (target.fp8 if target else "") or "e4m3fn"
    programs = along * triton.cdiv(outputs, tiling.outputs)
    shares = shares_of(programs, each, columns)
    parts = out if shares == 1 else x.new_empty(shares, rows, outputs, dtype=torch.float32)
    constants = _constants(form, inputs.dim() == 2, columns, experts is not None) | constants_of(tiling)
    given = (x, codes, scales, inputs, blocks, parts, rows, outputs, columns, shares)
    multiply_eights[(programs, shares)](*given, **constants)
    if shares > 1:
        add_shares[(triton.cdiv(rows * outputs, _ADDED),)](parts, out, rows * outputs, shares, _ADDED, num_warps=4)
    return out


def shares_of(blocks: int, rows: int, columns: int) -> int:
    """Programs that share a block's sums, a power of two. rows: of x, that a weight is for. Their parts, 4 bytes that are written and read, are to move half of what the weight's codes
    do at most; and each has two turns to make at least."""
    most = min(_MOST_SHARES, _PROGRAMS // blocks, columns // (2 * _BLOCK), columns // (16 * rows))
    return 1 << max(1, most).bit_length() - 1


@product.register_fake
def _(
    x: torch.Tensor, inputs: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, experts: torch.Tensor | None = None
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], codes.shape[-2], dtype=dtype)


def _constants(form: str, grouped: bool, columns: int, routed: bool) -> dict[str, object]:
    return {
        "FORMAT": form, "GROUPED": grouped, "EVEN": columns % _BLOCK == 0, "TOGETHER": _TOGETHER, "ROUTED": routed, "BK": _BLOCK
    }  # fmt: skip


class EightsLinear(StackableLinear):
    """codes: int8, or uint8 the bytes of e4m3fn, [N, K]. scales: float32 [groups, N]. input_scale: of static inputs, float32 [1]."""

    codes: torch.Tensor
    scales: torch.Tensor
    input_scale: torch.Tensor | None

    def __init__(
        self, rounding: Rounding, codes: torch.Tensor, scales: torch.Tensor, input_scale: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.rounding = rounding
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("input_scale", input_scale)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        weight = layer.weight
        grid, rows = weight.scheme.weight.granularity, weight.shape[0]
        rounding = Rounding.of(
            weight.scheme.input
        )  # where tools differ in a last bit, inputs are divided by their scale
        assert rounding is not None, "the row takes no other inputs"
        codes, scales = weight.codes, by_group(weight.scales[0].to(torch.float32), grid, rows)
        if not isinstance(weight.scheme.weight.element, Int):
            codes = codes.view(torch.uint8)
            for row, column in (
                (codes & 0x7F == 0x7F).nonzero().tolist()
            ):  # no numbers; another number for some matrix units
                scales[column // _BLOCK if isinstance(grid, Tile) else 0, row] = float("nan")
            codes = codes.masked_fill(codes == 0x80, 0)
        return cls(
            rounding,
            codes.contiguous(),
            scales,
            None if layer.input_scale is None else layer.input_scale.to(torch.float32),
        )

    @classmethod
    def programs(cls, scheme: Scheme, dtype: str, target: Target) -> list[Program]:
        rounding = Rounding.of(scheme.input)
        assert rounding is not None, "the row takes no other inputs"
        whole = isinstance(scheme.weight.element, Int)
        kind = torch.int8 if whole else torch.uint8
        parts = {"x_ptr": kind, "codes_ptr": kind, "scales_ptr": torch.float32, "inputs_ptr": torch.float32}
        form, grouped, name = "int8" if whole else target.fp8, rounding.group > 0, f"{scheme} {dtype}"

        def made(tiling: Tiling, more: str, columns: int, routed: bool) -> Program:
            pointers = {**parts, "blocks_ptr": torch.int32 if routed else kind, "out_ptr": getattr(torch, dtype)}
            constants = _constants(form, grouped, columns, routed)
            return built(f"{name}{more}", multiply_eights, pointers, ("M", "N", "K"), constants, tiling)

        every, ragged = eights_of(target), (("", _BLOCK), (", ragged", _BLOCK + 16))
        experts = routed_tilings(every, False)
        products = [
            *(made(tiling, more, columns, False) for tiling in every for more, columns in ragged),
            *(made(tiling, f" of experts{more}", columns, True) for tiling in experts for more, columns in ragged),
            *routing_programs([tiling.rows for tiling in experts]),
        ]
        sums = {"parts_ptr": "*fp32", "out_ptr": POINTERS[getattr(torch, dtype)], "size": "i32"}
        added = [
            Program(f"{shares} shares added {dtype}", add_shares, sums, {"SHARES": shares, "BLOCK": _ADDED}, frozenset(sums), {"num_warps": 4})
            for shares in (2, _MOST_SHARES)
        ]  # fmt: skip
        return [*products, *added, *rounding.programs(True, dtype, target)]

    def forward(self, x: torch.Tensor, experts: torch.Tensor | None = None) -> torch.Tensor:
        flat, how, scale = x.reshape(-1, x.shape[-1]), self.rounding, self.input_scale
        if flat.stride(-1) != 1:
            flat = flat.contiguous()
        if experts is not None and scale is not None:
            scale = scale[experts]
        codes, inputs = round_input(flat, scale, how.element, how.group, how.scale, how.dynamic, how.bound, True)
        if experts is None:
            out = self.product(codes, inputs, x.dtype)
        else:
            out = product(codes, inputs, self.codes, self.scales, x.dtype, experts)
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def product(self, codes: torch.Tensor, inputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[M, N] in dtype, of one weight. codes, inputs: as round_input gives them."""
        out: torch.Tensor = product(codes, inputs, self.codes, self.scales, dtype)
        return out
