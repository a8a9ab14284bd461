"""How exactly a block's products are made that are only looked at, or read by a block that is looked at: in bfloat16, where the processor multiplies that faster.

An input's error of 2^-9 of itself is far below the damping of the sums that are made of it (qcore/algorithms/seen.py). These sums, attention, and all that is not quantized, routers among it, stay float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType

import torch


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it; others take longer than for float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class Roughly:
    """Linear layers multiply in bfloat16 from `with` to its end, and give float32."""

    def __init__(self, layers: Iterable[torch.nn.Linear]) -> None:
        self.layers = list(layers) if multiplies_bfloat16() else []

    def __enter__(self) -> Roughly:
        for layer in self.layers:
            layer.forward = _product(layer)  # type: ignore[assignment, method-assign]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer in self.layers:
            del layer.forward


def _product(layer: torch.nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, bias = layer.weight.data.to(torch.bfloat16), layer.bias

    def product(input: torch.Tensor) -> torch.Tensor:
        found = torch.nn.functional.linear(input.to(torch.bfloat16), weight).to(torch.float32)
        return found if bias is None else found.add_(bias)

    return product
