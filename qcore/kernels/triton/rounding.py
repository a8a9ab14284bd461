"""Rounding activations as a scheme says, in one pass over memory: int8 and small floats, by row, by group, or under a scale that is given.

The arithmetic is that of qcore.kernels.activations where tools divide by the scale, each operation rounded to float32. A value that is no number
stays none; where codes cannot say so, the row's scale does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from qcore.elements import Group, PerToken
from qcore.kernels.minifloat import LARGEST
from qcore.kernels.triton.program import Program
from qcore.kernels.triton.tilings import eights_cast, target_on

if TYPE_CHECKING:
    from qcore.platform import Target
    from qcore.scheme import TensorScheme
    from qcore.tensor import Order

_BLOCK = 1024
"""Values that a program holds at a time: of groups, and of rows that are too long to be held."""
_LONGEST = 1 << 14
"""Values of a row that a program holds, so that the row is read once: 32 a thread at most."""
_FEW_ROWS = 64
"""Up to so many rows the time is that of one program, and it gets as many threads as there are pieces of 16 bytes."""
_GROUPS = (16, 32, 64, 128, 256, 512, 1024)
_MANTISSA = {"e2m1": 1, "e2m3": 3, "e3m2": 2, "e4m3fn": 3, "e5m2": 2}
_LEAST = {"e2m1": 0, "e2m3": 0, "e3m2": -2, "e4m3fn": -6, "e5m2": -14}
"""Exponent of the smallest normal number."""
_CARRY = {"e8m0": {"e2m1": 21, "e2m3": 19, "e3m2": 20, "e4m3fn": 21, "e5m2": 20}, "e8m0floor": {}}
"""The bit of a float32 that is added to a group's largest magnitude before its exponent is taken (qcore.kernels.minifloat)."""


