"""The model architectures that are read from GGUF, as rows.

Sources: llama.cpp's convert_hf_to_gguf (what is written) and gguf-py's tensor_mapping (names). tests/test_gguf_model.py
holds them against gguf-py and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

_COMMON = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FUSED = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Architecture:
    """One value of `general.architecture`.

    layer: GGUF's name of each part of a block -> transformers'. permuted: q and k rows are in the order of ggml's
    rotary embedding. norm_offset: what the converter added to norm weights (gemma's are stored as 1 + w).
    """

    name: str
    model_type: str
    model_class: str
    layer: Mapping[str, str] = field(default_factory=lambda: MappingProxyType(_COMMON))
    permuted: bool = False
    norm_offset: float = 0.0


_ROWS = (
    Architecture("llama", "llama", "LlamaForCausalLM", permuted=True),
    Architecture("mistral", "mistral", "MistralForCausalLM", permuted=True),
    Architecture("smollm3", "smollm3", "SmolLM3ForCausalLM", permuted=True),
    Architecture("qwen2", "qwen2", "Qwen2ForCausalLM"),
    Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", MappingProxyType({**_COMMON, **_QK_NORMS})),
    Architecture("gemma2", "gemma2", "Gemma2ForCausalLM", MappingProxyType({**_COMMON, **_GEMMA_NORMS}), norm_offset=1.0),
    Architecture("gemma3", "gemma3_text", "Gemma3ForCausalLM",
                 MappingProxyType({**_COMMON, **_GEMMA_NORMS, **_QK_NORMS}), norm_offset=1.0),
    Architecture("phi3", "phi3", "Phi3ForCausalLM", MappingProxyType(_FUSED)),
)  # fmt: skip

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({row.name: row for row in _ROWS})

OUTER = MappingProxyType({"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"})
"""The parts outside the blocks, the same in every architecture here."""

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that the config is made from; the model computes them."""
