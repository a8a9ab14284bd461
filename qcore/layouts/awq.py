"""The AWQ layouts: codes with a zero point for each group.

    gemm   qweight int32 [K, ceil(N b / 32)]   b-bit codes along the output channels, a little-endian bit stream
           qzeros  int32 [G, ceil(N b / 32)]   zero points, packed alike and stored as they are
           scales  f16   [G, N]
    gemv   qweight int32 [N, K / 8]            4-bit codes along the input channels
           qzeros  int32 [N, Z]                zero points along the groups; Z is padded
           scales  f16   [N, 8 Z]

gemm's 4-bit codes are woven: of every eight channels, place i of the stream holds channel _ORDER[i]. GPTQModel writes 2, 3
and 5 to 8 bits as they come; AutoRound writes 5 to 7 bits woven. w[n, k] = (q - z[g(k), n]) * s[g(k), n], and
q - 2^(b-1) where there are no zero points. AWQ never reorders input channels; the scales that it searches are folded into
the layer before. Read from AutoAWQ's, GPTQModel's and AutoRound's layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from qcore.checkpoint.settings import Settings
from qcore.elements import Granularity, Group, PerChannel
from qcore.method import CheckpointFiles, finite, require_tensor, stated_method
from qcore.refusal import bad_file
from qcore.scheme import Scheme, integer_weight

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors

FAST = ("gemv_fast", "llm-awq")
"""Layouts of layouts/awq_fast.py."""
LAYOUTS = ("gemm", "gemv", *FAST)
PARTS = frozenset({"qweight", "qzeros", "scales", "bias"})

BITS = (2, 3, 4, 5, 6, 7, 8)
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output channel, of eight, that stands at each place from the lowest on (AutoAWQ's packing_utils)."""
_PLACES = tuple(_ORDER.index(channel) for channel in range(8))
_CHANNELS = 1024
"""Output channels repacked at a time."""


class AwqSettings(Settings):
    """One module's numbers. zero_point: the config promises them. woven: 5 to 7 bits are woven like 4 bits. ordered: none are."""

    bits: int
    group_size: int = Field(ge=-1)
    zero_point: bool = True
    layout: str = "gemm"
    woven: bool = False
    ordered: bool = False

    @property
    def by_output(self) -> bool:
        """Words hold output channels."""
        return self.layout == "gemm"

    @property
    def reorder(self) -> bool:
        """Eight output channels stand in AWQ's order."""
        return self.by_output and not self.ordered and (self.woven or self.bits == 4)

    def groups(self, columns: int) -> int:
        """Groups of a row."""
        return columns // self.group_size if self.group_size > 0 else 1


def stated_under_gptq(config: Mapping[str, Any]) -> bool:
    """Whether a config says GPTQ, and names one of these layouts for its format."""
    layout = config.get("format", config.get("checkpoint_format"))
    return stated_method(config) in ("gptq", "gptqmodel") and layout in LAYOUTS


def check_settings(files: CheckpointFiles, settings: AwqSettings) -> AwqSettings:
    """`settings`, if the layout can hold them. Raises Refused (bad-field)."""
    known = (4, 5, 6, 7) if settings.woven else BITS if settings.by_output else (4,)
    if settings.bits in known and settings.group_size != 0:
        return settings
    field, found = ("bits", settings.bits) if settings.bits not in known else ("group_size", 0)
    raise bad_file("bad-field", "AWQ does not store this", file=files.quantization_file,
                   field=f"quantization_config.{field}", found=found,
                   expected=f"bits in {known}, group_size -1 or positive")  # fmt: skip


def scheme_of(files: CheckpointFiles, module: str, settings: AwqSettings) -> Scheme:
    """Zero points that are there are believed, whatever the config says; writers differ in what zero_point means."""
    grid: Granularity = Group(settings.group_size) if settings.group_size > 0 else PerChannel()
    symmetric = f"{module}.qzeros" not in files.source.tensors
    return Scheme(integer_weight(settings.bits, grid, symmetric=symmetric))


