"""The layers that a loaded model is made of: a kernel with what stands around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard, cast

import torch

from qcore.kernel import Kernel
from qcore.kernels.stacking import StackableLinear
from qcore.scheme import Scheme


class QuantizedLinear(torch.nn.Module):
    """Replaces torch.nn.Linear: y = kernel(x * input_multiplier) + bias.

    computes: the type that all of it is computed in, where it is not the input's, which y has again. kernel_name says which kernel runs it; `packed` is that kernel's module, which holds the weight.
    """

    bias: torch.Tensor | None
    input_multiplier: torch.Tensor | None

    def __init__(
        self,
        scheme: Scheme,
        shape: tuple[int, int],
        kernel: Kernel,
        packed: torch.nn.Module,
        bias: torch.Tensor | None = None,
        input_multiplier: torch.Tensor | None = None,
        computes: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scheme, self.kernel_name, self.computes = scheme, kernel.name, computes
        self.out_features, self.in_features = shape
        self.packed = packed
        self.register_buffer("bias", bias)
        self.register_buffer("input_multiplier", input_multiplier)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 1:  # kernels take rows
            alone: torch.Tensor = self(x[None])[0]
            return alone
        given = x.dtype
        if self.computes is not None:
            x = x.to(self.computes)
        if self.input_multiplier is not None:
            x = (x * self.input_multiplier).to(x.dtype)  # which the file may have stored in another
        out: torch.Tensor = self.packed(x)
        out = out if self.bias is None else out + self.bias
        return out if self.computes is None else out.to(given)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, scheme={self.scheme}, kernel={self.kernel_name}"


class StackedLinear(torch.nn.Module):
    """A mixture's experts of one part, E quantized layers on one kernel, each of which multiplies the rows that chose it.

    packed: the kernel's module, which holds all weights. bias: [E, N]. input_multiplier: [E, K]. The rest as QuantizedLinear has it.
    """

    bias: torch.Tensor | None
    input_multiplier: torch.Tensor | None

    def __init__(self, layers: Sequence[QuantizedLinear]) -> None:
        """Layers that are stackable, of which the kernel's modules are not to be used any more."""
        super().__init__()
        first, packed = layers[0], [cast("StackableLinear", layer.packed) for layer in layers]
        self.scheme, self.kernel_name, self.computes = first.scheme, first.kernel_name, first.computes
        self.count, self.out_features, self.in_features = len(layers), first.out_features, first.in_features
        self.packed = type(packed[0]).stacked(packed)
        for name in ("bias", "input_multiplier"):
            parts = [part for layer in layers if (part := getattr(layer, name)) is not None]
            self.register_buffer(name, torch.stack(parts) if parts else None)

    @staticmethod
    def stackable(layers: Sequence[torch.nn.Module]) -> TypeGuard[Sequence[QuantizedLinear]]:
        """Whether they can be run as one."""
        linears = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
        packed = [linear.packed for linear in linears if isinstance(linear.packed, StackableLinear)]
        if len(packed) < len(layers) or any(_around(linear) != _around(linears[0]) for linear in linears):
            return False
        return type(packed[0]).stackable(packed)

    def forward(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """x [M, K]; experts int32 [M], whose rows they are, in ascending order -> [M, N]."""
        given = x.dtype
        if self.computes is not None:
            x = x.to(self.computes)
        if self.input_multiplier is not None:
            x = (x * self.input_multiplier[experts]).to(x.dtype)
        out: torch.Tensor = self.packed(x, experts)
        out = out if self.bias is None else out + self.bias[experts]
        return out if self.computes is None else out.to(given)

    def extra_repr(self) -> str:
        return (
            f"{self.count} x {self.in_features}, {self.out_features}, scheme={self.scheme}, kernel={self.kernel_name}"
        )


def _around(layer: QuantizedLinear) -> tuple[object, ...]:
    """What layers that are run as one have in common, but for the kernel's module."""
    beside = [None if part is None else (part.shape, part.dtype) for part in (layer.bias, layer.input_multiplier)]
    return layer.scheme, layer.kernel_name, layer.computes, layer.out_features, layer.in_features, beside


class QuantizedEmbedding(torch.nn.Module):
    """Replaces torch.nn.Embedding; `scale` is what some models (gemma) multiply their embeddings by."""

    def __init__(
        self,
        scheme: Scheme,
        shape: tuple[int, int],
        kernel: Kernel,
        packed: torch.nn.Module,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.scheme, self.kernel_name, self.scale = scheme, kernel.name, scale
        self.num_embeddings, self.embedding_dim = shape
        self.packed = packed

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.packed(tokens)
        return rows if self.scale is None else rows * torch.tensor(self.scale, dtype=rows.dtype, device=rows.device)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme}, kernel={self.kernel_name}"
