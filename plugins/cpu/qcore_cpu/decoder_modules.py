"""What the native decoder reads off transformers' modules, caches and configs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qcore.model.linear import QuantizedLinear
from qcore.refusal import Refusal, Refused
from qcore_cpu.kernels.native import NativeLinear

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qcore.model.experts import QuantizedExperts
    from qcore.model.kv_cache import KvRoundings


def activation_of(mlp: Any) -> Any:
    """An MLP's activation function, or its experts'."""
    formula = getattr(getattr(mlp, "experts", None), "formula", mlp)
    return formula.activation_fn if hasattr(formula, "activation_fn") else formula.act_fn


def only_row_of(layer: Any) -> torch.Tensor:
    """The weight of a linear layer with one output."""
    if not isinstance(layer, QuantizedLinear):
        weight: torch.Tensor = layer.weight
        return weight
    if not isinstance(layer.packed, NativeLinear):
        raise unknown_part(f"a linear layer on {layer.kernel_name}")
    row: torch.Tensor = torch.ops.qcore_cpu.look_up(torch.tensor([0]), layer.packed.packed, layer.in_features)
    return row


def routing_of(router: Any, hidden: int, dtype: torch.dtype) -> tuple[int, bool]:
    """How many experts a router chooses, and whether their weights sum to 1: a softmax of all scores, the greatest of it."""
    x = torch.randn(4, hidden, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        answer = router(x)
        if not isinstance(answer, tuple) or len(answer) != 3:
            raise unknown_part(f"router {type(router).__name__}")
        _, weights, chosen = answer
        chances = torch.nn.functional.linear(x, router.weight).float().softmax(-1)
    highest, expected = chances.topk(chosen.shape[-1])
    if torch.equal(chosen.sort(-1).values, expected.sort(-1).values):
        for normalized in (False, True):
            given = highest / highest.sum(-1, keepdim=True) if normalized else highest
            if torch.allclose(weights.float(), given, rtol=1e-2, atol=1e-6):
                return chosen.shape[-1], normalized
    raise unknown_part(f"router {type(router).__name__}")


def is_plainly_gated(experts: QuantizedExperts) -> bool:
    """Whether gate and up meet as activation(gate) * up."""
    gate, up = torch.linspace(-3, 3, 16).view(2, 1, 8)
    joined = torch.stack((gate, up), -1).flatten(-2) if experts.layout.interleaved else torch.cat((gate, up), -1)
    return torch.allclose(experts.formula._apply_gate(joined), experts.formula.act_fn(gate) * up)


def rope_kind_of(layer: Any) -> str | None:
    """The rotary table that a layer uses; None where it has no positions (smollm3)."""
    attention = layer.self_attn
    if not getattr(attention, "use_rope", True):
        return None
    return str(getattr(attention, "layer_type", None) or getattr(layer, "attention_type", None) or "full_attention")


def window_of(layer: Any, config: Any) -> int:
    """Tokens that a layer looks back on; 0 where it is all of them. Mistral's layers have it from the config alone."""
    whole = None if hasattr(config, "layer_types") else getattr(config, "sliding_window", None)
    return int(getattr(layer.self_attn, "sliding_window", whole) or 0)


def epsilon_of(norm: torch.nn.Module) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)  # type: ignore[arg-type]


def cache_of(config: Any, roundings: KvRoundings | None, states: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """transformers' cache, or ours, that holds keys and values [1, kv_heads, tokens, row] of each layer."""
    from transformers import DynamicCache

    from qcore.model.kv_cache import QuantizedKvCache

    if roundings is not None:
        rounded = QuantizedKvCache(config, roundings)
        for layer, (keys, values) in zip(rounded.layers, states, strict=True):
            layer.restore(keys, values)
        return rounded
    cache = DynamicCache(config=config)
    for number, (keys, values) in enumerate(states):
        cache.update(keys, values, number)
    return cache


def unknown_part(what: str) -> Refused:
    return Refused(
        Refusal("unknown-variant", "notimpl", "native_decoder", "it does not know a part of this model", f"found {what}",
                "The model takes its steps itself, more slowly.")
    )  # fmt: skip
