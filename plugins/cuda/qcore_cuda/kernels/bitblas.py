"""Weight-only integers of 2 and 4 bits by the package `bitblas`, where it is installed and the quicker way."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import TYPE_CHECKING

import torch

from qcore.bits import unpack
from qcore.discovery import registry
from qcore.elements import Int
from qcore.kernels.scales import by_group, group_size
from qcore.refusal import Refusal, Refused
from qcore.select import LayerRequest, select
from qcore_cuda.bitblas_package import SPARE, Form, operator, refusal
from qcore_cuda.devices import examine
from qcore_cuda.race import Lap, race

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.kernel import Kernel
    from qcore.platform import Device
    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors, QuantizedTensor

log = logging.getLogger("qcore")

_NAME = "bitblas_int"
_FURTHEST = 8e-3
"""That the answers of two kernels may be apart: four times what each may be from the definition (qcore.accuracy)."""
_MOST = 65504.0
"""The largest number of float16."""


@torch.library.custom_op("qcore_cuda::bitblas", mutates_args=())
def product(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int, group: int, outputs: int
) -> torch.Tensor:  # fmt: skip
    """float16 [M, N] of x float16 [M, K]. weight, scales, zeros: as BitblasLinear has them. Raises TypeError, and Refused as `operator` does."""
    if x.dtype != torch.float16:
        raise TypeError(f"the product is of float16, not of {x.dtype}")
    out = x.new_empty(len(x), outputs)
    if len(x):
        x = x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
        operator(Form(bits, zeros is None, group, outputs, x.shape[1]), _architecture(x.device))(
            x, weight, scales, zeros, out
        )
    return out


@product.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int, group: int, outputs: int
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], outputs)


class BitblasLinear(torch.nn.Module):
    """weight: int8 [N, K bits / 8], as bitblas.Matmul has it (qcore/layouts/bitblas.py says how). scales: float16 [N + SPARE, groups], SPARE rows of them zero.
    zeros: the same, for unsigned codes."""

    weight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def __init__(self, form: Form, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> None:
        super().__init__()
        self.form = form
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        """The package packs the whole weight at a time, a byte for each of its codes. Raises Refused: contents-unsupported where scales are no numbers of
        float16, not-quicker where the kernel that comes next is as quick, no-device, and as `operator` does."""
        device, weight = this_device(torch.cuda.current_device() if torch.cuda.is_available() else None), layer.weight
        key = weight.scheme, weight.shape, device.architecture
        if (found := _VERDICTS.get(key)) is not None:
            raise Refused(found)
        form, scales, zeros = _form(weight), *_parts(weight)
        made = operator(form, device.architecture)
        packed = cls(form, made.packed(unpack(weight.codes, form.bits, form.columns)), scales, zeros)
        if os.environ.get("QCORE_BITBLAS") != "always" and key not in _VERDICTS:
            _VERDICTS[key] = verdict = _compared(packed, layer, device, dtype)
            if verdict is not None:
                raise Refused(verdict)
        return packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        form = self.form
        out: torch.Tensor = product(
            x.reshape(-1, x.shape[-1]), self.weight, self.scales, self.zeros, form.bits, form.group, form.rows
        )
        return out.view(*x.shape[:-1], form.rows)


_VERDICTS: dict[tuple[Scheme, tuple[int, ...], str], Refusal | None] = {}
"""By scheme, shape and architecture: why it is not taken, or None where it is."""


@cache
def this_device(index: int | None) -> Device:
    """The row of torch's GPU of this number. Raises Refused (no-device) where there is none, or others of another kind beside it, for the package compiles for the first one."""
    found = examine().devices
    here = [device for device in found if device.torch_device == f"cuda:{index}"]
    if not here or len({device.architecture for device in found}) > 1:
        raise Refused(refusal("no-device", "notyet", "the package bitblas compiles for the first of GPUs that are all of one kind",
                              f"found {', '.join(f'{device.id} {device.architecture}' for device in found) or 'none'}", "Another kernel is used."))  # fmt: skip
    return here[0]


