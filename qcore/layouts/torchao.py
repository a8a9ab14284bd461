"""torchao's records of its tensor subclasses, their int4 layouts, and scales in the order of a blocked matmul."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from qcore.checkpoint.settings import Settings
from qcore.elements import Granularity, Group, Int, Level, PerChannel, PerTensor, Tile
from qcore.method import SCALE_DTYPES, CheckpointFiles, read_scale, require_tensor
from qcore.refusal import Refused, bad_file
from qcore.scheme import Scheme, TensorScheme, integer_weight

if TYPE_CHECKING:
    import torch

    from qcore.tensor import QuantizedTensor

INT4 = ("Int4Tensor", "Int4PlainInt32Tensor", "Int4TilePackedTo4dTensor")
LANES = 32
_STEPS = (0, 8, 16, 24, 1, 9, 17, 25)
"""The input channel, after a lane's first, of each nibble of a word from the lowest on."""


_KWARGS = "act_quant_kwargs"
_KNOWN: dict[str, frozenset[str]] = {
    "Int8Tensor": frozenset(["block_size", "dtype", _KWARGS, "reduce_range"]),
    "IntxUnpackedToInt8Tensor": frozenset(
        ["target_dtype", "block_size", "dtype", "activation_quantization", "apply_int8_act_asym_per_token_quant"]
    ),
    "Float8Tensor": frozenset(
        ["block_size", "mm_config", _KWARGS, "kernel_preference", "dtype", "hp_value_lb", "hp_value_ub"]
    ),
    "Int4Tensor": frozenset(["block_size", "shape", "activation_dtype"]),
    "Int4PlainInt32Tensor": frozenset(["block_size", "shape"]),
    "Int4TilePackedTo4dTensor": frozenset(["block_size", "shape"]),
    "MXTensor": frozenset(
        [
            "elem_dtype",
            "block_size",
            "orig_dtype",
            "kernel_preference",
            "gemm_kernel_choice",
            _KWARGS,
            "is_swizzled_scales",
        ]
    ),
    "NVFP4Tensor": frozenset(["block_size", "orig_dtype", "is_swizzled_scales", "use_triton_kernel", _KWARGS]),
    "QuantizeTensorToInt8Kwargs": frozenset(["granularity", "mapping_type", "reduce_range"]),
    "QuantizeTensorToFloat8Kwargs": frozenset(
        ["float8_dtype", "granularity", "mm_config", "hp_value_lb", "hp_value_ub", "kernel_preference"]
    ),
    "QuantizeTensorToMXKwargs": frozenset(
        ["elem_dtype", "block_size", "scaling_mode", "kernel_preference", "gemm_kernel_choice", "is_swizzled_scales"]
    ),
    "QuantizeTensorToNVFP4Kwargs": frozenset(
        ["block_size", "is_swizzled_scales", "use_triton_kernel", "use_dynamic_per_tensor_scale"]
    ),
}
"""The attributes of each class that are read, or that say how a product is made, how a weight was, or which kernel makes it:
a weight's reduce_range and hp_value_* are in its codes and its scale."""
_INT4_INPUTS = {None: None, "bfloat16": None, "float8_e4m3fn": "fp8-token-dyn"}
"""Int4Tensor's activation_dtype, which is bfloat16 where nothing is said: inputs stay whole."""
_INTX_INPUTS = {None: None, "int8_asym_per_token": "int8-token-asym-dyn", "int8_sym_per_token": "int8-token-sym-dyn"}
"""IntxUnpackedToInt8Tensor's activation_quantization."""


class Record(Settings):
    """What the metadata says of one weight."""

    type: str = Field(alias="_type")
    data: dict[str, Any] = Field(default_factory=dict, alias="_data")
    parts: list[str] = Field(default_factory=list, alias="_tensor_data_names")

    def value(self, key: str) -> str | None:
        """An attribute that is a word, an enum or a dtype. Raises ValueError."""
        return bare(self.data.get(key))

    def sizes(self, key: str) -> tuple[int, ...]:
        """An attribute that is a list of sizes. Raises ValueError."""
        return sizes(self.data.get(key))


