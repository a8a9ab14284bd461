"""The model architectures that are read from GGUF, as rows.

Sources: llama.cpp's convert_hf_to_gguf (what is written) and its models (what is assumed where the file is silent), and
gguf-py's tensor_mapping (names). tests/test_gguf_model.py holds them against gguf-py and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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


_ROUTED = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_ATTENTION = {key: value for key, value in _COMMON.items() if key.startswith("attn") or key == "ffn_norm"}


@dataclass(frozen=True)
class Experts:
    """What a mixture's config says of its experts. count, inner: transformers' keys of their number and of their width.
    fixed: what llama.cpp assumes of all models of the architecture. shared: whether an expert runs for every token.
    block: what older checkpoints call the part of a layer that transformers calls mlp. alternating: rows of gate and up take
    turns where they are in one tensor, which transformers holds transposed, and experts have biases."""

    count: str
    inner: str
    fixed: Mapping[str, object]
    shared: bool = False
    block: str = ""
    alternating: bool = False


@dataclass(frozen=True)
class Architecture:
    """One value of `general.architecture`, and what its files leave unsaid.

    layer: GGUF's name of each part of a block -> transformers'. permuted: q and k rows are in the order of ggml's
    rotary embedding, which turns neighbouring values (transformers' turns the two halves of a head). norm_offset: what
    the converter added to norm weights (gemma's are stored as 1 + w). biases: the config's switches for them.
    global_period: every n-th layer attends globally, the others within a window. no_rope_period: every n-th layer has
    no rotary embedding. wide_depth: the number of layers of the one model size whose attention is scaled by
    hidden_size / heads instead of head_dim. experts: of a mixture, whose experts files hold stacked.
    """

    name: str
    model_type: str
    model_class: str
    layer: Mapping[str, str]
    permuted: bool = False
    norm_offset: float = 0.0
    biases: tuple[str, ...] = ()
    global_period: int = 0
    no_rope_period: int = 0
    wide_depth: int = 0
    experts: Experts | None = None


_ROWS = (
    # Llama, and everything of its shape: Mistral, SmolLM, TinyLlama, Yi...
    Architecture("llama", "llama", "LlamaForCausalLM", _COMMON, permuted=True, biases=("attention_bias", "mlp_bias")),
    Architecture("mistral3", "mistral", "MistralForCausalLM", _COMMON, permuted=True),
    Architecture("smollm3", "smollm3", "SmolLM3ForCausalLM", _COMMON, permuted=True,
                 biases=("attention_bias", "mlp_bias"), no_rope_period=4),
    Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", _COMMON),
    Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", _COMMON | _QK_NORMS, biases=("attention_bias",)),
    Architecture("gemma2", "gemma2", "Gemma2ForCausalLM", _COMMON | _GEMMA_NORMS, norm_offset=1.0,
                 biases=("attention_bias",), global_period=2, wide_depth=46),
    Architecture("gemma3", "gemma3_text", "Gemma3ForCausalLM", _COMMON | _GEMMA_NORMS | _QK_NORMS, norm_offset=1.0,
                 biases=("attention_bias",), global_period=6, wide_depth=62),
    Architecture("phi3", "phi3", "Phi3ForCausalLM", _FUSED),
)  # fmt: skip

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({row.name: row for row in _ROWS})

_MIXTURES = (
    Architecture("llama", "mixtral", "MixtralForCausalLM", _ATTENTION | _ROUTED, permuted=True,
                 experts=Experts("num_local_experts", "intermediate_size", {"sliding_window": None}, block="block_sparse_moe")),
    Architecture("qwen2moe", "qwen2_moe", "Qwen2MoeForCausalLM", _ATTENTION | _ROUTED | _SHARED,
                 experts=Experts("num_experts", "moe_intermediate_size",
                                 {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []}, shared=True)),
    Architecture("qwen3moe", "qwen3_moe", "Qwen3MoeForCausalLM", _ATTENTION | _QK_NORMS | _ROUTED, biases=("attention_bias",),
                 experts=Experts("num_experts", "moe_intermediate_size",
                                 {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []})),
    Architecture("gpt-oss", "gpt_oss", "GptOssForCausalLM",
                 _ATTENTION | _ROUTED | {"attn_sinks": "self_attn.sinks", "ffn_gate_inp": "mlp.router",
                                         "post_attention_norm": "post_attention_layernorm"},
                 biases=("attention_bias",),
                 experts=Experts("num_local_experts", "intermediate_size", {}, alternating=True)),
)  # fmt: skip

MIXTURES: Mapping[str, Architecture] = MappingProxyType({row.name: row for row in _MIXTURES})
"""Those of files with an `expert_count`: a llama with one is a Mixtral."""

ROUTERS = ("ffn_gate_inp", "ffn_gate_inp_shexp")
"""Matrices that choose experts: llama.cpp keeps them in float32."""

UNSUFFIXED = MappingProxyType({"attn_sinks": "self_attn.sinks"})
"""Parameters whose names in transformers do not end in .weight."""

BIAS_TENSORS = MappingProxyType({"attention_bias": "attn_q.bias", "mlp_bias": "ffn_up.bias"})
"""The tensor of block 0 that shows whether a model has these biases."""

OUTER = MappingProxyType({"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"})
"""The parts outside the blocks, the same in every architecture here."""

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that the config is made from; the model computes them."""
