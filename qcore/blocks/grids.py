"""The lookup tables of the IQ1, IQ2 and IQ3 types, made once per device.

The grids are ggml's choice of 4- or 8-tuples of magnitudes (src/ggml-common.h), kept in iq_grids.safetensors, which
tools/make_iq_grids.py writes. A tuple of bytes is held as one wide integer, so that a lookup moves a whole tuple.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from torch import Tensor

_FILE = Path(__file__).with_name("iq_grids.safetensors")


@functools.cache
def grid(name: str, device: torch.device) -> Tensor:
    """Grid `name` ("iq2_xxs", "iq2_xs", "iq2_s": int64, eight int8 each; "iq3_xxs", "iq3_s": int32, four int8 each)."""
    rows = _load(name).to(device)
    return rows.view(torch.int64 if rows.shape[1] == 8 else torch.int32).flatten()


@functools.cache
def shifted_grid(device: torch.device) -> Tensor:
    """iq1_s's and iq1_m's 2048 tuples of -1, 0, 1 plus 1/8, then the same minus 1/8, all times eight.

    int64 [4096], eight int8 each.
    """
    rows = _load("iq1_s").to(device) * 8
    return torch.cat([rows + 1, rows - 1]).view(torch.int64).flatten()


@functools.cache
def signs(bits: int, device: torch.device) -> Tensor:
    """Eight factors of 1 or -1 for every sign code, a set bit meaning -1: int64 [2 ** bits], eight int8 each.

    bits: 8, or 7 where the eighth sign is stored as parity (the number of minus signs is even).
    """
    codes = torch.arange(2**bits, dtype=torch.int32, device=device)
    minus = torch.stack([codes >> i & 1 for i in range(bits)], 1).to(torch.int8)
    if bits == 7:
        minus = torch.cat([minus, minus.sum(1, keepdim=True, dtype=torch.int8) & 1], 1)
    return (1 - 2 * minus).view(torch.int64).flatten()


def _load(name: str) -> Tensor:
    """One int8 [entries, 4 or 8] table of the file, on the CPU."""
    data = _FILE.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:start])[name]
    first, last = entry["data_offsets"]
    return torch.frombuffer(bytearray(data[start + first : start + last]), dtype=torch.int8).view(entry["shape"])
