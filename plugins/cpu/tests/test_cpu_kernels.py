"""The CPU's kernels against the definition: float64 products with QuantizedTensor.dequantize()."""

import pytest
import torch

import qcore
from qcore.bits import pack
from qcore.discovery import registry
from qcore.elements import Block, Group, PerChannel, scale_shape
from qcore.kernel import Kernel
from qcore.kernels.activations import quantize_input
from qcore.scheme import Scheme, integer_weight, weight_only
from qcore.select import LayerRequest, select
from qcore.tensor import LayerTensors, QuantizedTensor
from qcore_cpu.devices import cpu_device

KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel, _ in registry().kernels}
ROUNDED = 0.006
"""Relative error of a product whose scales, activations and result are rounded to bfloat16 (2^-9 each)."""


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """A single output that cancels is relatively far off, whatever runs it: numbers are those that were looked at."""
    torch.manual_seed(0)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def integers(scheme: Scheme, rows: int, columns: int) -> QuantizedTensor:
    weight = scheme.weight
    stored = torch.randint(0, 1 << weight.bits, (rows, columns), dtype=torch.uint8)
    codes = (stored ^ 0x80).view(torch.int8) if weight.bits == 8 and weight.zero is None else pack(stored, weight.bits)
    scale = (torch.rand(scale_shape(weight.scales[0].granularity, rows, columns)) * 0.01 + 0.001).to(torch.float16)
    zeros = torch.randint(0, 1 << weight.bits, scale.shape, dtype=torch.uint8) if weight.zero else None
    index = None
    if weight.ordered:
        grid = weight.scales[0].granularity
        assert isinstance(grid, Group)
        index = (torch.arange(columns) // grid.size)[torch.randperm(columns)].int()
    return QuantizedTensor(scheme, (rows, columns), codes, (scale,), zeros, index)


def check(name: str, layer: LayerTensors, dtype: torch.dtype, bound: float) -> None:
    """The kernel that selection finds under this name, on several batch shapes."""
    weight = layer.weight
    request = LayerRequest("linear", weight.scheme, weight.shape, str(dtype).removeprefix("torch."), kernel=name)  # type: ignore[arg-type]
    selection = select(request, "x86_cpu", registry().kernels, cpu_device())
    assert selection.kernel is not None, selection.refusal
    packed = selection.kernel.load().from_layer(layer, dtype)
    matrix = weight.dequantize().double()
    for shape in ((1,), (3,), (2, 5), (17,), (0,), (1, 1)):
        x = torch.randn(*shape, weight.shape[1]).to(dtype)
        scheme = weight.scheme.input
        given = x if scheme is None else quantize_input(x.float(), scheme, layer.input_scale, layer.input_zero)
        got = packed(x)
        assert got.shape == (*shape, weight.shape[0]) and got.dtype == dtype
        if x.numel():
            assert relative_error(got, given.double() @ matrix.t()) < bound


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(("group_size", "columns"), [(32, 96), (64, 192), (128, 256), (256, 512)])
@pytest.mark.parametrize("rows", [16, 80, 272])
def test_int4(symmetric: bool, ordered: bool, group_size: int, columns: int, rows: int) -> None:
    scheme = Scheme(integer_weight(4, Group(group_size), symmetric=symmetric, ordered=ordered))
    check("torch_int4pack", LayerTensors(integers(scheme, rows, columns)), torch.bfloat16, ROUNDED)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q4_k"])
@pytest.mark.parametrize("rows", [16, 80, 272])
def test_gguf_int4(kind: str, rows: int) -> None:
    from qcore.blocks.types import BLOCK_TYPES

    block, columns = BLOCK_TYPES[kind], 512
    codes = torch.randint(0, 256, (rows, columns // block.elements, block.nbytes), dtype=torch.uint8)
    for at in (0, 2)[: 1 if kind == "q4_0" else 2]:  # finite scales and minima of real files' size
        values = (torch.randn(rows, codes.shape[1], 1) * 0.01).to(torch.float16)
        codes[..., at : at + 2] = values.view(torch.uint8)
    weight = QuantizedTensor(weight_only(Block(kind)), (rows, columns), codes.flatten(1))
    check("torch_int4pack_gguf", LayerTensors(weight), torch.bfloat16, 3 * ROUNDED)


@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (80, 96), (33, 64), (1, 32), (256, 512)])
def test_int8_weight_only(rows: int, columns: int) -> None:
    scheme = Scheme(integer_weight(8, PerChannel(), symmetric=True))
    check("torch_int8pack", LayerTensors(integers(scheme, rows, columns)), torch.bfloat16, ROUNDED)


def test_shapes_that_an_operator_would_read_past_are_refused() -> None:
    scheme = Scheme(integer_weight(8, PerChannel(), symmetric=True))
    selection = select(
        LayerRequest("linear", scheme, (33, 65), "bfloat16"), "x86_cpu", registry().kernels, cpu_device()
    )
    refusals = {candidate.kernel.name: candidate.refusal for candidate in selection.candidates}
    assert refusals["torch_int8pack"] is not None and refusals["torch_int8pack"].code == "shape-unsupported"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (80, 96), (33, 65), (256, 512)])
def test_int8_activations(dtype: torch.dtype, static: bool, rows: int, columns: int) -> None:
    scheme = Scheme.parse("W8A8-int8-static" if static else "W8A8-int8-dyn")
    weight = integers(Scheme(scheme.weight), rows, columns)
    weight = QuantizedTensor(scheme, weight.shape, weight.codes, weight.scales)
    layer = LayerTensors(weight, input_scale=torch.tensor([0.03]) if static else None)
    # Exact but for the last bit, and for x on the border between two codes.
    check("onednn_int8", layer, dtype, {torch.bfloat16: 0.004, torch.float16: 0.001}[dtype])


def test_act_order_with_uneven_groups_gives_way_to_another_kernel() -> None:
    scheme = Scheme(integer_weight(4, Group(32), symmetric=True, ordered=True))
    weight = integers(scheme, 16, 64)
    assert weight.index is not None
    weight.index[:] = torch.tensor([0] * 40 + [1] * 24)
    with pytest.raises(qcore.Refused, match="shape-unsupported"):
        KERNELS["torch_int4pack"].load().from_layer(LayerTensors(weight), torch.bfloat16)


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_every_kernel_has_an_implementation_and_a_note(name: str) -> None:
    kernel = KERNELS[name]
    assert callable(kernel.load().from_layer) and kernel.note


def test_inputs_may_be_strided_and_stay_as_they_are() -> None:
    """Inputs are neither changed nor required to be contiguous."""
    weight = integers(Scheme(integer_weight(4, Group(32), symmetric=True)), 16, 64)
    packed = KERNELS["torch_int4pack"].load().from_layer(LayerTensors(weight), torch.bfloat16)
    wide = torch.randn(4, 128, dtype=torch.bfloat16)
    x, before = wide[:, ::2], wide.clone()
    assert torch.equal(packed(x), packed(x.contiguous())) and torch.equal(wide, before)
