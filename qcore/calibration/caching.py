"""What a block's attention caches of the windows, and the scales of a kv cache that are found for it.

Attention is handed a cache that gives back what it is given, so that nothing else changes: keys are seen as they are cached, behind their norms and rotary embedding.
Magnitudes are counted by the first 16 bits of their float32, of each head, so that all windows take the room of one.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache

from qcore.checkpoint.kv_scales import KvScales, Side
from qcore.elements import Float, PerTensor
from qcore.kernels.kv_cache import KvRounding
from qcore.model.cache_name import CACHE, OLD
from qcore.model.kv_cache import KvRoundings, QuantizedKvCache
from qcore.refusal import Refusal, Refused, bad_file
from qcore.tensor import TORCH_FLOATS

if TYPE_CHECKING:
    from qcore.calibration.blocks import Blocks
    from qcore.elements import Element
    from qcore.scheme import TensorScheme

_BINS = 0x7F80
"""Of finite magnitudes; after them come infinity and NaN."""
_CENTERS = ((torch.arange(_BINS, dtype=torch.int32) << 16) | 0x8000).view(torch.float32).to(torch.float64)
_INT8 = 127.0
_NAMES = (CACHE, OLD, "layer_past")
"""What attention calls the cache that it is handed, and older models' attention."""


