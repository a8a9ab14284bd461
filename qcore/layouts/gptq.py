"""The GPTQ layout: codes packed along the input channels, zero points along the output channels.

    qweight  int32 [ceil(K bits / 32), N]   codes as a little-endian bit stream along K, or in planes (layouts/planar.py)
    qzeros   int32 [G, ceil(N bits / 32)]   zero points along N, packed alike; v1 stores z - 1, v2 stores z
    scales   f16 or bf16 [G, N]
    g_idx    int32 [K], optional            the group of each input channel (act-order)

w[n, k] = (q - z[g(k), n]) * s[g(k), n]. A quantized embedding is stored as a layer with the vocabulary for its inputs, so that
its groups are rows of the table. Read from AutoGPTQ's and GPTQModel's layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from qcore.checkpoint.settings import Settings
from qcore.elements import Granularity, Group, PerChannel, Tile
from qcore.layouts.planar import RUN, unpack_planes
from qcore.method import CheckpointFiles, finite, require_tensor
from qcore.refusal import Refusal, Refused, bad_file
from qcore.scheme import Scheme, integer_weight

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors

BITS = (2, 3, 4, 5, 6, 7, 8)
WORDS = {"int8": ("I8", 8), "int16": ("I16", 16), "int32": ("I32", 32), "int64": ("I64", 64)}
"""Types of the words that codes are packed into, and their bits."""
PARTS = frozenset({"qweight", "qzeros", "scales", "g_idx", "bias"})


class GptqSettings(Settings):
    """One module's numbers. v1: stored zero points are one less than they are; by_word: a whole word of them was made so at once,
    as GPTQModel does it, where a zero point of 0 borrows from the next. planar: codes are stored in planes."""

    bits: int
    group_size: int = Field(ge=-1)
    desc_act: bool = False
    sym: bool = True
    v1: bool = True
    by_word: bool = False
    planar: bool = False
    pack_dtype: str = "int32"

    def scheme(self) -> Scheme:
        # One group for the whole row cannot be reordered.
        granularity: Granularity = Group(self.group_size) if self.group_size > 0 else PerChannel()
        ordered = self.desc_act and self.group_size > 0
        return Scheme(integer_weight(self.bits, granularity, symmetric=self.sym, ordered=ordered))

    def table_scheme(self, rows: int) -> Scheme:
        """That of an embedding with so many rows."""
        tile = Tile(self.group_size if self.group_size > 0 else rows, 1)
        return Scheme(integer_weight(self.bits, tile, symmetric=self.sym))


def check_settings(files: CheckpointFiles, module: str, settings: GptqSettings) -> GptqSettings:
    """`settings`, if the layout can hold them. Raises Refused (bad-field)."""
    if settings.bits in BITS and settings.group_size != 0:
        return settings
    field, found = ("bits", settings.bits) if settings.group_size else ("group_size", 0)
    raise bad_file("bad-field", f"{module} has a value that GPTQ does not store", file=files.quantization_file,
                   field=f"quantization_config.{field}", found=found,
                   expected=f"bits in {BITS}, group_size -1 or positive")  # fmt: skip


def shape_of(files: CheckpointFiles, module: str, settings: GptqSettings) -> tuple[int, int]:
    """[N, K], once all headers agree. Raises Refused (missing-tensor, bad-shape, bad-dtype)."""
    bits, (held, width) = settings.bits, WORDS[settings.pack_dtype]
    qweight = require_tensor(files, f"{module}.qweight", dtypes=[held])
    scales = require_tensor(files, f"{module}.scales", dtypes=["F16", "BF16", "F32"])
    if len(qweight.shape) != 2 or len(scales.shape) != 2:
        raise bad_file("bad-shape", "qweight and scales are matrices", file=qweight.file, tensor=qweight.name,
                       field="shape", found=[qweight.shape, scales.shape], expected="two dimensions")  # fmt: skip
    groups, rows = scales.shape
    if settings.desc_act and settings.group_size > 0:  # only g_idx tells in which order channels were quantized
        require_tensor(files, f"{module}.g_idx")
    order = files.source.tensors.get(f"{module}.g_idx")
    # Where bits do not divide 32 or K is ragged, only g_idx has K itself.
    columns = order.shape[0] if order and len(order.shape) == 1 else qweight.shape[0] * width // bits
    group_size = settings.group_size if settings.group_size > 0 else max(columns, 1)
    require_tensor(files, f"{module}.qweight", shape=(-(-columns * bits // width), rows))
    require_tensor(files, f"{module}.scales", shape=(-(-columns // group_size), rows))
    require_tensor(files, f"{module}.qzeros", shape=(groups, -(-rows * bits // width)), dtypes=[held])
    if settings.planar and (rows % RUN or columns % RUN):
        raise bad_file("bad-shape", "planes hold 32 codes each", file=qweight.file, tensor=qweight.name, field="shape",
                       found=[rows, columns], expected="rows and columns that are multiples of 32")  # fmt: skip
    if order:
        require_tensor(files, order.name, shape=(columns,), dtypes=["I32", "I64"])
    return rows, columns


def read_layer(files: CheckpointFiles, module: str, settings: GptqSettings) -> LayerTensors:
    """The module. Where the contents differ from the settings (zero points, group order), the contents are believed.

    Raises Refused (bad-content and all that `shape_of` gives).
    """
    import torch

    from qcore.bits import pack, unpack
    from qcore.tensor import LayerTensors, QuantizedTensor

    rows, columns = shape_of(files, module, settings)
    read, bits = files.source.read, settings.bits
    stream = read(f"{module}.qweight").t().contiguous().view(torch.uint8)
    codes = stream[:, : (columns * bits + 7) // 8].contiguous()
    zero_words, by_word = read(f"{module}.qzeros").contiguous(), settings.v1 and settings.by_word and 32 % bits == 0
    if by_word:
        width = 8 * zero_words.element_size()
        zero_words = zero_words + sum(1 << field for field in range(0, width, bits))
    zero_stream = zero_words.view(torch.uint8)
    if settings.planar:
        codes, zeros = pack(unpack_planes(codes, bits), bits), unpack_planes(zero_stream, bits).t().contiguous()
    else:
        zeros = unpack(zero_stream, bits, rows).t().contiguous()
    scales = finite(files, f"{module}.scales", read(f"{module}.scales").t().contiguous())
    if settings.v1 and not by_word:
        zeros = (zeros + 1) & ((1 << bits) - 1)  # field by field, so that no carry reaches the next zero point
    scheme = settings.scheme()
    index = _index(files, module, settings, columns, scales.shape[1])
    if index is not None and not scheme.weight.ordered:
        scheme = Scheme(integer_weight(bits, Group(settings.group_size), symmetric=settings.sym, ordered=True))
    symmetric = bool((zeros == 1 << (bits - 1)).all())
    if settings.sym and not symmetric:  # the stored zero points are the truth, whatever the config says
        weight = scheme.weight
        scheme = Scheme(integer_weight(bits, weight.scales[0].granularity, symmetric=False, ordered=weight.ordered))
    if settings.sym and symmetric and bits == 8:
        codes = (codes ^ 0x80).view(torch.int8)
    weight_tensor = QuantizedTensor(
        scheme, (rows, columns), codes, (scales,), None if settings.sym and symmetric else zeros, index
    )
    bias = f"{module}.bias"
    return LayerTensors(weight_tensor, read(bias) if bias in files.source.tensors else None)


def read_table(files: CheckpointFiles, module: str, settings: GptqSettings) -> LayerTensors:
    """The embedding. Raises Refused (unknown-variant, and all that `read_layer` gives)."""
    from qcore.bits import pack, unpack
    from qcore.tensor import QuantizedTensor

    layer = read_layer(files, module, settings.model_copy(update={"desc_act": False}))
    if layer.weight.index is not None:
        raise Refused(
            Refusal("unknown-variant", "notimpl", str(files.path), "an embedding with act-order is not read",
                    "found a g_idx that is not in order", "Quantize the embedding without desc_act.",
                    str(files.source.tensors[f"{module}.g_idx"].file), f"{module}.g_idx")
        )  # fmt: skip
    weight, bits = layer.weight, settings.bits
    columns, rows = weight.shape
    codes = weight.codes if bits == 8 else unpack(weight.codes, bits, rows)
    table = QuantizedTensor(
        settings.model_copy(update={"sym": weight.zeros is None}).table_scheme(rows),
        (rows, columns),
        codes.t().contiguous() if bits == 8 else pack(codes.t().contiguous(), bits),
        (weight.scales[0].t().contiguous(),),
        None if weight.zeros is None else weight.zeros.t().contiguous(),
    )
    return replace(layer, weight=table)


def _index(
    files: CheckpointFiles, module: str, settings: GptqSettings, columns: int, groups: int
) -> torch.Tensor | None:
    """g_idx where it says more than k // group_size, or where the scheme promises it."""
    import torch

    if settings.group_size <= 0:
        return None
    name = f"{module}.g_idx"
    sequential = torch.arange(columns, dtype=torch.int32) // settings.group_size
    index = files.source.read(name) if name in files.source.tensors else sequential
    if bool(((index < 0) | (index >= groups)).any()):
        raise bad_file("bad-content", "a group index is out of range", file=files.source.tensors[name].file,
                       tensor=name, field="values", found=f"{int(index.min())} to {int(index.max())}",
                       expected=f"0 to {groups - 1}")  # fmt: skip
    index = index.to(torch.int32)  # only now: a wide one that is out of range must not wrap into it
    return None if not settings.desc_act and torch.equal(index, sequential) else index


