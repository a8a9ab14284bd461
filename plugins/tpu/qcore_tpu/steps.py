"""A transformers model's steps as few compiled programs: keys and values have their room from the beginning, and tokens come in buckets, so that reading on compiles
nothing. The model is on torch's device `jax` (qcore_tpu.runtime)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qcore.platform import Target
from qcore_tpu.ahead import footprint, placed
from qcore_tpu.chips import made_for

_FEWEST = 16
"""Tokens that a prompt is filled up to at least; a single one is taken as it is."""


class ModelSteps:
    """length: tokens that there is room for. weights: the model's, as jax's arrays. programs: how many have been compiled."""

    def __init__(self, model: torch.nn.Module, length: int) -> None:
        import jax
        from torchax.interop import jax_view

        self.model, self.length = model, length
        self.weights: Mapping[str, Any] = jax_view({**dict(model.named_parameters()), **dict(model.named_buffers())})
        self._room = length + bucket(length)  # a bucket may reach over the end
        self._step = jax.jit(self._traced)

    @property
    def programs(self) -> int:
        count: int = self._step._cache_size()
        return count

    def begin(self) -> list[Any]:
        """Keys and values of a text of which nothing has been read, as jax's arrays: of each layer [1, heads, room, head_dim], twice."""
        import jax.numpy as jnp
        from torchax.ops.mappings import t2j_dtype

        config: Any = self.model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kind = t2j_dtype(self.model.dtype)
        return [jnp.zeros((1, heads, self._room, size), kind) for _ in range(2 * config.num_hidden_layers)]

    def take(self, states: list[Any], start: int, tokens: Sequence[int]) -> tuple[torch.Tensor, list[Any]]:
        """Logits float32 [tokens, vocabulary] on the CPU of what follows each of the tokens, which begin at `start` of the text, and the keys and values then. Raises
        ValueError where there is no room."""
        import jax.numpy as jnp
        import numpy as np

        if start + len(tokens) > self.length:
            raise ValueError(f"{start + len(tokens)} tokens, and room for {self.length}")
        filled = list(tokens) + [0] * (bucket(len(tokens)) - len(tokens))
        logits, states = self._step(
            self.weights, states, jnp.asarray([filled], jnp.int32), jnp.asarray(start, jnp.int32)
        )
        return torch.from_numpy(np.array(logits[0, : len(tokens)], np.float32)), states

    def compile(self, target: Target, count: int) -> dict[str, int]:
        """What libtpu says of the step of so many tokens (qcore_tpu.ahead)."""
        place = placed(str(target.name))
        import jax
        import jax.numpy as jnp

        def shaped(array: Any) -> Any:
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)

        given = (dict(self.weights), self.begin(), jnp.zeros((1, count), jnp.int32), jnp.asarray(0, jnp.int32))
        with made_for(target.architecture):
            step = jax.jit(self._traced, out_shardings=place, donate_argnums=1)
            return footprint(step.lower(*jax.tree.map(shaped, given)).compile())

    def _traced(self, weights: Any, states: list[Any], tokens: Any, start: Any) -> tuple[Any, list[Any]]:
        """Logits [1, tokens, vocabulary], and keys and values with those of the tokens."""
        import jax.numpy as jnp
        from torchax.interop import jax_view, torch_view
        from transformers import StaticCache

        place = start + jnp.arange(tokens.shape[1])
        seen = jnp.arange(self._room)[None, :] <= place[:, None]
        mask = jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min).astype(states[0].dtype)[None, None]
        cache: Any = StaticCache(config=self.model.config, max_cache_len=self._room)
        for layer, keys, values in zip(cache.layers, torch_view(states[::2]), torch_view(states[1::2]), strict=True):
            layer.keys, layer.values, layer.is_initialized = keys, values, True
            layer.dtype, layer.device, layer.cumulative_length = keys.dtype, keys.device, torch_view(start)
        given = {"input_ids": tokens, "position_ids": place[None], "attention_mask": mask, "cache_position": place}
        out: Any = torch.func.functional_call(
            self.model, torch_view(weights), (), {**torch_view(given), "past_key_values": cache, "use_cache": True}
        )
        return jax_view(out.logits), jax_view([part for layer in cache.layers for part in (layer.keys, layer.values)])


def bucket(count: int) -> int:
    """Tokens that so many are filled up to: one, or a power of two."""
    return count if count <= 1 else max(_FEWEST, 1 << (count - 1).bit_length())