def _architecture(place: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(place)
    return f"sm_{major}{minor}"


def _form(weight: QuantizedTensor) -> Form:
    scheme, (rows, columns) = weight.scheme.weight, weight.shape
    assert isinstance(scheme.element, Int)
    signed = scheme.element.signed and scheme.zero is None
    return Form(scheme.bits, signed, group_size(scheme.granularity) or -1, rows, columns)


def _parts(weight: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero points as BitblasLinear has them."""
    scheme, rows = weight.scheme.weight, weight.shape[0]
    stored = by_group(weight.scales[0], scheme.granularity, rows).t()
    scales = stored.to(torch.float16)
    fits = scales.double() == stored.double()
    if not bool((fits & (scales.double().abs() * 2**scheme.bits <= _MOST)).all()):
        raise Refused(refusal("contents-unsupported", "notimpl", "scales and what they make of a code must be numbers of float16",
                              f"found a scale of {float(stored[~fits][0] if not bool(fits.all()) else stored.abs().max()):.6g}", "Another kernel is used."))  # fmt: skip
    assert isinstance(scheme.element, Int)
    center = 2 ** (scheme.bits - 1) if scheme.element.signed else 0
    zeros = None
    if weight.zeros is not None:
        zeros = by_group(weight.zeros.to(torch.int16) + center, scheme.granularity, rows).t().to(torch.float16)
    elif not scheme.element.signed:
        zeros = torch.zeros_like(scales)
    return _spared(scales), None if zeros is None else _spared(zeros)


def _spared(part: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(part.contiguous(), (0, 0, 0, SPARE))


def _compared(packed: BitblasLinear, layer: LayerTensors, device: Device, dtype: torch.dtype) -> Refusal | None:
    """None where the layer is quicker than the one that would be made in its place for every number of rows, and gives the same; else why it is not taken."""
    scheme, shape, place = layer.weight.scheme, layer.weight.shape, device.torch_device
    rival = _rival(layer, device, dtype)
    if rival is None:
        return None
    kernel, other = rival
    try:
        laps = race(packed.to(place), other, shape[1], place, dtype)
    except Exception as fault:  # whatever the package or a kernel raises
        return refusal("kernel-failed", "notyet", "it could not be timed", f"{type(fault).__name__}: {fault}"[:300],
                       "Another kernel is used.")  # fmt: skip
    name = f"{shape[0]} x {shape[1]} of {scheme} on {device.architecture}"
    if wrong := [lap for lap in laps if not lap.apart <= _FURTHEST]:
        return refusal("kernel-wrong", "notyet", f"its answer is too far from that of {kernel.name}",
                       f"found {wrong[0].apart:.3g} for {wrong[0].rows} rows of {name}, expected at most {_FURTHEST:.3g}", "Another kernel is used.")  # fmt: skip
    if all(lap.ours < lap.theirs for lap in laps):
        log.info("%s is quicker than %s for %s: %s", _NAME, kernel.name, name, "; ".join(map(str, laps)))
        return None
    return slower(kernel, name, laps)


def slower(kernel: Kernel, name: str, laps: list[Lap]) -> Refusal:
    """Why a layer, by its name, stays on another kernel."""
    slow = " and ".join(str(lap.rows) for lap in laps if lap.ours >= lap.theirs)
    return refusal("not-quicker", "notyet", f"{kernel.name} is as quick or quicker for {slow} rows of activations", f"{name}: {'; '.join(map(str, laps))}",
                   "Nothing to do. QCORE_BITBLAS=tune has the package tune itself first, once for a host and minutes for each shape.")  # fmt: skip


def _rival(layer: LayerTensors, device: Device, dtype: torch.dtype) -> tuple[Kernel, torch.nn.Module] | None:
    """The kernel that would be chosen if this one were not there, with the layer, on the device."""
    kernels = [(kernel, plugin) for kernel, plugin in registry().kernels if kernel.name != _NAME]
    rows, columns = layer.weight.shape
    request = LayerRequest("linear", layer.weight.scheme, (rows, columns), str(dtype).removeprefix("torch."))
    for candidate in select(request, device.platform, kernels, device).candidates:
        if not candidate.accepted:
            break
        try:
            made = candidate.kernel.load().from_layer(layer, dtype)
        except Exception:  # a refusal, or a fault of its own
            continue
        return candidate.kernel, made.to(device.torch_device)
    return None