def check_attributes(record: Record) -> None:
    """An attribute that nobody knows might change the numbers. Raises ValueError."""
    given = record.data.get(_KWARGS)
    inner = given.get("_data") if isinstance(given, dict) else None
    kind = str(given.get("_type")) if isinstance(given, dict) else ""
    for owner, data in ((record.type, record.data), (kind, inner if isinstance(inner, dict) else {})):
        if unknown := [
            name for name, value in data.items() if value not in (None, False) and name not in _KNOWN.get(owner, ())
        ]:
            raise ValueError(f"{owner} with {', '.join(sorted(unknown))}")


def activation_words(record: Record) -> str | None:
    """How an IntxUnpackedToInt8Tensor rounds inputs, as a scheme's words; its first version had a flag. Raises ValueError."""
    mode = record.value("activation_quantization")
    flag = record.data.get("apply_int8_act_asym_per_token_quant")
    if not isinstance(flag, bool | None) or (flag and mode is not None):
        raise ValueError(f"apply_int8_act_asym_per_token_quant {flag!r:.20} beside activation_quantization {mode}")
    mode = "int8_asym_per_token" if flag else mode
    return _looked_up(_INTX_INPUTS, mode, "activation_quantization")


def _looked_up(known: dict[str | None, str | None], word: str | None, what: str) -> str | None:
    if word not in known:
        raise ValueError(f"{what} {word}")
    return known[word]


def granularity_of(block: tuple[int, ...], shape: tuple[int, int]) -> Granularity:
    """What a block_size means for a weight of `shape`. Raises ValueError."""
    if len(block) != 2:
        raise ValueError(f"block_size {list(block)}")
    rows, columns = block
    if rows >= shape[0] and columns >= shape[1] and shape[0] > 1:
        return PerTensor()
    if rows == 1:
        return PerChannel() if columns >= shape[1] else Group(columns)
    return Tile(rows, columns)


def bare(found: object) -> str | None:
    """A word; of an enum or a dtype its bare name. Raises ValueError."""
    word: object = found.get("_data") if isinstance(found, dict) else found
    if found is None or isinstance(word, str):
        return word if isinstance(word, str) else None
    raise ValueError(f"{found!r:.80}, which is no word")


def sizes(found: object) -> tuple[int, ...]:
    """A list of sizes. Raises ValueError."""
    if not isinstance(found, list) or not found or not all(type(size) is int and size > 0 for size in found):
        raise ValueError(f"sizes {found!r:.80}")
    return tuple(found)


