"""Act-order: which columns lie in which group, and the columns sorted by it."""

from __future__ import annotations

import torch

from qcore.refusal import Refusal, Refused


def columns_by_group(index: torch.Tensor, group: int, kernel: str) -> torch.Tensor:
    """int64 [K]: the columns of an index [K] of groups, sorted by group. Raises Refused (shape-unsupported) where groups are not all of one size; `kernel`
    names what does not take them."""
    order = index.argsort(stable=True)
    found = index[order]
    if not torch.equal(found, torch.arange(len(index), dtype=found.dtype, device=found.device) // group):
        counts = torch.bincount(index)
        raise Refused(Refusal("shape-unsupported", "notimpl", kernel, "act-order groups must all be of one size",
                              f"found groups of {int(counts.min())} to {int(counts.max())} columns, expected {group}",
                              "Another kernel takes this layer."))  # fmt: skip
    return order
