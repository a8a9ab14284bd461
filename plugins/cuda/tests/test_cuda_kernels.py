"""The kernels whose operators torch has on a CPU too, against the definition; all of them are judged on a GPU by the suite."""

import pytest
import torch

import qcore.testing.interpreter  # noqa: F401  the first to import Triton
from qcore.accuracy import error_bound, worst_error
from qcore.kernels.activations import quantize_input
from qcore.scheme import Scheme
from qcore.testing.layers import random_layer
from qcore_cuda.kernels.int4 import Int4Linear
from qcore_cuda.plugin import qcore_kernels

KERNELS = {kernel.name: kernel for kernel in qcore_kernels()}


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("cublas_int8", "W8A8-int8-dyn"),
        ("cublas_int8", "W8A8-int8-static"),
        ("cublas_fp8", "W8A8-fp8-dyn"),
        ("cublas_fp8", "W8A8-fp8-static"),
        ("cublas_fp8_tensor", "W8A8-fp8-channel/fp8-tensor-dyn"),
        ("cublas_fp8_tensor", "W8A8-fp8-tensor/fp8-tensor-dyn-bound2.5"),
    ],
)
@pytest.mark.parametrize("rows", [0, 1, 17, 70])
def test_eight_bits_by_eight(name: str, scheme: str, rows: int) -> None:
    kernel, layer = KERNELS[name], random_layer(Scheme.parse(scheme), 48, 64)
    assert kernel.accepts.refuse(layer.weight.scheme) is None and layer.weight.scheme.input is not None
    x = torch.randn(rows, 64).to(torch.bfloat16)
    given = quantize_input(x.float(), layer.weight.scheme.input, layer.input_scale, layer.input_zero)
    got = kernel.load().from_layer(layer, torch.bfloat16)(x[:, None])
    assert got.shape == (rows, 1, 48) and got.dtype == torch.bfloat16
    wanted = given.double() @ layer.weight.dequantize().double().t()
    assert worst_error(got[:, 0], wanted) < error_bound(kernel, layer.weight.scheme, "bfloat16")


class Fragments(Int4Linear):
    """With a layout of its own: places are shuffled within every 8 rows by 16 tiles."""

    @classmethod
    def pack(cls, codes: torch.Tensor) -> torch.Tensor:
        tiles = next(n for n in (8, 4, 2) if codes.shape[1] % (16 * n) == 0)
        shuffled = torch.randperm(128 * tiles, generator=torch.Generator().manual_seed(tiles))
        blocks = (
            codes.view(len(codes) // 8, 8, -1, 16 * tiles).transpose(1, 2).flatten(2)[..., shuffled].to(torch.uint8)
        )
        return (blocks[..., ::2] | blocks[..., 1::2] << 4).view(torch.int32).view(*blocks.shape[:2], 32, tiles // 2)


@pytest.mark.parametrize("scheme", ["W4A16-g32-asym", "W4A16-g128-sym", "W4A16-g128-asym-actorder", "W4A16-gguf:q4_k"])
def test_int4_is_dequantized_from_whatever_layout_it_has(scheme: str) -> None:
    layer = random_layer(Scheme.parse(scheme), 272, 768 if "gguf" in scheme else 384)
    packed = Fragments.from_layer(layer, torch.bfloat16)
    x = torch.randn(70, layer.weight.shape[1]).to(torch.bfloat16)
    assert worst_error(packed(x), x.double() @ layer.weight.dequantize().double().t()) < 0.016
    assert packed(x[:0]).shape == (0, 272)


def test_rows_name_what_exists() -> None:
    for kernel in KERNELS.values():
        assert callable(kernel.load().from_layer)
        assert kernel.features or kernel.dtypes == ("float16",), f"{kernel.name} computes in what not every GPU has"
