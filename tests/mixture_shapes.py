"""Headers of GGUF files of mixtures, for what depends on names and shapes alone: which type llama.cpp gives each tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from qcore.gguf.architectures import MIXTURES, UNSUFFIXED
from qcore.gguf.encode_config import architecture_fields

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # Eight experts, which llama.cpp has rules for; experts that always run; fewer than four; rows that are no whole blocks
    # of 256; and 80 layers, which it takes for a model of 70B where it is a llama.
    "eight": ("llama", {"num_local_experts": 8, "num_key_value_heads": 2}),
    "shared": ("qwen2moe", {"num_experts": 4}),
    "few": ("qwen3moe", {"num_experts": 2, "norm_topk_prob": True}),
    "narrow": (
        "gpt-oss",
        {"num_local_experts": 4, "num_hidden_layers": 2, "hidden_size": 288, "intermediate_size": 320},
    ),
    "large": ("llama", {"num_local_experts": 2, "num_hidden_layers": 80, "num_key_value_heads": 4}),
    "long": ("qwen3moe", {"num_experts": 2, "num_hidden_layers": 80, "num_key_value_heads": 4, "norm_topk_prob": True}),
}
_SIZES = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256,
          "num_hidden_layers": 16, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32, "vocab_size": 1024,
          "num_experts_per_tok": 2, "tie_word_embeddings": False, "max_position_embeddings": 128}  # fmt: skip


def header_of(model: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Metadata without a tokenizer, and every tensor's shape, by parts and then by layers."""
    name, changes = MODELS[model]
    row = MIXTURES[name]
    config = CONFIG_MAPPING[row.model_type](**{**_SIZES, **changes})
    assert row.experts is not None
    experts, inner, hidden = getattr(config, row.experts.count), getattr(config, row.experts.inner), config.hidden_size
    heads, keys = 32 * config.num_attention_heads, 32 * config.num_key_value_heads
    shapes = {
        "attn_q": (heads, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden), "attn_output": (hidden, heads),
        "ffn_gate_inp": (experts, hidden), "ffn_gate_exps": (experts, inner, hidden), "ffn_up_exps": (experts, inner, hidden),
        "ffn_down_exps": (experts, hidden, inner), "ffn_gate_inp_shexp": (hidden,), "ffn_gate_shexp": (256, hidden),
        "ffn_up_shexp": (256, hidden), "ffn_down_shexp": (hidden, 256), "attn_sinks": (config.num_attention_heads,),
        "attn_norm": (hidden,), "ffn_norm": (hidden,), "post_attention_norm": (hidden,), "attn_q_norm": (32,), "attn_k_norm": (32,),
    }  # fmt: skip
    parts = {
        part: shapes[part] for part in row.layer if not (part == "ffn_norm" and "post_attention_norm" in row.layer)
    }
    tensors = {"token_embd.weight": (1024, hidden), "output_norm.weight": (hidden,), "output.weight": (1024, hidden)}
    layers = range(config.num_hidden_layers)
    tensors |= {f"blk.{layer}.{part}.weight": shape for part, shape in parts.items() for layer in layers}
    biased = (
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "ffn_gate_inp",
        "ffn_gate_exps",
        "ffn_up_exps",
        "ffn_down_exps",
    )
    if row.experts.alternating:
        tensors |= {f"blk.{layer}.{part}.bias": parts[part][:-1] for part in biased for layer in layers}
    assert set(UNSUFFIXED) <= {"attn_sinks"}
    return {"general.architecture": name, **architecture_fields(config, row, Path(model))}, tensors


def shortened(types: list[str]) -> str:
    """Q4_K Q4_K Q6_K as Q4_K*2 Q6_K."""
    runs: list[tuple[str, int]] = []
    for kind in types:
        if runs and runs[-1][0] == kind:
            runs[-1] = kind, runs[-1][1] + 1
        else:
            runs.append((kind, 1))
    return " ".join(kind if count == 1 else f"{kind}*{count}" for kind, count in runs)
