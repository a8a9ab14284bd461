"""A look at a kernel's answer before a model is trusted to it.

What a kernel's row claims may not be what its code does. So the first layer of every kernel and scheme is multiplied with
two rows of random activations, and a part of the result compared with the definition.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence

import torch

from qcore.accuracy import error_bound, worst_error
from qcore.elements import Tile
from qcore.kernel import Kernel
from qcore.kernels.activations import quantize_input
from qcore.model.linear import QuantizedLinear, StackedLinear
from qcore.refusal import Refusal
from qcore.tensor import LayerTensors

_ROWS = 256
"""Output channels compared at either end of a weight."""
_TOLERANCE = 4.0
"""Times the bound: real weights are not as even as those that the bounds were found with."""


def wrong_answer(
    kernel: Kernel, packed: torch.nn.Module, layer: LayerTensors, dtype: torch.dtype, device: str
) -> Refusal | None:
    """None where the kernel is as near to the definition as it must be; else why it is not to be used.

    packed: what the kernel made of the layer, on the device. Memory: two blocks of rows in float64.
    """
    weight = layer.weight
    scheme, (rows, columns) = weight.scheme, weight.shape
    name = str(dtype).removeprefix("torch.")
    bound = _TOLERANCE * error_bound(kernel, scheme, name)
    tile = next((level.granularity.rows for level in scheme.weight.scales if isinstance(level.granularity, Tile)), 1)
    last = max(0, rows - _ROWS) // tile * tile
    parts = [(0, min(rows, _ROWS))] + ([(last, rows)] if last else [])
    if kernel.op == "embedding":
        x = torch.tensor([0, rows - 1])
        expected = torch.cat(
            [weight.rows(start // tile * tile, start + 1).dequantize()[-1:] for start in (0, rows - 1)]
        )
    else:
        x = torch.randn(2, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    try:
        if kernel.op != "embedding":
            given = x.float()
            if scheme.input is not None:
                given = quantize_input(given, scheme.input, layer.input_scale, layer.input_zero, layer.order)
            elif kernel.quantizes_input:
                given = packed.rounded(given)  # type: ignore[operator]
            expected = torch.cat([given.double() @ weight.rows(*part).dequantize().double().t() for part in parts], -1)
        got = packed(x.to(device)).cpu()
        if kernel.op != "embedding":
            got = torch.cat([got[..., start:stop] for start, stop in parts], -1)
        error = worst_error(got, expected) if got.shape == expected.shape else float("inf")
    except Exception as fault:  # whatever the kernel raises
        return failed(kernel, fault)
    if error <= bound:
        return None
    return _wrong(kernel, "its answer is too far from the definition",
                  f"found error {error:.3g} for {scheme} in {name}, expected at most {bound:.3g}", "Another kernel is used.")  # fmt: skip


def wrong_stack(kernel: Kernel, layers: Sequence[QuantizedLinear], dtype: torch.dtype, device: str) -> Refusal | None:
    """None where experts that the kernel holds as one give what they give one by one; else why they are not to be held so.

    layers: one or two of them, stackable, which stay as they are. Memory: theirs once more.
    """
    name, scheme = str(dtype).removeprefix("torch."), layers[0].scheme
    bound = _TOLERANCE * error_bound(kernel, scheme, name)
    x = torch.randn(3, layers[0].in_features, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    last, instead = len(layers) - 1, "Its experts run one by one."
    try:
        stack, error = StackedLinear(copy.deepcopy(list(layers))), 0.0
        for rows in ([0, 0, last], [last]):
            counts, experts = Counter(rows), torch.tensor(rows, device=device).to(torch.int32)
            parts = zip(counts, x[: len(rows)].split(list(counts.values())), strict=True)
            expected = torch.cat([layers[number](part) for number, part in parts])
            error = max(error, worst_error(stack(x[: len(rows)], experts).cpu(), expected.cpu()))
    except Exception as fault:  # whatever the kernel raises
        return _wrong(kernel, "its implementation failed on experts", f"{type(fault).__name__}: {fault}"[:300], instead)
    if error <= bound:
        return None
    return _wrong(kernel, "its answer for experts as one is too far from theirs",
                  f"found error {error:.3g} for {scheme} in {name}, expected at most {bound:.3g}", instead)  # fmt: skip


def _wrong(kernel: Kernel, reason: str, fact: str, instead: str) -> Refusal:
    return Refusal("kernel-wrong", "notimpl", kernel.name, reason, fact,
                   f"{instead} Report it to the kernel's plugin; `qcore verify` shows every case.")  # fmt: skip


def failed(kernel: Kernel, fault: Exception) -> Refusal:
    """The refusal of a kernel that raised an error."""
    return Refusal("kernel-failed", "notimpl", kernel.name, "its implementation failed on this layer",
                   f"{type(fault).__name__}: {fault}"[:300],
                   "Another kernel is used. Report it to the kernel's plugin; `qcore verify` shows every case.")  # fmt: skip
