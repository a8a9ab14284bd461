"""A transformers model's steps as few compiled programs: keys and values have their room from the beginning, and tokens come in buckets, so that reading on compiles
nothing. The model is on torch's device `jax` (qcore_tpu.runtime)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.functional import pad

from qcore.model.cache_name import CACHE
from qcore.model.kv_cache import QuantizedKvCache, RoundedStaticLayer, kv_roundings_of
from qcore.refusal import Refusal, Refused
from qcore_tpu.ahead import footprint, placed
from qcore_tpu.chips import made_for
from qcore_tpu.kernels.kv_cache import KvCache
from qcore_tpu.kernels.linear import whole_inputs
from qcore_tpu.sharding import current_mesh, heads_placement, mesh_of, over, placements

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qcore.kernels.kv_cache import KvRounding
    from qcore.model.kv_cache import KvRoundings
    from qcore.platform import Target

_NAME = "tpu_decoder"
_FEWEST = 16
"""Tokens that a prompt is filled up to at least; a single one is taken as it is."""
_ROOM = 256
"""Tokens that there is room for at first; it is doubled as it runs out, and then programs are compiled again."""


class CompiledDecoder:
    """weights: the model's, as jax's arrays. mesh: of the chips that have them, each a part (qcore_tpu.sharding); None: one has all. programs: how many have been
    compiled."""

    def __init__(self, model: PreTrainedModel, mesh: Any = None) -> None:
        import jax
        from torchax.interop import jax_view

        self.model, self.mesh = model, mesh
        self.config: Any = model.config.get_text_config(decoder=True)
        self.weights: Mapping[str, Any] = jax_view({**dict(model.named_parameters()), **dict(model.named_buffers())})
        if mesh is not None:
            self.weights = jax.device_put(self.weights, placements(self.weights, mesh))
        self.roundings = kv_roundings_of(model)
        for rounding in self._roundings():
            rounding.to(model.device)
        self._whole = False
        self._step = jax.jit(self._traced, static_argnames=("whole",), donate_argnames=("states",))

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> CompiledDecoder:
        """Raises Refused (unknown-variant) as `keeps_all` does, and where another kernel rounds keys and values."""
        keeps_all(model, _NAME)
        found = kv_roundings_of(model)
        if found is not None and not isinstance(found.default[0], KvCache):
            raise unknown(_NAME, f"a kv cache in {found.scheme}, which another kernel rounds")
        return cls(model, current_mesh())

    @property
    def programs(self) -> int:
        count: int = self._step._cache_size()
        return count

    def begin(self, texts: int = 1) -> CompiledSteps:
        return CompiledSteps(self, texts)

    @contextmanager
    def exact(self) -> Iterator[None]:
        self._whole = True
        try:
            with whole_inputs():
                yield
        finally:
            self._whole = False

    def room(self, tokens: int) -> list[Any]:
        """Of each layer keys and values [1, heads, tokens, head_dim] of nothing; rounded ones as rows of bytes, which have their scales where those are of run time."""
        import jax.numpy as jnp
        from torchax.ops.mappings import t2j_dtype

        heads, size = heads_of(self.config)
        place = None if self.mesh is None else heads_placement(heads, self.mesh)
        if self.roundings is None:
            rows = [(size, t2j_dtype(self.model.dtype))] * (2 * self.config.num_hidden_layers)
        else:
            rows = [(size + 4 * (rounding.scale is None), jnp.uint8) for rounding in self._roundings()]
        return [jnp.zeros((1, heads, tokens, width), kind, device=place) for width, kind in rows]

    def _roundings(self) -> list[KvRounding]:
        """Of the first layer's keys, of its values, and so on; none where they are not rounded."""
        found = self.roundings
        if found is None:
            return []
        return [
            side for number in range(self.config.num_hidden_layers) for side in found.layers.get(number, found.default)
        ]

    def step(self, states: list[Any], start: int, tokens: list[int], keep: int) -> tuple[torch.Tensor, list[Any]]:
        """Logits float32 [at most keep, vocabulary] on the CPU of what follows the last of the tokens, which begin at `start` of a text, and the keys and values then, which are
        written to in place: those that were given are gone."""
        import jax.numpy as jnp
        import numpy as np

        filled = tokens + [0] * (bucket(len(tokens)) - len(tokens))
        given = (jnp.asarray([filled], jnp.int32), jnp.asarray(start, jnp.int32))
        with over(self.mesh):
            logits, states = self._step(self.weights, states, *given, whole=self._whole)
        last = logits[0, max(0, len(tokens) - keep) : len(tokens)]
        return torch.from_numpy(np.array(last, np.float32)), states

    def to_torch(self, states: list[Any]) -> list[torch.Tensor]:
        from torchax.interop import torch_view

        found: list[torch.Tensor] = torch_view(states)
        return found

    def from_torch(self, states: list[torch.Tensor]) -> list[Any]:
        from torchax.interop import jax_view

        found: list[Any] = jax_view(states)
        return found

    def compile(self, target: Target, count: int, room: int = _ROOM, topology: str = "") -> dict[str, int]:
        """What libtpu says of the step of so many tokens (qcore_tpu.ahead): on one chip or, by their parts, on each of all chips of a topology."""
        return footprint(self.program(target, count, room, topology))

    def program(self, target: Target, count: int, room: int = _ROOM, topology: str = "") -> Any:
        """That step as libtpu makes it, one of jax's compiled programs."""
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec

        def shaped(array: Any, place: Any) -> Any:
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)

        weights, states = dict(self.weights), self.room(room)
        rest = (jnp.zeros((1, count), jnp.int32), jnp.asarray(0, jnp.int32))
        mesh = mesh_of(topology) if topology else None
        if mesh is None:
            everywhere: Any = placed(str(target.name))
            own, heads = dict.fromkeys(weights, everywhere), everywhere
        else:
            everywhere = NamedSharding(mesh, PartitionSpec())
            own, heads = placements(weights, mesh), heads_placement(states[0].shape[1], mesh)
        given = (
            {name: shaped(array, own[name]) for name, array in weights.items()},
            [shaped(array, heads) for array in states],
            *(shaped(array, everywhere) for array in rest),
        )
        with made_for(target.architecture), over(mesh):
            step = jax.jit(partial(self._traced, whole=False), out_shardings=(everywhere, heads), donate_argnums=1)
            return step.lower(*given).compile()

    def _traced(self, weights: Any, states: list[Any], tokens: Any, start: Any, whole: bool) -> tuple[Any, list[Any]]:
        """Logits [1, tokens, vocabulary], and keys and values with those of the tokens. whole: within `exact`."""
        import jax.numpy as jnp
        from torchax.interop import jax_view, torch_view
        from torchax.ops.mappings import t2j_dtype
        from transformers import StaticCache

        room = states[0].shape[2]
        place = start + jnp.arange(tokens.shape[1])
        seen = jnp.arange(room)[None, :] <= place[:, None]
        mask = jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min).astype(t2j_dtype(self.model.dtype))[None, None]
        cache: Any = StaticCache(config=self.model.config, max_cache_len=room)
        if sides := self._roundings():
            cache.layers = [RoundedStaticLayer(max_cache_len=room) for _ in cache.layers]
            for layer, *rounding in zip(cache.layers, sides[::2], sides[1::2], strict=True):
                layer.rounding = rounding
        for layer, keys, values in zip(cache.layers, torch_view(states[::2]), torch_view(states[1::2]), strict=True):
            layer.keys, layer.values, layer.is_initialized = keys, values, True
            layer.dtype, layer.device, layer.cumulative_length = keys.dtype, keys.device, torch_view(start)
        given = {"input_ids": tokens, "position_ids": place[None], "attention_mask": mask}
        out: Any = torch.func.functional_call(
            self.model, torch_view(weights), (), {**torch_view(given), CACHE: cache, "use_cache": True}
        )
        return jax_view(out.logits), jax_view([part for layer in cache.layers for part in (layer.keys, layer.values)])


