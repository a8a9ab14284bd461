"""Codes with scales beside them: what ModelOpt, Quark, AutoRound and DeepSeek's fp8 share, under names of their own.

    codes   int8 or e4m3, e5m2 [N, K]; smaller floats uint8 [N, K bits / 8], a little-endian bit stream, first code low
    scale   of the scheme's finest level: [N, G], or with dimensions of one left out or put in ([N], [], [N, 1, G, 1])
    whole   of the coarser level, one number
    input   one number, where inputs are static or have such a level too

w = q * scale * whole, or q * scale / whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcore.elements import Float, scale_shape
from qcore.method import SCALE_DTYPES, CheckpointFiles, read_scale, require_tensor
from qcore.refusal import bad_file
from qcore.scheme import Scheme, TensorScheme

if TYPE_CHECKING:
    import torch

    from qcore.tensor import LayerTensors

_HELD = {"e4m3fn": "F8_E4M3", "e4m3fnuz": "F8_E4M3FNUZ", "e5m2": "F8_E5M2"}


@dataclass(frozen=True)
class Names:
    """The tensors' names after the module's. divides: `whole` and `input_whole` are divided by. flat: `scale` may have one
    dimension."""

    codes: str = "weight"
    scale: str = "weight_scale"
    whole: str = "weight_scale_2"
    input: str = "input_scale"
    input_whole: str = "input_scale"
    divides: bool = False
    flat: bool = False


def input_part(scheme: Scheme, names: Names) -> str | None:
    """The name of the input's stored scale, where the scheme has one."""
    if scheme.input is None:
        return None
    if len(scheme.input.scales) > 1:
        return names.input_whole
    return None if scheme.input.dynamic else names.input


def shape_of(
    files: CheckpointFiles, module: str, scheme: Scheme, names: Names, *, shape: tuple[int, int] | None = None
) -> tuple[int, int]:
    """[N, K], once all headers agree; `shape` where the codes are of another layout and checked already.

    Raises Refused (missing-tensor, bad-shape, bad-dtype).
    """
    rows, columns = shape or _codes_shape(files, f"{module}.{names.codes}", scheme.weight)
    fine = scheme.weight.scales[0]
    wanted = scale_shape(fine.granularity, rows, columns)
    info = require_tensor(files, f"{module}.{names.scale}", dtypes=SCALE_DTYPES[fine.type])
    flat = names.flat and info.shape == (wanted[0] * wanted[1],)
    if _squeezed(info.shape) != _squeezed(wanted) and not flat:
        raise bad_file("bad-shape", "the scales do not fit the weight", file=info.file, tensor=info.name,
                       field="shape", found=list(info.shape), expected=list(wanted))  # fmt: skip
    numbers = [names.whole] if len(scheme.weight.scales) > 1 else []
    given = input_part(scheme, names)
    for part in [*numbers, *([given] if given else [])]:
        number = require_tensor(files, f"{module}.{part}", dtypes=SCALE_DTYPES["float"])
        if _squeezed(number.shape):
            raise bad_file("bad-shape", "the scale is one number", file=number.file, tensor=number.name, field="shape",
                           found=list(number.shape), expected="[] or [1]")  # fmt: skip
    return rows, columns


def read_layer(
    files: CheckpointFiles,
    module: str,
    scheme: Scheme,
    names: Names,
    *,
    shape: tuple[int, int] | None = None,
    codes: torch.Tensor | None = None,
) -> LayerTensors:
    """The module; `shape` and `codes` where these are of another layout. Raises Refused (bad-content and others)."""
    from qcore.tensor import LayerTensors, QuantizedTensor

    rows, columns = shape_of(files, module, scheme, names, shape=shape)
    fine = scheme.weight.scales[0]
    scales = [read_scale(files, f"{module}.{names.scale}", fine.type)]
    scales[0] = scales[0].reshape(scale_shape(fine.granularity, rows, columns))
    if len(scheme.weight.scales) > 1:
        scales.append(_number(files, f"{module}.{names.whole}", divides=names.divides).reshape(1, 1))
    given = input_part(scheme, names)
    divides = names.divides and given == names.input_whole
    bias = f"{module}.bias"
    return LayerTensors(
        QuantizedTensor(
            scheme,
            (rows, columns),
            files.source.read(f"{module}.{names.codes}") if codes is None else codes,
            tuple(scales),
        ),
        files.source.read(bias) if bias in files.source.tensors else None,
        input_scale=_number(files, f"{module}.{given}", divides=divides).reshape(1) if given else None,
    )


def _codes_shape(files: CheckpointFiles, name: str, weight: TensorScheme) -> tuple[int, int]:
    element = weight.element
    held = _HELD.get(element.format, "U8") if isinstance(element, Float) else "I8"
    info = require_tensor(files, name, dtypes=[held])
    if len(info.shape) != 2 or (held == "U8" and info.shape[1] * 2 % weight.bits):
        raise bad_file("bad-shape", "the weight is a matrix of whole codes", file=info.file, tensor=name, field="shape",
                       found=list(info.shape), expected=f"two dimensions of {weight.bits}-bit codes")  # fmt: skip
    rows, columns = info.shape
    return rows, columns * 8 // weight.bits if held == "U8" else columns


def _number(files: CheckpointFiles, name: str, *, divides: bool) -> torch.Tensor:
    """The scale; one that divides as 1 / s in float64, with which a float32 product is as exact as the division."""
    stored = read_scale(files, name)
    if not divides:
        return stored
    if not bool((stored > 0).all()):
        raise bad_file("bad-content", "this scale divides, and is positive", file=files.source.tensors[name].file,
                       tensor=name, field="values", found=float(stored.min()), expected="a positive number")  # fmt: skip
    return 1 / stored.double()


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
