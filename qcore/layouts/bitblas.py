"""BitBLAS's own layout, as its matmul for half-precision inputs of any batch size stores it.

    qweight        int8 [N, K bits / 8]   codes as a little-endian bit stream along K; under 8 bits each word's codes are
                                          interleaved for fast decoding, unless `fast_decoding` is false or the
                                          scales are bfloat16
    scales         f16 or bf16 [N, G]
    qzeros, zeros  int8 [G, N bits / 8]   zeros_mode `quantized`: zero points along N, plain
                   float [N, G]           `original`: w = (q - z) s; `rescale`: w = q s - z

Symmetric codes are q + 2^(bits-1). Source: BitBLAS's quantization/utils.py (general_compress, interleave_weight) and
ops/general_matmul. Layouts of a weight propagated through the tensor cores have four dimensions, and are refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from qcore.checkpoint.settings import Settings
from qcore.elements import Granularity, Group, Int, Level, PerChannel
from qcore.method import CheckpointFiles, read_scale, require_tensor
from qcore.refusal import bad_file
from qcore.scheme import Scheme, TensorScheme, Zero

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors

PARTS = frozenset({"qweight", "scales", "qzeros", "zeros", "bias"})


class BitblasSettings(Settings):
    """One module's numbers."""

    bits: Literal[2, 4, 8]
    group_size: int = Field(-1, ge=-1)
    sym: bool = False
    zeros_mode: Literal["quantized", "original", "rescale"] = "quantized"
    fast_decoding: bool | None = None

    def scheme(self) -> Scheme:
        granularity: Granularity = Group(self.group_size) if self.group_size > 0 else PerChannel()
        zero: Zero | None = None if self.sym else "float" if self.zeros_mode == "rescale" else "stored"
        return Scheme(TensorScheme(Int(self.bits, signed=self.sym), (Level(granularity),), zero))


