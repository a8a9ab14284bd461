"""Integer weights as writers want them: unsigned codes, zero points on the same scale, scales in the width of the format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from qcore.elements import Group, Int, PerChannel, PerTensor
from qcore.refusal import Refusal, Refused

if TYPE_CHECKING:
    import torch

    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors, QuantizedTensor


def unholdable(name: str, module: str, what: object, expected: str) -> NoReturn:
    """Raises Refused (not-representable): the format `name` cannot hold a module without changing its numbers."""
    raise Refused(
        Refusal("not-representable", "never", module, f"{name} cannot hold this layer without changing its numbers",
                f"found {what}, expected {expected}", "Choose another format, or quantize the model again for this one.")
    )  # fmt: skip


def integer_of(
    name: str,
    module: str,
    scheme: Scheme,
    bits: Sequence[int],
    *,
    inputs: bool = False,
    ordered: bool = False,
    floating: bool = False,
) -> tuple[int, int]:
    """Bits and group size (-1: one group a row) of a weight that is an integer with a scale a group, else a Refusal.

    inputs, ordered, floating: quantized activations, act-order and float zero points of unsigned codes are held too.
    """
    weight = scheme.weight
    element, levels = weight.element, weight.scales
    fits = isinstance(element, Int) and element.bits in bits and len(levels) == 1
    if fits and weight.zero == "float":
        fits = floating and not element.signed  # type: ignore[union-attr]
    if not fits or (weight.ordered and not ordered) or (scheme.input is not None and not inputs):
        unholdable(name, module, scheme, f"integers of {', '.join(map(str, bits))} bits in groups")
    grid = levels[0].granularity
    if isinstance(grid, PerChannel | PerTensor):
        return element.bits, -1
    if not isinstance(grid, Group):
        unholdable(name, module, scheme, "one scale for each group or output channel")
    return element.bits, grid.size


def affine_parts(weight: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes uint8 [N, K] in 0 .. 2^bits - 1, scales [N, G] and zero points uint8 [N, G], None where all are 2^(bits-1)."""
    import torch

    from qcore.bits import unpack

    element = weight.scheme.weight.element
    assert isinstance(element, Int)
    rows, columns = weight.shape
    middle = 1 << (element.bits - 1)
    if element.bits == 8:
        codes = weight.codes.view(torch.uint8) ^ 0x80 if element.signed else weight.codes
    else:
        codes = unpack(weight.codes, element.bits, columns)
    scales = weight.scales[0].expand(rows, -1) if weight.scales[0].shape[0] == 1 else weight.scales[0]
    zeros = None if weight.scheme.weight.zero == "float" else weight.zeros
    if zeros is not None:
        wide = zeros.to(torch.int16).expand(scales.shape)
        zeros = (wide + middle if element.signed else wide).to(torch.uint8)
    elif not element.signed:
        zeros = torch.zeros(scales.shape, dtype=torch.uint8)
    return codes, scales.contiguous(), zeros


def added_zeros(name: str, module: str, weight: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    """The term that is added to q s of unsigned codes, [N, G]: a float zero point, or -(z s) where `dtype` holds it,
    else a Refusal."""
    import torch

    if weight.scheme.weight.zero == "float":
        assert weight.zeros is not None
        return exactly(name, module, weight.zeros, dtype, what="zero points")
    _, scales, zeros = affine_parts(weight)
    middle = 1 << (weight.scheme.weight.bits - 1)
    points = torch.full(scales.shape, float(middle)) if zeros is None else zeros.float()
    return exactly(name, module, -(points.double() * scales.double()), dtype, what="zero points times scales")


def plain_inputs(name: str, module: str, layer: LayerTensors) -> None:
    """Raises Refused (not-representable) where a vector multiplies the input, for which formats of integers have no place."""
    if layer.input_multiplier is not None:
        unholdable(name, module, "a vector that multiplies the input", "none")


def exactly(name: str, module: str, values: torch.Tensor, *dtypes: torch.dtype, what: str = "scales") -> torch.Tensor:
    """`values` in the first of the types that holds all of them, else a Refusal; no file has scales of 64 bits."""
    import torch

    wide = values.to(torch.float64)
    for dtype in dtypes:
        if dtype == torch.float64:
            continue
        narrow = values.to(dtype)
        if torch.equal(narrow.to(torch.float64), wide):
            return narrow
    short = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    unholdable(name, module, f"{what} in {str(values.dtype).removeprefix('torch.')}", f"{what} that {short} holds")


def multiplier_of(name: str, module: str, fine: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """The coarser scale in float32, if its products with all of the finer ones stay the same numbers, else a Refusal."""
    import torch

    narrow = whole.to(torch.float32)
    wide = whole if whole.dtype == torch.float64 else narrow
    if not torch.equal(fine.float() * narrow, (fine.float() * wide).float()):
        unholdable(name, module, "a scale of the whole tensor that divides", "one that multiplies to the same numbers")
    return narrow


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [A, n] -> int32 [A, ceil(n bits / 32)], a little-endian bit stream."""
    from qcore.bits import pack

    return as_words(pack(codes.contiguous(), bits))


def as_words(stream: torch.Tensor) -> torch.Tensor:
    """uint8 [A, B] -> int32 [A, ceil(B / 4)]."""
    import torch

    padded = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 4))
    return padded.flatten().view(torch.int32).reshape(stream.shape[0], -1)
