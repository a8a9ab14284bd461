"""e4m3 x e4m3 by blocks of scales. Here a stand-in for cuBLASLt's product is as strict as torch and cuBLAS are; `QCORE_DEVICE=cuda:0` has a Hopper GPU compute."""

import os
from typing import Any

import pytest
import torch

if os.environ.get("QCORE_DEVICE", "cpu") == "cpu":
    import qcore.testing.interpreter  # noqa: F401  the first to import Triton

from qcore.accuracy import error_bound, worst_error
from qcore.discovery import registry
from qcore.kernels.activations import quantize_input
from qcore.platform import Device
from qcore.scheme import Scheme
from qcore.select import LayerRequest, select
from qcore.tensor import LayerTensors
from qcore.testing.layers import random_layer
from qcore_cuda.kernels import fp8_blocks
from qcore_cuda.kernels.fp8_blocks import BlocksLinear

KERNELS = registry().kernels
KERNEL = next(kernel for kernel, _ in KERNELS if kernel.name == "cublas_fp8_block128")
FEW_ROWS, TILED_ROWS = 4, 12
"""In the kernel's place, for Triton's interpreter takes seconds to round hundreds of rows."""
TILES, ROWS = "W8A8-fp8-block128", "W8A8-fp8-tile1x128/fp8-g128-dyn"
PLACE = torch.device(os.environ.get("QCORE_DEVICE", "cpu"))


def _laid(scales: torch.Tensor, shape: tuple[int, int], strides: tuple[int, int]) -> bool:
    """As torch asks it (ScaledBlas.cpp, check_size_stride): the stride along a dimension of one is nothing."""
    found = [stride if size > 1 else 0 for size, stride in zip(shape, scales.stride(), strict=True)]
    wanted = [stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True)]
    return scales.dtype == torch.float32 and scales.shape == shape and found == wanted and scales.data_ptr() % 16 == 0


