"""The operators of Intel's software that kernels here call: `torch.ops.hpu`, which torch has once it has loaded habana_frameworks, as it does by itself.

Sources: Intel's bridge to torch (github.com/HabanaAI/gaudi-pytorch-bridge: TORCH_LIBRARY(hpu, ...), hpu_ops/backend, tests/pytest_working), and those who
call them (vllm-hpu-extension, neural-compressor).
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
