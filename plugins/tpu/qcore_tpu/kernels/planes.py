"""Codes packed into planes (qcore_tpu.kernels.form), some rows of a weight at a time."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from qcore_tpu.kernels.form import Form


def packed(parts: Iterable[torch.Tensor], form: Form, rows: int, columns: int) -> torch.Tensor:
    """uint8 [K * bits / 8, N], or int8 where codes are. parts: codes [some rows, columns], below 2^bits, one after the other; columns are filled up to whole
    blocks with zeros."""
    blocks = -(-columns // form.block)
    made: torch.Tensor | None = None
    start = 0
    for part in parts:
        if made is None:
            made = torch.empty(form.byte_rows(blocks * form.block), rows, dtype=part.dtype, device=part.device)
        whole = torch.nn.functional.pad(part, (0, blocks * form.block - columns))
        made[:, start : start + len(part)] = _planes(whole.t().reshape(blocks, form.block, -1), form).flatten(0, 1)
        start += len(part)
    assert made is not None and start == rows, "codes of every row"
    return made


def _planes(codes: torch.Tensor, form: Form) -> torch.Tensor:
    """[blocks, columns of a block, rows] -> [blocks, bytes of a block, rows]."""
    if form.bits == 8:
        return codes
    found, below = [], 0
    for width in form.widths:
        stacked = (codes >> below & (1 << width) - 1).unflatten(1, (8 // width, -1))
        plane = stacked[:, 0].clone()
        for place in range(1, 8 // width):
            plane |= stacked[:, place] << (place * width)
        found.append(plane)
        below += width
    return torch.cat(found, 1)
