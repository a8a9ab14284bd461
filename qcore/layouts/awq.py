"""The AWQ layouts: 4-bit codes with a zero point for each group.

    gemm   qweight int32 [K, N / 8]    eight output channels a word, nibble i being channel _ORDER[i]
           qzeros  int32 [G, N / 8]    zero points, packed alike and stored as they are
           scales  f16   [G, N]
    gemv   qweight int32 [N, K / 8]    eight input channels a word, in order
           qzeros  int32 [N, Z]        zero points along the groups, in order; Z is padded
           scales  f16   [N, 8 Z]

w[n, k] = (q - z[g(k), n]) * s[g(k), n], and q - 8 where there are no zero points. AWQ never reorders input channels; the
scales that it searches are folded into the layer before. Read from AutoAWQ's layers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from qcore.checkpoint.settings import Settings
from qcore.elements import Granularity, Group, PerChannel
from qcore.method import CheckpointFiles, finite, require_tensor
from qcore.refusal import bad_file
from qcore.scheme import Scheme, integer_weight

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors

LAYOUTS = ("gemm", "gemv")
PARTS = frozenset({"qweight", "qzeros", "scales", "bias"})

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output channel, of a word's eight, that each nibble holds from the lowest on (AutoAWQ's packing_utils)."""
_PLACES = tuple(_ORDER.index(channel) for channel in range(8))
_CHANNELS = 1024
"""Output channels repacked at a time."""


class AwqSettings(Settings):
    """One module's numbers. zero_point: the config promises them."""

    bits: int
    group_size: int = Field(ge=-1)
    zero_point: bool = True
    layout: str = "gemm"

    @property
    def by_output(self) -> bool:
        """Words hold output channels."""
        return self.layout == "gemm"

    def groups(self, columns: int) -> int:
        """Groups of a row."""
        return columns // self.group_size if self.group_size > 0 else 1


def check_settings(files: CheckpointFiles, settings: AwqSettings) -> AwqSettings:
    """`settings`, if the layout can hold them. Raises Refused (bad-field)."""
    if settings.bits == 4 and settings.group_size != 0:
        return settings
    field, found = ("bits", settings.bits) if settings.bits != 4 else ("group_size", 0)
    raise bad_file("bad-field", "AWQ does not store this", file=files.quantization_file,
                   field=f"quantization_config.{field}", found=found, expected="4 bits, group_size -1 or positive")  # fmt: skip


def scheme_of(files: CheckpointFiles, module: str, settings: AwqSettings) -> Scheme:
    """Zero points that are there are believed, whatever the config says; writers differ in what zero_point means."""
    grid: Granularity = Group(settings.group_size) if settings.group_size > 0 else PerChannel()
    return Scheme(integer_weight(4, grid, symmetric=f"{module}.qzeros" not in files.source.tensors))


