"""One perplexity for all tools, over windows of a text that do not overlap.

TOKENS is a JSON file that tools/real_models.py writes: lists of token ids, `calibration` and `scored`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def calibration(tokens: Path) -> list[list[int]]:
    """Windows that a quantizer may look at."""
    return list(json.loads(tokens.read_text())["calibration"])


def perplexity(model: Any, tokens: Path) -> float:
    """Of a causal model of transformers: logits in float32, likelihoods in float64 (see `of`).

    Attention is transformers' plain one: the last bits of another would move what activations are rounded to.
    """
    import torch

    model.set_attn_implementation("eager")
    losses = []
    with torch.no_grad():
        for window in json.loads(tokens.read_text())["scored"]:
            ids = torch.tensor(window)
            logits = model(ids[None]).logits[0].double()
            losses.append(float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:])))
    return of(losses)


def after_saving(model: Path, tokens: Path, out: Path, config: Any) -> float:
    """Of a model that transformers quantizes by a config while it loads, saves with its tokenizer, and opens again."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.float32)
    made.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    return perplexity(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), tokens)


def of(losses: Sequence[float]) -> float:
    """Perplexity from the mean negative log likelihood (nats) of each window's tokens but the first; windows are of one length."""
    return math.exp(math.fsum(losses) / len(losses))


def tell(tool: str, value: float) -> None:
    """The last line that a script prints: the tool with its version, and the perplexity of its own forward."""
    print(json.dumps({"tool": tool, "perplexity": value}))
