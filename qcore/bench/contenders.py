"""Ways of multiplying by one weight that are measured beside each other: kernels of the registry, dense bfloat16, and other tools.

Each maps x [M, K] to [M, N] and is built from the same layer. Tools that are not installed, or do not hold the weight's scheme, are
left out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from qcore.elements import Codebook, Group, PerChannel
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


def dense(layer: LayerTensors) -> Contender:
    """torch's own product with the weight in bfloat16: what every other time is compared with."""
    weight = layer.weight.dequantize(torch.bfloat16)

    def make() -> Product:
        return partial(torch.nn.functional.linear, weight=weight.clone())

    return Contender("dense bfloat16", make, weight.nbytes, torch.bfloat16)


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


def of_tools(layer: LayerTensors) -> Iterator[Contender]:
    """Other tools that are installed and multiply by weights of this scheme."""
    weight = layer.weight.scheme.weight
    grid = weight.granularity
    if isinstance(weight.element, Codebook) and isinstance(grid, Group) and importlib.util.find_spec("bitsandbytes"):
        yield _bitsandbytes(layer, weight.element.name, grid.size)
    if layer.weight.scheme.input is not None and isinstance(grid, PerChannel) and hasattr(torch, "_int_mm"):
        yield _int_mm(layer)


def _bitsandbytes(layer: LayerTensors, kind: str, block: int) -> Contender:
    """bitsandbytes' own quantization of the same numbers: its codes are as many, whatever their values."""
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    dense_weight = layer.weight.dequantize(torch.bfloat16)
    rows, columns = dense_weight.shape

    def make() -> Product:
        packed, state = quantize_4bit(dense_weight, blocksize=block, quant_type=kind)
        linear = Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type=kind)
        linear.weight = Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True, module=linear)
        product: Product = linear.eval()
        return product

    return Contender("bitsandbytes", make, layer.weight.nbytes, torch.bfloat16)


def _int_mm(layer: LayerTensors) -> Contender:
    """torch._int_mm with activations rounded by token, as torchao does it."""
    codes, scales = layer.weight.codes, layer.weight.scales[0].float().flatten()

    def make() -> Product:
        turned = codes.clone().t()

        def product(x: torch.Tensor) -> torch.Tensor:
            scale = x.abs().amax(-1, keepdim=True).float() / 127.5
            rounded = (x.float() / scale).round().clamp(-128, 127).to(torch.int8)
            return (torch._int_mm(rounded, turned) * (scale * scales)).to(x.dtype)

        return product

    return Contender("torch._int_mm", make, codes.nbytes, torch.bfloat16)
