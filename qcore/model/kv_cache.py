"""A transformers cache that holds keys and values in 8 bits, and the hooks that make a model run with it.

A layer of the cache holds rows of bytes, uint8 [batch, heads, tokens, head_dim]: the codes, since few devices reorder
8-bit floats. Where scales are dynamic, the four bytes of a row's float32 scale follow its codes. Everything that transformers
does to a cache (beams, crop, sliding windows) thereby takes scales along; only `update` knows what the bytes mean.

Every key and value is rounded, those of the running call too, and also where no cache is asked for (`use_cache=False`): the
tools that calibrate scales do the same, and logits must not depend on how a text was cut into calls.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

try:
    from transformers.cache_utils import DynamicSlidingWindowLayer, StaticLayer
except ImportError:  # before transformers 4.56, whose models run with caches of their own alone

    class DynamicSlidingWindowLayer(DynamicLayer):  # type: ignore[no-redef,misc]
        """Nothing is one."""

    class StaticLayer(DynamicLayer):  # type: ignore[no-redef,misc]
        """Nothing is one."""


from qcore.checkpoint.kv_scales import KvScales, Side
from qcore.elements import Float
from qcore.kernels.kv_cache import KvRounding
from qcore.model.attention import RowAttention, read_rows, row_states
from qcore.model.cache_name import CACHE, OLD
from qcore.refusal import Refusal, Refused, bad_file
from qcore.scheme import TensorScheme

log = logging.getLogger("qcore")


class _Rounded:
    """What is added to transformers' layers, whose `keys` and `values` hold bytes then."""

    rounding: tuple[KvRounding, KvRounding]
    is_initialized: bool

    def lazy_initialization(self, *states: torch.Tensor) -> None:  # keys; and values since transformers 5
        super().lazy_initialization(*(one.new_empty(0, dtype=torch.uint8) for one in states))  # type: ignore[misc]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Every key and value so far, rounded, in the dtype of the new ones. Where the kernel reads rows in attention, they are dense only once they are
        looked at."""
        of_keys, of_values = self.rounding
        keys, values = super().update(of_keys.encode(key_states), of_values.encode(value_states), *args, **kwargs)  # type: ignore[misc]
        if isinstance(of_keys, RowAttention):
            return row_states(keys, of_keys, key_states), row_states(values, of_values, value_states)
        return of_keys.decode(keys, key_states.dtype), of_values.decode(values, value_states.dtype)

    def restore(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Rows of bytes that this layer, or one like it, has held, after those that are there."""
        super().update(keys, values)  # type: ignore[misc]


class RoundedLayer(_Rounded, DynamicLayer):  # type: ignore[misc]
    """Full attention."""


