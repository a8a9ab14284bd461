"""e4m3 weights within what every chip has. Neuron's number with four bits of exponent is IEEE 754's, which ends at 240: the bytes that stand for 256 to 448 in torch's e4m3fn
are infinity and no numbers there. Trn3 has both.

Rows with a number above 240 are held as halves, and their scales doubled. A number can be halved unless it is below 2^-5, where the step is 2^-9 already; beside
the number above 240 that shares its scale, that step is nothing.

Sources: AWS's documentation of neuronx-cc's error NCC_EVRF051, NxD Inference's guide to custom quantization, and neuronx-distributed's
README_rescaling_fp8_for_neuron.md.
"""

from __future__ import annotations

import torch

IEEE_LARGEST = 240.0
_ROWS = 256
"""Rows brought into range at a time."""


def halved(codes: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight's e4m3 codes [N, K] on the CPU, halved in every tile of rows x columns with one above 240; and the tiles' factors, 1 or 2, float32
    [ceil(N / rows), ceil(K / columns)]."""
    kept, factors = [], []
    step = max(rows, _ROWS // rows * rows)
    for part in codes.split(step):
        wide = part.to(torch.float32)
        above = torch.nn.functional.pad(
            (wide.abs() > IEEE_LARGEST).float(), (0, -wide.shape[1] % columns, 0, -len(wide) % rows)
        )
        factor = 1.0 + above.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).amax((1, 3))
        spread = factor.repeat_interleave(rows, 0)[: len(wide)].repeat_interleave(columns, 1)[:, : wide.shape[1]]
        kept.append((wide / spread).to(torch.float8_e4m3fn))
        factors.append(factor)
    return torch.cat(kept), torch.cat(factors)
