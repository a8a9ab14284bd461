"""QuantizedTensor.dequantize against the same formulas written out in plain Python, element by element."""

import math

import pytest
import torch

from qcore.bits import pack, packed_bytes, unpack
from qcore.elements import FLOAT_BITS, FlatGroup, Float, Group, Int, Level, PerChannel, PerTensor, Tile, scale_shape
from qcore.scheme import Scheme, TensorScheme
from qcore.tensor import QuantizedTensor, float_table

ROWS, COLUMNS = 5, 27
GRIDS = [PerTensor(), PerChannel(), Group(9), Group(8), Group(64), Tile(2, 10), Tile(128, 128), FlatGroup(16)]


def position(grid: object, row: int, column: int) -> tuple[int, int]:
    """Where the scale of one element lies."""
    if isinstance(grid, Group):
        return row, column // grid.size
    if isinstance(grid, Tile):
        return row // grid.rows, column // grid.cols
    if isinstance(grid, FlatGroup):
        return 0, (row * COLUMNS + column) // grid.size
    return (row, 0) if isinstance(grid, PerChannel) else (0, 0)


def scales_for(grid: object, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return (torch.rand(scale_shape(grid, ROWS, COLUMNS)) + 0.1).to(dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [*range(1, 9), 12])
@pytest.mark.parametrize("count", [1, 7, 8, 13, 32, 100])
def test_bit_streams(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, count), dtype=torch.uint8 if bits <= 8 else torch.int16)
    packed = pack(codes, bits)
    for row in range(3):
        number = sum(int(code) << (bits * i) for i, code in enumerate(codes[row]))
        assert bytes(packed[row].tolist()) == number.to_bytes(packed_bytes(count, bits), "little")
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("zero", [None, "stored", "float"])
@pytest.mark.parametrize(
    ("bits", "signed"), [(1, False), (2, True), (3, False), (4, True), (5, True), (8, True), (8, False)]
)
def test_integers(grid: object, zero: str | None, bits: int, signed: bool) -> None:
    offset = 1 << (bits - 1) if signed else 0
    stored = torch.randint(0, 1 << bits, (ROWS, COLUMNS), dtype=torch.uint8)
    codes = pack(stored, bits) if bits < 8 or not signed else (stored ^ 0x80).view(torch.int8)
    scale = scales_for(grid)
    zeros = None
    if zero == "stored":
        zeros = torch.randint(0, 1 << bits, scale.shape, dtype=torch.uint8)
    elif zero == "float":
        zeros = torch.randn(scale.shape).to(torch.bfloat16)
    scheme = Scheme(TensorScheme(Int(bits, signed), (Level(grid),), zero))  # type: ignore[arg-type]
    got = QuantizedTensor(scheme, (ROWS, COLUMNS), codes, (scale,), zeros).dequantize()
    for row in range(ROWS):
        for column in range(COLUMNS):
            at = position(grid, row, column)
            value = torch.tensor(float(int(stored[row, column]) - offset))
            s = scale[at].float()
            if zeros is None:
                want = value * s
            else:
                want = (value - zeros[at].float()) * s if zero == "stored" else value * s + zeros[at].float()
            assert got[row, column] == want


def test_act_order_follows_the_index() -> None:
    index = torch.tensor([2, 0, 1, 0, 2, 1, 1, 2] * 3 + [0, 1, 2], dtype=torch.int32)
    stored = torch.randint(0, 16, (ROWS, COLUMNS), dtype=torch.uint8)
    scale, zeros = scales_for(Group(9)), torch.randint(0, 16, (ROWS, 3), dtype=torch.uint8)
    scheme = Scheme(TensorScheme(Int(4, False), (Level(Group(9)),), "stored", ordered=True))
    got = QuantizedTensor(scheme, (ROWS, COLUMNS), pack(stored, 4), (scale,), zeros, index).dequantize()
    for row in range(ROWS):
        for column in range(COLUMNS):
            group = int(index[column])
            want = (stored[row, column].float() - zeros[row, group].float()) * scale[row, group].float()
            assert got[row, column] == want


@pytest.mark.parametrize("name", ["e4m3fn", "e4m3fnuz", "e5m2"])
@pytest.mark.parametrize("grid", [PerTensor(), PerChannel(), Tile(2, 10), Tile(128, 128)], ids=str)
def test_eight_bit_floats(name: str, grid: object) -> None:
    exponent, mantissa, bias = {"e4m3fn": (4, 3, 7), "e4m3fnuz": (4, 3, 8), "e5m2": (5, 2, 15)}[name]
    dtype = getattr(torch, f"float8_{name}")
    stored = torch.randint(0, 256, (ROWS, COLUMNS), dtype=torch.uint8)
    scale = scales_for(grid, torch.float32)
    scheme = Scheme(TensorScheme(Float(name), (Level(grid),)))  # type: ignore[arg-type]
    got = QuantizedTensor(scheme, (ROWS, COLUMNS), stored.view(dtype), (scale,)).dequantize()
    for row in range(ROWS):
        for column in range(COLUMNS):
            code = int(stored[row, column])
            e, m = code >> mantissa & ((1 << exponent) - 1), code & ((1 << mantissa) - 1)
            if (name == "e4m3fn" and code & 127 == 127) or (name == "e4m3fnuz" and code == 128):
                assert got[row, column].isnan()
                continue
            if name == "e5m2" and e == 31:
                assert not got[row, column].isfinite()
                continue
            size = (m / (1 << mantissa) + (1 if e else 0)) * 2.0 ** (max(e, 1) - bias)
            value = -size if code >> 7 else size
            assert got[row, column] == torch.tensor(value) * scale[position(grid, row, column)]


