"""Ways of multiplying by one weight that are measured beside each other: kernels of the registry and dense bfloat16.

Each maps x [M, K] to [M, N] and is built from the same layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from qcore.select import LayerRequest, select

if TYPE_CHECKING:
    from qcore.kernel import Kernel
    from qcore.platform import Device
    from qcore.tensor import LayerTensors

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Contender:
    """name: the kernel's, or the tool's and its operator's. make: a copy of the weight in the contender's layout. nbytes: what a copy
    holds. dtype: of the activations that it is given."""

    name: str
    make: Callable[[], Product]
    nbytes: int
    dtype: torch.dtype


def dense(layer: LayerTensors, dtype: torch.dtype) -> Contender:
    """torch's own product with the weight in a float type; in bfloat16, what every other time is compared with."""
    weight = layer.weight.dequantize(dtype)

    def make() -> Product:
        return partial(torch.nn.functional.linear, weight=weight.clone())

    return Contender(f"dense {str(dtype).removeprefix('torch.')}", make, weight.nbytes, dtype)


def of_registry(
    layer: LayerTensors, kernels: list[tuple[Kernel, str]], device: Device, dtype: torch.dtype, exact: bool
) -> list[Contender]:
    """Every kernel that takes the layer on the device in `dtype`, the one that selection chooses first; the reference is left out."""
    name = str(dtype).removeprefix("torch.")
    request = LayerRequest("linear", layer.weight.scheme, layer.weight.shape, name, exact)  # type: ignore[arg-type]
    found = select(request, device.platform, kernels, device)
    return [
        _of_kernel(candidate.kernel, layer, dtype)
        for candidate in found.candidates
        if candidate.accepted and candidate.kernel.family != "reference"
    ]


def _of_kernel(kernel: Kernel, layer: LayerTensors, dtype: torch.dtype) -> Contender:
    def make() -> Product:
        return kernel.load().from_layer(layer, dtype)

    return Contender(kernel.name, make, _held(make(), layer.weight.nbytes), dtype)


def _held(module: object, otherwise: int) -> int:
    """Bytes that a module's buffers hold; of some of torch's packed tensors only the number of elements is known."""
    assert isinstance(module, torch.nn.Module)
    return sum(part.numel() * part.element_size() for part in module.buffers()) or otherwise
