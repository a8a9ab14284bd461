"""The transformers config that a GGUF file's metadata describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcore.checkpoint.source import TensorInfo
from qcore.gguf.architectures import BIAS_TENSORS, Experts
from qcore.gguf.fields import Fields
from qcore.gguf.rope import Read, rope_config
from qcore.refusal import bad_file

_END_OF_TURN = frozenset({"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>"})
"""Control tokens that end an answer. Files name one end-of-text id; chat models stop at these too (as in llama.cpp)."""
_PLAIN_ROUTING = (("expert_weights_scale", 1.0), ("expert_gating_func", 1), ("expert_group_count", 1), ("expert_group_used_count", 1),
                  ("leading_dense_block_count", 0), ("interleave_moe_layer_step", 1))  # fmt: skip
"""Fields of other mixtures, and what they say where routing is plain: a softmax over all experts, in every layer."""
_CONTROL = 3
"""The token type of control tokens."""


def model_config(metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read) -> dict[str, Any]:
    """Keys of a transformers config (in the spelling that 4.55 and later read), without a dtype.

    read: called for the few values of the rotary factors, where the file stores those as tensors.
    Raises Refused: unknown-architecture, bad-field, bad-shape, unknown-variant, missing-tensor.
    """
    fields = Fields(metadata, tensors)
    architecture = fields.architecture
    layers = fields.size("block_count", most=1 << 14)
    for needed in ("token_embd.weight", f"blk.{layers - 1}.attn_norm.weight"):
        if needed not in tensors:
            raise bad_file("missing-tensor", f"a model of {layers} layers has this tensor", file=fields.file, tensor=needed,
                           fix="Download the file again, with all its shards.")  # fmt: skip
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "architectures": [architecture.model_class],
        "vocab_size": _vocabulary_size(fields, tensors["token_embd.weight"]),
        "intermediate_size": fields.size(
            "feed_forward_length", 0 if architecture.experts else None, least=0 if architecture.experts else 1
        ),
        "num_hidden_layers": layers,
        "max_position_embeddings": fields.size("context_length", most=1 << 30),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        **_heads(fields),
        **{switch: f"blk.0.{BIAS_TENSORS[switch]}" in tensors for switch in architecture.biases},
    }
    if architecture.experts is not None:
        config |= _experts(fields, architecture.experts)
    config |= _token_ids(fields, config["vocab_size"])
    config |= _attention(fields, config)
    return config | rope_config(fields, config, tensors, read)


def _heads(fields: Fields) -> dict[str, Any]:
    """Sizes of the attention, checked against each other."""
    hidden = fields.size("embedding_length")
    heads = fields.size("attention.head_count", most=1 << 14)
    kv_heads = fields.size("attention.head_count_kv", heads, most=1 << 14)
    if not fields.has("attention.key_length") and hidden % heads:
        raise fields.wrong("attention.head_count", heads, f"a divisor of the embedding length {hidden}")
    if heads % kv_heads:
        raise fields.wrong("attention.head_count_kv", kv_heads, f"a divisor of {heads} heads")
    head_dim = fields.size("attention.key_length", hidden // heads, most=1 << 14)
    if fields.size("attention.value_length", head_dim, most=1 << 14) != head_dim:
        raise fields.not_read("attention.value_length", "keys and values of different lengths are not read",
                              fields.get("attention.value_length"), str(head_dim))  # fmt: skip
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


def _experts(fields: Fields, row: Experts) -> dict[str, Any]:
    """Numbers and widths of experts. Raises Refused (unknown-variant) where a file says other than what llama.cpp assumes."""
    for key, plain in _PLAIN_ROUTING:
        if fields.get(key, plain) not in (plain, None):
            raise fields.not_read(key, "this way of choosing experts is not read", fields.get(key), str(plain))
    normed = row.fixed.get("norm_topk_prob", True)
    if bool(fields.get("expert_weights_norm", normed)) is not normed:
        raise fields.not_read("expert_weights_norm", "this way of weighing experts is not read",
                              fields.get("expert_weights_norm"), str(normed))  # fmt: skip
    count = fields.size("expert_count", most=1 << 14)
    used = fields.size("expert_used_count", most=count)
    whole = fields.get("feed_forward_length")
    config = {row.count: count, "num_experts_per_tok": used, **row.fixed}
    config[row.inner] = fields.size("expert_feed_forward_length", whole if type(whole) is int else None)
    if row.shared:
        config["shared_expert_intermediate_size"] = fields.size("expert_shared_feed_forward_length")
    return config


def _vocabulary_size(fields: Fields, embedding: TensorInfo) -> int:
    tokens = fields.metadata.get("tokenizer.ggml.tokens")
    if len(embedding.shape) != 2:
        raise bad_file("bad-shape", "the token embedding is a matrix", file=fields.file, tensor=embedding.name,
                       field="shape", found=list(embedding.shape), expected="[vocabulary, hidden size]")  # fmt: skip
    if isinstance(tokens, list) and len(tokens) != embedding.shape[0]:
        raise bad_file("bad-shape", "the tokenizer and the embedding disagree on the vocabulary", file=fields.file,
                       tensor=embedding.name, field="shape", found=list(embedding.shape),
                       expected=f"{len(tokens)} rows")  # fmt: skip
    return embedding.shape[0]


def _token_ids(fields: Fields, vocabulary: int) -> dict[str, int | list[int] | None]:
    """Ids that lie in the vocabulary; a wrong one is refused, for the model would stop at the wrong place."""
    ids: dict[str, int | None] = {}
    for key in ("bos", "eos", "eot", "eom", "padding"):
        name = f"tokenizer.ggml.{key}_token_id"
        value = fields.metadata.get(name)
        if value is not None and (type(value) is not int or not 0 <= value < vocabulary):
            raise fields.wrong(name, value, f"an id below {vocabulary}")
        ids[key] = value
    tokens = fields.metadata.get("tokenizer.ggml.tokens")
    types = fields.metadata.get("tokenizer.ggml.token_type")
    ends = [ids["eos"], ids["eot"], ids["eom"]]
    if isinstance(tokens, list) and isinstance(types, list):
        pairs = enumerate(zip(tokens, types, strict=False))
        ends += [i for i, (token, kind) in pairs if kind == _CONTROL and token in _END_OF_TURN]
    distinct = list(dict.fromkeys(end for end in ends if end is not None))
    end = distinct if len(distinct) > 1 else next(iter(distinct), None)
    return {"bos_token_id": ids["bos"], "eos_token_id": end, "pad_token_id": ids["padding"]}


def _attention(fields: Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    """Windows, scales and caps of the attention: what differs between the architectures."""
    row, layers = fields.architecture, config["num_hidden_layers"]
    extras: dict[str, Any] = {}
    if fields.has("attention.temperature_scale"):
        raise fields.not_read("attention.temperature_scale", "a scale that grows with the position is not read",
                              fields.get("attention.temperature_scale"), "none")  # fmt: skip
    if row.model_type == "gpt_oss":
        extras["sliding_window"] = fields.size("attention.sliding_window", most=1 << 30)
        extras["layer_types"] = [f"{'full' if i % 2 else 'sliding'}_attention" for i in range(layers)]
    if row.model_type in ("mistral", "phi3", "gemma2", "gemma3_text"):
        window = fields.size("attention.sliding_window", 0, least=0, most=1 << 30)
        if window or not row.global_period:
            extras["sliding_window"] = window or None
    if row.no_rope_period:
        extras["no_rope_layers"] = [int((i + 1) % row.no_rope_period != 0) for i in range(layers)]
        extras["no_rope_layer_interval"] = row.no_rope_period
    if row.global_period:
        extras["layer_types"] = _layer_types(fields, layers)
        wide = layers == row.wide_depth
        extras["query_pre_attn_scalar"] = (
            config["hidden_size"] // config["num_attention_heads"] if wide else config["head_dim"]
        )
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if fields.has(key):
                extras[key] = fields.number(key)
    return extras


def _layer_types(fields: Fields, layers: int) -> list[str]:
    """Which layers attend within the window: a list or a period in the file, or else the architecture's period."""
    key = "attention.sliding_window_pattern"
    pattern = fields.get(key)
    if isinstance(pattern, list):
        if len(pattern) != layers or not all(type(local) is bool for local in pattern):
            raise fields.wrong(key, pattern, f"{layers} truth values")
        local_layers = pattern
    else:
        period = fields.size(key, fields.architecture.global_period, most=1 << 14)
        # A Gemma 3 file that names no window has none; a Gemma 2 file has the default one.
        windowed = fields.architecture.name != "gemma3" or fields.get("attention.sliding_window", 0) != 0
        local_layers = [windowed and (i + 1) % period != 0 for i in range(layers)]
    return ["sliding_attention" if local else "full_attention" for local in local_layers]
