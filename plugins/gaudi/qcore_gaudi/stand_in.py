"""A stand-in for Gaudi2's operators, for hosts without Intel's software: the same names and schemas (qcore_gaudi/operators.py) on the CPU, with the checks of
Intel's bridge to torch (hpu_ops/backend: fp8_gemm.cpp, fp8_ops.cpp, convert_from_int4_gen.cpp) and of how its tests call them; results by their formulas.

Numbers are Gaudi2's: casts saturate at 240, and what is larger is no number. Gaudi3 takes all that Gaudi2 does. What Gaudi makes of sums is not shown.

Torch's own operators are the CPU's; while a kernel of this plugin runs, those that Intel does not list for Gaudi, or not for the type, raise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qcore.testing.watch import watch
from qcore_gaudi.kernels.blocks import BlockLinear
from qcore_gaudi.kernels.dense import DenseLinear
from qcore_gaudi.kernels.fp8 import Fp8Linear, Fp8ProductLinear
from qcore_gaudi.kernels.int4 import Int4Linear
from qcore_gaudi.kernels.kv_cache import KvCache
from qcore_gaudi.operators import SAME, SCHEMAS, TORCH, VIEWS

_FLOATS = (torch.bfloat16, torch.float32)
_E4M3 = torch.float8_e4m3fn
_LARGEST = 240.0


def cast_to_fp8_v2(
    x: torch.Tensor, scale: torch.Tensor | None = None, stochastic_rounding: bool = False, is_amax: bool = False, dtype: torch.dtype | None = None,
    scale_shape: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """x * scale in x's type, rounded half to even and saturated; and the largest magnitude of x where it is asked for."""
    _check(x.dtype in _FLOATS, "the input is float32 or bfloat16")
    _check(dtype == _E4M3 and not stochastic_rounding, "the result is e4m3, rounded to the nearest")
    scaled = _scaled(x, scale, scale_shape).to(torch.float32)
    amax = x.abs().amax().to(torch.float32) if is_amax else x.new_empty(0, dtype=torch.float32)
    return scaled.clamp(-_LARGEST, _LARGEST).to(_E4M3), amax


def cast_from_fp8(
    codes: torch.Tensor, scale: torch.Tensor | None, out_dtype: torch.dtype, scale_shape: Sequence[int] | None = None
) -> torch.Tensor:
    """codes * scale in out_dtype."""
    _check(out_dtype in _FLOATS, "the result is float32 or bfloat16")
    return _scaled(_numbers(codes).to(out_dtype), scale, scale_shape)


def fp8_gemm_v2(
    left: torch.Tensor, trans_left: bool, right: torch.Tensor, trans_right: bool, added: torch.Tensor | None, out_dtype: torch.dtype,
    left_scale: torch.Tensor | None = None, right_scale: torch.Tensor | None = None, bias: torch.Tensor | None = None, accumulate: bool = False,
    right_scale_shape: Sequence[int] | None = None,
) -> torch.Tensor:  # fmt: skip
    """e4m3 [M, K] times e4m3 [K, N], each as it is or transposed, times the scales that its sides were divided by: of one number, or of each row of the
    left and each column of the right."""
    sides = [
        side.t() if turned else side for side, turned in ((_numbers(left), trans_left), (_numbers(right), trans_right))
    ]
    (rows, columns), outputs = sides[0].shape, sides[1].shape[-1]
    _check(left.is_contiguous() and right.is_contiguous(), "both sides are contiguous")
    _check(sides[1].shape == (columns, outputs), "the sides are matrices that fit")
    _check(added is None and not accumulate and right_scale_shape is None, "nothing is added, and scales have a shape")
    _check(out_dtype in _FLOATS, "the result is float32 or bfloat16")
    out = sides[0] @ sides[1]
    for scale, vectors in ((left_scale, ((rows, 1),)), (right_scale, ((outputs,), (1, outputs)))):
        if scale is not None:
            _check(scale.dtype == torch.float32, "scales are float32")
            _check(scale.numel() == 1 or tuple(scale.shape) in vectors, "scales are single, or [M, 1] and [N]")
            out = out * scale
    return (out if bias is None else out + bias.to(torch.float32)).to(out_dtype)