def shape_of(files: CheckpointFiles, module: str, settings: BitblasSettings) -> tuple[int, int]:
    """[N, K], once all headers agree. Raises Refused (missing-tensor, bad-shape, bad-dtype)."""
    bits = settings.bits
    info = require_tensor(files, f"{module}.qweight", dtypes=["I8", "U8"])
    if len(info.shape) != 2 or (bits < 8 and info.shape[1] % 4):
        raise bad_file("bad-shape", "only weights that are not propagated are read", file=info.file, tensor=info.name,
                       field="shape", found=list(info.shape),
                       expected=f"[N, K * {bits} / 8], K * {bits} a multiple of 32")  # fmt: skip
    rows, columns = info.shape[0], info.shape[1] * 8 // bits
    if settings.group_size > 0 and columns % settings.group_size:
        raise bad_file("bad-shape", "groups do not divide the input channels", file=info.file, tensor=info.name,
                       field="shape", found=f"{columns} channels",
                       expected=f"a multiple of {settings.group_size}")  # fmt: skip
    groups = columns // settings.group_size if settings.group_size > 0 else 1
    require_tensor(files, f"{module}.scales", shape=(rows, groups), dtypes=["F16", "BF16", "F32"])
    if not settings.sym:
        quantized = settings.zeros_mode == "quantized"
        require_tensor(
            files,
            _zeros_name(files, module),
            shape=(groups, rows * bits // 8) if quantized else (rows, groups),
            dtypes=["I8", "U8"] if quantized else ["F16", "BF16", "F32"],
        )
    return rows, columns


def read_layer(files: CheckpointFiles, module: str, settings: BitblasSettings) -> LayerTensors:
    """The module. Raises Refused (bad-content and all that `shape_of` gives)."""
    import torch

    from qcore.tensor import LayerTensors, QuantizedTensor

    rows, columns = shape_of(files, module, settings)
    scales = read_scale(files, f"{module}.scales")
    codes = files.source.read(f"{module}.qweight").view(torch.uint8)
    fast = settings.fast_decoding if settings.fast_decoding is not None else scales.dtype == torch.float16
    if fast and settings.bits < 8:
        codes = deinterleave(codes, settings.bits)
    if settings.bits == 8 and settings.sym:
        codes = (codes ^ 0x80).view(torch.int8)
    bias = f"{module}.bias"
    return LayerTensors(
        QuantizedTensor(
            settings.scheme(),
            (rows, columns),
            codes,
            (scales,),
            None if settings.sym else _zeros(files, module, settings, rows),
        ),
        files.source.read(bias) if bias in files.source.tensors else None,
    )


def deinterleave(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [N, B] words interleaved for half-precision decoding -> the plain stream.

    Code i of a word's stands in half i % 2, as its field i / 2; of 2-bit codes the two middle bytes are swapped besides.
    """
    import torch

    words = codes.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    if bits == 2:
        words = words & 0xFF0000FF | (words & 0x00FF0000) >> 8 | (words & 0x0000FF00) << 8
    plain, mask = torch.zeros_like(words), (1 << bits) - 1
    for i in range(32 // bits):
        plain |= ((words >> ((i % 2) * 16 + (i // 2) * bits)) & mask) << (bits * i)
    return plain.to(torch.int32).view(torch.uint8)


def interleave(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The plain stream uint8 [N, B] -> its words interleaved, the inverse of `deinterleave`."""
    import torch

    words = codes.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    woven, mask = torch.zeros_like(words), (1 << bits) - 1
    for i in range(32 // bits):
        woven |= ((words >> (bits * i)) & mask) << ((i % 2) * 16 + (i // 2) * bits)
    if bits == 2:
        woven = woven & 0xFF0000FF | (woven & 0x00FF0000) >> 8 | (woven & 0x0000FF00) << 8
    return woven.to(torch.int32).view(torch.uint8)


def pack_layer(module: str, layer: LayerTensors, settings: BitblasSettings, name: str) -> dict[str, torch.Tensor]:
    """The module's tensors. Raises Refused (not-representable), also where floats do not hold z s (`rescale`)."""
    import torch

    from qcore.bits import pack
    from qcore.layouts.affine import added_zeros, affine_parts, exactly, unholdable

    bits = settings.bits
    codes, scales, zeros = affine_parts(layer.weight)
    rows, columns = codes.shape
    if (
        columns * bits % 32
        or rows * bits % 8
        or columns % (settings.group_size if settings.group_size > 0 else columns)
    ):
        unholdable(name, module, f"{rows} output and {columns} input channels in groups of {settings.group_size}",
                   "whole groups, and rows and columns that end with a word")  # fmt: skip
    scales = exactly(name, module, scales, torch.float16, torch.bfloat16)
    stream = pack(codes, bits)
    if bits < 8 and scales.dtype == torch.float16:
        stream = interleave(stream, bits)
    parts = {"qweight": stream.view(torch.int8), "scales": scales}
    points = torch.full(scales.shape, 1 << (bits - 1), dtype=torch.uint8) if zeros is None else zeros
    if settings.sym and zeros is not None:
        unholdable(name, module, "zero points", "symmetric codes, as the config says")
    elif settings.zeros_mode == "rescale":
        parts["zeros"] = -added_zeros(name, module, layer.weight, scales.dtype)
    elif settings.zeros_mode == "original":
        parts["zeros"] = exactly(name, module, points, scales.dtype)
    elif not settings.sym:
        parts["qzeros"] = pack(points.t().contiguous(), bits).view(torch.int8)
    if layer.bias is not None:
        parts["bias"] = layer.bias
    return {f"{module}.{part}": tensor for part, tensor in parts.items()}


def _zeros_name(files: CheckpointFiles, module: str) -> str:
    return f"{module}.zeros" if f"{module}.zeros" in files.source.tensors else f"{module}.qzeros"


def _zeros(files: CheckpointFiles, module: str, settings: BitblasSettings, rows: int) -> torch.Tensor:
    """Zero points [N, G]: codes, or the float that is added."""
    import torch

    from qcore.bits import unpack

    name = _zeros_name(files, module)
    if settings.zeros_mode == "quantized":
        return unpack(files.source.read(name).view(torch.uint8), settings.bits, rows).t().contiguous()
    stored = read_scale(files, name)
    if settings.zeros_mode == "rescale":
        return -stored
    whole = stored.round()
    if not bool(((whole == stored) & (stored >= 0) & (stored < 256)).all()):
        raise bad_file("bad-content", "a zero point is not a code", file=files.source.tensors[name].file, tensor=name,
                       field="values", found=f"{float(stored.min())} to {float(stored.max())}",
                       expected="whole numbers of 0 to 255")  # fmt: skip
    return whole.to(torch.uint8)
