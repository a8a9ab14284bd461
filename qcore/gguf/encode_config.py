"""A transformers config as GGUF metadata: the inverse of `config` and `rope`.

What GGUF has no field for is never dropped silently: the metadata are read back, and a config that would come out
different is refused by the key that differs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.checkpoint.source import TensorInfo
from qcore.gguf.architectures import ARCHITECTURES, MIXTURES, Architecture, Experts
from qcore.gguf.config import model_config
from qcore.gguf.rope import LLAMA3, llama3_factors
from qcore.refusal import Refusal, Refused

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger("qcore")

Values = Mapping[str, list[float]]
"""The small tensors that belong to the config, by name."""

_UNUSED = frozenset(
    {"initializer_range", "attention_dropout", "resid_pdrop", "embd_pdrop", "use_cache", "pretraining_tp",
     "max_window_layers", "no_rope_layer_interval", "sliding_window_pattern", "_sliding_window_pattern",
     "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
     "bos_token_id", "eos_token_id", "pad_token_id", "rope_theta", "rope_scaling", "rope_local_base_freq"}
)  # fmt: skip
"""Keys without a part in a forward pass, or that others repeat. Token ids are the tokenizer's to say."""
_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_local_base_freq")
"""Where transformers 4 keeps what 5 has in rope_parameters."""
_YARN = (("attention_factor", "attn_factor"), ("beta_fast", "beta_fast"), ("beta_slow", "beta_slow"))


def architecture_of(config: PretrainedConfig, file: Path) -> Architecture:
    """The row whose files hold a model of this type. Raises Refused (unknown-architecture)."""
    kind = config.model_type
    if kind == "mistral" and config.sliding_window is None:
        return ARCHITECTURES["llama"]  # the same network, under the name that llama.cpp's converter gives it
    rows = (*ARCHITECTURES.values(), *MIXTURES.values())
    for row in rows:
        if row.model_type == kind:
            return row
    known = ", ".join(sorted({row.model_type for row in rows}))
    raise Refused(
        Refusal("unknown-architecture", "notimpl", str(file), "this architecture is not written to GGUF yet",
                f"found model_type {kind!r}, expected one of {known}", "Keep the model in safetensors.", str(file),
                field="model_type")
    )  # fmt: skip


def architecture_fields(config: PretrainedConfig, row: Architecture, file: Path) -> dict[str, Any]:
    """The architecture's metadata, as llama.cpp's converter would write them. Raises Refused (not-representable)."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": hidden,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    window = getattr(config, "sliding_window", None)
    if row.global_period or row.name == "mistral3":
        fields["attention.sliding_window"] = window or 0
        if row.name == "mistral3":
            log.warning("llama.cpp has no sliding window in mistral3: it will attend to all %d positions",
                        config.max_position_embeddings)  # fmt: skip
    if row.name == "phi3":  # a zero tells Phi 4 from the others
        fields["attention.sliding_window"] = window or 0
    if row.global_period:
        local = [kind == "sliding_attention" for kind in config.layer_types]
        if local != [(i + 1) % row.global_period != 0 for i in range(len(local))]:
            fields["attention.sliding_window_pattern"] = local
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if (cap := getattr(config, key, None)) is not None:
                fields[key] = float(cap)
    if row.experts is not None:
        fields |= _expert_fields(config, row, row.experts, file)
    fields |= _rotary_fields(config, row, head_dim)
    return {f"{row.name}.{key}": value for key, value in fields.items()}


def _expert_fields(config: PretrainedConfig, row: Architecture, experts: Experts, file: Path) -> dict[str, Any]:
    """Raises Refused (not-representable) where llama.cpp would choose or weigh experts otherwise: no field tells it."""
    for key, assumed in experts.fixed.items():
        if not _same(found := getattr(config, key, assumed), assumed):
            raise _unsayable(file, row.name, key, found, assumed)
    fields = {"expert_count": getattr(config, experts.count), "expert_used_count": config.num_experts_per_tok}
    if row.name != "llama":
        fields["expert_feed_forward_length"] = getattr(config, experts.inner)
    if experts.shared:
        fields["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    if experts.alternating:
        fields["attention.sliding_window"] = config.sliding_window
    return fields


def rotary_tensors(config: PretrainedConfig, row: Architecture) -> dict[str, list[float]]:
    """The factors that files hold as tensors: Llama 3.1's formula, and Phi 3's two lists."""
    rope, _ = _rope(config)
    kind = _kind(rope)
    if kind == "llama3" and all(rope.get(key) == value for key, value in LLAMA3.items()):
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return {"rope_freqs.weight": llama3_factors(rope["rope_theta"], head_dim, rope["factor"])}
    if kind == "longrope" and row.name == "phi3":
        return {f"rope_factors_{length}.weight": [float(value) for value in rope[f"{length}_factor"]]
                for length in ("long", "short")}  # fmt: skip
    return {}


def check_config(
    config: PretrainedConfig, metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo], values: Values, file: Path
) -> None:
    """Reads the metadata back. Raises Refused (not-representable) where the model would be another one."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    found = model_config(metadata, tensors, lambda name: values[name])
    ours, theirs = config.to_dict(), CONFIG_MAPPING[found["model_type"]].from_dict(found).to_dict()
    for said in (ours, theirs):
        rope = said.setdefault("rope_parameters", {})
        for name in _ROPE_KEYS:
            rope.setdefault(name, said.get(name))
        for yarn in (rope, rope["rope_scaling"] or {}):
            yarn.setdefault("truncate", True)  # which is what it does where nothing is said
    general = PretrainedConfig().to_dict().keys() - {"tie_word_embeddings"}
    for key in sorted(type(config)().to_dict().keys() - general - _UNUSED | {"rope_parameters", "tie_word_embeddings"}):
        if not _same(ours.get(key), theirs.get(key)):
            raise _unsayable(file, metadata["general.architecture"], key, ours.get(key), theirs.get(key))