def scaled_mm(
    x: torch.Tensor, weight: torch.Tensor, *, scale_a: torch.Tensor, scale_b: torch.Tensor, out_dtype: torch.dtype, use_fast_accum: bool
) -> torch.Tensor:  # fmt: skip
    """torch._scaled_mm with scales by blocks, by its definition: those of x by row and 128 columns, those of the weight too, or by tile."""
    (rows, columns), outputs, scales = x.shape, weight.shape[1], scale_b.t()
    groups = columns // 128
    assert x.dtype == weight.dtype == torch.float8_e4m3fn and x.is_contiguous() and weight.t().is_contiguous()
    assert rows % 4 == 0 and outputs % 128 == 0 and columns % 128 == 0
    assert out_dtype == torch.bfloat16 and not use_fast_accum
    assert _laid(scale_a, (rows, groups), (1, rows))
    if len(scales) == outputs:
        assert _laid(scales, (outputs, groups), (1, outputs))
    else:
        assert groups % 4 == 0, "versions of torch do not agree on these, and cuBLASLt would read others"
        assert _laid(scales, (outputs // 128, groups), (groups, 1))
        scales = scales.repeat_interleave(128, 0)
    left, right = (part.double().unflatten(1, (groups, 128)).transpose(0, 1) for part in (x, weight.t()))
    sums = left @ right.transpose(1, 2)
    return (sums * scale_a.t()[:, :, None] * scales.t()[:, None, :]).sum(0).to(out_dtype)


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each product that is cuBLASLt's, rows of x and scales along the weight's."""
    found: list[tuple[int, int]] = []
    real = scaled_mm if PLACE.type == "cpu" else torch._scaled_mm

    def counted(x: torch.Tensor, weight: torch.Tensor, *, scale_b: torch.Tensor, **more: Any) -> torch.Tensor:
        found.append((len(x), scale_b.shape[1]))
        out: torch.Tensor = real(x, weight, scale_b=scale_b, **more)
        return out

    monkeypatch.setattr(torch, "_scaled_mm", counted)
    monkeypatch.setattr(fp8_blocks, "FEW_ROWS", FEW_ROWS)
    monkeypatch.setattr(fp8_blocks, "TILED_ROWS", TILED_ROWS)
    return found


def _expected(layer: LayerTensors, x: torch.Tensor) -> torch.Tensor:
    assert layer.weight.scheme.input is not None
    return quantize_input(x.float(), layer.weight.scheme.input).double() @ layer.weight.dequantize().double().t()


def _packed(layer: LayerTensors) -> BlocksLinear:
    return BlocksLinear.from_layer(layer, torch.bfloat16).to(PLACE)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("scheme", "outputs", "columns", "by_tile"),
    [
        (TILES, 256, 512, True),
        (TILES, 128, 1024, True),
        (TILES, 256, 384, False),
        (TILES, 256, 128, False),
        (ROWS, 256, 512, False),
        (ROWS, 128, 128, False),
    ],
)
@pytest.mark.parametrize("rows", [0, 1, FEW_ROWS, FEW_ROWS + 1, TILED_ROWS + 1])
def test_products(
    scheme: str, outputs: int, columns: int, by_tile: bool, rows: int, calls: list[tuple[int, int]]
) -> None:
    """Few rows by Triton, more by cuBLASLt, filled up to a multiple of four."""
    layer = random_layer(Scheme.parse(scheme), outputs, columns)
    assert KERNEL.accepts.refuse(layer.weight.scheme) is None
    packed, x = _packed(layer), _random(rows, 1, columns)
    got = packed(x.to(PLACE)).cpu()
    assert got.shape == (rows, 1, outputs) and got.dtype == torch.bfloat16 and got.is_contiguous()
    assert worst_error(got[:, 0], _expected(layer, x[:, 0])) < error_bound(KERNEL, layer.weight.scheme, "bfloat16")
    assert calls == (
        [(-(-rows // 4) * 4, outputs // 128 if by_tile and rows >= TILED_ROWS else outputs)] if rows > FEW_ROWS else []
    )


@pytest.mark.parametrize("columns", [384, 512])
def test_what_is_no_number_stays_in_its_row(columns: int) -> None:
    """Of the weight and of the inputs."""
    layer = random_layer(Scheme.parse(TILES), 128, columns)
    layer.weight.codes.view(torch.uint8)[0, 5] = 0x7F
    x = _random(14, columns)
    x[12, 2] = float("nan")
    missing = _packed(layer)(x.to(PLACE)).cpu().isnan()
    assert missing[:, 0].all() and missing[12].all() and missing.sum() == 14 + 128 - 1


def test_experts_are_triton_s(calls: list[tuple[int, int]]) -> None:
    """Held as one, each row meets its own expert's weight."""
    layers = [random_layer(Scheme.parse(TILES), 128, 512, seed) for seed in range(3)]
    packed = [_packed(layer) for layer in layers]
    assert BlocksLinear.stackable(packed)
    x, chosen = _random(20, 512), torch.tensor([0] * 5 + [2] * 15, dtype=torch.int32)
    got = BlocksLinear.stacked(packed)(x.to(PLACE), chosen.to(PLACE)).cpu()
    wanted = torch.cat([_expected(layers[0], x[:5]), _expected(layers[2], x[5:])])
    assert worst_error(got, wanted) < error_bound(KERNEL, layers[0].weight.scheme, "bfloat16") and not calls


def test_a_compiled_graph_chooses_as_it_runs(calls: list[tuple[int, int]]) -> None:
    layer = random_layer(Scheme.parse(TILES), 128, 512)
    packed = _packed(layer)
    compiled = torch.compile(packed, backend="aot_eager", dynamic=True, fullgraph=True)
    for rows in (3, 10):
        x = _random(rows, 512).to(PLACE)
        assert torch.equal(compiled(x), packed(x))
    assert calls == [(12, 128), (12, 128)]


@pytest.mark.parametrize(
    ("shape", "toolkit", "expert", "taken"),
    [
        ((256, 384), "cuda12.9", False, KERNEL.name),
        ((256, 384), "cuda12.9", True, KERNEL.name),
        ((256, 384), "", False, "triton_fp8_block128"),
        ((192, 384), "cuda12.9", False, "triton_fp8_block128"),
        ((256, 320), "cuda12.9", False, "triton_fp8_block128"),
    ],
)
def test_it_is_taken_where_cublas_has_it(shape: tuple[int, int], toolkit: str, expert: bool, taken: str) -> None:
    gpu = Device("cuda:0", "hopper", "H200", "cuda:0", "sm_90", frozenset({"bf16", "fp8", toolkit}))
    asked = LayerRequest("linear", Scheme.parse(TILES), shape, "bfloat16", expert=expert)
    found = select(asked, "hopper", KERNELS, gpu)
    assert found.kernel is not None and found.kernel.name == taken
    if not toolkit:
        refusal = next(c.refusal for c in found.candidates if c.kernel is KERNEL)
        assert refusal is not None and refusal.fact == "H200 has no cuda12.9+fp8"
