"""Small checkpoints written the way their tools write them, from codes that the test chooses.

Packing is done on Python's integers, so that it shares nothing with the code that reads it.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
LINEARS = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int [rows, n] -> int32 [rows, ceil(n bits / 32)]: a little-endian bit stream along the last dimension."""
    count = -(-codes.shape[1] * bits // 32)
    packed = []
    for row in codes.tolist():
        number = sum(code << (bits * i) for i, code in enumerate(row))
        packed.append([(number >> (32 * word)) & 0xFFFFFFFF for word in range(count)])
    return torch.tensor(packed, dtype=torch.int64).to(torch.int32)


def gptq_tensors(
    codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, bits: int, index: torch.Tensor | None, *, v1: bool
) -> dict[str, torch.Tensor]:
    """codes [N, K], zeros and scales [N, G] -> GPTQ's tensors."""
    stored = (zeros - 1) % (1 << bits) if v1 else zeros
    tensors = {
        "qweight": words(codes, bits).t().contiguous(),
        "qzeros": words(stored.t(), bits),
        "scales": scales.t().contiguous(),
    }
    return tensors if index is None else {**tensors, "g_idx": index.to(torch.int32)}


def dense_llama(seed: int = 0, **changes: Any) -> dict[str, torch.Tensor]:
    """Random weights of a one-layer llama, by transformers' names."""
    generator = torch.Generator().manual_seed(seed)
    config = {**LLAMA, **changes}

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    tensors = {"model.embed_tokens.weight": random(config["vocab_size"], 64), "model.norm.weight": 1 + random(64)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}{name}.weight": random(*shape) for name, shape in LINEARS.items()}
        tensors |= {
            f"{prefix}{name}.weight": 1 + random(64) for name in ("input_layernorm", "post_attention_layernorm")
        }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = random(config["vocab_size"], 64)
    return tensors


def write(
    folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any] | None = None, **config: Any
) -> Path:
    """A safetensors folder."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {**LLAMA, **config}
    if quantization is not None:
        values["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(values))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def child_seconds() -> float:
    """What this process's children took of the processor, which other tests beside it do not change."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@cache
def compiled() -> dict[str, str]:
    """An environment in which modules are compiled once, as pip does when it installs, wherever the caller keeps them."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return environment | {"PYTHONPYCACHEPREFIX": tempfile.mkdtemp(prefix="qcore-pyc-")}


SMALLEST = (
    "import typer\napp = typer.Typer()\n@app.command()\ndef one(a: str = 'x', b: float = 1.0): pass\napp(['--help'])"
)
"""The help of a command that has one option: what the least that there is takes of the processor here."""


def too_slow(command: list[str], seconds: float, times: float) -> str:
    """What is too slow about a command that takes more of the processor than `seconds` and than `times` what the
    smallest command takes, on this machine and as busy as it is; empty where it does not.

    Runs of the two take turns, and the quickest of each counts, for whatever else the machine does only adds to them:
    so a command has up to twelve runs to show what it can do."""
    least, smallest = float("inf"), float("inf")
    for _ in range(12):
        smallest = min(smallest, _seconds([sys.executable, "-c", SMALLEST]))
        least = min(least, _seconds(command))
        if least < max(seconds, times * smallest):
            return ""
    return f"{least:.2f} s is more than {seconds} s and than {times} times {smallest:.2f} s"


def _seconds(command: list[str]) -> float:
    began = child_seconds()
    subprocess.run(command, capture_output=True, check=True, env=compiled())
    return child_seconds() - began
