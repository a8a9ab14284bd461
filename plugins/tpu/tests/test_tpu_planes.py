"""Repacked weights, without jax: what the parts stand for, taken apart again in torch, is the weight."""

from __future__ import annotations

import math

import pytest
import torch

from qcore.kernel import Kernel
from qcore.scheme import Scheme
from qcore.tensor import QuantizedTensor, float_table
from qcore.testing.cases import claimed, row_schemes
from qcore.testing.checks import smallest_shape
from qcore.testing.layers import random_layer
from qcore_tpu.kernels.form import LANES, Form, block_of, widths
from qcore_tpu.kernels.linear import PlanesLinear
from qcore_tpu.kernels.planes import packed
from qcore_tpu.plugin import qcore_kernels

LINEARS = [kernel for kernel in qcore_kernels() if kernel.op == "linear"]
CASES = [(kernel, scheme) for kernel in LINEARS for scheme in claimed(kernel, row_schemes())]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 203, 576, 2816])
def test_codes_come_back(bits: int, columns: int) -> None:
    form = Form(bits, block_of(columns, bits, 0))
    codes = torch.randint(0, 1 << bits, (37, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    planes = packed(codes.split(16), form, 37, columns)
    assert len(planes) * 8 // bits % form.block == 0
    assert torch.equal(_codes(planes, form)[:columns].t(), codes)


@pytest.mark.parametrize("group", [0, 16, 32, 64, 96, 128, 160, 192, 256, 512, 1024])
def test_blocks_are_whole_groups_and_planes_and_hardly_longer_than_the_weight(group: int) -> None:
    for bits in range(1, 9):
        for columns in (576, 1024, 1536, 2048, 4096, 8960, 11008, 14336):
            if group and columns % group:
                continue
            block = block_of(columns, bits, group)
            least = math.lcm(256 // min(widths(bits)), group or 1)
            assert block % least == 0 and block <= max(1024, least)
            padded = -(-columns // block) * block
            assert padded - columns < 256 or group > 128


@pytest.mark.parametrize(("kernel", "scheme"), CASES, ids=[f"{kernel.name}-{scheme}" for kernel, scheme in CASES])
@pytest.mark.parametrize("times", [1, 5])
def test_parts_are_the_weight(kernel: Kernel, scheme: Scheme, times: int) -> None:
    rows, columns = smallest_shape(kernel, scheme)
    layer = random_layer(scheme, rows * 37, columns * times)
    made = kernel.load().from_layer(layer, torch.bfloat16)
    assert isinstance(made, PlanesLinear)
    found = _weight(made, layer.weight)
    assert len(found) % LANES == 0 and made.outputs == rows * 37
    assert torch.allclose(found[: made.outputs], layer.weight.dequantize(), rtol=1e-6, atol=1e-9)
    assert (made.form.rounding is not None) == (scheme.input is not None)


def _weight(made: PlanesLinear, weight: QuantizedTensor) -> torch.Tensor:
    """float32 [N, K], with the rows that fill up."""
    form, parts = made.form, dict(made.named_buffers())
    if form.tuples:
        return _tuples(parts, form)
    codes = _codes(parts["codes"], form).long()
    if form.table:
        values = parts["table"][0][codes]
    elif form.exponent:
        values = _table(form)[codes]
    else:
        values = (codes - form.center).float()
    if form.group:
        scales = _spread(parts, "scales", "coarse", form)
        if form.zero == "subtracted":
            values = values - _spread(parts, "zeros", "coarse_zeros", form)
        values = values * scales
        if form.zero == "added":
            values = values + _spread(parts, "zeros", "coarse_zeros", form)
    values = values * parts.get("tail", torch.ones(1))
    values = values[: weight.shape[1]].t()
    if "order" not in parts:
        return values
    back = torch.empty_like(values)
    back[:, parts["order"].long()] = values
    return back


def _codes(planes: torch.Tensor, form: Form) -> torch.Tensor:
    """[K, N]"""
    found = []
    for block in planes.split(form.byte_rows(form.block)):
        codes, first, below = 0, 0, 0
        for width in form.widths:
            plane = block[first : first + form.block * width // 8]
            parts = [plane if width == 8 else plane >> shift & (1 << width) - 1 for shift in range(0, 8, width)]
            codes = codes | torch.cat(parts) << below if below else torch.cat(parts)
            first, below = first + len(plane), below + width
        found.append(codes)
    return torch.cat(found)


def _table(form: Form) -> torch.Tensor:
    """Values of every code of a small float."""
    plain = (1 << (form.exponent - 1)) - 1
    return float_table(f"e{form.exponent}m{form.bits - 1 - form.exponent}") * 2.0 ** (plain - form.bias)


def _spread(parts: dict[str, torch.Tensor], name: str, coarse: str, form: Form) -> torch.Tensor:
    """float32 [K, N]"""
    values = parts[name].float().flatten(0, 1).repeat_interleave(form.group, 0)
    if coarse in parts:
        values = values * parts[coarse].flatten(0, 1).repeat_interleave(form.coarse, 0)
    return values


def _tuples(parts: dict[str, torch.Tensor], form: Form) -> torch.Tensor:
    """float32 [N, K], of weights that are looked up."""
    groups, entries = form.block // form.group, parts["grid"].flatten()
    low, high = parts["codes"].int().unflatten(0, (-1, 2, form.group // 8, groups)).unbind(1)
    words = low | high << 8  # [blocks, words of a group, groups, N]
    codes = entries[words & (1 << form.tuples) - 1].unsqueeze(-1) >> torch.arange(0, 16, 2, dtype=torch.int32) & 3
    signs = (words >> form.tuples).unsqueeze(-1) >> torch.arange(8, dtype=torch.int32) & 1
    if form.tuples == 11:
        values = 8 * (codes - 1) + 1 - 2 * signs[..., :1]
    else:
        if form.tuples == 9:
            signs[..., 7] = signs[..., :7].sum(-1) & 1
        values = torch.tensor([8, 25, 43])[codes] * (1 - 2 * signs)
    columns = values.permute(0, 2, 1, 4, 3).flatten(0, 3)
    scales = parts["scales"].float().flatten(0, 1).repeat_interleave(form.group, 0)
    return (columns * scales * parts["coarse"].flatten(0, 1).repeat_interleave(form.coarse, 0)).t()
