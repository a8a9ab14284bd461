"""The kv cache in 8 bits on GPUs: states are rounded as they are written, and become 16-bit floats again as attention reads them, each in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from qcore.elements import Float
from qcore.kernels.kv_cache import KvRounding
from qcore.kernels.triton.launch import POINTERS
from qcore.kernels.triton.program import Program
from qcore.kernels.triton.rounding import e4m3_bytes, nearest

if TYPE_CHECKING:
    from qcore.platform import Target
    from qcore.scheme import Scheme

_ROWS = 16
"""Rows of a program."""
_FORMS: dict[str, tuple[int, int, float]] = {
    "int8": (-1, 0, 127.0),
    "e4m3fn": (3, -6, 448.0),
    "e5m2": (2, -14, 57344.0),
}
"""Mantissa bits, exponent of the smallest normal number, and the largest: as qcore.kernels.triton.rounding takes them."""


@triton.jit  # type: ignore[untyped-decorator]
def encode_rows(  # type: ignore[no-untyped-def]
    x_ptr, scale_ptr, zero_ptr, out_ptr, R, D, inner, heads, row_bytes,
    MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr, DYNAMIC: tl.constexpr, ZERO: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of x [R, D] a program. out: uint8 [R, row_bytes], the codes, and behind them the row's float32 scale where it is DYNAMIC. Row r has the scale
    (and zero point) r // inner % heads."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    inside = tl.arange(0, BLOCK)[None, :]
    mask = (row < R) & (inside < D)
    x = tl.load(x_ptr + row * D + inside, mask=mask, other=0.0).to(tl.float32)
    head = row // inner % heads
    if DYNAMIC:
        largest = tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1, keep_dims=True)
        scale = tl.maximum(tl.math.div_rn(largest, tl.zeros_like(largest) + LARGEST), 1.1754943508222875e-38)
        bytes_ = tl.arange(0, 4)[None, :]
        tail = (scale.to(tl.int32, bitcast=True) >> (8 * bytes_)) & 255
        tl.store(out_ptr + row * row_bytes + D + bytes_, tail.to(tl.uint8), mask=row < R)
    else:
        scale = tl.load(scale_ptr + head)
    scaled = tl.math.div_rn(x, scale + tl.zeros_like(x))
    if MANTISSA < 0:
        whole = (tl.minimum(tl.maximum(scaled, -4194304.0), 4194304.0) + 12582912.0) - 12582912.0
        if ZERO:
            whole += tl.load(zero_ptr + head)
        codes = tl.minimum(tl.maximum(whole, -128.0), 127.0).to(tl.int8).to(tl.uint8, bitcast=True)
    elif MANTISSA == 3:
        sign = (scaled.to(tl.int32, bitcast=True) >> 24) & 0x80  # zero has one here
        codes = e4m3_bytes(nearest(scaled, MANTISSA, LEAST, LARGEST)).to(tl.int32) | sign
        codes = tl.where(x == x, codes, 0x7F).to(tl.uint8)
    else:
        rounded = nearest(scaled, MANTISSA, LEAST, LARGEST).to(tl.float16)
        codes = ((rounded.to(tl.int16, bitcast=True) >> 8) & 255).to(tl.uint8)
    tl.store(out_ptr + row * row_bytes + inside, codes, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def decode_rows(  # type: ignore[no-untyped-def]
    rows_ptr, scale_ptr, zero_ptr, out_ptr, R, D, inner, heads, row_bytes,
    MANTISSA: tl.constexpr, DYNAMIC: tl.constexpr, ZERO: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The reverse: out [R, D]."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    inside = tl.arange(0, BLOCK)[None, :]
    mask = (row < R) & (inside < D)
    codes = tl.load(rows_ptr + row * row_bytes + inside, mask=mask, other=0).to(tl.int32)
    head = row // inner % heads
    if DYNAMIC:
        bytes_ = tl.arange(0, 4)[None, :]
        tail = tl.load(rows_ptr + row * row_bytes + D + bytes_, mask=row < R, other=0).to(tl.int32)
        scale = tl.sum(tail << (8 * bytes_), 1, keep_dims=True).to(tl.float32, bitcast=True)
    else:
        scale = tl.load(scale_ptr + head)
    if MANTISSA < 0:
        values = ((codes ^ 128) - 128).to(tl.float32)
        if ZERO:
            values -= tl.load(zero_ptr + head)
    elif MANTISSA == 3:
        bits = ((codes & 0x80) << 24) | ((codes & 0x7F) << 20)
        values = tl.where((codes & 0x7F) == 0x7F, float("nan"), bits.to(tl.float32, bitcast=True) * (2.0**120))
    else:
        values = (codes << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    tl.store(out_ptr + row * D + inside, (values * scale).to(out_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("qcore::triton_kv_encode", mutates_args=())
def encode(
    x: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None, element: str, inner: int
) -> torch.Tensor:
    """uint8 [..., D], or [..., D + 4] without a scale, of contiguous x [..., D]. scale, zero: float32 [heads]."""
    columns = x.shape[-1]
    out = x.new_empty((*x.shape[:-1], columns + 4 * (scale is None)), dtype=torch.uint8)
    if x.numel():
        mantissa, least, largest = _FORMS[element]
        encode_rows[(triton.cdiv(x.numel(), columns * _ROWS),)](
            x, out if scale is None else scale, out if zero is None else zero, out, x.numel() // columns, columns, inner,
            1 if scale is None else len(scale), out.shape[-1], MANTISSA=mantissa, LEAST=least, LARGEST=largest, DYNAMIC=scale is None,
            ZERO=zero is not None, ROWS=_ROWS, BLOCK=triton.next_power_of_2(columns),
        )  # fmt: skip
    return out


@encode.register_fake
def _(x: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None, element: str, inner: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] + 4 * (scale is None)), dtype=torch.uint8)


@torch.library.custom_op("qcore::triton_kv_decode", mutates_args=())
def decode(
    rows: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None, element: str, inner: int, dtype: torch.dtype
) -> torch.Tensor:  # fmt: skip
    """[..., D] in dtype of what `encode` gave, contiguous."""
    columns = rows.shape[-1] - 4 * (scale is None)
    out = rows.new_empty((*rows.shape[:-1], columns), dtype=dtype)
    if out.numel():
        decode_rows[(triton.cdiv(out.numel(), columns * _ROWS),)](
            rows, rows if scale is None else scale, rows if zero is None else zero, out, out.numel() // columns, columns, inner,
            1 if scale is None else len(scale), rows.shape[-1], MANTISSA=_FORMS[element][0], DYNAMIC=scale is None, ZERO=zero is not None,
            ROWS=_ROWS, BLOCK=triton.next_power_of_2(columns),
        )  # fmt: skip
    return out


@decode.register_fake
def _(
    rows: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None, element: str, inner: int, dtype: torch.dtype
) -> torch.Tensor:  # fmt: skip
    return rows.new_empty((*rows.shape[:-1], rows.shape[-1] - 4 * (scale is None)), dtype=dtype)


class KvCache(KvRounding):
    """What KvRounding does, but for scales that tools multiply by the inverse of, which stay with it."""

    def encode(self, states: torch.Tensor) -> torch.Tensor:
        if self.inverse is not None:
            return super().encode(states)
        self._follow(states.device)
        scale, inner = self._spread(states)
        out: torch.Tensor = encode(states.contiguous(), scale, self._flat(self.zero), self._element, inner)
        return out

    def decode(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        self._follow(rows.device)
        scale, inner = self._spread(rows)
        out: torch.Tensor = decode(rows.contiguous(), scale, self._flat(self.zero), self._element, inner, dtype)
        return out

    @property
    def _element(self) -> str:
        return self.element.format if isinstance(self.element, Float) else "int8"

    def _spread(self, states: torch.Tensor) -> tuple[torch.Tensor | None, int]:
        """Scales in a row, and how many rows of states follow each other under one."""
        if self.scale is None or self.scale.numel() == 1:
            return self._flat(self.scale), 1
        inner = 1
        for size in states.shape[states.dim() - self.scale.dim() + 1 : -1]:
            inner *= size
        return self._flat(self.scale), inner

    @staticmethod
    def _flat(part: torch.Tensor | None) -> torch.Tensor | None:
        return None if part is None else part.flatten()

    @classmethod
    def programs(cls, scheme: Scheme, dtype: str, target: Target) -> list[Program]:
        """What writes and reads states of 128 numbers."""
        element = scheme.weight.element
        mantissa, least, largest = _FORMS[element.format if isinstance(element, Float) else "int8"]
        floats, zero = POINTERS[getattr(torch, dtype)], scheme.weight.zero is not None
        sizes = dict.fromkeys(("R", "D", "inner", "heads", "row_bytes"), "i32")
        made_for: dict[str, object] = {
            "MANTISSA": mantissa,
            "DYNAMIC": False,
            "ZERO": zero,
            "ROWS": _ROWS,
            "BLOCK": 128,
        }
        ways: tuple[tuple[str, Any, dict[str, str], str, dict[str, object]], ...] = (
            ("written", encode_rows, {"x_ptr": floats}, "*u8", {"LEAST": least, "LARGEST": largest}),
            ("read", decode_rows, {"rows_ptr": "*u8"}, floats, {}),
        )
        return [
            Program(f"{scheme} {dtype}, {way}", kernel, {**first, "scale_ptr": "*fp32", "zero_ptr": "*fp32", "out_ptr": last, **sizes}, made_for | more,
                    frozenset({*first, "out_ptr", "D", "row_bytes"}))
            for way, kernel, first, last, more in ways
        ]  # fmt: skip
