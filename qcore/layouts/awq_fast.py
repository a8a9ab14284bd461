"""AWQ's gemv_fast layout: 4-bit codes shuffled for vector loads, with zero points multiplied out.

    qweight int16 [N / 4, K]   tiles of 4 rows by 64 columns, four codes a word; within a row every 32 codes are shuffled
    scales  f16   [Z, N]       Z is the number of groups, padded as gemv pads its own
    qzeros  f16   [Z, N]       -(z * s); scaled_zeros in llm-awq's own files

w[n, k] = q * s[g(k), n] + qzeros[g(k), n]. Source: AutoAWQ's linear/gemv_fast.py (pack_intweight).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcore.elements import Group, Int, Level
from qcore.layouts.awq import AwqSettings, padded_words
from qcore.method import CheckpointFiles, read_scale, require_tensor
from qcore.refusal import bad_file
from qcore.scheme import Scheme, TensorScheme

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors

_ROWS, _COLUMNS = 4, 64
"""A tile."""


def scheme_of(settings: AwqSettings, columns: int) -> Scheme:
    size = settings.group_size if settings.group_size > 0 else columns
    return Scheme(TensorScheme(Int(4, signed=False), (Level(Group(size)),), "float"))


def zeros_name(settings: AwqSettings) -> str:
    return "scaled_zeros" if settings.layout == "llm-awq" else "qzeros"


def shape_of(files: CheckpointFiles, module: str, settings: AwqSettings) -> tuple[int, int]:
    """[N, K], once all headers agree. Raises Refused (missing-tensor, bad-shape, bad-dtype)."""
    info = require_tensor(files, f"{module}.qweight", dtypes=["I16"])
    if len(info.shape) != 2 or info.shape[1] % _COLUMNS:
        raise bad_file("bad-shape", "gemv_fast stores tiles", file=info.file, tensor=info.name, field="shape",
                       found=list(info.shape), expected="[N / 4, K], K a multiple of 64")  # fmt: skip
    rows, columns = info.shape[0] * _ROWS, info.shape[1]
    if settings.group_size > 0 and columns % settings.group_size:
        raise bad_file("bad-shape", "groups do not divide the input channels", file=info.file, tensor=info.name,
                       field="shape", found=f"{columns} channels",
                       expected=f"a multiple of {settings.group_size}")  # fmt: skip
    padded = 8 * padded_words(settings.groups(columns), settings.group_size)
    for part in ("scales", zeros_name(settings)):
        require_tensor(files, f"{module}.{part}", shape=(padded, rows), dtypes=["F16", "BF16"])
    return rows, columns


def read_layer(files: CheckpointFiles, module: str, settings: AwqSettings) -> LayerTensors:
    """The module. Raises Refused (bad-content and all that `shape_of` gives)."""
    from qcore.bits import pack
    from qcore.tensor import LayerTensors, QuantizedTensor

    rows, columns = shape_of(files, module, settings)
    groups = settings.groups(columns)
    scales, zeros = (
        read_scale(files, f"{module}.{part}")[:groups].t().contiguous() for part in ("scales", zeros_name(settings))
    )
    codes = pack(unshuffle(files.source.read(f"{module}.qweight")), 4)
    bias = f"{module}.bias"
    return LayerTensors(
        QuantizedTensor(scheme_of(settings, columns), (rows, columns), codes, (scales,), zeros),
        files.source.read(bias) if bias in files.source.tensors else None,
    )


def unshuffle(words: torch.Tensor) -> torch.Tensor:
    """int16 [N / 4, K] -> codes uint8 [N, K]."""
    import torch

    from qcore.bits import unpack

    columns = words.shape[1]
    stream = unpack(words.contiguous().view(torch.uint8), 4, _ROWS * columns)
    rows = stream.unflatten(1, (-1, _ROWS, _COLUMNS)).transpose(1, 2).flatten(2).flatten(0, 1)
    eights = rows.unflatten(1, (-1, 2, 4)).transpose(2, 3).flatten(1)  # even places stood before odd ones
    codes: torch.Tensor = eights.unflatten(1, (-1, 4, 4, 2)).transpose(2, 3).flatten(1)
    return codes


def shuffle(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [N, K] -> int16 [N / 4, K], the inverse of `unshuffle`."""
    import torch

    from qcore.bits import pack

    fours = codes.unflatten(1, (-1, 4, 4, 2)).transpose(2, 3).flatten(1)
    eights = fours.unflatten(1, (-1, 4, 2)).transpose(2, 3).flatten(1)
    tiles = eights.unflatten(1, (-1, _COLUMNS)).unflatten(0, (-1, _ROWS)).transpose(1, 2)
    return pack(tiles.reshape(codes.shape[0] // _ROWS, -1), 4).view(torch.int16)


def pack_layer(module: str, layer: LayerTensors, settings: AwqSettings, name: str = "awq") -> dict[str, torch.Tensor]:
    """The module's tensors. Raises Refused (not-representable), also where f16 does not hold -(z s)."""
    import torch

    from qcore.layouts.affine import added_zeros, affine_parts, exactly, unholdable

    codes, scales, _ = affine_parts(layer.weight)
    rows, columns = codes.shape
    if rows % 8 or columns % _COLUMNS or columns % (settings.group_size if settings.group_size > 0 else columns):
        unholdable(name, module, f"{rows} output and {columns} input channels in groups of {settings.group_size}",
                   f"multiples of 8 and {_COLUMNS}, and whole groups")  # fmt: skip
    zeros = added_zeros(name, module, layer.weight, torch.float16)
    scales = exactly(name, module, scales, torch.float16)
    groups = scales.shape[1]
    padding = 8 * padded_words(groups, settings.group_size) - groups
    padded = (torch.nn.functional.pad(part, (0, padding)).t().contiguous() for part in (scales, zeros))
    parts = {"qweight": shuffle(codes), **dict(zip(("scales", zeros_name(settings)), padded, strict=True))}
    if layer.bias is not None:
        parts["bias"] = layer.bias
    return {f"{module}.{part}": tensor for part, tensor in parts.items()}