@triton.jit  # type: ignore[untyped-decorator]
def nearest(values, MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 values rounded to the nearest number, ties to even; beyond the largest they saturate. MANTISSA below 0: to whole numbers from -LARGEST - 1 on.

    A number is rounded to steps of 2^e by adding 1.5 * 2^(e + 23), whose last bit is that step, and taking it away again."""
    if MANTISSA < 0:
        held = tl.minimum(tl.maximum(values, -LARGEST - 1.0), LARGEST)
        rounded = (held + 12582912.0) - 12582912.0
    else:
        held = tl.minimum(tl.maximum(values, -LARGEST), LARGEST)
        exponent = tl.maximum((held.to(tl.int32, bitcast=True) >> 23) & 255, LEAST + 127)
        step = (((exponent + 23 - MANTISSA) << 23) | 0x400000).to(tl.float32, bitcast=True)
        rounded = (held + step) - step
    return tl.where(values == values, rounded, values)


@triton.jit
def quotients(x, scale):  # type: ignore[no-untyped-def]
    """x / scale, float32, rounded to nearest, for what `nearest` makes of it. scale: of x's shape, or of one that becomes it.

    A division takes a dozen instructions, of which one runs at an eighth of the rate. By Markstein's theorem, q + (x - q * scale) / scale is the
    rounded quotient once q is within a unit in its last place; x times the reciprocal is within two, and so corrected twice. Both are moved away from
    the ends of float32's range first. Infinity minus itself is no number: there, and where a product overflows, the first quotient stays."""
    far = tl.where(scale < 2.0**-64, 2.0**64, tl.where(scale > 2.0**64, 2.0**-64, 1.0))
    scale = scale * far
    inverse = tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    x = x * far
    first = x * inverse
    better = tl.fma(tl.fma(first, -scale, x), inverse, first)
    better = tl.fma(tl.fma(better, -scale, x), inverse, better)
    return tl.where(tl.abs(first) < 1e30, better, first)


@triton.jit
def e4m3_bytes(values):  # type: ignore[no-untyped-def]
    """uint8 codes of float32 numbers that e4m3fn has; zero has no sign, for e4m3fnuz has another use for it."""
    bits = values.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    code = tl.where(magnitude < (121 << 23), (tl.abs(values) * 512.0).to(tl.int32), (magnitude >> 20) - (120 << 3))
    return tl.where(magnitude == 0, 0, code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit  # type: ignore[untyped-decorator]
def scale_for(largest, whole, MANTISSA: tl.constexpr, LARGEST: tl.constexpr, SCALE: tl.constexpr, CARRY: tl.constexpr, EXPONENT: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """float32 scales for magnitudes up to `largest`. LARGEST: what it becomes. EXPONENT: that of the element's largest number."""
    if SCALE == "e8m0":
        exponent = ((largest.to(tl.int32, bitcast=True) + CARRY) >> 23) - EXPONENT
        exponent = tl.minimum(tl.maximum(exponent, 0), 254)
        scale = tl.where(exponent == 0, 0x00400000, exponent << 23).to(tl.float32, bitcast=True)
    elif SCALE == "e4m3fn":
        fine = nearest(tl.math.div_rn(tl.math.div_rn(largest, LARGEST), whole), 3, -6, 448.0)
        scale = tl.where(fine == 0, 0.125, fine) * whole
    else:
        scale = tl.math.div_rn(largest, LARGEST)
        scale = tl.where(scale == 0, 1.1920928955078125e-07, scale)
    return scale


@triton.jit  # type: ignore[untyped-decorator]
def stored_as(x, scale, kind: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr, CODES: tl.constexpr, CAST: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """What round_rows and round_groups store of x, float32, under scales of x's shape, or of one. kind: the type of `out` where it is no CODES."""
    values = quotients(x, scale)
    if CODES and MANTISSA < 0:  # the whole number is in the last bits of the sum
        held = tl.minimum(tl.maximum(values, -LARGEST - 1.0), LARGEST)
        stored = (held + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    elif CODES and CAST:  # saturates
        stored = values.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    elif CODES:
        stored = e4m3_bytes(nearest(values, MANTISSA, LEAST, LARGEST))
    else:
        stored = (nearest(values, MANTISSA, LEAST, LARGEST) * scale).to(kind)
    return stored


@triton.jit  # type: ignore[untyped-decorator]
def round_rows(  # type: ignore[no-untyped-def]
    x_ptr, given_ptr, out_ptr, scales_ptr, K, x_stride, bound,
    DYNAMIC: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr, STEPS: tl.constexpr, CODES: tl.constexpr, BLOCK: tl.constexpr,
    HELD: tl.constexpr, CAST: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """One row of x [M, K] a program. out: where CODES, int8 or the bytes of e4m3fn, and scales float32 [M]; otherwise what the codes stand for, in x's
    type. given: float32, the scale where it is not DYNAMIC: [1] where EACH is 0; 1: [M], each row has its own. bound: run-time scales are for magnitudes up
    to it. STEPS: what the largest becomes. HELD: BLOCK is no less than K. CAST: the processor converts to e4m3fn; its zero has a sign.

    Magnitudes are compared as whole numbers, of which those of what is no number are the largest."""
    row = tl.program_id(0).to(tl.int64)
    inside = tl.arange(0, BLOCK)
    bits = tl.full((BLOCK,), 0, tl.int32)
    if HELD:
        x = tl.load(x_ptr + row * x_stride + inside, mask=inside < K, other=0.0).to(tl.float32)
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    elif DYNAMIC:
        for start in range(0, K, BLOCK):
            part = tl.load(x_ptr + row * x_stride + start + inside, mask=start + inside < K, other=0.0).to(tl.float32)
            bits = tl.maximum(bits, part.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    if DYNAMIC:
        largest = tl.minimum(tl.max(bits, 0), 0x7F800000).to(tl.float32, bitcast=True)
        scale = scale_for(tl.minimum(largest, bound), 1.0, MANTISSA, STEPS, "plain", 0, 0)
    else:
        scale = tl.load(given_ptr + row * EACH)
    kind: tl.constexpr = out_ptr.dtype.element_ty
    if HELD:
        stored = stored_as(x, scale, kind, MANTISSA, LEAST, LARGEST, CODES, CAST)
        tl.store(out_ptr + row * K + inside, stored, mask=inside < K)
    else:
        for start in range(0, K, BLOCK):
            part = tl.load(x_ptr + row * x_stride + start + inside, mask=start + inside < K, other=0.0).to(tl.float32)
            stored = stored_as(part, scale, kind, MANTISSA, LEAST, LARGEST, CODES, CAST)
            tl.store(out_ptr + row * K + start + inside, stored, mask=start + inside < K)
            bits = tl.maximum(bits, part.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    if CODES:
        most = tl.max(bits, 0)
        tl.store(scales_ptr + row, tl.where((most > 0x7F800000) | (scale == float("inf")), float("nan"), scale))


@triton.jit  # type: ignore[untyped-decorator]
def round_groups(  # type: ignore[no-untyped-def]
    x_ptr, given_ptr, out_ptr, scales_ptr, K, x_stride,
    GROUP: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr, SCALE: tl.constexpr, CARRY: tl.constexpr,
    EXPONENT: tl.constexpr, CODES: tl.constexpr, BLOCK: tl.constexpr, CAST: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Of each row, BLOCK // GROUP groups a program; as round_rows, but scales are [M, groups]. given: the scale above NVFP4's own."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + row * x_stride + column, mask=column < K, other=0.0).to(tl.float32)
    most = tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1)
    whole = tl.load(given_ptr + row * EACH) if SCALE == "e4m3fn" else 1.0
    scale = scale_for(most, whole, MANTISSA, LARGEST, SCALE, CARRY, EXPONENT)
    kind: tl.constexpr = out_ptr.dtype.element_ty
    stored = stored_as(x, scale[:, None], kind, MANTISSA, LEAST, LARGEST, CODES, CAST)
    tl.store(out_ptr + row * K + column, stored, mask=column < K)
    if CODES:
        scale = tl.where(scale == float("inf"), float("nan"), scale)
        tl.store(scales_ptr + row * tl.cdiv(K, GROUP) + group, scale, mask=group * GROUP < K)


@dataclass(frozen=True)
class Rounding:
    """How inputs are rounded. element: `int8` or a small float. group: values under one scale; 0: a row's, or all where a scale is given. scale: its
    type, as qcore.elements has it. dynamic: scales are found at run time. bound: for magnitudes up to it."""

    element: str
    group: int
    scale: str
    dynamic: bool
    bound: float

    @classmethod
    def of(cls, scheme: TensorScheme | None, order: Order = "dequantized") -> Rounding | None:
        """None where the kernels do not round so: with zero points, with outliers, under a scale of the whole input that is found at run time, or in
        another order of operations."""
        if scheme is None or scheme.zero is not None or scheme.outliers is not None or order != "dequantized":
            return None
        element, grid = str(scheme.element).replace("fp8", "e4m3fn"), scheme.granularity
        kind = scheme.scales[0].type
        group = grid.size if isinstance(grid, Group) else 0
        fits = group in _GROUPS if group else scheme.dynamic == isinstance(grid, PerToken)
        known = (element == "int8" and not group) or (element in _MANTISSA and kind in ("float", *_CARRY, "e4m3fn"))
        return cls(element, group, kind, scheme.dynamic, scheme.bound or float("inf")) if fits and known else None

    @cached_property
    def constants(self) -> dict[str, object]:
        """What the kernel is made for, but for what it stores."""
        if self.element == "int8":
            return {
                "DYNAMIC": self.dynamic,
                "MANTISSA": -1,
                "LEAST": 0,
                "LARGEST": 127.0,
                "STEPS": 127.5,
            }
        largest = LARGEST[self.element]
        of_element = {
            "MANTISSA": _MANTISSA[self.element],
            "LEAST": _LEAST[self.element],
            "LARGEST": largest,
        }
        if not self.group:
            return {"DYNAMIC": self.dynamic, "STEPS": largest, **of_element}
        carry = 1 << _CARRY[self.scale][self.element] if _CARRY.get(self.scale) else 0
        scale = "e8m0" if self.scale in _CARRY else self.scale
        return {
            "GROUP": self.group,
            "SCALE": scale,
            "CARRY": carry,
            "EXPONENT": math.frexp(largest)[1] - 1,
            **of_element,
        }

    def shape(self, rows: int, columns: int) -> dict[str, Any]:
        """How a program goes about x [rows, columns], and with how many warps."""
        if self.group:
            return {"BLOCK": _BLOCK, "num_warps": 4}
        if columns > _LONGEST:
            return {"BLOCK": 2 * _BLOCK, "HELD": False, "num_warps": 8}
        block = max(256, triton.next_power_of_2(columns))
        each = 8 if rows <= _FEW_ROWS else 32
        return {"BLOCK": block, "HELD": True, "num_warps": min(16, max(1, block // 32 // each))}

    def programs(self, codes: bool, dtype: str, target: Target | None = None) -> list[Program]:
        """What rounds activations of this type. target: needed for codes."""
        floats = {"bfloat16": "*bf16", "float16": "*fp16"}[dtype]
        stored = floats if not codes else "*i8" if self.element == "int8" else "*u8"
        signature = {
            "x_ptr": floats,
            "given_ptr": "*fp32",
            "out_ptr": stored,
            "scales_ptr": "*fp32",
            "K": "i32",
            "x_stride": "i32",
        }
        more = {} if self.group else {"bound": "fp32"}
        constants = self.constants | {"CODES": codes, "CAST": eights_cast(target)}
        scales = ((0, ""), (1, ", a scale for each")) if self.scale == "e4m3fn" or not self.dynamic else ((0, ""),)
        shapes = [self.shape(1 << 20, columns) for columns in ((4096,) if self.group else (4096, 2 * _LONGEST))]
        return [
            Program(
                f"rounding to {self.element} {dtype}, {shape['BLOCK']} at a time{own}",
                round_groups if self.group else round_rows,
                signature | more,
                constants | {"EACH": each} | {key: value for key, value in shape.items() if key != "num_warps"},
                frozenset(signature),
                {"num_warps": shape["num_warps"]},
            )
            for shape in shapes
            for each, own in scales
        ]


@torch.library.custom_op("qcore::triton_round", mutates_args=())
def round_input(
    x: torch.Tensor, given: torch.Tensor | None, element: str, group: int, scale: str, dynamic: bool, bound: float, codes: bool
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """x: [M, K] of unit stride along K. given: float32 [1], or of each row [M]. codes: int8 or uint8 [M, K] and their scales, float32 [M] or [M, groups]; otherwise
    what they stand for, in x's type, and nothing."""
    rounding = Rounding(element, group, scale, dynamic, bound)
    (rows, columns), groups = x.shape, triton.cdiv(x.shape[1], group) if group else 0
    kept, scales = _results(x, element, groups, codes)
    if not rows:
        return kept, scales
    parts = (x, scales if given is None else given, kept, scales, columns, x.stride(0))
    how = (
        rounding.constants
        | rounding.shape(rows, columns)
        | {
            "CODES": codes,
            "CAST": eights_cast(target_on(x.device)),
            "EACH": int(given is not None and given.numel() > 1),
        }
    )
    if group:
        round_groups[(rows, triton.cdiv(columns, _BLOCK))](*parts, **how)
    else:
        round_rows[(rows,)](*parts, bound, **how)
    return kept, scales


@round_input.register_fake
def _(
    x: torch.Tensor, given: torch.Tensor | None, element: str, group: int, scale: str, dynamic: bool, bound: float, codes: bool
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return _results(x, element, -(-x.shape[1] // group) if group else 0, codes)


def _results(x: torch.Tensor, element: str, groups: int, codes: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if not codes:
        return x.new_empty(x.shape), x.new_empty(0, dtype=torch.float32)
    scales = (x.shape[0], groups) if groups else (x.shape[0],)
    return x.new_empty(x.shape, dtype=torch.int8 if element == "int8" else torch.uint8), x.new_empty(
        scales, dtype=torch.float32
    )
