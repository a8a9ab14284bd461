"""A model whose attention rounds keys and values, which quantized kv caches are compared with.

It has no cache, computes everything anew each time, and shares no code with the caches. Both run in float64 and round from
float32, so that the noise of float32's sums moves no key from one number to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import qcore
from makers import dense_llama, write
from qcore.model.kv_cache import kv_cache_of

LAYERS, HEADS, HEAD_DIM, VOCABULARY = 2, 2, 16, 128
K, V = 0.01, 0.004
FP8 = {"type": "float", "num_bits": 8, "strategy": "tensor", "symmetric": True, "dynamic": False}
INT8 = {**FP8, "type": "int"}

Round = Callable[[torch.Tensor], torch.Tensor]


def attention(layer: int) -> str:
    return f"model.layers.{layer}.self_attn"


def scales(k: Any = K, v: Any = V) -> dict[str, torch.Tensor]:
    """Scales of both layers by compressed-tensors' names; the second layer's are doubled."""
    return {
        f"{attention(layer)}.{part}_scale": torch.as_tensor(value).reshape(-1, 1, 1).squeeze(0) * (layer + 1)
        for layer in range(LAYERS)
        for part, value in (("k", k), ("v", v))
    }


def made(folder: Path, extra: dict[str, torch.Tensor] | None = None, scheme: Any = None, **config: Any) -> Path:
    """A llama of two layers whose keys are large enough for their rounding to be seen."""
    tensors = dense_llama(num_hidden_layers=LAYERS)
    for name in tensors:
        if "k_proj" in name or "q_proj" in name:
            tensors[name] *= 4
    groups = config.pop("config_groups", {})
    quantization = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": groups}
    if "attention_input_activations" in config:
        quantization["attention_input_activations"] = config.pop("attention_input_activations")
    if scheme is not None:
        quantization["kv_cache_scheme"] = scheme
    return write(folder, {**tensors, **(extra or {})}, quantization, num_hidden_layers=LAYERS, **config)


def tokens(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(4, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def logits(model: PreTrainedModel, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, **arguments).logits


def fp8(scale: Any, kind: torch.dtype = torch.float8_e4m3fn) -> Round:
    most = torch.finfo(kind).max
    return lambda x: (x / scale).clamp(-most, most).to(kind).float() * scale


def int8(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def affine(scale: float, zero: int) -> Round:
    return lambda x: (((x / scale).round() + zero).clamp(-128, 127) - zero) * scale


def load(path: Path, kv_cache: str = "auto", dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    return qcore.load_model(path, dtype=dtype, kv_cache=kv_cache)


def close(found: torch.Tensor, wanted: torch.Tensor, bound: float = 1e-6) -> None:
    torch.testing.assert_close(found, wanted, atol=bound, rtol=0)


def reference(path: Path, rounds: list[tuple[Round, Round]], dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The unquantized model, with attention that rounds keys and values first."""

    def rounded(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        of_keys, of_values = rounds[module.layer_idx]
        key, value = of_keys(key.float()).to(dtype), of_values(value.float()).to(dtype)
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("rounded", rounded)
    AttentionMaskInterface.register("rounded", sdpa_mask)
    model = load(path, "none", dtype)
    assert kv_cache_of(model) is None
    model.set_attn_implementation("rounded")
    model.config.use_cache = model.generation_config.use_cache = False
    return model


def twice(k: Any = K, v: Any = V, kind: torch.dtype = torch.float8_e4m3fn) -> list[tuple[Round, Round]]:
    return [(fp8(k * (layer + 1), kind), fp8(v * (layer + 1), kind)) for layer in range(LAYERS)]


PER_HEAD = torch.tensor([0.01, 0.02]), torch.tensor([0.004, 0.008])
UNIT = [(fp8(1.0), fp8(1.0))] * LAYERS
E5M2 = torch.float8_e5m2
