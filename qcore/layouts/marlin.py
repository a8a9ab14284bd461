"""Serialized Marlin, dense: 4-bit symmetric codes in the order in which the kernel's tensor-core fragments read them.

    codes   int32 [K / 16, 2 N]   tiles of 16 x 16 codes, and in every 1024 of those the fragment order
    scales  f16 [G, N]            64 (one group: 32) output channels at a time in the order of the fragments

w[n, k] = (q - 8) * s[g(k), n]. AutoGPTQ names them `B` and `s`, AutoAWQ `qweight` and `scales`. The order is given in
IST-DASLab's Marlin (Frantar et al. 2024) and in AutoGPTQ's qlinear_marlin.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from qcore.elements import Granularity, Group, PerChannel
from qcore.method import CheckpointFiles, read_scale, require_tensor
from qcore.refusal import bad_file
from qcore.scheme import Scheme, integer_weight

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors

TILE = 16
PARTS = frozenset({"B", "s", "workspace"})
_WEAVE = (0, 2, 4, 6, 1, 3, 5, 7)
"""The order of a word's eight nibbles, which lets two at once become half floats."""


@cache
def fragment_order() -> tuple[int, ...]:
    """The place, among 1024 codes in tile order, of each stored code."""
    order: list[int] = []
    for lane in range(32):
        column, row = lane // 4, 2 * (lane % 4)
        one = [TILE * r + column + 8 * half for half in (0, 1) for r in (row, row + 1, row + 8, row + 9)]
        order += [256 * tile + place for tile in range(4) for place in one]
    runs = [order[i : i + 8] for i in range(0, len(order), 8)]
    return tuple(run[place] for run in runs for place in _WEAVE)


@cache
def scale_order(*, grouped: bool) -> tuple[int, ...]:
    """The output channel, of a run, that each stored scale belongs to."""
    if grouped:
        return tuple(i + 8 * j for i in range(8) for j in range(8))
    return tuple(2 * i + d for i in range(4) for d in (0, 1, 8, 9, 16, 17, 24, 25))


def scheme_of(group_size: int) -> Scheme:
    granularity: Granularity = Group(group_size) if group_size > 0 else PerChannel()
    return Scheme(integer_weight(4, granularity, symmetric=True))


def shape_of(files: CheckpointFiles, codes: str, scales: str, group_size: int) -> tuple[int, int]:
    """[N, K], once all headers agree. Raises Refused (missing-tensor, bad-shape, bad-dtype)."""
    info = require_tensor(files, codes, dtypes=["I32"])
    if len(info.shape) != 2 or info.shape[1] % 128:
        raise bad_file("bad-shape", "Marlin's codes come in tiles", file=info.file, tensor=codes, field="shape",
                       found=list(info.shape), expected="[K / 16, 2 N], N a multiple of 64")  # fmt: skip
    rows, columns = info.shape[1] // 2, info.shape[0] * TILE
    groups = columns // group_size if group_size > 0 else 1
    require_tensor(files, scales, shape=(groups, rows), dtypes=["F16", "BF16"])
    return rows, columns


def read_layer(files: CheckpointFiles, module: str, codes: str, scales: str, group_size: int) -> LayerTensors:
    """The module. Raises Refused (bad-content and all that `shape_of` gives)."""
    import torch

    from qcore.bits import pack, unpack
    from qcore.tensor import LayerTensors, QuantizedTensor

    rows, columns = shape_of(files, codes, scales, group_size)
    stream = files.source.read(codes).contiguous().view(torch.uint8)
    stored = unpack(stream, 4, rows * TILE).reshape(-1, 1024)
    tiled = torch.empty_like(stored)
    tiled[:, torch.tensor(fragment_order())] = stored
    by_input = tiled.reshape(columns // TILE, rows // TILE, TILE, TILE).transpose(1, 2).reshape(columns, rows)
    grouped = group_size > 0 and group_size < columns
    order = torch.tensor(scale_order(grouped=grouped))
    scale = read_scale(files, scales).reshape(-1, len(order))
    ordered = torch.empty_like(scale)
    ordered[:, order] = scale
    bias = f"{module}.bias"
    return LayerTensors(
        QuantizedTensor(
            scheme_of(group_size), (rows, columns), pack(by_input.t(), 4), (ordered.reshape(-1, rows).t().contiguous(),)
        ),
        files.source.read(bias) if bias in files.source.tensors else None,
    )


def pack_layer(
    module: str, layer: LayerTensors, codes: str, scales: str, group_size: int, name: str, *, rows_in: int = 64
) -> dict[str, torch.Tensor]:
    """The module's tensors, those of codes and scales under these parts' names. rows_in: what the tool wants the output
    channels to be a multiple of. Raises Refused (not-representable)."""
    import torch

    from qcore.layouts.affine import affine_parts, exactly, unholdable, words

    stored, scale, zeros = affine_parts(layer.weight)
    rows, columns = stored.shape
    if rows % rows_in or columns % 128 or group_size not in (-1, 128) or zeros is not None:
        unholdable(name, module, f"{layer.weight.scheme}, {rows} output and {columns} input channels",
                   f"symmetric codes in groups of 128 or a row, and multiples of {rows_in} and 128 channels")  # fmt: skip
    scale = exactly(name, module, scale, torch.float16).t()
    tiles = stored.t().reshape(columns // TILE, TILE, rows // TILE, TILE).transpose(1, 2)
    fragments = tiles.reshape(-1, 1024)[:, list(fragment_order())]
    order = list(scale_order(grouped=0 < group_size < columns))
    parts = {
        codes: words(fragments.reshape(columns // TILE, rows * TILE), 4),
        scales: scale.reshape(-1, len(order))[:, order].reshape(-1, rows).contiguous(),
    }
    if layer.bias is not None:
        parts["bias"] = layer.bias
    return {f"{module}.{part}": tensor for part, tensor in parts.items()}
