"""ggml's blocks as plain codes and scales: the same numbers, and what other formats make of them."""

from pathlib import Path

import pytest
import torch

import qcore
from qcore.blocks.types import BLOCK_TYPES
from qcore.convert import convert
from qcore.elements import Block
from qcore.gguf.make import save_gguf
from qcore.layouts.unblocked import unblocked, unblocked_scheme
from qcore.refusal import Refused
from qcore.scheme import Scheme, weight_only
from qcore.tensor import QuantizedTensor

BASE = Path(__file__).parent / "golden" / "base"


def random_blocks(kind: str, rows: int, count: int) -> torch.Tensor:
    """Any codes and any scales of runs, under ordinary scales of blocks."""
    block = BLOCK_TYPES[kind]
    blocks = torch.randint(0, 256, (rows * count, block.nbytes), dtype=torch.uint8)
    for offset, size, number in block.fields:
        if size == 2 and number <= 2 and kind != "iq4_xs":
            halves = (torch.rand(rows * count, number) * 0.1 + 0.001).half()
            blocks[:, offset : offset + 2 * number] = halves.view(torch.uint8)
    if kind == "iq4_xs":
        blocks[:, :2] = torch.rand(rows * count, 1).half().view(torch.uint8)
    if kind == "iq1_m":  # its scale's digits are spread over words
        blocks[:, 49::2] = blocks[:, 49::2] & 15 | torch.tensor([0x00, 0x40, 0x20, 0x20], dtype=torch.uint8)
    if kind == "mxfp4":
        blocks[:, 0] = torch.randint(90, 150, (rows * count,), dtype=torch.uint8)
    return blocks.view(rows, -1)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_the_numbers_stay(kind: str) -> None:
    torch.manual_seed(0)
    block = BLOCK_TYPES[kind]
    weight = QuantizedTensor(weight_only(Block(kind)), (6, 3 * block.elements), random_blocks(kind, 6, 3))
    plain = unblocked(weight)
    assert plain.scheme == unblocked_scheme(weight.scheme) and not isinstance(plain.scheme.weight.element, Block)
    assert weight.dequantize().isfinite().all() and weight.dequantize().any()
    assert torch.equal(plain.dequantize(), weight.dequantize())
    assert unblocked(plain) is plain


@pytest.mark.parametrize(
    ("kind", "format", "scheme"),
    [
        ("q4_0", "gptq", "W4A16-g32-sym"), ("q8_0", "gptq", "W8A16-g32-sym"), ("q5_0", "gptq", "W5A16-g32-sym"),
        ("q4_0", "awq", "W4A16-g32-asym"), ("mxfp4", "compressed-tensors", "W4A16-mxfp4"),
        ("q6_k", "compressed-tensors", "W6A16-g16-sym"), ("q8_0", "compressed-tensors", "W8A16-g32-sym"),
        ("q3_k", "compressed-tensors", "W3A16-g16-sym"), ("tq2_0", "compressed-tensors", "W2A16-g256-asym"),
    ],
)  # fmt: skip
def test_gguf_files_become_other_formats(tmp_path: Path, kind: str, format: str, scheme: str) -> None:
    file = save_gguf(qcore.open_checkpoint(BASE), tmp_path / "model.gguf", kind, overrides={"": kind})
    source, written = qcore.open_checkpoint(file), qcore.open_checkpoint(convert(file, format, tmp_path / "out"))
    assert written.plan["model.layers.1.mlp.up_proj"] == Scheme.parse(scheme)
    for module in source.layers:
        assert torch.equal(source.dequantize(module), written.dequantize(module)), module
    tokens = torch.arange(8)[None]
    with torch.inference_mode():
        logits = [qcore.load_model(c, dtype=torch.float32)(tokens).logits for c in (source, written)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)


def test_minima_have_no_place_in_gptq(tmp_path: Path) -> None:
    file = save_gguf(qcore.open_checkpoint(BASE), tmp_path / "model.gguf", "q4_k")
    with pytest.raises(Refused, match="not-representable"):
        convert(file, "gptq", tmp_path / "out")
    assert not (tmp_path / "out").exists()