def convert_from_uint4(
    packed: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """(q - z) * s [K, N] of packed int32 [K, N / 8], scale [K / group, N] and zero points int32 [K / group, N / 8], each packed from the lowest four bits."""
    _check(packed.dtype == torch.int32 and packed.dim() == 2 and packed.is_contiguous(), "codes are int32 [K, N / 8]")
    _check(out_dtype in _FLOATS and scale.dtype == out_dtype, "scales are of the result's type, float32 or bfloat16")
    (rows, words), groups = packed.shape, len(scale)
    _check(
        scale.shape == (groups, 8 * words) and scale.is_contiguous() and rows % groups == 0, "scales are [K / group, N]"
    )
    codes = _nibbles(packed)
    if zero_point is not None:
        _check(zero_point.dtype == torch.int32 and zero_point.is_contiguous(), "zero points are packed into int32")
        _check(zero_point.shape == (groups, words), "zero points are [K / group, N / 8]")
        codes = codes - _nibbles(zero_point).repeat_interleave(rows // groups, 0)
    return (codes * scale.to(torch.float32).repeat_interleave(rows // groups, 0)).to(out_dtype)


_DOUBLES: dict[str, Callable[..., object]] = {
    "cast_to_fp8_v2": cast_to_fp8_v2, "cast_from_fp8": cast_from_fp8, "fp8_gemm_v2": fp8_gemm_v2, "convert_from_uint4": convert_from_uint4
}  # fmt: skip


@cache
def load() -> None:
    """Registers the operators. Raises RuntimeError where Intel's software is, which has its own."""
    if find_spec("habana_frameworks") is not None:
        raise RuntimeError("habana_frameworks is installed: nothing stands in for its operators")
    library = torch.library.Library("hpu", "FRAGMENT")
    for name, double in _DOUBLES.items():
        library.define(f"{name}{SCHEMAS[name]}")
        library.impl(name, double, "CPU")
    _KEPT.append(library)
    watch((Int4Linear, Fp8ProductLinear, Fp8Linear, DenseLinear, BlockLinear, KvCache), only_gaudis)


_KEPT: list[torch.library.Library] = []
"""What is registered goes when its library does."""


class OnlyGaudis(TorchDispatchMode):
    """Raises ValueError where torch computes by an operator, or of a type, that Intel does not list."""

    def __torch_dispatch__(
        self, operator: Any, types: Sequence[type], given: tuple[Any, ...] = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        with self:  # in inference mode operators come that are made of others
            found = operator.decompose(*given, **(named or {}))
        if found is not NotImplemented:
            return found
        found = operator(*given, **(named or {}))
        space, name = operator.namespace, operator.overloadpacket.__name__
        if space == "aten" and name not in VIEWS:
            taken = TORCH.get(SAME.get(name, name))
            _check(taken is not None, f"{operator} is not among the operators that Gaudi has")
            tensors = (part for part in tree_leaves((given, named)) if isinstance(part, torch.Tensor))
            for kind in {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}:
                _check(kind in (taken or ()), f"{operator} of {kind}")
        else:
            _check(space in ("aten", "hpu"), f"{operator} is not Gaudi's")
        return found


def only_gaudis(given: tuple[object, ...]) -> OnlyGaudis:
    """What kernels run inside of."""
    return OnlyGaudis()  # type: ignore[no-untyped-call]


def _scaled(x: torch.Tensor, scale: torch.Tensor | None, scale_shape: Sequence[int] | None) -> torch.Tensor:
    _check(scale_shape is None, "scales have a shape")
    if scale is None:
        return x
    _check(scale.dtype in _FLOATS, "scales are float32 or bfloat16")
    _check(torch.broadcast_shapes(scale.shape, x.shape) == x.shape, "scales spread over the input")
    return x * scale.to(x.dtype)


def _numbers(codes: torch.Tensor) -> torch.Tensor:
    """float32. Raises ValueError where there is one that Gaudi2 lacks."""
    _check(codes.dtype == _E4M3, "codes are e4m3")
    wide = codes.to(torch.float32)
    _check(not bool((wide.abs() > _LARGEST).any()), "Gaudi2 has no e4m3 above 240")
    return wide


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return (words.unsqueeze(-1) >> shifts & 15).flatten(1).to(torch.float32)


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"Gaudi's operator would not take this: {what}")
