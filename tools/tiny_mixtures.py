"""Tiny mixtures of experts with random weights, as transformers saves them: no quantizer's golden checkpoints have any."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

_SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024,
    "num_experts_per_tok": 2, "max_position_embeddings": 256, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8},
    "qwen2_moe": {"num_experts": 4},
    "qwen3_moe": {"num_experts": 4, "norm_topk_prob": True},
    "gpt_oss": {"num_local_experts": 4},
}
"""By model_type: what there is beside the sizes."""


def save(kind: str, folder: Path, tokenizer: Path) -> Path:
    """A model of this kind in the new folder, with the tokenizer of the checkpoint `tokenizer`, whose vocabulary it has."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**_SIZES, **KINDS[kind])).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    return folder
