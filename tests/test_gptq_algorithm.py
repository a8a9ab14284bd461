"""GPTQ: the error of outputs against rounding to nearest and the published algorithm, every order of columns, and inputs that a text leaves out."""

from dataclasses import replace

import pytest
import torch

from qcore.algorithms.gptq import gptq
from qcore.algorithms.grids import fit, grid_of
from qcore.algorithms.rtn import rtn
from qcore.algorithms.rtn_mse import rtn_mse
from qcore.algorithms.seen import DAMPING, Seen, Watch
from qcore.scheme import Scheme

ROWS, COLUMNS = 96, 384
SCHEMES = ("W4A16-g128-sym", "W4A16-g32-asym", "W3A16-g64-sym", "W2A16-g64-asym", "W8A16-channel-sym", "W8A16-g128-asym", "W4A16-channel-asym", "W8A8-int8-dyn", "W4A16-g192-sym")  # fmt: skip


def weight(rows: int = ROWS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, COLUMNS, generator=generator) * torch.rand(rows, 1, generator=generator)


def seen(rows: int = 4096, columns: int = COLUMNS) -> Seen:
    """Inputs whose columns go together, as those of models do, and some of which are large."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)
    sizes = 1 + 5 * torch.rand(columns, generator=generator) ** 8
    watch = Watch(columns)
    for part in (torch.randn(rows, columns, generator=generator) @ mixed.T * sizes).split(1000):
        watch.add(part)
    return watch.seen()


def published(weights: torch.Tensor, scheme: Scheme, inputs: Seen) -> torch.Tensor:
    """GPTQ as its paper has it, on the search of scales that ours begins with; columns in their order."""
    size = getattr(scheme.weight.scales[0].granularity, "size", weights.shape[1])
    gram = inputs.gram + DAMPING * inputs.gram.diagonal().mean() * torch.eye(weights.shape[1])
    after = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    left, made, grid = weights.clone(), torch.empty_like(weights), grid_of(scheme.weight, weights)
    for column in range(weights.shape[1]):
        if column % size == 0:
            group = slice(column, column + size)
            now = fit(grid, left[:, group].T, gram.diagonal()[group])
        made[:, column] = (grid.nearest(left[:, column], now) * now.scale)[0]
        error = (left[:, column] - made[:, column]) / after[column, column]
        left[:, column:] -= error[:, None] * after[column, column:]
    return made


@pytest.mark.parametrize("words", SCHEMES)
def test_outputs_are_nearer_than_the_published_algorithm_s(words: str) -> None:
    scheme, weights, inputs = Scheme.parse(words), weight(), seen()
    made = gptq(weights, scheme, inputs)
    error = inputs.error(weights, made.dequantize())
    assert made.scheme == scheme and error < 0.85 * inputs.error(weights, published(weights, scheme, inputs))
    assert error < 0.2 * inputs.error(weights, rtn(weights, scheme).dequantize())


@pytest.mark.parametrize("words", SCHEMES)
def test_scales_are_searched_for(words: str) -> None:
    """Of weights that are normally distributed the nearest codes under the scale of the largest are far from best."""
    scheme, weights = Scheme.parse(words), weight()
    nearest, searched = (part(weights, scheme).dequantize() - weights for part in (rtn, rtn_mse))
    assert searched.square().mean() < (0.999 if scheme.weight.bits == 8 else 0.95) * nearest.square().mean()
    assert (searched.square().sum(1) <= 1.05 * nearest.square().sum(1)).all()


def test_an_index_lets_all_columns_be_ordered() -> None:
    """Groups have the columns that matter alike; each column's is in the index."""
    scheme, inputs = Scheme.parse("W4A16-g64-sym-actorder"), seen()
    made = gptq(weight(), scheme, inputs)
    assert made.index is not None and torch.equal(made.index.bincount(), torch.full((COLUMNS // 64,), 64))
    sizes = inputs.gram.diagonal()
    assert all(sizes[made.index == group].min() >= sizes[made.index == group + 1].max() for group in range(5))
    plain = gptq(weight(), Scheme.parse("W4A16-g64-sym"), inputs)
    assert inputs.error(weight(), made.dequantize()) < inputs.error(weight(), plain.dequantize())


def test_columns_that_no_text_has_are_rounded_to_nearest() -> None:
    inputs = seen()
    inputs.gram[5], inputs.gram[:, 5] = 0, 0
    made = gptq(weight(), Scheme.parse("W8A16-channel-sym"), inputs).dequantize()
    assert (made[:, 5] - weight()[:, 5]).abs().amax() <= weight().abs().amax() / 254
    nothing = replace(Seen.nothing(COLUMNS), gram=torch.zeros(COLUMNS, COLUMNS))
    made = gptq(weight(), Scheme.parse("W8A16-channel-sym"), nothing).dequantize()
    assert (made - weight()).abs().amax() <= weight().abs().amax() / 127


def test_inputs_of_few_tokens_are_enough() -> None:
    """Their Gram matrix has no inverse."""
    inputs = seen(rows=3)
    for words in ("W4A16-g128-sym", "W2A16-g64-asym"):
        made = gptq(weight(), Scheme.parse(words), inputs).dequantize()
        assert made.isfinite().all() and inputs.error(weight(), made) < 0.01


def test_inputs_that_are_not_finite_end_in_an_error() -> None:
    inputs = seen()
    inputs.gram[3, 3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        gptq(weight(), Scheme.parse("W4A16-g128-sym"), inputs)


def test_zeros_and_single_rows() -> None:
    for rows in (1, 2):
        made = gptq(torch.zeros(rows, COLUMNS), Scheme.parse("W4A16-g128-asym"), seen())
        assert torch.equal(made.dequantize(), torch.zeros(rows, COLUMNS))
    assert seen().error(torch.zeros(2, COLUMNS), torch.zeros(2, COLUMNS)) == 0


def test_rows_are_made_each_for_itself() -> None:
    """So that layers with one input may be made as one."""
    scheme, inputs = Scheme.parse("W4A16-g64-asym"), seen()
    whole, part = gptq(weight(), scheme, inputs), gptq(weight()[32:64], scheme, inputs)
    assert inputs.error(part.dequantize(), whole.rows(32, 64).dequantize()) < 1e-3


@pytest.mark.parametrize("words", ["W4A16-g256-sym", "W4A16-g256-asym", "W4A16-g256-sym-actorder", "W3A16-g100-sym"])
def test_the_last_columns_are_a_group_of_their_own(words: str) -> None:
    scheme, inputs = Scheme.parse(words), seen()
    made = gptq(weight(), scheme, inputs)
    plain = rtn(weight(), Scheme.parse(words.removesuffix("-actorder")))
    assert made.scales[0].shape == plain.scales[0].shape == (ROWS, -(-COLUMNS // int(words.split("-")[1][1:])))
    assert inputs.error(weight(), made.dequantize()) < 0.2 * inputs.error(weight(), plain.dequantize())


@pytest.mark.parametrize(
    "words", ["FP8_DYNAMIC", "FP8", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "MXFP8", "W6A16-e3m2-g64"]
)
def test_floats_make_up_for_errors_too(words: str) -> None:
    scheme, inputs = Scheme.parse(words), seen()
    made = gptq(weight(), scheme, inputs)
    assert inputs.error(weight(), made.dequantize()) < 0.15 * inputs.error(weight(), rtn(weight(), scheme).dequantize())