def shape_of(files: CheckpointFiles, module: str, settings: AwqSettings) -> tuple[int, int]:
    """[N, K], once all headers agree. Raises Refused (missing-tensor, bad-shape, bad-dtype)."""
    bits = settings.bits
    qweight = require_tensor(files, f"{module}.qweight", dtypes=["I32"])
    scale = require_tensor(files, f"{module}.scales", dtypes=["F16", "BF16", "F32"])
    if len(qweight.shape) != 2 or len(scale.shape) != 2:
        raise bad_file("bad-shape", "qweight and scales are matrices", file=qweight.file, tensor=qweight.name, field="shape",
                       found=[qweight.shape, scale.shape], expected="two dimensions")  # fmt: skip
    outer, inner = qweight.shape
    rows, columns = (scale.shape[1], outer) if settings.by_output else (outer, inner * 8)
    if settings.group_size > 0 and columns % settings.group_size:
        raise bad_file("bad-shape", "groups do not divide the input channels", file=qweight.file, tensor=qweight.name,
                       field="shape", found=f"{columns} channels",
                       expected=f"a multiple of {settings.group_size}")  # fmt: skip
    if settings.reorder and rows % 8:
        raise bad_file("bad-shape", "output channels come in eights", file=scale.file, tensor=scale.name, field="shape",
                       found=list(scale.shape), expected="a multiple of 8 output channels")  # fmt: skip
    groups, width = settings.groups(columns), -(-rows * bits // 32)
    if settings.by_output:
        require_tensor(files, qweight.name, shape=(columns, width))
        scales, zeros = (groups, rows), (groups, width)
    else:
        words = padded_words(groups, settings.group_size)
        scales, zeros = (rows, words * 8), (rows, words)
    require_tensor(files, scale.name, shape=scales)
    if f"{module}.qzeros" in files.source.tensors or settings.zero_point:
        require_tensor(files, f"{module}.qzeros", shape=zeros, dtypes=["I32"])
    return rows, columns


def read_layer(files: CheckpointFiles, module: str, settings: AwqSettings) -> LayerTensors:
    """The module. Raises Refused (bad-content and all that `shape_of` gives)."""
    import torch

    from qcore.tensor import LayerTensors, QuantizedTensor

    rows, columns = shape_of(files, module, settings)
    scheme, read, groups = scheme_of(files, module, settings), files.source.read, settings.groups(columns)
    scales = finite(files, f"{module}.scales", read(f"{module}.scales"))
    zeros = None
    if scheme.weight.zero:
        count = rows if settings.by_output else groups
        zeros = unpack_words(read(f"{module}.qzeros"), settings.bits, count, reorder=settings.reorder)
        zeros = zeros.t() if settings.by_output else zeros
    if settings.by_output:
        codes, scales = _pack_rows(read(f"{module}.qweight"), rows, settings), scales.t()
    else:
        codes, scales = _bytes(read(f"{module}.qweight")), scales[:, :groups]
    if settings.bits == 8 and not scheme.weight.zero:
        codes = (codes ^ 0x80).view(torch.int8)
    bias = f"{module}.bias"
    weight = QuantizedTensor(
        scheme, (rows, columns), codes, (scales.contiguous(),), None if zeros is None else zeros.contiguous()
    )
    return LayerTensors(weight, read(bias) if bias in files.source.tensors else None)


def padded_words(groups: int, group_size: int) -> int:
    """Words of a gemv row of zero points: rounded up to what its kernel reads at once (AutoAWQ's calculate_zeros_width)."""
    unit = 1 if group_size >= 128 or group_size <= 0 else {64: 2, 32: 4}.get(group_size, 1)
    return math.ceil(groups / (8 * unit)) * unit


def unpack_words(words: torch.Tensor, bits: int = 4, count: int | None = None, *, reorder: bool = True) -> torch.Tensor:
    """int32 [A, B] -> uint8 [A, count], in AWQ's order or as they come; without `count` as many as there are."""
    from qcore.bits import unpack

    codes = unpack(_bytes(words), bits, words.shape[1] * 32 // bits if count is None else count)
    return codes.unflatten(1, (-1, 8))[..., list(_PLACES)].flatten(1) if reorder else codes


def pack_words(codes: torch.Tensor, bits: int = 4, *, reorder: bool = True) -> torch.Tensor:
    """uint8 [A, n] -> int32 [A, ceil(n bits / 32)], the inverse of `unpack_words`."""
    from qcore.layouts.affine import words

    return words(codes.unflatten(1, (-1, 8))[..., list(_ORDER)].flatten(1) if reorder else codes, bits)


def _bytes(words: torch.Tensor) -> torch.Tensor:
    """int32 [A, B] -> uint8 [A, 4 B], lowest byte first."""
    import torch

    return words.contiguous().view(torch.uint8)


def _pack_rows(words: torch.Tensor, rows: int, settings: AwqSettings) -> torch.Tensor:
    """gemm's int32 [K, ceil(N b / 32)] -> uint8 [N, ceil(K b / 8)], a block of output channels at a time."""
    import torch

    from qcore.bits import pack, packed_bytes

    bits = settings.bits
    codes = torch.empty(rows, packed_bytes(words.shape[0], bits), dtype=torch.uint8)
    for start in range(0, rows, _CHANNELS):
        stop = min(start + _CHANNELS, rows)
        block = words[:, start * bits // 32 : -(-stop * bits // 32)]
        unpacked = unpack_words(block, bits, stop - start, reorder=settings.reorder)
        codes[start:stop] = pack(unpacked.t().contiguous(), bits)
    return codes


def pack_layer(module: str, layer: LayerTensors, settings: AwqSettings, name: str = "awq") -> dict[str, torch.Tensor]:
    """The module's tensors in this layout. Raises Refused (not-representable)."""
    import torch

    from qcore.layouts.affine import affine_parts, exactly, unholdable

    codes, scales, zeros = affine_parts(layer.weight)
    rows, columns = codes.shape
    unit = 32 if settings.woven and settings.bits != 4 else 8
    if rows % unit or columns % (1 if settings.by_output else 8):
        unholdable(name, module, f"{rows} output and {columns} input channels", f"multiples of {unit}")
    if columns % scales.shape[1] or (settings.group_size > 0 and columns % settings.group_size):
        unholdable(
            name, module, "a last group that is smaller than the others", "groups that divide the input channels"
        )
    if zeros is None:
        zeros = torch.full(scales.shape, 1 << (settings.bits - 1), dtype=torch.uint8)
    scales = exactly(name, module, scales, torch.float16, torch.bfloat16)
    if settings.by_output:
        codes, zeros, scales = codes.t(), zeros.t(), scales.t().contiguous()
    else:
        padded = 8 * padded_words(scales.shape[1], settings.group_size) - scales.shape[1]
        zeros, scales = (torch.nn.functional.pad(part, (0, padded)) for part in (zeros, scales))
    parts = {
        "qweight": pack_words(codes, settings.bits, reorder=settings.reorder),
        "qzeros": pack_words(zeros, settings.bits, reorder=settings.reorder),
        "scales": scales,
    }
    if layer.bias is not None:
        parts["bias"] = layer.bias
    return {f"{module}.{part}": tensor for part, tensor in parts.items()}
