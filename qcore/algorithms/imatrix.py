"""llama.cpp's importance matrix: each block is encoded for the least error, in which columns count by the mean square of their inputs."""

from __future__ import annotations

import torch

from qcore.algorithms.gptq_blocks import block_type
from qcore.algorithms.seen import Seen
from qcore.blocks.quantize import quantize_blocks
from qcore.scheme import Scheme
from qcore.tensor import QuantizedTensor


def imatrix(weight: torch.Tensor, scheme: Scheme, seen: Seen) -> QuantizedTensor:
    """weight: float [N, K]. Raises Refused (shape-unsupported) where K is no whole number of blocks."""
    importance = seen.sums.diagonal() / max(seen.rows, 1)
    return QuantizedTensor(scheme, tuple(weight.shape), quantize_blocks(block_type(weight, scheme), weight, importance))
