"""ggml's blocks from numbers: bit for bit as gguf-py makes them where it does, and with bounded errors in every type."""

import gguf
import numpy as np
import pytest
import torch

from qcore.blocks.dequantize import dequantize_blocks
from qcore.blocks.quantize import quantize_blocks
from qcore.blocks.types import BLOCK_TYPES

GGUF_PY_WRITES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0", "mxfp4")
GGUF_PY_READS = tuple(name for name in BLOCK_TYPES if name not in ("q1_0", "q2_0"))

# Bounds on the mean squared error of normally distributed weights, relative to their mean square. None is above what
# ggml 0.20.2's own encoders reach on the same weights, with an importance of one everywhere where they take any.
BOUNDS = {
    "q4_0": 0.0075, "q4_1": 0.0062, "q5_0": 0.0019, "q5_1": 0.0015, "q8_0": 3e-5, "tq1_0": 0.68, "tq2_0": 0.68,
    "mxfp4": 0.0134, "nvfp4": 0.0136, "q1_0": 0.365, "q2_0": 0.124,
    "q2_k": 0.0732, "q3_k": 0.0210, "q4_k": 0.00506, "q5_k": 0.00127, "q6_k": 0.000311,
    "iq1_s": 0.210, "iq1_m": 0.182, "iq2_xxs": 0.115, "iq2_xs": 0.087, "iq2_s": 0.0605,
    "iq3_xxs": 0.0333, "iq3_s": 0.0180, "iq4_nl": 0.00562, "iq4_xs": 0.00577,
}  # fmt: skip

# Values that a type holds exactly: encoding them again gives them back.
IDEMPOTENT = ("q4_0", "q5_0", "q8_0", "tq1_0", "tq2_0", "q1_0", "q2_0", "iq4_nl", "mxfp4")


def weights(rows: int = 16, columns: int = 512, seed: int = 0) -> torch.Tensor:
    """Normally distributed, each row of another size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 1, rows).unsqueeze(1)


def importance(columns: int = 512) -> torch.Tensor:
    return torch.randn(columns, generator=torch.Generator().manual_seed(1)).mul(1.5).exp()


def error(name: str, rows: torch.Tensor, blocks: torch.Tensor, weight: torch.Tensor | float = 1.0) -> float:
    """Relative to the rows' own mean squares."""
    size = rows.square().mean(1, keepdim=True)
    return float(((dequantize_blocks(name, blocks) - rows).square() * weight / size).mean())


def as_gguf_py(rows: torch.Tensor, name: str) -> torch.Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.quantize(rows.numpy(), gguf.GGMLQuantizationType[name.upper()]))


@pytest.mark.parametrize("name", GGUF_PY_WRITES)
def test_simple_types_are_encoded_as_gguf_py_encodes_them(name: str) -> None:
    rows = weights(64)
    whole = rows.mul(4).round() + 0.0  # which of two zeros is the least, numpy and torch do not agree on
    for case in (rows, rows.bfloat16().float(), whole, torch.zeros(2, 512), rows.abs(), -rows.abs()):
        assert torch.equal(quantize_blocks(name, case), as_gguf_py(case, name))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_errors_are_bounded(name: str) -> None:
    rows = weights()
    blocks = quantize_blocks(name, rows)
    block = BLOCK_TYPES[name]
    assert blocks.dtype == torch.uint8 and blocks.shape == (16, 512 // block.elements * block.nbytes)
    assert error(name, rows, blocks) < BOUNDS[name]


@pytest.mark.parametrize("name", GGUF_PY_READS)
def test_gguf_py_reads_the_same_numbers(name: str) -> None:
    blocks = quantize_blocks(name, weights(4), importance())
    read = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name.upper()])
    assert torch.equal(torch.from_numpy(read), dequantize_blocks(name, blocks))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_importance_lowers_the_weighted_error(name: str) -> None:
    rows, weight = weights(), importance()
    plain, weighted = quantize_blocks(name, rows), quantize_blocks(name, rows, weight)
    assert error(name, rows, weighted, weight) < error(name, rows, plain, weight)


@pytest.mark.parametrize("name", IDEMPOTENT)
@pytest.mark.parametrize("weight", [None, torch.ones(512)], ids=["plain", "importance"])
def test_numbers_that_a_type_holds_come_back(name: str, weight: torch.Tensor | None) -> None:
    rows = weights(8)
    values = dequantize_blocks(name, quantize_blocks(name, rows, weight))
    again = dequantize_blocks(name, quantize_blocks(name, values, weight))
    torch.testing.assert_close(again, values, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize("weight", [None, torch.ones(512), torch.zeros(512)], ids=["plain", "ones", "zeros"])
def test_extreme_rows_give_finite_numbers(name: str, weight: torch.Tensor | None) -> None:
    rows = torch.zeros(12, 512)
    rows[1, 3], rows[2, 3], rows[3, 3], rows[4, 3] = 1e-45, 1e-30, 3e38, -3e38
    rows[5], rows[6], rows[7] = 1.0, -1e-7, torch.linspace(-1, 1, 512) * 3e38
    rows[8], rows[9], rows[10] = weights(1)[0] * 1e-30, weights(1)[0] * 10, 65504.0
    rows[11, 256:] = weights(1, 256)[0]
    values = dequantize_blocks(name, quantize_blocks(name, rows, weight))
    assert values.isfinite().all()
    assert not values[0].any() and not values[11, :256].any()
    assert error(name, rows[9:10], quantize_blocks(name, rows[9:10], weight)) < 2.5 * BOUNDS[name]


@pytest.mark.parametrize("name", ("q4_k", "iq3_s", "nvfp4", "q8_0"))
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    """However many are encoded at once: more than a piece of them here."""
    rows = weights(1100, 256)
    blocks = quantize_blocks(name, rows, importance(256))
    assert torch.equal(blocks[1030:1040], quantize_blocks(name, rows[1030:1040], importance(256)))


def test_half_precision_rows_are_taken() -> None:
    rows = weights(2).bfloat16()
    assert torch.equal(quantize_blocks("q4_k", rows), quantize_blocks("q4_k", rows.float()))


@pytest.mark.parametrize("name", ("q4_0", "q4_k", "iq2_s"))
def test_no_rows_give_no_blocks(name: str) -> None:
    assert quantize_blocks(name, torch.zeros(0, 512)).shape[0] == 0
    assert quantize_blocks(name, torch.zeros(3, 0), torch.zeros(0)).shape == (3, 0)


@pytest.mark.parametrize(
    ("name", "rows", "weight", "message"),
    [
        ("q4_9", torch.zeros(1, 32), None, "unknown block type"),
        ("q4_0", torch.zeros(32), None, r"\[R, K\]"),
        ("q4_0", torch.zeros(1, 32, dtype=torch.int32), None, "floating point"),
        ("q4_k", torch.zeros(1, 288), None, "whole q4_k blocks of 256"),
        ("q4_0", torch.full((1, 32), torch.nan), None, "infinite or NaN"),
        ("q4_0", torch.full((1, 32), torch.inf), None, "infinite or NaN"),
        ("q4_0", torch.zeros(1, 32), torch.ones(64), "one value a column"),
        ("q4_0", torch.zeros(1, 32), -torch.ones(32), "not negative"),
        ("q4_0", torch.zeros(1, 32), torch.full((32,), torch.nan), "finite"),
    ],
)
def test_wrong_arguments_are_refused(name: str, rows: torch.Tensor, weight: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_blocks(name, rows, weight)