def shape_of(files: CheckpointFiles, module: str, settings: AwqSettings) -> tuple[int, int]:
    """[N, K], once all headers agree. Raises Refused (missing-tensor, bad-shape, bad-dtype)."""
    qweight = require_tensor(files, f"{module}.qweight", dtypes=["I32"])
    if len(qweight.shape) != 2:
        raise bad_file("bad-shape", "qweight is a matrix", file=qweight.file, tensor=qweight.name, field="shape",
                       found=list(qweight.shape), expected="two dimensions")  # fmt: skip
    outer, inner = qweight.shape
    rows, columns = (inner * 8, outer) if settings.by_output else (outer, inner * 8)
    if settings.group_size > 0 and columns % settings.group_size:
        raise bad_file("bad-shape", "groups do not divide the input channels", file=qweight.file, tensor=qweight.name,
                       field="shape", found=f"{columns} channels",
                       expected=f"a multiple of {settings.group_size}")  # fmt: skip
    groups = settings.groups(columns)
    if settings.by_output:
        scales, zeros = (groups, rows), (groups, rows // 8)
    else:
        words = padded_words(groups, settings.group_size)
        scales, zeros = (rows, words * 8), (rows, words)
    require_tensor(files, f"{module}.scales", shape=scales, dtypes=["F16", "BF16", "F32"])
    if f"{module}.qzeros" in files.source.tensors or settings.zero_point:
        require_tensor(files, f"{module}.qzeros", shape=zeros, dtypes=["I32"])
    return rows, columns


def read_layer(files: CheckpointFiles, module: str, settings: AwqSettings) -> LayerTensors:
    """The module. Raises Refused (bad-content and all that `shape_of` gives)."""
    from qcore.tensor import LayerTensors, QuantizedTensor

    rows, columns = shape_of(files, module, settings)
    scheme, read, groups = scheme_of(files, module, settings), files.source.read, settings.groups(columns)
    scales = finite(files, f"{module}.scales", read(f"{module}.scales"))
    zeros = None
    if scheme.weight.zero:
        zeros = unpack_words(read(f"{module}.qzeros"), reorder=settings.by_output)
        zeros = zeros.t() if settings.by_output else zeros[:, :groups]
    if settings.by_output:
        codes, scales = _pack_rows(read(f"{module}.qweight"), rows), scales.t()
    else:
        codes, scales = _bytes(read(f"{module}.qweight")), scales[:, :groups]
    bias = f"{module}.bias"
    weight = QuantizedTensor(
        scheme, (rows, columns), codes, (scales.contiguous(),), None if zeros is None else zeros.contiguous()
    )
    return LayerTensors(weight, read(bias) if bias in files.source.tensors else None)


def padded_words(groups: int, group_size: int) -> int:
    """Words of a gemv row of zero points: rounded up to what its kernel reads at once (AutoAWQ's calculate_zeros_width)."""
    unit = 1 if group_size >= 128 or group_size <= 0 else {64: 2, 32: 4}.get(group_size, 1)
    return math.ceil(groups / (8 * unit)) * unit


def unpack_words(words: torch.Tensor, *, reorder: bool = True) -> torch.Tensor:
    """int32 [A, B / 8] -> uint8 [A, B], in AWQ's order of nibbles or as they come."""
    nibbles = _nibbles(words)
    return (nibbles[..., list(_PLACES)] if reorder else nibbles).flatten(1)


def _bytes(words: torch.Tensor) -> torch.Tensor:
    """int32 [A, B] -> uint8 [A, 4 B], lowest byte first."""
    import torch

    return words.contiguous().view(torch.uint8)


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """int32 [A, B] -> uint8 [A, B, 8], lowest nibble first."""
    import torch

    stored = _bytes(words)
    return torch.stack([stored & 15, stored >> 4], -1).view(*words.shape, 8)


def _pack_rows(words: torch.Tensor, rows: int) -> torch.Tensor:
    """gemm's int32 [K, N / 8] -> uint8 [N, ceil(K / 2)], a block of output channels at a time."""
    import torch

    from qcore.bits import pack, packed_bytes

    codes = torch.empty(rows, packed_bytes(words.shape[0], 4), dtype=torch.uint8)
    for start in range(0, rows, _CHANNELS):
        stop = min(start + _CHANNELS, rows)
        block = unpack_words(words[:, start // 8 : stop // 8])
        codes[start:stop] = pack(block.t().contiguous(), 4)
    return codes


def pack_layer(module: str, layer: LayerTensors, name: str = "awq") -> dict[str, torch.Tensor]:
    """The module's tensors in the gemm layout. Raises Refused (not-representable)."""
    import torch

    from qcore.layouts.affine import affine_parts, exactly, unholdable

    codes, scales, zeros = affine_parts(layer.weight)
    if codes.shape[0] % 8:
        unholdable(name, module, f"{codes.shape[0]} output channels", "a multiple of 8")
    if codes.shape[1] % scales.shape[1]:
        unholdable(
            name, module, "a last group that is smaller than the others", "groups that divide the input channels"
        )
    zeros = torch.full(scales.shape, 8, dtype=torch.uint8) if zeros is None else zeros
    parts = {
        "qweight": pack_words(codes.t()),
        "qzeros": pack_words(zeros.t()),
        "scales": exactly(name, module, scales, torch.float16, torch.bfloat16).t().contiguous(),
    }
    if layer.bias is not None:
        parts["bias"] = layer.bias
    return {f"{module}.{part}": tensor for part, tensor in parts.items()}


def pack_words(codes: torch.Tensor, *, reorder: bool = True) -> torch.Tensor:
    """uint8 [A, B] -> int32 [A, B / 8], the inverse of `unpack_words`."""
    from qcore.layouts.affine import words

    eights = codes.unflatten(1, (-1, 8))
    ordered = eights[..., list(_ORDER)] if reorder else eights
    return words(ordered.flatten(1), 4)
