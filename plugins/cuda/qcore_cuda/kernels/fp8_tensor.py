"""fp8 under inputs with one scale for all rows, found at run time: the layer of Triton's kernels, of which cuBLASLt multiplies many rows."""

from __future__ import annotations

from qcore.kernels.triton.whole import WholeEightsLinear
from qcore_cuda.kernels.scaled import Fp8Linear


class Fp8TensorLinear(WholeEightsLinear, Fp8Linear):
    """Inputs are rounded as the one has it, products those of the other."""
