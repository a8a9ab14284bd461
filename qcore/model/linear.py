"""The layers that a loaded model is made of: a kernel with what stands around it."""

from __future__ import annotations

import torch

from qcore.kernel import Kernel
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