class StepDecoder(Protocol):
    """A decoder whose texts have keys and values with room from the beginning, of each layer keys and values [1, heads, tokens, ..] in a list."""

    model: PreTrainedModel
    config: Any
    roundings: KvRoundings | None

    def room(self, tokens: int) -> list[Any]: ...

    def step(self, states: list[Any], start: int, tokens: list[int], keep: int) -> tuple[torch.Tensor, list[Any]]: ...

    def to_torch(self, states: list[Any]) -> list[torch.Tensor]: ...

    def from_torch(self, states: list[torch.Tensor]) -> list[Any]: ...


class CompiledSteps:
    """Texts under way, each with keys and values of its own, of which `lengths` are there."""

    def __init__(self, decoder: StepDecoder, texts: int = 1) -> None:
        self.decoder, self.lengths = decoder, [0] * texts
        self._states = [decoder.room(_ROOM) for _ in range(texts)]

    def take(self, texts: list[list[int]], keep: int = 1) -> list[torch.Tensor]:
        found = []
        for text, tokens in enumerate(texts):
            states = self._enough(self._states[text], self.lengths[text] + bucket(len(tokens)))
            logits, self._states[text] = self.decoder.step(states, self.lengths[text], tokens, keep)
            self.lengths[text] += len(tokens)
            found.append(logits)
        return found

    def forget(self, count: int) -> None:
        self.lengths = [length - count for length in self.lengths]

    def to_cache(self, length: int = 0) -> Any:
        from transformers import DynamicCache

        longest = max(length, *self.lengths)
        roundings, config = self.decoder.roundings, self.decoder.model.config
        cache = DynamicCache(config=config) if roundings is None else QuantizedKvCache(config, roundings)
        each = [self.decoder.to_torch(states) for states in self._states] if longest else []
        for place, sides in enumerate(zip(*each, strict=True)):
            joined = torch.cat(
                [
                    pad(states[:, :, :some], (0, 0, longest - some, 0))
                    for states, some in zip(sides, self.lengths, strict=True)
                ]
            )
            if place % 2 == 0:
                keys = joined
            elif roundings is None:
                cache.update(keys, joined, place // 2)
            else:
                cache.layers[place // 2].restore(keys, joined)
        return cache

    def _enough(self, states: list[Any], tokens: int) -> list[Any]:
        """Keys and values with room for so many tokens."""
        room = states[0].shape[2]
        if tokens <= room:
            return states
        more = (1 << (tokens - 1).bit_length()) - room
        return self.decoder.from_torch([pad(part, (0, 0, 0, more)) for part in self.decoder.to_torch(states)])


def heads_of(config: Any) -> tuple[int, int]:
    """How many heads keys and values have, and their size."""
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, size


def keeps_all(model: PreTrainedModel, decoder: str) -> None:
    """Raises Refused (unknown-variant), in the decoder's name, where the model keeps something else than all keys and values."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    for layer in StaticCache(config=model.config, max_cache_len=_ROOM).layers:
        if type(layer) is not StaticLayer:
            raise unknown(decoder, f"a cache with a {type(layer).__name__}")


def bucket(count: int) -> int:
    """Tokens that so many are filled up to: one, or a power of two."""
    return count if count <= 1 else max(_FEWEST, 1 << (count - 1).bit_length())


def unknown(decoder: str, what: str) -> Refused:
    return Refused(
        Refusal("unknown-variant", "notimpl", decoder, "it does not know a part of this model", f"found {what}",
                "The model's layers are run one operator after the other, more slowly.")
    )  # fmt: skip