def _unsayable(file: Path, architecture: str, key: str, ours: object, theirs: object) -> Refused:
    return Refused(
        Refusal("not-representable", "never", str(file), "GGUF cannot say this of the model",
                f"found {ours!r:.200}; llama.cpp's {architecture} has {theirs!r:.200}",
                "Keep the model in safetensors.", str(file), field=key)
    )  # fmt: skip


def _rotary_fields(config: PretrainedConfig, row: Architecture, head_dim: int) -> dict[str, Any]:
    rope, local_base = _rope(config)
    share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    fields: dict[str, Any] = {
        "rope.dimension_count": int(head_dim * share),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if row.name == "gemma3" and local_base is not None:
        fields["rope.freq_base_swa"] = float(local_base)
    kind = _kind(rope)
    if kind in ("linear", "yarn"):
        fields |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        fields["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        fields |= {f"rope.scaling.yarn_{theirs}": float(rope[ours]) for ours, theirs in _YARN
                   if rope.get(ours) is not None}  # fmt: skip
        if row.name == "gpt-oss":
            log.warning("llama.cpp rounds the bounds of yarn's blend to whole frequencies, which gpt-oss does not: its logits "
                        "will differ a little, as with any file of this model")  # fmt: skip
    if row.name == "phi3":
        longest = config.max_position_embeddings
        original = getattr(config, "original_max_position_embeddings", None) or longest
        fields["rope.scaling.original_context_length"] = original
        if kind == "longrope":
            scale = longest / original
            fields["rope.scaling.type"] = kind
            fields["rope.scaling.attn_factor"] = (
                math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
            )
    return fields


def _rope(config: PretrainedConfig) -> tuple[dict[str, Any], float | None]:
    """The rotary parameters of layers that attend globally, and the base of the others."""
    stated = getattr(config, "rope_parameters", None)
    if not stated:  # transformers 4
        scaling = getattr(config, "rope_scaling", None) or {}
        return {"rope_theta": config.rope_theta, **scaling}, getattr(config, "rope_local_base_freq", None)
    local = stated.get("sliding_attention") or {}
    return dict(stated.get("full_attention", stated)), local.get("rope_theta")


def _kind(rope: Mapping[str, Any]) -> str:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    return "longrope" if kind == "su" else str(kind)


def _same(ours: Any, theirs: Any) -> bool:
    """Equal but for the rounding of fields to float32; what is absent, off or nothing is one."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        return all(_same(ours.get(key), theirs.get(key)) for key in ours.keys() | theirs.keys())
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if isinstance(ours, float) or isinstance(theirs, float):
        return ours is not None and theirs is not None and math.isclose(ours, theirs, rel_tol=1e-6)
    return bool(ours == theirs) or (not ours and not theirs)
