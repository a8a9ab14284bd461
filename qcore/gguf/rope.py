"""The rotary embedding's part of the config: base, scaling and the factors that some files store as tensors.

Sources: llama.cpp's convert_hf_to_gguf (keys and formulas) and transformers' modeling_rope_utils (their meaning there).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qcore.checkpoint.source import TensorInfo
from qcore.gguf.fields import Fields
from qcore.refusal import bad_file

Read = Callable[[str], Sequence[float]]
"""Reads a small tensor's values by name."""

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Llama 3.1's rope scaling: the same in every model that uses it, but for the factor (8 or 32)."""
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


def rope_config(
    fields: Fields, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read
) -> dict[str, Any]:
    """The config's rope_theta and, where positions are scaled, rope_scaling.

    config: what is known of it so far. Raises Refused: bad-field, bad-shape, missing-tensor, unknown-variant.
    """
    rope: dict[str, Any] = {"rope_theta": fields.number("rope.freq_base", 10000.0)}
    head_dim = config["head_dim"]
    rotated = fields.size("rope.dimension_count", head_dim)
    if fields.architecture.name == "phi3":
        return rope | _phi3(fields, config, rotated, tensors, read)
    if rotated != head_dim:
        raise fields.not_read("rope.dimension_count", "heads that are rotated in part are not read", rotated,
                              str(head_dim))  # fmt: skip
    if fields.architecture.name == "gemma3":
        rope["rope_local_base_freq"] = fields.number("rope.freq_base_swa", 10000.0)
    if "rope_freqs.weight" in tensors:
        scaling = _llama3(fields, tensors["rope_freqs.weight"], rope["rope_theta"], head_dim, read)
    else:
        scaling = _scaling(fields)
    if scaling is not None:
        if fields.architecture.name == "gpt-oss":
            scaling["truncate"] = False  # its bounds between frequencies are no whole numbers
        rope["rope_scaling"] = scaling
    return rope


def _scaling(fields: Fields) -> dict[str, Any] | None:
    """What the fields say. llama.cpp takes the kind for linear where it is absent; a factor of 0 means none."""
    kind = fields.get("rope.scaling.type", "linear")
    key = next((key for key in ("rope.scaling.factor", "rope.scale_linear") if fields.get(key) not in (None, 0)), None)
    if kind == "none" or (kind == "linear" and key is None):
        return None
    if kind not in ("linear", "yarn"):
        raise fields.not_read("rope.scaling.type", "this scaling of positions is not read", kind,
                              "none, linear or yarn")  # fmt: skip
    scaling: dict[str, Any] = {"rope_type": kind, "factor": fields.number(key or "rope.scaling.factor")}
    if kind == "linear":
        return scaling if scaling["factor"] != 1.0 else None
    for unread, plain in (("yarn_ext_factor", 1.0), ("yarn_log_multiplier", 0.0)):
        if (found := fields.get(f"rope.scaling.{unread}", plain)) != plain:
            raise fields.not_read(f"rope.scaling.{unread}", "this parameter of yarn is not read", found, str(plain))
    scaling["original_max_position_embeddings"] = fields.size("rope.scaling.original_context_length", most=1 << 30)
    for theirs, ours in (("attn_factor", "attention_factor"), ("beta_fast", "beta_fast"), ("beta_slow", "beta_slow")):
        if fields.has(f"rope.scaling.yarn_{theirs}"):
            scaling[ours] = fields.number(f"rope.scaling.yarn_{theirs}")
    return scaling


def _phi3(
    fields: Fields, config: Mapping[str, Any], rotated: int, tensors: Mapping[str, TensorInfo], read: Read
) -> dict[str, Any]:
    """Phi 3 rotates a part of each head; its long variants divide the frequencies by two lists of factors."""
    longest = config["max_position_embeddings"]
    original = fields.size("rope.scaling.original_context_length", longest, least=2, most=1 << 30)
    rope: dict[str, Any] = {
        "partial_rotary_factor": rotated / config["head_dim"],
        "original_max_position_embeddings": original,
    }
    if _LONG not in tensors and _SHORT not in tensors:
        return rope
    factors = [_factors(fields, tensors, name, rotated // 2, read) for name in (_LONG, _SHORT)]
    scale = longest / original
    computed = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    stored = fields.number("rope.scaling.attn_factor", computed)
    if not math.isclose(stored, computed, rel_tol=1e-4):  # transformers computes it, and takes no other
        raise fields.not_read("rope.scaling.attn_factor", "another attention factor than longrope's is not read",
                              stored, f"{computed:.6g}")  # fmt: skip
    # 4.55 takes these three keys and no others.
    rope["rope_scaling"] = {"type": "longrope", "long_factor": factors[0], "short_factor": factors[1]}
    return rope


def _llama3(fields: Fields, info: TensorInfo, theta: float, head_dim: int, read: Read) -> dict[str, Any] | None:
    """The file stores the factors that Llama 3.1's formula gives; the formula's parameters are found again from them."""
    stored = _factors(fields, {info.name: info}, info.name, head_dim // 2, read)
    factor = max(stored)
    expected = llama3_factors(theta, head_dim, factor)
    if any(not math.isclose(a, b, rel_tol=1e-5) for a, b in zip(stored, expected, strict=True)):
        raise fields.not_read(None, "the rotary factors are not those of Llama 3.1's formula",
                              [round(value, 4) for value in stored[-4:]],
                              str([round(value, 4) for value in expected[-4:]]), tensor=info.name)  # fmt: skip
    return {"rope_type": "llama3", "factor": factor, **LLAMA3} if factor != 1.0 else None


def _factors(fields: Fields, tensors: Mapping[str, TensorInfo], name: str, count: int, read: Read) -> list[float]:
    """The positive, finite values of a tensor of `count` factors."""
    if name not in tensors:
        raise bad_file("missing-tensor", "the other list of rotary factors is missing", file=fields.file, tensor=name)
    info = tensors[name]
    if info.shape != (count,):
        raise bad_file("bad-shape", "there is one rotary factor for each pair of values", file=info.file, tensor=name,
                       field="shape", found=list(info.shape), expected=[count])  # fmt: skip
    values = [float(value) for value in read(name)]
    if not all(0 < value < math.inf for value in values):
        raise bad_file("bad-content", "rotary factors are positive numbers", file=info.file, tensor=name,
                       found=values[:4])  # fmt: skip
    return values


def llama3_factors(theta: float, head_dim: int, factor: float) -> list[float]:
    """What each frequency is divided by: nothing for short waves, `factor` for long ones, and between them a blend."""
    low, high, length = LLAMA3.values()
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        share = min(max((length / wavelength - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - share) / factor + share))
    return factors
