"""GPTQ: the error of outputs against rounding to nearest and the published algorithm, every order of columns, and inputs that a text leaves out."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from qcore.algorithms.gptq import gptq
from qcore.algorithms.grids import fit, grid_of
from qcore.algorithms.rtn import rtn
from qcore.algorithms.rtn_mse import rtn_mse
from qcore.algorithms.seen import Seen, Watch
from qcore.algorithms.symmetric import DAMPING, Factored, Symmetric
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
    inputs.sums.panels[0][5], inputs.sums.panels[0][:, 5] = 0, 0
    made = gptq(weight(), Scheme.parse("W8A16-channel-sym"), inputs).dequantize()
    assert (made[:, 5] - weight()[:, 5]).abs().amax() <= weight().abs().amax() / 254
    nothing = replace(Seen.nothing(COLUMNS), sums=Symmetric.zeros(COLUMNS))
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
    inputs.sums.panels[0][3, 3] = float("nan")
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


@pytest.mark.parametrize("size", [1, 100, 128, 300, 600])
def test_a_matrix_and_its_factor_in_the_room_of_one(size: int) -> None:
    """Beside torch's own algebra, for parts that lie across those that it is made of."""
    torch.manual_seed(size)
    rows = torch.randn(2 * size, size, dtype=torch.float64)
    held = Symmetric.zeros(size)
    held.add(rows.float())
    held.add(rows[:3].float(), 2.5)
    gram = rows.T @ rows + 2.5 * rows[:3].T @ rows[:3]
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4 * size, check_dtype=False)
    close(held.whole(), gram)
    close(held.diagonal(), gram.diagonal())
    x = torch.randn(5, size)
    assert held.size_of(x) == pytest.approx(float(((x.double() @ gram) * x).sum()), rel=1e-5)
    assert held.squares() == pytest.approx(float(gram.square().sum()), rel=1e-5)
    factors = torch.rand(size) + 0.5
    close(held.divided(factors).whole(), gram / factors / factors[:, None])
    before, order = held.whole(), torch.randperm(size)
    gram = gram[order[:, None], order] + DAMPING * gram.diagonal().mean() * torch.eye(size)
    upper = torch.linalg.cholesky(gram.flip(0, 1)).flip(0, 1)
    into, wanted = torch.ones(size, 3), torch.ones(size, 3)
    with Factored(held, order) as matrix:
        assert not held.panels
        for start in range(0, size, 90):
            part = slice(start, min(start + 90, size))
            close(matrix.within(part), gram[part, part])
            close(matrix.corner(part), upper[part, part])
            close(matrix.above(part), upper[: part.start, part])
            matrix.add_product(into, part, x[:3, part].T, -2.0)
            wanted -= 2 * gram[:, part].float() @ x[:3, part].T
            close(into, wanted)
        whole = slice(min(size - 1, 50), size)
        close(matrix.inside(whole, x[:, whole].T), gram[whole, whole].float() @ x[:, whole].T)
    torch.testing.assert_close(held.whole(), before, rtol=1e-6, atol=1e-6 * size)


def test_a_matrix_without_a_factor_gets_one() -> None:
    """More is added to its diagonal until it has; what is below that stays as it was."""
    held = Symmetric.zeros(300)
    held.panels[0][:2, :2] = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    held.panels[0][5, 299] = 0.25
    before, whole = held.whole(), slice(0, 300)
    with Factored(held, torch.arange(300)) as matrix:
        gram, upper = matrix.within(whole), matrix.corner(whole)
    assert torch.equal(held.whole(), before)
    assert gram[0, 1] == 3 and gram[5, 299] == 0.25 and 3 < gram[0, 0] < 7
    torch.testing.assert_close(upper @ upper.T, gram, rtol=1e-4, atol=1e-4)
