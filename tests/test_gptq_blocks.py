"""GPTQ for ggml's blocks: that blocks stand for the numbers that were meant, and the error of outputs against importance alone, of every block type."""

import pytest
import torch

from qcore.algorithms.block_forms import FORMS, Scales
from qcore.algorithms.gptq import gptq
from qcore.algorithms.imatrix import imatrix
from qcore.algorithms.seen import Seen
from qcore.blocks.dequantize import dequantize_blocks
from qcore.blocks.quantize import quantize_blocks
from qcore.blocks.quantize_fit import Table
from qcore.blocks.types import BLOCK_TYPES
from qcore.elements import Block
from qcore.refusal import Refused
from qcore.scheme import Scheme, weight_only
from test_gptq_algorithm import seen

ENCODED = {"iq1_s": 0.95, "iq2_xs": 0.9, "iq3_s": 0.9, "mxfp4": 0.7, "nvfp4": 0.8, "tq1_0": 0.9, "q1_0": 0.98}
"""Types that are encoded a block at a time, and the parts of the error that may be left of importance's alone."""


def scheme(kind: str) -> Scheme:
    return weight_only(Block(kind))


def columns(kind: str) -> int:
    """Two blocks of the large types."""
    return max(2 * BLOCK_TYPES[kind].elements, 128)


def inputs(kind: str) -> Seen:
    return seen(columns=columns(kind))


def weights(kind: str, rows: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, columns(kind), generator=generator) * torch.rand(rows, 1, generator=generator)


@pytest.mark.parametrize("kind", FORMS)
def test_packed_blocks_stand_for_what_was_meant(kind: str) -> None:
    """All levels, all whole numbers that scales and minima may be, and float16's signs."""
    form, size, count = FORMS[kind], BLOCK_TYPES[kind].elements, 200
    generator = torch.Generator().manual_seed(0)

    def whole(steps: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, steps, shape, generator=generator).float()

    if isinstance(form.book, Table):
        levels = torch.tensor([float(level) for level in range(-127, 114) if form.book.nearest(torch.tensor([float(level)]), torch.ones(1)) == level])  # fmt: skip
    else:
        levels = torch.arange(form.book.low, form.book.high + 1).float()
    codes = levels[whole(len(levels), count, size).long()]
    d, dmin = (torch.randn(count, 1, generator=generator).half().float() for _ in range(2))
    if not form.signed:
        d, dmin = d.abs(), dmin.abs()
    scales = form.scales.multipliers(whole(form.scales.count, count, form.runs))
    minima = torch.zeros_like(scales)
    if form.minima is not None:
        minima = form.minima.multipliers(whole(form.minima.count, count, form.runs))
    blocks = form.pack(codes, Scales(d, dmin, scales, minima))
    assert blocks.dtype == torch.uint8 and tuple(blocks.shape) == (count, BLOCK_TYPES[kind].nbytes)
    meant = (d * scales)[..., None] * codes.view(count, form.runs, -1) - (dmin * minima)[..., None]
    assert torch.equal(dequantize_blocks(kind, blocks), meant.view(count, size))


@pytest.mark.parametrize("kind", [*FORMS, *ENCODED])
def test_outputs_are_nearer_than_by_importance_alone(kind: str) -> None:
    values, known = weights(kind), inputs(kind)
    made = gptq(values, scheme(kind), known)
    assert made.scheme == scheme(kind)
    error = known.error(values, made.dequantize())
    assert error < ENCODED.get(kind, 0.7) * known.error(values, imatrix(values, scheme(kind), known).dequantize())


@pytest.mark.parametrize("kind", ["q4_0", "q4_k", "iq3_s"])
def test_columns_that_go_together_with_none_are_rounded_to_nearest(kind: str) -> None:
    """Of inputs without any order nothing makes up for anything: what the search finds is at least as near as the encoder's."""
    values = weights(kind)
    known = Seen.nothing(columns(kind))
    made = gptq(values, scheme(kind), known).dequantize()
    plain = dequantize_blocks(kind, quantize_blocks(kind, values, torch.ones(columns(kind))))
    assert (made - values).square().sum() <= 1.001 * (plain - values).square().sum()


@pytest.mark.parametrize("kind", ["q5_1", "q2_k", "q6_k", "iq4_xs"])
def test_weights_that_blocks_hold_stay_as_they_are(kind: str) -> None:
    """Zeros, and one value in a column that no input has."""
    values = torch.zeros(3, columns(kind))
    values[1, 5] = 1.0
    known = inputs(kind)
    known.sums.panels[0][5], known.sums.panels[0][:, 5] = 0.0, 0.0
    made = gptq(values, scheme(kind), known).dequantize()
    assert made[0].abs().max() == 0 and made[2].abs().max() == 0
    assert made[1, 5] == pytest.approx(1.0, abs=0.05) and made.isfinite().all()


@pytest.mark.parametrize("kind", ["q4_0", "q3_k"])
def test_large_and_tiny_weights(kind: str) -> None:
    """float16 holds the scales of neither: they are cut to what it holds."""
    for size in (1e7, 1e-9):
        made = gptq(size * weights(kind, 4), scheme(kind), inputs(kind)).dequantize()
        assert made.isfinite().all() and made.abs().max() <= 130 * size


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    for algorithm in (gptq, imatrix):
        with pytest.raises(Refused, match="whole blocks"):
            algorithm(torch.ones(2, 96), scheme("q4_k"), Seen.nothing(96))
