"""The operators that kernels here call: `torch.ops.hpu`, which torch has once it has loaded habana_frameworks, as it does by itself, and those of torch's own
that Intel says that Gaudi has, with the types that it says.

Sources: Intel's bridge to torch (github.com/HabanaAI/gaudi-pytorch-bridge: TORCH_LIBRARY(hpu, ...), hpu_ops/backend, tests/pytest_working,
docs/Pytorch_Operators.rst, scripts/hpu_op.yaml), and those who call them (vllm-hpu-extension, neural-compressor).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

SCHEMAS: Mapping[str, str] = MappingProxyType(
    {
        "cast_to_fp8_v2": "(Tensor input, Tensor? scale=None, bool stochastic_rounding=False, bool is_amax=False, ScalarType? dtype=None, "
        "int[]? scale_shape=None) -> (Tensor, Tensor)",
        "cast_from_fp8": "(Tensor input, Tensor? scale, ScalarType out_dtype, int[]? scale_shape=None) -> Tensor",
        "fp8_gemm_v2": "(Tensor A, bool trans_A, Tensor B, bool trans_B, Tensor? D, ScalarType out_dtype, Tensor? A_scale_inv=None, "
        "Tensor? B_scale_inv=None, Tensor? bias=None, bool accumulate=False, int[]? B_scale_shape=None) -> Tensor",
        "convert_from_uint4": "(Tensor input, Tensor scale, Tensor? zero_point, ScalarType out_dtype) -> Tensor",
    }
)
"""Arguments and results. Later versions have further arguments, with defaults, at the end."""

_FLOATS = ("float32", "bfloat16", "float16")
_INT8 = ("int8", "uint8")
_MOST = (*_FLOATS, "float8_e4m3fn", "int64", "int32", *_INT8, "bool")

TORCH: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "abs": _FLOATS,
        "add": (*_FLOATS, "int64", "int32"),
        "amax": (*_FLOATS, "float8_e4m3fn", "int32"),
        "any": ("float32", "bfloat16", "int32", *_INT8, "bool"),
        "bitwise_and": ("int32", *_INT8, "bool"),
        "bitwise_left_shift": ("int32", *_INT8, "bool"),
        "bitwise_or": ("int32", *_INT8, "bool"),
        "bitwise_right_shift": ("int32", *_INT8, "bool"),
        "cat": _MOST,
        "clamp": _MOST,
        "clone": (*_FLOATS, "float8_e4m3fn", "int32", *_INT8, "bool"),
        "div": (*_FLOATS, "int32", *_INT8),
        "eq": _MOST,
        "full": _MOST,
        "ge": (*_FLOATS, "float8_e4m3fn", "int64", "int32"),
        "gt": (*_FLOATS, "float8_e4m3fn", "int64", "int32", *_INT8),
        "index_select": _MOST,
        "lt": (*_FLOATS, "float8_e4m3fn", "int64", "int32", *_INT8),
        "mm": _FLOATS,
        "mul": _FLOATS,
        "neg": _FLOATS,
        "pad": ("float32", "bfloat16", "float8_e4m3fn"),
        "reciprocal": _FLOATS,
        "round": _FLOATS,
        "sub": _FLOATS,
        "to": _MOST,
        "where": (*_FLOATS, "int64", "int32", "bool"),
    }
)
"""Operators of torch and the types of their tensors: those of docs/Pytorch_Operators.rst whose cell says Yes (its INT8 is any byte), and bool as the condition of
`where`. No product has INT8."""

SAME: Mapping[str, str] = MappingProxyType(
    {
        "__lshift__": "bitwise_left_shift", "__rshift__": "bitwise_right_shift", "_to_copy": "to", "clamp_min": "clamp", "constant_pad_nd": "pad",
        "new_full": "full", "new_zeros": "full", "scalar_tensor": "full",
    }
)  # fmt: skip
"""What torch's dispatcher calls some of them."""

VIEWS = frozenset(
    {
        "_unsafe_view",
        "alias",
        "detach",
        "expand",
        "new_empty",
        "select",
        "slice",
        "split",
        "t",
        "transpose",
        "unsqueeze",
        "view",
    }
)
"""Operators that compute nothing, for any type; `view` with another type among them (hpu_op.yaml: view.dtype)."""
