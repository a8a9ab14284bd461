"""Checkpoints that the real tools made, with what the tools get of them: those that the repository carries and, by QCORE_GOLDEN=FOLDER, more."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

FOLDERS = [Path(__file__).parent / "golden", *map(Path, filter(None, [os.environ.get("QCORE_GOLDEN")]))]


def goldens() -> list[Path]:
    """Each once, by its name."""
    found = {
        path.name: path
        for folder in FOLDERS
        for path in sorted(folder.iterdir())
        if (path / "expected.safetensors").is_file()
    }
    assert found, "no golden checkpoints"
    return list(found.values())


def bound_of(path: Path, bounds: Mapping[str, float], usual: float) -> float:
    """The first of the bounds whose name the checkpoint's begins with; else the usual one."""
    return next((bound for start, bound in bounds.items() if path.name.startswith(start)), usual)


def divergence(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest Kullback-Leibler divergence of a token: of logits [..., vocabulary] from those that are wanted."""
    logs = got.float().log_softmax(-1), wanted.float().log_softmax(-1)
    return float(torch.nn.functional.kl_div(*logs, log_target=True, reduction="none").sum(-1).max())