def int4_headers(files: CheckpointFiles, module: str, record: Record) -> tuple[Scheme, tuple[int, int]]:
    prefix, block = f"{module}._weight_", record.sizes("block_size")
    shape = record.sizes("shape")
    if len(shape) != 2 or len(block) != 2 or block[0] != 1:
        raise ValueError(f"shape {list(shape)} in blocks of {list(block)}")
    (rows, columns), size = shape, block[1]
    given = None
    if record.type == "Int4TilePackedTo4dTensor":
        info = require_tensor(files, f"{prefix}qdata", dtypes=["I32"])
        tiles = info.shape
        fits = len(tiles) == 4 and tiles[2] == LANES and tiles[3] in (1, 2, 4)
        if not fits or tiles[0] * 8 < rows or tiles[1] * tiles[3] * LANES < columns:
            raise bad_file("bad-shape", "tinygemm's tiles do not hold the weight", file=info.file, tensor=info.name,
                           field="shape", found=list(tiles), expected=f"[N / 8, K / 128, 32, 4] for {list(shape)}")  # fmt: skip
        wide = tiles[1] * tiles[3] * LANES
        require_tensor(
            files, f"{prefix}scale_and_zero", shape=(wide // size, tiles[0] * 8, 2), dtypes=SCALE_DTYPES["float"]
        )
        weight = TensorScheme(Int(4, signed=True), (Level(Group(size)),), "float")
    else:
        plain = record.type == "Int4PlainInt32Tensor"
        wanted = (rows, columns // 8) if plain else (rows, columns // 2)
        require_tensor(files, f"{prefix}qdata", shape=wanted, dtypes=["I32"] if plain else ["I8", "U8"])
        grid = (-(-columns // size), rows)
        require_tensor(files, f"{prefix}scale", shape=grid, dtypes=SCALE_DTYPES["float"])
        require_tensor(files, f"{prefix}zero_point", shape=grid, dtypes=["I8"] if plain else SCALE_DTYPES["float"])
        weight = integer_weight(4, Group(size), symmetric=False)
        if not plain:
            weight = TensorScheme(Int(4, signed=True), (Level(Group(size)),), "float")
        if words := _looked_up(_INT4_INPUTS, record.value("activation_dtype"), "activation_dtype"):
            given = TensorScheme.parse(words)
    return Scheme(weight, given), (rows, columns)


def read_int4(
    files: CheckpointFiles, module: str, record: Record, scheme: Scheme, shape: tuple[int, int]
) -> QuantizedTensor:
    import torch

    from qcore.bits import pack
    from qcore.tensor import QuantizedTensor

    prefix, (rows, columns) = f"{module}._weight_", shape
    qdata = files.source.read(f"{prefix}qdata")
    if record.type == "Int4TilePackedTo4dTensor":
        both = read_scale(files, f"{prefix}scale_and_zero")[: -(-columns // record.sizes("block_size")[1]), :rows]
        codes = pack(untile_int4(qdata)[:rows, :columns], 4)
        scale, zero = (both[..., i].t().contiguous() for i in (0, 1))
        return QuantizedTensor(scheme, shape, codes, (scale,), zero)
    codes = qdata.contiguous().view(torch.uint8)
    scale = read_scale(files, f"{prefix}scale").t().contiguous()
    zeros = read_scale(files, f"{prefix}zero_point").t().contiguous()
    if record.type == "Int4Tensor":
        return QuantizedTensor(scheme, shape, codes ^ 0x88, (scale,), zeros)
    if bool(((zeros < 0) | (zeros > 15)).any()):
        raise out_of_range(files, f"{prefix}zero_point", zeros, 0, 15)
    return QuantizedTensor(scheme, shape, codes, (scale,), zeros.to(torch.uint8))


def out_of_range(files: CheckpointFiles, name: str, values: torch.Tensor, least: int, most: int) -> Refused:
    return bad_file("bad-content", "a number is outside its type", file=files.source.tensors[name].file, tensor=name,
                    field="values", found=f"{float(values.min()):g} to {float(values.max()):g}",
                    expected=f"whole numbers of {least} to {most}")  # fmt: skip


def untile_int4(words: torch.Tensor) -> torch.Tensor:
    """int32 [N / 8, K / (16 I), 32, I / 2] -> codes uint8 [N, K].

    Lane t of a tile holds output channel t / 4 and, of each 32 input channels, those from 2 (t % 4) on by _STEPS. Source:
    torch.ops.aten._convert_weight_to_int4pack's layout of m16n8k16 B fragments.
    """
    import torch

    from qcore.bits import unpack

    tiles, outer, _, inner = words.shape
    nibbles = unpack(words.contiguous().view(torch.uint8), 4, inner * 8)
    nibbles = nibbles.reshape(tiles, outer, 8, 4, inner, 8)  # channel, start, run of 32, step
    columns = 2 * torch.arange(4).unsqueeze(1) + torch.tensor(_STEPS)
    codes = torch.empty(tiles, outer, 8, inner, LANES, dtype=torch.uint8)
    codes[..., columns.flatten()] = nibbles.transpose(3, 4).flatten(4)
    return codes.permute(0, 2, 1, 3, 4).reshape(tiles * 8, outer * inner * LANES)


def unswizzle_scales(stored: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Scales of 128 x 4 blocks, rows r, r + 32, r + 64 and r + 96 side by side -> [rows, columns] (cuBLAS' block-scaling layout)."""
    down, across = -(-rows // 128), -(-columns // 4)
    blocks = stored.reshape(down, across, 32, 4, 4).transpose(2, 3).reshape(down, across, 128, 4)
    plain: torch.Tensor = blocks.transpose(1, 2).reshape(down * 128, across * 4)[:rows, :columns].contiguous()
    return plain