class RoundedSlidingLayer(_Rounded, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """Attention to a window: bytes that leave it are freed."""


class RoundedStaticLayer(_Rounded, StaticLayer):  # type: ignore[misc]
    """Full attention, with room from the beginning; for plugins' decoders."""


_LAYERS: dict[type, type] = {
    DynamicLayer: RoundedLayer,
    DynamicSlidingWindowLayer: RoundedSlidingLayer,
}


@dataclass(frozen=True)
class KvRoundings:
    """Keys' and values' roundings by the layer's number; `default` is for layers without calibrated scales."""

    scheme: TensorScheme
    layers: Mapping[int, tuple[KvRounding, KvRounding]]
    default: tuple[KvRounding, KvRounding]


class QuantizedKvCache(DynamicCache):  # type: ignore[misc]
    """A growing cache of codes. Raises Refused: bad-argument where the config asks for layers that hold something else, missing-package where transformers is too old."""

    def __init__(self, config: Any, roundings: KvRoundings, *, transient: bool = False) -> None:
        if "config" not in inspect.signature(DynamicCache.__init__).parameters:
            raise Refused(Refusal("missing-package", "missing-dep", "kv_cache", "caches in 8 bits are built on those of transformers 4.56",
                                  f"found transformers {transformers.__version__}", "Install a newer one, or load the model with kv_cache='none'."))  # fmt: skip
        super().__init__(config=config)
        self.transient = transient
        """Whether it is dropped after the call that it was made for."""
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, CacheLayerMixin):
                continue  # no keys and values of its own: of a shared cache, or a recurrent state
            made = _LAYERS.get(type(layer))
            if made is None:
                raise _unsupported(f"found a {type(layer).__name__} for layer {index}")
            window = {"sliding_window": layer.sliding_window} if made is RoundedSlidingLayer else {}
            self.layers[index] = made(**window)
            self.layers[index].rounding = roundings.layers.get(index, roundings.default)


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that a cache holds, and of the scales among them."""
    return sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values) if part is not None)


def quantize_kv_cache(
    model: PreTrainedModel, scheme: TensorScheme, scales: Mapping[str, KvScales], file: Path, kernel: type[KvRounding]
) -> None:
    """From now on every forward of the model, and `generate`, run with such a cache. Scales are by attention module.

    Raises Refused: unexpected-tensor, bad-shape and bad-content where scales do not fit the model or the scheme; bad-argument
    where the architecture keeps something else than keys and values; missing-package where transformers is too old.
    """
    base, config = model.base_model, model.config.get_text_config(decoder=True)
    if CACHE not in inspect.signature(base.forward).parameters:
        raise _unsupported(f"found no {CACHE} in {type(base).__name__}'s forward")
    numbers = {
        name: number for name, m in model.named_modules() if isinstance(number := getattr(m, "layer_idx", None), int)
    }
    calibrated = {}
    for name, found in scales.items():
        if name not in numbers:
            raise bad_file("unexpected-tensor", "a kv cache's scale belongs to no attention layer", file=file,
                           tensor=found.k.source, expected=f"an attention layer of {type(model).__name__}")  # fmt: skip
        if not scheme.dynamic:
            keys, values = (
                kernel(scheme.element, *_static(side, scheme, config, file), order=found.order)
                for side in (found.k, found.v)
            )
            calibrated[numbers[name]] = (keys, values)
    default = kernel(scheme.element, torch.ones(1) if isinstance(scheme.element, Float) else None)
    roundings = KvRoundings(scheme, calibrated, (default, default))
    cache = QuantizedKvCache(config, roundings)  # refuses what it cannot hold
    bare = sum(isinstance(layer, _Rounded) and number not in calibrated for number, layer in enumerate(cache.layers))
    if scheme.dynamic and scales:
        log.warning("the kv scales of %s are not used: a %s cache computes its own", file, scheme)
    elif bare and not scheme.dynamic:
        meaning = "the scale 1.0" if isinstance(scheme.element, Float) else "a scale for each token and head"
        log.warning("%s has no kv scales for %d attention layers, which take %s", file, bare, meaning)
    if isinstance(default, RowAttention):
        read_rows()
    hook = _Hook(roundings)
    base.register_forward_pre_hook(hook.before, with_kwargs=True)
    base.register_forward_hook(hook.after, with_kwargs=True)


def kv_cache_of(model: PreTrainedModel) -> TensorScheme | None:
    """The kv cache that a loaded model runs with; None is an unquantized one."""
    roundings = kv_roundings_of(model)
    return None if roundings is None else roundings.scheme


def kv_hooks_of(model: PreTrainedModel) -> list[Any]:
    """The hooks of `quantize_kv_cache`; none where there is no such cache."""
    base = model.base_model
    hooks = (*base._forward_pre_hooks.values(), *base._forward_hooks.values())
    return [hook for hook in hooks if isinstance(getattr(hook, "__self__", None), _Hook)]


def kv_roundings_of(model: PreTrainedModel) -> KvRoundings | None:
    """How keys and values are rounded; None where they are not."""
    return next((hook.__self__.roundings for hook in kv_hooks_of(model)), None)


class _Hook:
    """Around the decoder's forward, which everything goes through: the model's own forward, and `generate`, whose cache
    turns into a quantized one in place, so that beams and rollbacks find what they hold."""

    def __init__(self, roundings: KvRoundings) -> None:
        self.roundings = roundings

    def before(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Supplies the cache."""
        named = dict(kwargs)
        if args:
            named |= zip(inspect.signature(module.forward).parameters, args, strict=False)
        if OLD in named:  # which the forward itself would rename, later
            named[CACHE] = named.pop(OLD)
        config: Any = module.config
        cache = named.get(CACHE)
        if cache is None:
            kept = named.get("use_cache")
            kept = getattr(config, "use_cache", True) if kept is None else kept
            named[CACHE] = self._made(config, transient=not kept)
        elif not any(isinstance(layer, _Rounded) for layer in cache.layers):
            self._adopt(cache, config)
        return (), named

    def after(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Makes sure that the cache was used, and drops it where none was asked for."""
        cache = kwargs[CACHE]
        if not any(isinstance(layer, _Rounded) and layer.is_initialized for layer in cache.layers):
            raise _unsupported(f"{type(module).__name__} ran and put nothing into its cache")
        if not getattr(cache, "transient", False):
            return output
        if isinstance(output, tuple):
            return tuple(part for part in output if part is not cache)
        setattr(output, CACHE, None)
        return output

    def _made(self, config: Any, *, transient: bool) -> QuantizedKvCache:
        return QuantizedKvCache(config.get_text_config(decoder=True), self.roundings, transient=transient)

    def _adopt(self, cache: Any, config: Any) -> None:
        """An empty cache that transformers or the caller made."""
        if not isinstance(cache, DynamicCache) or any(
            layer.is_initialized for layer in cache.layers if layer.keys is not None
        ):
            raise Refused(
                Refusal("bad-argument", "usage", CACHE, "the model runs with a quantized kv cache, and this "
                        "cache cannot become one", f"found a {type(cache).__name__}, expected an empty DynamicCache",
                        "Pass no cache, or load the model with kv_cache='none'.")
            )  # fmt: skip
        recording = any(getattr(layer, "record_past", False) for layer in cache.layers)
        cache.layers = self._made(config, transient=False).layers
        if recording:
            cache.activate_past_recording()


def _static(
    side: Side, scheme: TensorScheme, config: Any, file: Path
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Stored scale and zero point. Raises Refused: bad-shape, bad-content."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for values in (side.scale, side.zero):
        if values is not None and len(values) not in (1, heads):
            raise bad_file("bad-shape", "a kv cache has one scale, or one for each head", file=file, tensor=side.source,
                           field="shape", found=len(values), expected=f"1 or {heads} heads")  # fmt: skip
    if side.zero is not None and scheme.zero is None:
        raise bad_file("bad-content", "a symmetric kv cache has a zero point", file=file, tensor=side.source,
                       field="values", found=side.zero.flatten()[:4].tolist(), expected="0")  # fmt: skip
    return side.scale, side.zero


def _unsupported(found: str) -> Refused:
    return Refused(
        Refusal("bad-argument", "notimpl", "kv_cache", "this architecture's cache cannot be quantized yet",
                f"{found}, expected full or sliding attention that caches keys and values",
                "Load the model with kv_cache='none'.")
    )  # fmt: skip