def pack_layer(module: str, layer: LayerTensors, settings: GptqSettings, name: str = "gptq") -> dict[str, torch.Tensor]:
    """The module's tensors in this layout. Raises Refused (not-representable)."""
    import torch

    from qcore.layouts.affine import affine_parts, exactly, unholdable

    codes, scales, zeros = affine_parts(layer.weight)
    bits = settings.bits
    if settings.planar and (codes.shape[0] % RUN or codes.shape[1] % RUN):
        unholdable(name, module, f"{list(codes.shape)}", "rows and columns that are multiples of 32, in planes")
    if zeros is None:
        zeros = torch.full(scales.shape, 1 << (bits - 1), dtype=torch.uint8)
    if settings.v1:
        zeros = (zeros.to(torch.int16) - 1).to(torch.uint8) & ((1 << bits) - 1)
    columns = layer.weight.shape[-1]
    index = layer.weight.index
    if index is None:
        size = settings.group_size if settings.group_size > 0 else columns
        index = torch.arange(columns, dtype=torch.int32) // size
    parts = {
        "qweight": _words(codes, settings).t().contiguous(),
        "qzeros": _words(zeros.t(), settings),
        "scales": exactly(name, module, scales, torch.float16, torch.bfloat16).t().contiguous(),
        "g_idx": index.to(torch.int32),
    }
    if layer.bias is not None:
        parts["bias"] = layer.bias
    return {f"{module}.{part}": tensor for part, tensor in parts.items()}


def _words(codes: torch.Tensor, settings: GptqSettings) -> torch.Tensor:
    """uint8 [A, n] -> int32 [A, ceil(n bits / 32)]."""
    from qcore.layouts.affine import as_words, words
    from qcore.layouts.planar import pack_planes

    return as_words(pack_planes(codes, settings.bits)) if settings.planar else words(codes, settings.bits)
