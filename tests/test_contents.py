"""What a decoded layer may hold: each part spoiled in turn, under every kind of scheme."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import qcore
from qcore.bits import pack
from qcore.blocks.types import BLOCK_TYPES
from qcore.checkpoint.contents import check_layer
from qcore.elements import Block, scale_shape
from qcore.scheme import Scheme, weight_only
from qcore.tensor import TORCH_FLOATS, LayerTensors, QuantizedTensor
from test_compressed_tensors import MODULE, arguments, checkpoint
from variants import VARIANTS

ROWS, COLUMNS = 8, 64
NAN, INFINITY = float("nan"), float("inf")


def layer(text: str) -> LayerTensors:
    """A layer of ones."""
    scheme = Scheme.parse(text)
    weight = scheme.weight
    name = str(getattr(weight.element, "format", ""))
    codes = pack(torch.ones(ROWS, COLUMNS, dtype=torch.uint8), weight.bits)
    codes = torch.ones(ROWS, COLUMNS).to(TORCH_FLOATS[name]) if name in TORCH_FLOATS else codes
    if weight.bits == 8 and str(weight.element) == "int8":
        codes = codes.view(torch.int8)
    dtypes = {"float": torch.float32, "e8m0": torch.uint8, "e4m3fn": torch.float8_e4m3fn, "dynamic8": torch.uint8}
    scales = tuple(
        torch.ones(scale_shape(one.granularity, ROWS, COLUMNS)).to(dtypes[one.type]) for one in weight.scales
    )
    zeros = {None: None, "stored": torch.ones_like(scales[0]).to(torch.uint8), "float": torch.ones_like(scales[0])}
    given = scheme.input is not None and (not scheme.input.dynamic or len(scheme.input.scales) > 1)
    index = torch.zeros(COLUMNS, dtype=torch.int32) if weight.ordered else None
    table = torch.ones(16) if name == "" and "nf4" in text else None
    made = QuantizedTensor(scheme, (ROWS, COLUMNS), codes, scales, zeros[weight.zero], index, table)
    return LayerTensors(made, input_scale=torch.ones(1) if given else None)


def refused(spoiled: LayerTensors) -> str:
    with pytest.raises(qcore.Refused) as caught:
        check_layer(spoiled, file=Path("folder"), module="m")
    assert caught.value.refusal.tensor == "m" and caught.value.refusal.field
    return f"{caught.value.refusal.code} {caught.value.refusal.field}"


def spoiled(whole: LayerTensors, **parts: Any) -> LayerTensors:
    return replace(whole, weight=replace(whole.weight, **parts))


SIGNED = ("W4A16-g32-sym", "W4A16-g32-asym", "W8A8-int8-channel-sym/int8-token-sym-dyn", "W4A16-g32-sym-actorder")
UNSIGNED = ("W8A8-fp8-static", "W8A16-fp8-block128", "W4A16-nf4-g32", "W4A4-nvfp4")


@pytest.mark.parametrize("text", [*SIGNED, *UNSIGNED, "W4A4-mxfp4"])
def test_scales(text: str) -> None:
    whole = layer(text)
    assert check_layer(whole, file=Path(), module="m") is whole
    *_, coarse = whole.weight.scales
    fine = whole.weight.scales[0]

    def with_scale(value: float, place: int = 0) -> LayerTensors:
        scales = [scale.clone() for scale in whole.weight.scales]
        scales[place].flatten()[-1] = value
        return spoiled(whole, scales=tuple(scales))

    if fine.dtype == torch.uint8:
        assert refused(with_scale(255)) == "bad-content scales"
        return
    for value in (NAN, INFINITY) if fine.is_floating_point() and fine.element_size() > 1 else (NAN,):
        assert refused(with_scale(value)) == "bad-content scales"
    assert check_layer(with_scale(0.0), file=Path(), module="m"), "a row of zeros"
    if text in UNSIGNED:
        assert refused(with_scale(-1.0)) == "bad-content scales"
        assert refused(with_scale(-1.0, -1)) == "bad-content scales" and coarse is not None
    else:
        check_layer(with_scale(-1.0), file=Path(), module="m")  # AutoRound's


def test_zero_points_and_groups() -> None:
    whole = layer("W4A16-g32-asym")
    assert refused(spoiled(whole, zeros=torch.full((ROWS, 2), 16, dtype=torch.uint8))) == "bad-content zero points"
    assert refused(spoiled(whole, zeros=torch.ones(ROWS, 1, dtype=torch.uint8))) == "bad-shape zero points"
    ordered = layer("W4A16-g32-sym-actorder")
    for index in (2, -1):
        assert refused(spoiled(ordered, index=torch.full((COLUMNS,), index))) == "bad-content index"
    assert refused(spoiled(ordered, index=torch.zeros(COLUMNS + 1))) == "bad-shape index"


@pytest.mark.parametrize(
    ("name", "codes"), [("e4m3fn", (0x7F, 0xFF)), ("e5m2", (0x7C, 0x7D, 0xFC, 0xFF)), ("e4m3fnuz", (0x80,))]
)
def test_codes_that_are_no_number(name: str, codes: tuple[int, ...]) -> None:
    whole = layer(f"W8A16-{'fp8' if name == 'e4m3fn' else name}-channel")
    for code in range(256):
        held = whole.weight.codes.clone()
        held.view(torch.uint8)[-1, -1] = code
        if code in codes or not bool(held.float().isfinite().all()):
            assert refused(spoiled(whole, codes=held)) == "bad-content codes" and not bool(
                held.float().isfinite().all()
            )
        else:
            check_layer(spoiled(whole, codes=held), file=Path(), module="m")


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_block_scales_that_are_no_number(kind: str) -> None:
    """Against what dequantizing gives: a scale that is no number gives weights that are none."""
    block, generator = BLOCK_TYPES[kind], torch.Generator().manual_seed(0)
    for turn in range(200):
        rows = torch.randint(0, 256, (2, block.nbytes), dtype=torch.uint8, generator=generator)
        if kind == "mxfp4":
            rows[:, 0] = torch.tensor([1, 255 if turn % 2 else 250])
        held = LayerTensors(QuantizedTensor(weight_only(Block(kind)), (2, block.elements), rows))
        finite = bool(held.weight.dequantize().isfinite().all()) and not (kind == "mxfp4" and rows[1, 0] == 255)
        if finite:
            check_layer(held, file=Path(), module="m")
        else:
            assert refused(held) == "bad-content blocks"


def test_inputs_and_biases() -> None:
    whole = layer("W8A8-fp8-static")
    for value in (0.0, -1.0, NAN, INFINITY):
        assert refused(replace(whole, input_scale=torch.tensor([value]))) == "bad-content input_scale"
    assert refused(replace(whole, input_scale=torch.ones(2))) == "bad-shape input_scale"
    assert refused(replace(whole, input_scale=None)) == "missing-tensor input_scale"
    assert refused(replace(whole, input_zero=torch.tensor([200]))) == "bad-content input_zero"
    assert refused(replace(whole, bias=torch.ones(ROWS + 1))) == "bad-shape bias"
    assert refused(replace(whole, input_multiplier=torch.ones(1, COLUMNS))) == "bad-shape input_multiplier"
    assert refused(replace(whole, input_multiplier=torch.full((COLUMNS,), NAN))) == "bad-content input_multiplier"


@pytest.mark.parametrize(("part", "dtype", "value"), [("weight", torch.int8, 8), ("weight", torch.int8, -9),
    ("weight_zero_point", torch.int8, 8), ("weight_zero_point", torch.int32, 1 << 16), ("weight_zero_point", torch.int32, -9)])  # fmt: skip
def test_wide_integers_are_not_wrapped(tmp_path: Path, part: str, dtype: torch.dtype, value: int) -> None:
    parts = {"weight": torch.zeros(64, 96, dtype=torch.int8), "weight_scale": torch.ones(64, 3),
             "weight_zero_point": torch.zeros(64, 3, dtype=dtype)}  # fmt: skip
    parts[part][1, 1] = value
    path = checkpoint(tmp_path, parts, arguments(symmetric=False), layout="int-quantized")
    with pytest.raises(qcore.Refused) as caught:
        qcore.open_checkpoint(path).weight(MODULE)
    assert caught.value.refusal.code == "bad-content" and caught.value.refusal.tensor == f"{MODULE}.{part}"


def test_a_gguf_file_whose_scales_are_no_number(tmp_path: Path) -> None:
    VARIANTS["gguf-Q4_0"](tmp_path)
    opened = qcore.open_checkpoint(tmp_path)
    module = next(name for name, scheme in opened.plan.items() if scheme is not None)
    info = next(info for info in opened.files.source.tensors.values() if info.dtype == "Q4_0")
    data = bytearray((tmp_path / "model.gguf").read_bytes())
    data[info.offset : info.offset + 2] = b"\0\x7e"
    (tmp_path / "model.gguf").write_bytes(data)
    opened, refusals = qcore.open_checkpoint(tmp_path), []
    for module, scheme in opened.plan.items():
        try:
            _ = opened.weight(module) if scheme is not None else None
        except qcore.Refused as error:
            refusals.append(error.refusal)
    assert [refusal.code for refusal in refusals] == ["bad-content"] and refusals[0].field == "blocks"
