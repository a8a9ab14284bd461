"""The kernels whose operators torch has on a CPU too, against the definition; all of them are judged on a GPU by the suite."""

import pytest
import torch

from qcore.accuracy import error_bound, worst_error
from qcore.kernels.activations import quantize_input
from qcore.scheme import Scheme
from qcore.testing.layers import random_layer
from qcore_cuda.plugin import qcore_kernels

KERNELS = {kernel.name: kernel for kernel in qcore_kernels()}


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("cublas_int8", "W8A8-int8-dyn"),
        ("cublas_int8", "W8A8-int8-static"),
        ("cublas_fp8", "W8A8-fp8-dyn"),
        ("cublas_fp8", "W8A8-fp8-static"),
    ],
)
@pytest.mark.parametrize("rows", [0, 1, 17, 40])
def test_eight_bits_by_eight(name: str, scheme: str, rows: int) -> None:
    kernel, layer = KERNELS[name], random_layer(Scheme.parse(scheme), 48, 64)
    assert kernel.accepts.refuse(layer.weight.scheme) is None and layer.weight.scheme.input is not None
    x = torch.randn(rows, 64).to(torch.bfloat16)
    given = quantize_input(x.float(), layer.weight.scheme.input, layer.input_scale, layer.input_zero)
    got = kernel.load().from_layer(layer, torch.bfloat16)(x[:, None])
    assert got.shape == (rows, 1, 48) and got.dtype == torch.bfloat16
    wanted = given.double() @ layer.weight.dequantize().double().t()
    assert worst_error(got[:, 0], wanted) < error_bound(kernel, layer.weight.scheme, "bfloat16")


def test_rows_name_what_exists() -> None:
    for kernel in KERNELS.values():
        assert callable(kernel.load().from_layer) and kernel.features