@pytest.mark.parametrize(
    ("name", "largest"), [("e2m1", 6.0), ("e3m2", 28.0), ("e2m3", 7.5), ("e4m3", 480.0), ("e4m7", 510.0)]
)
def test_small_floats_with_power_of_two_scales(name: str, largest: float) -> None:
    bits = FLOAT_BITS[name]
    assert float_table(name).max() == largest
    stored = torch.randint(0, 1 << bits, (ROWS, 64), dtype=torch.int16)
    exponents = torch.tensor([[0, 254], [127, 120], [128, 1], [100, 130], [127, 127]], dtype=torch.uint8)
    scheme = Scheme(TensorScheme(Float(name), (Level(Group(32), "e8m0"),)))  # type: ignore[arg-type]
    got = QuantizedTensor(scheme, (ROWS, 64), pack(stored, bits), (exponents,)).dequantize()
    for row in range(ROWS):
        for column in range(64):
            scale = torch.tensor(2.0 ** (int(exponents[row, column // 32]) - 127), dtype=torch.float32)
            assert got[row, column] == float_table(name)[int(stored[row, column])] * scale


def test_nvfp4_levels_multiply() -> None:
    stored = torch.randint(0, 16, (ROWS, 32), dtype=torch.uint8)
    fine = torch.rand(ROWS, 2).to(torch.float8_e4m3fn)
    coarse = torch.tensor([[0.037]])
    scheme = Scheme.parse("W4A16-nvfp4")
    got = QuantizedTensor(scheme, (ROWS, 32), pack(stored, 4), (fine, coarse)).dequantize()
    scale = (fine.float() * coarse).repeat_interleave(16, 1)
    assert torch.equal(got, float_table("e2m1")[stored.int()] * scale)


def test_codebook_with_nested_scales() -> None:
    rows, columns = 6, 128
    table, nested = torch.randn(16), torch.randn(256)
    stored = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    absmax = torch.randint(0, 256, (rows, 2), dtype=torch.uint8)
    coarse = torch.rand(1, 3)  # one for each 4 fine scales, over the flattened weight
    scheme = Scheme.parse("W4A16-nf4-g64:dynamic8+flat256")
    tensor = QuantizedTensor(
        scheme,
        (rows, columns),
        pack(stored, 4),
        (absmax, coarse),
        table=table,
        scale_table=nested,
        offset=torch.tensor(0.25),
    )
    got = tensor.dequantize()
    for row in range(rows):
        for column in range(columns):
            fine = row * 2 + column // 64
            scale = nested[int(absmax.flatten()[fine])] * coarse[0, fine // 4] + 0.25
            assert got[row, column] == table[int(stored[row, column])] * scale


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rows_and_take_agree_with_the_whole(grid: object) -> None:
    stored = torch.randint(0, 16, (ROWS, COLUMNS), dtype=torch.uint8)
    scale = scales_for(grid)
    zeros = torch.randint(0, 16, scale.shape, dtype=torch.uint8)
    scheme = Scheme(TensorScheme(Int(4, False), (Level(grid),), "stored"))  # type: ignore[arg-type]
    tensor = QuantizedTensor(scheme, (ROWS, COLUMNS), pack(stored, 4), (scale,), zeros)
    whole = tensor.dequantize()
    step = grid.rows if isinstance(grid, Tile) else 1
    for start in range(0, ROWS, step):
        assert torch.equal(tensor.rows(start, start + step).dequantize(), whole[start : start + step])
    if not isinstance(grid, FlatGroup):
        wanted = torch.tensor([4, 0, 3, 3])
        assert torch.equal(tensor.take(wanted).dequantize(), whole[wanted])


def test_stacked_experts() -> None:
    stored = torch.randint(0, 16, (3, ROWS, 32), dtype=torch.uint8)
    scale = torch.rand(3, ROWS, 2)
    scheme = Scheme.parse("W4A16-g16-sym")
    got = QuantizedTensor(scheme, (3, ROWS, 32), pack(stored, 4), (scale,)).dequantize()
    assert torch.equal(got, (stored.float() - 8) * scale.repeat_interleave(16, -1))


def test_wrong_shapes_are_errors() -> None:
    scheme = Scheme.parse("W4A16-g16-sym")
    with pytest.raises(ValueError, match="codes"):
        QuantizedTensor(scheme, (4, 32), torch.zeros(4, 15, dtype=torch.uint8), (torch.ones(4, 2),))
    with pytest.raises(ValueError, match="scales"):
        QuantizedTensor(scheme, (4, 32), torch.zeros(4, 16, dtype=torch.uint8), (torch.ones(4, 3),))
    assert math.isfinite(
        QuantizedTensor(scheme, (4, 32), torch.zeros(4, 16, dtype=torch.uint8), (torch.ones(4, 2),)).nbytes
    )
