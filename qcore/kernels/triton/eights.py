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
from qcore.kernels.triton.launch import built, constants_of, in_shares
from qcore.kernels.triton.linear import by_group
from qcore.kernels.triton.rounding import Rounding, round_input
from qcore.kernels.triton.tilings import eights_of, eights_on, target_on

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.kernels.triton.program import Program
    from qcore.platform import Target
    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors

_BLOCK = 128
"""Columns of one product, and of a group."""


@triton.jit  # type: ignore[untyped-decorator]
def multiply_eights(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, scales_ptr, inputs_ptr, out_ptr, M, N, K, shares,
    FORMAT: tl.constexpr, GROUPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [shares, M, N] of x [M, K] and codes [N, K], int8, or the bytes of e4m3fn, which have no other zero than 0. scales: float32 [groups, N]; inputs:
    float32 [M, groups]; groups of BK columns where GROUPED, else one. FORMAT: `int8`, `e4m3fn`, or `e4m3fnuz` where the matrix unit has that: the
    same bytes, which stand for half as much there."""
    blocks = tl.cdiv(M, BM)
    m = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    n = tl.program_id(0) // blocks * BN + tl.arange(0, BN)
    share = tl.program_id(1)
    inside = tl.arange(0, BK)
    row = codes_ptr + tl.minimum(n, N - 1)[:, None].to(tl.int64) * K + inside[None, :]
    given = x_ptr + tl.minimum(m, M - 1)[:, None].to(tl.int64) * K + inside[None, :]
    turns = tl.cdiv(K, BK)
    each = tl.cdiv(turns, shares)
    groups = turns if GROUPED else 1
    sums = tl.zeros((BN, BM), dtype=tl.int32 if FORMAT == "int8" else tl.float32)
    for turn in range(share * each, tl.minimum(turns, share * each + each)):
        left = K - turn * BK
        weight = tl.load(row + turn * BK, mask=inside[None, :] < left, other=0)
        x = tl.load(given + turn * BK, mask=inside[None, :] < left, other=0)
        if FORMAT == "e4m3fn":
            weight, x = weight.to(tl.float8e4nv, bitcast=True), x.to(tl.float8e4nv, bitcast=True)
        if FORMAT == "e4m3fnuz":
            weight, x = weight.to(tl.float8e4b8, bitcast=True), x.to(tl.float8e4b8, bitcast=True)
        if GROUPED:
            products = tl.dot(weight, tl.trans(x))
            scale = tl.load(scales_ptr + turn * N + n, mask=n < N, other=0.0)
            inputs = tl.load(inputs_ptr + m * groups + turn, mask=m < M, other=0.0)
            sums += products * (scale[:, None] * inputs[None, :])
        elif FORMAT == "int8":
            sums = tl.dot(weight, tl.trans(x), sums, out_dtype=tl.int32)
        else:
            sums += tl.dot(weight, tl.trans(x))
    total = sums.to(tl.float32)
    if not GROUPED:
        scale = tl.load(scales_ptr + n, mask=n < N, other=0.0)
        inputs = tl.load(inputs_ptr + m, mask=m < M, other=0.0)
        total = total * scale[:, None] * inputs[None, :]
    if FORMAT == "e4m3fnuz":
        total *= 4.0
    out = out_ptr + (share * M + m[None, :]).to(tl.int64) * N + n[:, None]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(m[None, :] < M) & (n[:, None] < N))


@torch.library.custom_op("qcore::triton_eights", mutates_args=())
def product(
    x: torch.Tensor, inputs: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:  # fmt: skip
    """[M, N] in dtype. x, inputs: codes and scales as round_input gives them. codes, scales: as multiply_eights takes them."""
    (rows, columns), outputs = x.shape, len(codes)
    if not rows:
        return x.new_empty(0, outputs, dtype=dtype)
    tiling = next(tiling for tiling in eights_on(x.device) if rows <= tiling.most)
    target = target_on(x.device)
    form = "int8" if x.dtype == torch.int8 else (target.fp8 if target else "") or "e4m3fn"

    def run(grid: tuple[int, int], out: torch.Tensor) -> None:
        multiply_eights[grid](
            x, codes, scales, inputs, out, rows, outputs, columns, grid[1], **_constants(form, inputs.dim() == 2), **constants_of(tiling)
        )  # fmt: skip

    return in_shares(dtype, rows, outputs, triton.cdiv(columns, _BLOCK), tiling, x.device, run)


@product.register_fake
def _(
    x: torch.Tensor, inputs: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return x.new_empty(x.shape[0], codes.shape[0], dtype=dtype)


def _constants(form: str, grouped: bool) -> dict[str, object]:
    return {"FORMAT": form, "GROUPED": grouped, "BK": _BLOCK}


class EightsLinear(torch.nn.Module):
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
        pointers = {
            "x_ptr": kind,
            "codes_ptr": kind,
            "scales_ptr": torch.float32,
            "inputs_ptr": torch.float32,
            "out_ptr": getattr(torch, dtype),
        }
        constants = _constants("int8" if whole else target.fp8, rounding.group > 0)
        products = [
            built(f"{scheme} {dtype}", multiply_eights, pointers, ("M", "N", "K"), constants, tiling) for tiling in eights_of(target)
        ]  # fmt: skip
        return [*products, *rounding.programs(True, dtype)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat, how = x.reshape(-1, x.shape[-1]), self.rounding
        if flat.stride(-1) != 1:
            flat = flat.contiguous()
        codes, inputs = round_input(
            flat, self.input_scale, how.element, how.group, how.scale, how.dynamic, how.bound, True
        )
        out: torch.Tensor = product(codes, inputs, self.codes, self.scales, x.dtype)
        return out.reshape(*x.shape[:-1], out.shape[-1])