class Caching:
    """Sees what the block caches from `with` to its end; it is run in between. scheme: of the cache; without one nothing is looked at."""

    def __init__(self, blocks: Blocks, number: int, scheme: TensorScheme | None) -> None:
        self.blocks, self.scheme = blocks, scheme
        self._attention: dict[str, tuple[torch.nn.Module, Magnitudes, Magnitudes]] = {}
        self._hooks = ExitStack()
        if scheme is not None:
            for name, module in _attentions(blocks.blocks[number]).items():
                place = f"{blocks.prefix}.{number}.{name}"
                self._attention[place] = (module, Magnitudes(), Magnitudes())

    def __enter__(self) -> Caching:
        for place, (module, keys, values) in self._attention.items():
            handed = _Handed(module, _Seeing(self.blocks, place, keys, values))
            self._hooks.enter_context(module.register_forward_pre_hook(handed, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()

    def scales(self) -> dict[str, KvScales]:
        """By attention module. Raises Refused: bad-argument where one has cached nothing, bad-content where what it cached is not finite."""
        found: dict[str, KvScales] = {}
        for place, (module, keys, values) in self._attention.items():
            if keys.counts is None:
                raise _unsupported(f"{place}, a {type(module).__name__}, which put nothing into its cache")
            found[place] = KvScales(self._side(keys, f"{place}.k_scale"), self._side(values, f"{place}.v_scale"))
        return found

    def _side(self, seen: Magnitudes, name: str) -> Side:
        assert self.scheme is not None
        if not bool(seen.largest.isfinite().all()):
            raise bad_file("bad-content", "what the model caches is not finite", file=self.blocks.checkpoint.path, tensor=name, field="values",
                           found="NaN or infinity", expected="finite numbers", fix="Check that the model reads the text sensibly before it is quantized.")  # fmt: skip
        whole = isinstance(self.scheme.scales[0].granularity, PerTensor)
        return Side(seen.scale(self.scheme.element, by_head=not whole), None, name)


class Magnitudes:
    """Of keys or values. counts: int64 [heads, bins]. largest: float32 [heads]."""

    def __init__(self) -> None:
        self.counts: torch.Tensor | None = None
        self.largest = torch.zeros(1)

    def add(self, states: torch.Tensor) -> None:
        """[1, heads, tokens, head_dim]."""
        size = states.to(torch.float32).abs().transpose(0, 1).flatten(1)
        heads = len(size)
        bins = (size.view(torch.int32) >> 16).clamp_max(_BINS) + (_BINS + 1) * torch.arange(heads, dtype=torch.int32)[
            :, None
        ]
        counts = torch.bincount(bins.flatten(), minlength=heads * (_BINS + 1)).view(heads, -1)[:, :_BINS]
        self.counts = counts if self.counts is None else self.counts + counts
        self.largest = torch.maximum(self.largest, size.amax(1))

    def scale(self, element: Element, *, by_head: bool) -> torch.Tensor:
        """float32 [1], or [heads, 1, 1].

        Floats: the largest magnitude over the element's largest number, for their steps go with the magnitude, and a smaller scale would only clip. Integers: that of the least
        squared error, for all of which their steps are alike.
        """
        assert self.counts is not None
        counts, largest = self.counts, self.largest
        if not by_head:
            counts, largest = counts.sum(0, keepdim=True), largest.amax(0, keepdim=True)
        most = torch.finfo(TORCH_FLOATS[element.format]).max if isinstance(element, Float) else _INT8
        scale = largest / most
        if not isinstance(element, Float):
            scale = torch.minimum(scale, torch.stack([_nearest(own) for own in counts]))
        scale = torch.where(largest > 0, scale.clamp_min(torch.finfo(torch.float32).tiny), 1.0)
        return scale.view(-1, 1, 1) if by_head else scale


def _nearest(counts: torch.Tensor) -> torch.Tensor:
    """Of magnitudes counted [bins], the scale of 8-bit integers with the least squared error, which is looked for among all that have the last code on a bin.

    What is beyond the last code is clipped to it; what is below half a step becomes zero; and between them the error is that of numbers which lie anywhere in a step.
    """
    steps = _CENTERS / _INT8
    moments = torch.stack([counts * _CENTERS**power for power in range(3)])
    below = torch.nn.functional.pad(moments.cumsum(1), (1, 0))
    small, kept = (torch.searchsorted(_CENTERS, edge) for edge in (steps / 2, _CENTERS + steps / 2))
    clipped = below[:, -1:] - below[:, kept]
    error = clipped[2] - 2 * _CENTERS * clipped[1] + _CENTERS**2 * clipped[0]
    error += below[2, small] + steps**2 / 12 * (below[0, kept] - below[0, small]).clamp_min(0)
    return steps[error.argmin()].to(torch.float32)


class _Seeing(DynamicCache):  # type: ignore[misc]
    """An empty cache, whatever is put into it. place: of the attention module that has it."""

    def __init__(self, blocks: Blocks, place: str, keys: Magnitudes, values: Magnitudes) -> None:
        super().__init__()
        self.place, self.seen = place, (keys, values)
        self.rank = getattr(blocks.model.config.get_text_config(decoder=True), "kv_lora_rank", None)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        states = (key_states, value_states)
        alike = key_states.ndim == 4 and key_states.shape[:3] == value_states.shape[:3]
        if not alike or self.rank in (key_states.shape[-1], value_states.shape[-1]):
            raise _unsupported(f"{self.place}, which caches {list(key_states.shape)} and {list(value_states.shape)}")
        for seen, own in zip(self.seen, states, strict=True):
            seen.add(own)
        return states


class _Handed:
    """Before an attention module's forward: puts a cache among its arguments."""

    def __init__(self, module: torch.nn.Module, cache: DynamicCache) -> None:
        self.names, self.cache = list(inspect.signature(module.forward).parameters), cache

    def __call__(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = {**kwargs, **dict(zip(self.names, args, strict=False))}
        named[next(name for name in _NAMES if name in self.names)] = self.cache
        return (), named


def check_cache(blocks: Blocks, scheme: TensorScheme) -> None:
    """Raises Refused: bad-argument where a block keeps something else than keys and values, missing-package where transformers is too old for a quantized cache."""
    default = KvRounding(scheme.element, torch.ones(1))
    roundings = KvRoundings(scheme, {}, (default, default))
    QuantizedKvCache(blocks.model.config.get_text_config(decoder=True), roundings)  # refuses what it cannot hold
    for block in blocks.blocks:
        _attentions(block)


def _attentions(block: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The innermost modules that are handed a cache and have a number in it, by their names in the block. Raises Refused (bad-argument) where there are none."""
    taking = {
        name: module
        for name, module in block.named_modules()
        if name and isinstance(getattr(module, "layer_idx", None), int) and inspect.signature(module.forward).parameters.keys() & {*_NAMES}
    }  # fmt: skip
    found = {
        name: module for name, module in taking.items() if not any(other.startswith(f"{name}.") for other in taking)
    }
    if not found:
        raise _unsupported(f"no attention that is handed a cache in {type(block).__name__}")
    return found


def _unsupported(found: str) -> Refused:
    return Refused(
        Refusal("bad-argument", "notimpl", "kv_cache", "scales of this architecture's cache are not found by calibration",
                f"found {found}, expected attention that caches keys and values", "Leave the kv cache out.")
    )  # fmt: skip
