"""ggml's blocks against gguf-py's decoders, bit for bit, and against plain loops where gguf-py has none."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import gguf
import numpy as np
import pytest
import torch

from qcore.blocks.dequantize import byteswap_blocks, dequantize_blocks
from qcore.blocks.grids import grid, shifted_grid
from qcore.blocks.types import BLOCK_TYPES, BY_ID, PLAIN_TYPES, REMOVED_IDS, BlockType

ROWS, BLOCKS = 5, 3
# gguf-py 0.19 knows nothing of q2_0, and of q1_0 only the size.
WITHOUT_ORACLE = ("q1_0", "q2_0")
WITH_ORACLE = tuple(name for name in BLOCK_TYPES if name not in WITHOUT_ORACLE)
HALVES = (0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFD55)
"""Zeros, denormals, the least normal, +-1, +-maximum, infinities and NaNs."""

# Where each type keeps float16 values, written down apart from the package's own table.
HALF_OFFSETS = {
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,), "q1_0": (0,), "q2_0": (0,),
    "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,),
    "iq1_s": (0,), "iq1_m": (), "iq2_xxs": (0,), "iq2_xs": (0,), "iq2_s": (0,), "iq3_xxs": (0,), "iq3_s": (0,),
    "iq4_nl": (0,), "iq4_xs": (0,), "tq1_0": (52,), "tq2_0": (64,), "mxfp4": (), "nvfp4": (),
}  # fmt: skip


def random_blocks(block: BlockType, rows: int = ROWS, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * block.id + seed)
    return torch.randint(0, 256, (rows, BLOCKS * block.nbytes), dtype=torch.uint8, generator=generator)


def with_halves(block: BlockType) -> Iterator[torch.Tensor]:
    """Random blocks whose float16 fields take every special value, in every combination."""
    offsets = HALF_OFFSETS[block.name]
    for i, first in enumerate(HALVES if offsets else ()):
        for j, second in enumerate(HALVES if len(offsets) > 1 else (0,)):
            codes = random_blocks(block, 1, seed=1 + i + 100 * j)
            for offset, bits in zip(offsets, (first, second), strict=False):
                codes.view(-1, block.nbytes)[:, offset : offset + 2] = torch.tensor([bits & 255, bits >> 8])
            yield codes


def with_iq1_m_halves() -> torch.Tensor:
    """iq1_m keeps its float16 in the top four bits of four words."""
    block = BLOCK_TYPES["iq1_m"]
    codes = random_blocks(block, len(HALVES))
    blocks = codes.view(len(HALVES), BLOCKS, block.nbytes)
    for row, bits in enumerate(HALVES):
        for word in range(4):
            high_byte = blocks[row, :, 49 + 2 * word]
            high_byte.copy_((high_byte & 15) | (bits >> 4 * word & 15) << 4)
    return codes


def assert_same_bits(found: torch.Tensor, expected: np.ndarray) -> None:
    """Equal as 32-bit patterns; any NaN equals any other."""
    assert found.dtype == torch.float32 and expected.dtype == np.float32
    assert tuple(found.shape) == expected.shape
    values = found.cpu().numpy()
    same = (values.view(np.int32) == expected.view(np.int32)) | (np.isnan(values) & np.isnan(expected))
    assert same.all(), np.argwhere(~same)[:5]


def oracle(name: str, codes: torch.Tensor) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(codes.numpy(), gguf.GGMLQuantizationType[name.upper()])


@pytest.mark.parametrize("name", WITH_ORACLE)
def test_random_blocks_decode_as_gguf_py_decodes_them(name: str) -> None:
    codes = random_blocks(BLOCK_TYPES[name], 64)
    assert_same_bits(dequantize_blocks(name, codes), oracle(name, codes))


@pytest.mark.parametrize("name", WITH_ORACLE)
def test_extreme_blocks_decode_as_gguf_py_decodes_them(name: str) -> None:
    block = BLOCK_TYPES[name]
    fills = [torch.full((1, BLOCKS * block.nbytes), byte, dtype=torch.uint8) for byte in range(256)]
    special = [with_iq1_m_halves()] if name == "iq1_m" else list(with_halves(block))
    codes = torch.cat([*fills, *special])
    assert_same_bits(dequantize_blocks(name, codes), oracle(name, codes))


def scalar_loop(name: str, data: bytes) -> Iterator[float]:
    """q1_0 and q2_0 straight from their definition: a float16, then 1- or 2-bit codes from the lowest bit on."""
    elements, bits = {"q1_0": (128, 1), "q2_0": (64, 2)}[name]
    for start in range(0, len(data), 18):
        (d,) = struct.unpack("<e", data[start : start + 2])
        word = int.from_bytes(data[start + 2 : start + 18], "little")
        for j in range(elements):
            code = word >> bits * j & (1 << bits) - 1
            yield (d if code else -d) if bits == 1 else (code - 1) * d


@pytest.mark.parametrize("name", WITHOUT_ORACLE)
def test_types_that_gguf_py_lacks_decode_as_defined(name: str) -> None:
    codes = torch.cat([random_blocks(BLOCK_TYPES[name]), *with_halves(BLOCK_TYPES[name])])
    expected = [list(scalar_loop(name, row.numpy().tobytes())) for row in codes]
    assert_same_bits(dequantize_blocks(name, codes), np.array(expected, dtype=np.float32))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_shapes_and_strides_do_not_matter(name: str) -> None:
    block = BLOCK_TYPES[name]
    codes = random_blocks(block)
    expected = dequantize_blocks(name, codes).numpy()
    assert_same_bits(dequantize_blocks(name, codes.unsqueeze(1)), expected[:, None])
    assert_same_bits(dequantize_blocks(name, codes[:0]), expected[:0])
    assert_same_bits(dequantize_blocks(name, codes[:, :0]), expected[:, :0])
    assert_same_bits(dequantize_blocks(name, codes[:1, : block.nbytes]), expected[:1, : block.elements])
    odd = torch.cat([torch.zeros(1, dtype=torch.uint8), codes.flatten()])[1:].view(codes.shape)
    assert_same_bits(dequantize_blocks(name, odd), expected)
    assert_same_bits(dequantize_blocks(name, codes.t().contiguous().t()), expected)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_the_blocks_are_left_alone(name: str) -> None:
    codes = random_blocks(BLOCK_TYPES[name])
    before = codes.clone()
    dequantize_blocks(name, codes)
    byteswap_blocks(name, codes)
    assert torch.equal(codes, before)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_the_default_dtype_does_not_matter(name: str) -> None:
    codes = random_blocks(BLOCK_TYPES[name])
    expected = dequantize_blocks(name, codes).numpy()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert_same_bits(dequantize_blocks(name, codes), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_nothing_leaves_the_blocks_device(name: str) -> None:
    """The meta device stands in for an accelerator: mixing it with CPU tensors fails, as does reading values."""
    block = BLOCK_TYPES[name]
    codes = random_blocks(block).to("meta")
    values = dequantize_blocks(name, codes)
    assert values.is_meta and values.shape == (ROWS, BLOCKS * block.elements)
    assert byteswap_blocks(name, codes).is_meta


def test_the_stored_grids_are_gguf_pys() -> None:
    cpu = torch.device("cpu")
    for name in ("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq1_s"):
        source = getattr(gguf.quants, name.upper())
        source.init_grid()
        rows = torch.from_numpy(source.grid.reshape(source.grid_shape))
        if name == "iq1_s":
            found = shifted_grid(cpu).view(torch.int8).view(2, *rows.shape) / 8
            assert torch.equal(found, torch.stack([rows + 0.125, rows - 0.125]))
        else:
            assert torch.equal(grid(name, cpu).view(torch.int8).view(rows.shape).float(), rows)


def test_bad_arguments_are_value_errors() -> None:
    codes = torch.zeros(2, 36, dtype=torch.uint8)
    with pytest.raises(ValueError, match="unknown block type 'q9_9'"):
        dequantize_blocks("q9_9", codes)
    with pytest.raises(ValueError, match="not whole q4_0 blocks"):
        dequantize_blocks("q4_0", codes[:, :35])
    with pytest.raises(ValueError, match="must be uint8"):
        dequantize_blocks("q4_0", codes.view(torch.int8))
    with pytest.raises(ValueError, match="not whole q4_0 blocks"):
        byteswap_blocks("q4_0", codes[:, :35])


def test_the_table_agrees_with_gguf_py() -> None:
    sizes = {type_.name: (int(type_), *size) for type_, size in gguf.GGML_QUANT_SIZES.items()}
    for name, block in BLOCK_TYPES.items():
        if name.upper() in sizes:
            assert (block.id, block.elements, block.nbytes) == sizes[name.upper()]
    for id_, (name, nbytes) in PLAIN_TYPES.items():
        assert (id_, 1, nbytes) == sizes[name]
    activations = {"Q8_1", "Q8_K"}
    known = {name.upper() for name in BLOCK_TYPES} | {name for name, _ in PLAIN_TYPES.values()}
    assert set(sizes) <= known | activations
    assert not set(REMOVED_IDS) & ({row[0] for row in sizes.values()} | set(BY_ID) | set(PLAIN_TYPES))


# The structs of ggml's src/ggml-common.h on a big-endian machine, in numpy's words. Bytes that ggml reads as one word
# are declared as one.
STRUCTS = {
    "q4_0": ">f2, 16u1", "q4_1": ">f2, >f2, 16u1", "q5_0": ">f2, >u4, 16u1", "q5_1": ">f2, >f2, >u4, 16u1",
    "q8_0": ">f2, 32u1", "q1_0": ">f2, 16u1", "q2_0": ">f2, 16u1",
    "q2_k": "16u1, 64u1, >f2, >f2", "q3_k": "32u1, 64u1, 12u1, >f2", "q4_k": ">f2, >f2, 12u1, 128u1",
    "q5_k": ">f2, >f2, 12u1, 32u1, 128u1", "q6_k": "128u1, 64u1, 16u1, >f2",
    "iq1_s": ">f2, 32u1, 8>u2", "iq1_m": "32u1, 16u1, 4>u2", "iq2_xxs": ">f2" + ", 4u1, >u4" * 8,
    "iq2_xs": ">f2, 32>u2, 8u1", "iq2_s": ">f2, 64u1, 8u1, 8u1", "iq3_xxs": ">f2, 64u1, 8>u4",
    "iq3_s": ">f2, 64u1, 8u1, 32u1, 4u1", "iq4_nl": ">f2, 16u1", "iq4_xs": ">f2, >u2, 4u1, 128u1",
    "tq1_0": "48u1, 4u1, >f2", "tq2_0": "64u1, >f2", "mxfp4": "u1, 16u1", "nvfp4": "4u1, 32u1",
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_big_endian_blocks_decode_as_their_little_endian_twins(name: str) -> None:
    codes = random_blocks(BLOCK_TYPES[name])
    big_endian = np.dtype(STRUCTS[name])
    assert big_endian.itemsize == BLOCK_TYPES[name].nbytes
    twin = codes.numpy().view(big_endian.newbyteorder("<")).astype(big_endian).view(np.uint8)
    swapped = byteswap_blocks(name, torch.from_numpy(twin))
    assert torch.equal(swapped, codes)
    assert_same_bits(dequantize_blocks(name, swapped), dequantize_blocks(name, codes).numpy())
    assert torch.equal(byteswap_blocks(name, byteswap_blocks(name, codes)), codes)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "MXFP4", "NVFP4"])
def test_byte_swaps_agree_with_gguf_pys_converter(name: str) -> None:
    convert = pytest.importorskip("gguf.scripts.gguf_convert_endian")
    block = BLOCK_TYPES[name.lower()]
    codes = random_blocks(block)
    swapped = byteswap_blocks(block.name, codes)

    class Reading:
        data = codes.flatten().numpy().copy()

    for start in range(0, Reading.data.size, block.nbytes):
        convert.byteswap_tensors[gguf.GGMLQuantizationType[name]](Reading, start)
    assert torch.equal(swapped.flatten(), torch.from_numpy(Reading.data))
