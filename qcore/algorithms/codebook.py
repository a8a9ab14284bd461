"""bitsandbytes' quantizers: blocks of the flattened weight in 16 values, and LLM.int8's rows.

    4 bits    absmax = max |w| of a block; the nearest of the table's values to w / absmax, a tie going to the lower one
    nested    absmax less its mean in blocks of 256, each the nearest of dynamic8's values to a / max |a|, as near as
              2^16 steps tell
    LLM.int8  q = round(127 w / absmax), absmax = max |w| of a row; the weight is rounded to float16 first

Sources: Dettmers et al. 2022 (LLM.int8), 2023 (QLoRA, NF4), Dettmers 2016 (the dynamic type). The order of operations is
bitsandbytes', so that codes and scales are equal to the last bit.
"""

from __future__ import annotations

from functools import cache

import torch

from qcore.bits import pack
from qcore.elements import Codebook, FlatGroup, Group
from qcore.scheme import Scheme
from qcore.tensor import QuantizedTensor

TABLES: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}  # fmt: skip
"""The value of every code. fp4 is bitsandbytes' own order of sign, exponent and mantissa, not OCP's e2m1."""
_SMALLEST = 1e-38
"""What a block of zeros is divided by."""
_STEPS = (1 << 16) - 1


def codebook(weight: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
    """weight: float [N, K] -> nf4 or fp4 codes, absmax of every block in f32, or nested: uint8 and f32 with an offset."""
    element, levels = scheme.weight.element, scheme.weight.scales
    assert isinstance(element, Codebook)
    rows, columns = weight.shape
    table = torch.tensor(TABLES[element.name], dtype=torch.float32)
    order = torch.argsort(table)
    scaled, absmax = _blocks(weight.reshape(-1).to(torch.float32), _size(levels[0].granularity))
    codes = order[_nearest(scaled, table[order])].view(rows, columns).to(torch.uint8)
    packed, shape = pack(codes, element.bits), (rows, columns)
    if len(levels) == 1:
        scales = absmax.reshape((1, -1) if isinstance(levels[0].granularity, FlatGroup) else (rows, -1))
        return QuantizedTensor(scheme, shape, packed, (scales,), table=table)
    offset, nested = absmax.mean(), dynamic8()
    blocks = _size(levels[1].granularity) // _size(levels[0].granularity)
    fine, coarse = _nested(absmax - offset, blocks)
    return QuantizedTensor(scheme, shape, packed, (fine, coarse), table=table, scale_table=nested, offset=offset)


def llm_int8(weight: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
    """weight: float [N, K] -> int8 [N, K] and scales [N, 1]: absmax times float32's 1 / 127, in float64 as it is exact."""
    largest = torch.finfo(torch.float16).max
    half = weight.clamp(-largest, largest).to(torch.float16)
    absmax = half.abs().amax(1, keepdim=True).to(torch.float32)
    codes = (half * (127.0 / absmax.masked_fill(absmax == 0, 1.0))).round_().to(torch.int8)
    scales = absmax.double() * torch.tensor(1 / 127, dtype=torch.float32).double()
    return QuantizedTensor(scheme, (weight.shape[0], weight.shape[1]), codes, (scales,))


@cache
def dynamic8() -> torch.Tensor:
    """float32 [256], sorted: the signed dynamic type of 8 bits. Decade i of seven has 2^i means of equal parts of
    [0.1, 1], times 10^(i - 6), with both signs; 0 and 1 are added."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, (1 << decade) + 1, dtype=torch.float32)
        means = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)


def _blocks(flat: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """f32 [n] -> the values of every block over its largest magnitude [n], and those magnitudes [ceil(n / size)].

    Whole blocks are multiplied by the reciprocal and a last, ragged one is divided, which rounds otherwise.
    """
    whole = flat.numel() - flat.numel() % size
    blocks, rest = flat[:whole].view(-1, size), flat[whole:]
    absmax = blocks.abs().amax(1) if whole else flat[:0]
    scaled = (blocks * (1.0 / absmax.clamp(min=_SMALLEST)).unsqueeze(1)).reshape(-1)
    if rest.numel():
        last = rest.abs().max().clamp(min=_SMALLEST)
        scaled, absmax = torch.cat([scaled, rest / last]), torch.cat([absmax, last.reshape(1)])
    return scaled.clamp_(-1, 1), absmax


def _nested(absmax: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """f32 [n] -> uint8 codes [1, n] and f32 [1, ceil(n / size)]. bitsandbytes' CPU library looks the nearest value up in a
    table of 2^16 steps from -1 to 1, which rounds the value first, and gives blocks of zeros the code 0."""
    blocks = torch.nn.functional.pad(absmax, (0, -absmax.numel() % size)).view(-1, size)
    coarse = blocks.abs().amax(1, keepdim=True)
    step = (((blocks * (1.0 / coarse)).clamp_(-1, 1) + 1) * 0.5 * _STEPS + 0.5).floor_()
    codes = _nearest(-1 + 2 * step / _STEPS, dynamic8()).masked_fill_(coarse == 0, 0)
    return codes.reshape(1, -1)[:, : absmax.numel()].to(torch.uint8), coarse.reshape(1, -1)


def _nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Indexes [n] of the nearest values of a sorted table."""
    return torch.bucketize(values, (table[:-1] + table[1:]) / 2, out_int32=True)


def _size(granularity: object) -> int:
    assert isinstance(granularity, Group | FlatGroup)
    return granularity.size
