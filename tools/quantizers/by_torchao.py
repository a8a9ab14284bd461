"""Quantizes with TorchAO through transformers: python tools/quantizers/by_torchao.py CASE MODEL TOKENS OUT"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torchao
from perplexity import after_saving, tell
from torchao import quantization as q
from transformers import TorchAoConfig

CASES = (
    "int8 weight-only",
    "int4 by 32 weight-only",
    "int2 by 64 weight-only",
    "float8 weight-only",
    "int8 weights, int8 activations",
    "int4 by 32 weights, int8 activations",
)


def config(case: str) -> Any:
    match case:
        case "int8 weight-only":
            return q.Int8WeightOnlyConfig()
        case "int4 by 32 weight-only":
            return q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32))  # type: ignore[attr-defined]
        case "int2 by 64 weight-only":
            return q.IntxWeightOnlyConfig(weight_dtype=torch.int2, granularity=q.PerGroup(64))  # type: ignore[attr-defined]
        case "float8 weight-only":
            return q.Float8WeightOnlyConfig()
        case "int8 weights, int8 activations":
            return q.Int8DynamicActivationInt8WeightConfig()
        case "int4 by 32 weights, int8 activations":
            return q.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=q.PerGroup(32))  # type: ignore[attr-defined]
    raise SystemExit(f"no case {case}")


def main(case: str, model: Path, tokens: Path, out: Path) -> None:
    value = after_saving(model, tokens, out, TorchAoConfig(config(case)))
    tell(f"torchao {torchao.__version__}", value)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
