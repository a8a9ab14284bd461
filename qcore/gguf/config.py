"""The transformers config that a GGUF file's metadata describes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qcore.checkpoint.source import TensorInfo
from qcore.gguf.fields import Fields
from qcore.refusal import bad_file

Read = Callable[[str], Sequence[float]]
"""Reads a small tensor's values by name."""

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Llama 3.1's rope scaling: the same in every model that uses it, but for the factor (8 or 32)."""


def model_config(metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read) -> dict[str, Any]:
    """Keys of a transformers config (in the spelling that 4.55 and later read).

    Raises Refused: unknown-architecture, bad-field, unknown-variant, missing-tensor.
    """
    embedding = tensors.get("token_embd.weight")
    file = next(iter(tensors.values())).file if tensors else None
    if embedding is None or file is None:
        raise bad_file(
            "missing-tensor", "the file holds no token embedding", file=file or "GGUF", tensor="token_embd.weight"
        )
    fields = Fields(metadata, file)
    heads = fields.size("attention.head_count", most=1 << 14)
    hidden = fields.size("embedding_length")
    head_dim = fields.size("attention.key_length", max(1, hidden // heads))
    config: dict[str, Any] = {
        "model_type": fields.architecture.model_type,
        "architectures": [fields.architecture.model_class],
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": fields.size("feed_forward_length"),
        "num_hidden_layers": fields.size("block_count", most=1 << 14),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.size("attention.head_count_kv", heads, most=1 << 14),
        "head_dim": head_dim,
        "max_position_embeddings": fields.size("context_length", most=1 << 30),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "use_cache": True,
        **_special_tokens(fields, embedding.shape[0]),
    }
    biases = any(name.endswith("attn_q.bias") for name in tensors)
    if fields.architecture.model_type in ("llama", "smollm3"):
        config["attention_bias"] = biases
    config |= _EXTRAS.get(fields.architecture.name, _no_extras)(fields, config)
    scaling = _rope_scaling(fields, config, tensors, read)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config


def _special_tokens(fields: Fields, vocabulary: int) -> dict[str, int | None]:
    """Ids that lie in the vocabulary; a wrong one is refused, for the tokenizer would stop at the wrong place."""
    ids: dict[str, int | None] = {}
    for ours, theirs in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        value = fields.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if value is not None and (type(value) is not int or not 0 <= value < vocabulary):
            raise fields.wrong(f"tokenizer.ggml.{theirs}_token_id", value, f"an id below {vocabulary}")
        ids[ours] = value
    return ids


def _no_extras(fields: Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _sliding_window(fields: Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    window = fields.size("attention.sliding_window", 0, least=0, most=1 << 30)
    return {"sliding_window": window or None}


def _gemma(fields: Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    """The attention's scale is not in the file: llama.cpp knows the largest models, which differ, by their depth."""
    largest = {"gemma2": 46, "gemma3": 62}[fields.architecture.name]
    divided = config["hidden_size"] // config["num_attention_heads"]
    extras: dict[str, Any] = {
        "query_pre_attn_scalar": divided if config["num_hidden_layers"] == largest else config["head_dim"],
        "sliding_window": fields.size("attention.sliding_window", most=1 << 30),
        "hidden_activation": "gelu_pytorch_tanh",
    }
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        extras[key] = fields.number(key) if fields.has(key) else None
    if fields.architecture.name == "gemma3":
        extras["rope_local_base_freq"] = fields.number("rope.freq_base_swa", 10000.0)
        # Five local layers, then a global one.
        kinds = [
            "full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(config["num_hidden_layers"])
        ]
        extras["layer_types"] = kinds
    return extras


def _phi3(fields: Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    rotated = fields.size("rope.dimension_count", config["head_dim"])
    original = fields.size("rope.scaling.original_context_length", config["max_position_embeddings"], most=1 << 30)
    return {
        **_sliding_window(fields, config),
        "partial_rotary_factor": rotated / config["head_dim"],
        "original_max_position_embeddings": original,
    }


_EXTRAS: dict[str, Callable[[Fields, Mapping[str, Any]], dict[str, Any]]] = {
    "mistral": _sliding_window,
    "gemma2": _gemma,
    "gemma3": _gemma,
    "phi3": _phi3,
}


def _rope_scaling(
    fields: Fields, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read
) -> dict[str, Any] | None:
    """The config's rope_scaling, from the fields or from the factors that the file stores as tensors."""
    if "rope_freqs.weight" in tensors:
        return _llama3(fields, config, tensors["rope_freqs.weight"], read)
    if "rope_factors_long.weight" in tensors:
        long, short = (list(read(f"rope_factors_{length}.weight")) for length in ("long", "short"))
        return {"rope_type": "longrope", "type": "longrope", "long_factor": long, "short_factor": short}
    kind = fields.metadata.get(f"{fields.architecture.name}.rope.scaling.type", "none")
    if kind == "none" or (kind == "longrope" and fields.architecture.name == "phi3"):
        return None
    if kind not in ("linear", "yarn"):
        raise bad_file("unknown-variant", "this rope scaling is not read", file=fields.file,
                       field=f"{fields.architecture.name}.rope.scaling.type", found=kind, expected="none, linear or yarn",
                       fix="Use the model's safetensors checkpoint.")  # fmt: skip
    scaling: dict[str, Any] = {"rope_type": kind, "factor": fields.number("rope.scaling.factor")}
    if kind == "yarn":
        length = fields.size("rope.scaling.original_context_length", most=1 << 30)
        scaling["original_max_position_embeddings"] = length
    return scaling


def _llama3(fields: Fields, config: Mapping[str, Any], info: TensorInfo, read: Read) -> dict[str, Any]:
    """The file stores the factors that Llama 3.1's formula gives; the formula's parameters are found again from them."""
    stored = list(read(info.name))
    scaling = {"rope_type": "llama3", "factor": max(stored), **_LLAMA3}
    expected = _llama3_factors(config["rope_theta"], config["head_dim"], max(stored))
    if len(stored) != len(expected) or any(
        not math.isclose(a, b, rel_tol=1e-4) for a, b in zip(stored, expected, strict=True)
    ):
        raise bad_file("unknown-variant", "the rotary factors are not those of Llama 3.1's formula", file=info.file,
                       tensor=info.name, field="values", found=[round(value, 4) for value in stored[-4:]],
                       expected=[round(value, 4) for value in expected[-4:]],
                       fix="Use the model's safetensors checkpoint.")  # fmt: skip
    return scaling


def _llama3_factors(theta: float, head_dim: int, factor: float) -> list[float]:
    """What each frequency is divided by (transformers' modeling_rope_utils, llama3)."""
    low, high, length = (
        _LLAMA3["low_freq_factor"],
        _LLAMA3["high_freq_factor"],
        _LLAMA3["original_max_position_embeddings"],
    )
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors
