"""Quark's integer weights: codes of 8 and 4 bits, with zero points beside them whether they are symmetric or not.

    4 bits, by groups   weight int32 [K, N / 8], weight_scale [G, N], weight_zero_point int32 [G, N / 8]
    4 bits, else        weight int32 [N, K / 8], weight_scale [] or [N], weight_zero_point int32 [] or [N / 8]
    8 bits, by groups   weight [K, N], weight_scale [G, N], weight_zero_point [G, N]
    8 bits, else        weight [N, K], weight_scale [] or [N], weight_zero_point [] or [N]

Eight nibbles to a word, in AWQ's order or as they come. int4 and int8 are two's complement, zero points included. The int4 of
fp8 (W4A8) has weight_scale [] of the fp8 and weight_scale_2 [N] of the int4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcore.elements import Group, Int, PerTensor, scale_shape
from qcore.layouts.awq import pack_words, unpack_words
from qcore.layouts.scaled import Names, shape_of
from qcore.method import SCALE_DTYPES, CheckpointFiles, read_scale, require_tensor
from qcore.refusal import bad_file
from qcore.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors, QuantizedTensor

_TWO_LEVELS = Names(scale="weight_scale_2", whole="weight_scale")
_ZEROS = ("weight_zero_point", "weight_zero_point_2", "input_zero_point", "input_zero_point_2")


def integer_shape(files: CheckpointFiles, module: str, scheme: Scheme, *, signed: bool) -> tuple[int, int]:
    """[N, K], once all headers agree. Raises Refused (missing-tensor, bad-shape, bad-dtype)."""
    weight = scheme.weight
    grid, lanes = weight.scales[0].granularity, 8 if weight.bits == 4 else 1
    held = "I32" if weight.bits == 4 else "I8" if signed else "U8"
    info = require_tensor(files, f"{module}.weight", dtypes=[held])
    if len(info.shape) != 2:
        raise bad_file("bad-shape", "the weight is a matrix", file=info.file, tensor=info.name, field="shape",
                       found=list(info.shape), expected="two dimensions")  # fmt: skip
    outer, inner = info.shape[0], info.shape[1] * lanes
    rows, columns = (inner, outer) if isinstance(grid, Group) else (outer, inner)
    groups = scale_shape(grid, rows, columns)[1]
    if weight.zero:
        by_rows = [(groups, rows // lanes)] if isinstance(grid, Group) else [(rows // lanes,)]
        shapes = [(), (1,)] if isinstance(grid, PerTensor) else by_rows
        zeros = require_tensor(files, f"{module}.weight_zero_point", dtypes=[held])
        if zeros.shape not in shapes:
            raise bad_file("bad-shape", "the zero points do not fit the weight", file=zeros.file, tensor=zeros.name,
                           field="shape", found=list(zeros.shape), expected=list(shapes[0]))  # fmt: skip
    if scheme.input is not None and scheme.input.zero and not scheme.input.dynamic:
        require_tensor(files, f"{module}.input_zero_point", dtypes=["I8", "U8"])
    if not isinstance(grid, Group):
        names = _TWO_LEVELS if len(weight.scales) == 2 else Names()
        return shape_of(files, module, scheme, names, shape=(rows, columns))
    floats = SCALE_DTYPES["float"]
    require_tensor(files, f"{module}.weight_scale", shape=(groups, rows), dtypes=floats)
    if scheme.input is not None and not scheme.input.dynamic:
        require_tensor(files, f"{module}.input_scale", dtypes=floats)
    return rows, columns


def read_integers(
    files: CheckpointFiles, module: str, scheme: Scheme, shape: tuple[int, int], *, signed: bool, reorder: bool
) -> LayerTensors:
    """The module. Raises Refused (bad-content and others)."""
    import torch

    from qcore.bits import pack
    from qcore.tensor import LayerTensors, QuantizedTensor

    weight, read = scheme.weight, files.source.read
    grouped = isinstance(weight.scales[0].granularity, Group)
    middle = (1 << (weight.bits - 1)) if signed else 0  # two's complement becomes q + middle

    def codes(part: str) -> torch.Tensor:
        stored = read(f"{module}.{part}")
        if not stored.dim() or (stored.numel() == 1 and not grouped):  # one, in the lowest bits
            return ((stored.reshape(1, 1).view(torch.uint8)[:, :1] & ((1 << weight.bits) - 1)) ^ middle).contiguous()
        stored = stored.reshape(1, -1) if stored.dim() == 1 else stored
        whole = unpack_words(stored, reorder=reorder) if weight.bits == 4 else stored.view(torch.uint8)
        return whole.t().contiguous() ^ middle if grouped else whole ^ middle

    made = codes("weight")
    zeros = codes("weight_zero_point") if weight.zero else None
    if zeros is not None and not grouped:
        zeros = zeros.reshape(-1, 1)
    if weight.bits == 4:
        made = pack(made, 4)
    elif weight.zero is None:
        made = (made ^ 0x80).view(torch.int8)
    scales = []
    for i, level in enumerate(weight.scales):
        part = _TWO_LEVELS.scale if len(weight.scales) == 2 and i == 0 else _TWO_LEVELS.whole
        scale = read_scale(files, f"{module}.{part}")
        scales.append(scale.t().contiguous() if grouped else scale.reshape(scale_shape(level.granularity, *shape)))
    given = scheme.input is not None and not scheme.input.dynamic
    bias = f"{module}.bias"
    return LayerTensors(
        QuantizedTensor(scheme, shape, made, tuple(scales), zeros),
        read(bias) if bias in files.source.tensors else None,
        input_scale=read_scale(files, f"{module}.input_scale").reshape(1) if given else None,
        input_zero=_input_zero(files, module, scheme),
        # Quark rounds integers as torch's fake quantization does.
        order="reciprocal" if scheme.input and isinstance(scheme.input.element, Int) else "dequantized",
    )


def _input_zero(files: CheckpointFiles, module: str, scheme: Scheme) -> torch.Tensor | None:
    """int8 [1]: that of unsigned codes on the scale of signed ones."""
    import torch

    if scheme.input is None or not scheme.input.zero or scheme.input.dynamic:
        return None
    stored = files.source.read(f"{module}.input_zero_point").reshape(1)
    return (stored ^ 0x80).view(torch.int8) if stored.dtype == torch.uint8 else stored


def no_zero_points(files: CheckpointFiles, module: str, scheme: Scheme) -> None:
    """Symmetric tensors come with zero points all the same. Raises Refused (bad-content) where one is not 0."""
    inputs = scheme.input is not None and scheme.input.zero is not None
    for part in _ZEROS:
        info = files.source.tensors.get(f"{module}.{part}")
        meant = inputs if part.startswith("input") else scheme.weight.zero is not None
        if info is not None and not meant and bool(files.source.read(info.name).any()):
            raise bad_file("bad-content", "a symmetric tensor has a zero point", file=info.file, tensor=info.name,
                           field="values", found="other than 0", expected="0")  # fmt: skip


def pack_integers(weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    """weight and weight_zero_point, nibbles in AWQ's order: signed where there are no zero points, else unsigned."""
    import torch

    from qcore.layouts.affine import affine_parts

    scheme = weight.scheme.weight
    assert isinstance(scheme.element, Int)
    grid, bits, signed = scheme.scales[0].granularity, scheme.bits, scheme.zero is None
    grouped, middle = isinstance(grid, Group), (1 << (scheme.bits - 1)) if scheme.zero is None else 0
    codes, scales, zeros = affine_parts(weight)
    if zeros is None:
        zeros = torch.full(scales.shape, middle, dtype=torch.uint8)
    if isinstance(grid, PerTensor):
        zeros = zeros[:1, :1]

    def stored(part: torch.Tensor) -> torch.Tensor:
        part = ((part.t() if grouped else part) ^ middle).contiguous()
        if bits == 4:
            return pack_words(part)
        return part.view(torch.int8) if signed else part

    if grouped:
        return {"weight": stored(codes), "weight_zero_point": stored(zeros)}
    if isinstance(grid, PerTensor):
        one = (zeros ^ middle).reshape(())
        one = one.to(torch.int32) if bits == 4 else one.view(torch.int8) if signed else one
        return {"weight": stored(codes), "weight_zero_point": one}
    return {"weight": stored(codes), "weight_zero_point": stored(zeros.reshape(1, -1)).reshape(-1)}
