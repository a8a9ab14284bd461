"""A model's step from token to token in one native call (native/decoder.cpp): llama's decoder layers and their kin.

What a model is made of is read off its modules, not its name: norms around attention and MLP, norms of queries and keys, biases,
sliding windows, rotary tables. A part that is not known refuses; whatever is overlooked shows in the first step's logits, which
qcore.model.decode compares.
"""

from __future__ import annotations

import ctypes
import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from qcore.elements import Float
from qcore.model.linear import QuantizedLinear
from qcore.refusal import Refusal, Refused
from qcore_cpu.kernels.native import NativeLinear
from qcore_cpu.library import register
from qcore_cpu.packed import Header

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from qcore.kernels.kv_cache import KvRounding

_NORMS = ("input_norm", "query_norm", "key_norm", "attention_norm", "mlp_norm", "output_norm")
_WEIGHTS = ("query", "key", "value", "out", "gate", "up", "down")
_BIASES = ("query_bias", "key_bias", "value_bias", "out_bias")
_SIDES = tuple(f"{side}_{part}" for side in ("key", "value") for part in ("scale", "zero", "inverse"))
_KEPT = {"int8": 1, "e4m3fn": 2, "e5m2": 3}
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ACTIVATIONS = {"SiLUActivation": 0, "SiLU": 0, "GELUTanh": 1, "PytorchGELUTanh": 1}
_FIRST_CAPACITY = 256
"""Tokens that there is room for at first; it doubles."""


class _Layer(ctypes.Structure):
    """native/decoder.h's `Layer`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_NORMS, *_WEIGHTS, *_BIASES, *_SIDES)),
        ("window", ctypes.c_int64),
        ("rope", ctypes.c_int64),
    ]


class _Stack(ctypes.Structure):
    """native/decoder.h's `Stack`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "size", "layers", "hidden", "heads", "kv_heads", "head_dim", "rope_dim", "activation", "type")),
        *((name, ctypes.c_double) for name in ("norm_epsilon", "scale", "softcap")),
        ("final_norm", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("kept", "row_bytes", "reserved")),
    ]  # fmt: skip


class NativeDecoder:
    """A model's plan, and the rotary tables of as many positions as its texts have had."""

    def __init__(self, model: PreTrainedModel) -> None:
        register()
        self.dtype, self.embed, self.head = model.dtype, model.get_input_embeddings(), model.get_output_embeddings()
        self.softcap = float(getattr(model.config, "final_logit_softcapping", None) or 0.0)
        if self.dtype not in _TYPES or self.head is None:
            raise _unknown(f"a model in {self.dtype}")
        base = model.model
        self.rotary, layers = base.rotary_emb, list(base.layers)
        self.kept: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []
        """Tensors that the plan points into: norms and biases, and packed weights."""
        self.windows = [_window(layer, model.config) for layer in layers]
        self.kinds = [_rope_kind(layer) for layer in layers]
        self.named = "layer_type" in inspect.signature(self.rotary.forward).parameters
        if not self.named:  # one table for all
            self.kinds = [None if kind is None else "" for kind in self.kinds]
        if hasattr(base, "rotary_emb_local"):  # gemma3 of transformers 4
            raise _unknown("a second rotary embedding")
        self.ropes = sorted({kind for kind in self.kinds if kind is not None})
        if getattr(self.rotary, "rope_type", "default") in ("dynamic", "longrope") or (
            isinstance(rope_type := getattr(self.rotary, "rope_type", None), dict)
            and {"dynamic", "longrope"} & set(rope_type.values())
        ):
            raise _unknown("rotary tables that change with the length")
        attention = layers[0].self_attn
        self.heads = attention.q_proj.out_features // attention.head_dim
        self.kv_heads, self.head_dim = attention.k_proj.out_features // attention.head_dim, attention.head_dim
        self.layers = len(layers)
        self.roundings = _roundings(model, len(layers))
        self.kv_kind, self.row = self._rows()
        self.rope = torch.empty(0)
        self.plan = self._plan(model, layers, base.norm)

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> NativeDecoder:
        try:
            return cls(model)
        except AttributeError as error:  # a module without what llama's have
            raise _unknown(str(error)) from error

    def _rows(self) -> tuple[int, int]:
        """How keys and values are kept (native/decoder.h's `Kept`), and elements of a row: of the model's type, or bytes."""
        if not self.roundings:
            return 0, self.head_dim
        sides = [side for pair in self.roundings for side in pair]
        kinds = {
            (side.element.format if isinstance(side.element, Float) else "int8", side.scale is None) for side in sides
        }
        if len(kinds) != 1:
            raise _unknown("a kv cache of several kinds")
        ((kind, dynamic),) = kinds
        return _KEPT[kind], self.head_dim + 4 * dynamic

    # --- What the model is made of ---------------------------------------------------------------------------------

    def _plan(self, model: PreTrainedModel, layers: list[Any], final: torch.nn.Module) -> torch.Tensor:
        if self.head_dim % 16 or self.heads % self.kv_heads:
            raise _unknown(f"heads of {self.head_dim}")
        activation = type(layers[0].mlp.act_fn).__name__
        if activation not in _ACTIVATIONS:
            raise _unknown(f"activation {activation}")
        scales = {(float(layer.self_attn.scaling), self._softcap(layer)) for layer in layers}
        if len(scales) != 1:
            raise _unknown("layers with scales of their own")
        ((scale, softcap),) = scales
        stack = _Stack(
            layers=len(layers), hidden=model.config.hidden_size, heads=self.heads, kv_heads=self.kv_heads,
            head_dim=self.head_dim, rope_dim=self.tables(1).shape[-1], activation=_ACTIVATIONS[activation], type=_TYPES[self.dtype],
            norm_epsilon=_epsilon(final), scale=scale, softcap=softcap, final_norm=self._norm(final), kept=self.kv_kind,
            row_bytes=self.row if self.kv_kind else self.row * self.dtype.itemsize,
        )  # fmt: skip
        stack.size = ctypes.sizeof(_Stack) + len(layers) * ctypes.sizeof(_Layer)
        rows = b"".join(bytes(self._layer(number, layer, stack)) for number, layer in enumerate(layers))
        return torch.frombuffer(bytearray(bytes(stack) + rows), dtype=torch.uint8)

    def _layer(self, number: int, layer: Any, stack: _Stack) -> _Layer:
        kind, window = self.kinds[number], self.windows[number]
        attention, mlp = layer.self_attn, layer.mlp
        around = hasattr(layer, "pre_feedforward_layernorm")  # gemma's: what a block gives is normalized too
        parts = {
            "query": attention.q_proj, "key": attention.k_proj, "value": attention.v_proj, "out": attention.o_proj,
            "gate": mlp.gate_proj, "up": mlp.up_proj, "down": mlp.down_proj,
        }  # fmt: skip
        made = _Layer(rope=-1 if kind is None else self.ropes.index(kind), window=window)
        for name, module in parts.items():
            setattr(made, name, self._weight(module))
        for name in ("query", "key", "value", "out"):
            if parts[name].bias is not None:
                setattr(made, f"{name}_bias", self._floats(parts[name].bias))
        norms = {
            "input_norm": layer.input_layernorm,
            "query_norm": getattr(attention, "q_norm", None),
            "key_norm": getattr(attention, "k_norm", None),
            "attention_norm": layer.post_attention_layernorm if around else None,
            "mlp_norm": layer.pre_feedforward_layernorm if around else layer.post_attention_layernorm,
            "output_norm": layer.post_feedforward_layernorm if around else None,
        }
        for name, norm in norms.items():
            if norm is not None:
                if _epsilon(norm) != stack.norm_epsilon:
                    raise _unknown("norms with epsilons of their own")
                setattr(made, name, self._norm(norm))
        for side, rounding in zip(("key", "value"), self.roundings[number] if self.roundings else (), strict=False):
            for part in ("scale", "zero", "inverse"):
                values = getattr(rounding, part)
                if values is not None:
                    setattr(made, f"{side}_{part}", self._floats(values.flatten().expand(self.kv_heads)))
        return made

    def _weight(self, module: torch.nn.Module) -> int:
        packed = module.packed if isinstance(module, QuantizedLinear) else None
        if not isinstance(packed, NativeLinear) or packed.given is not None:
            raise _unknown(f"a linear layer on {getattr(module, 'kernel_name', 'no native kernel')}")
        assert isinstance(module, QuantizedLinear)
        if module.input_multiplier is not None or module.computes not in (None, self.dtype):
            raise _unknown("a linear layer with an input multiplier or a type of its own")
        self.weights.append(packed.packed)
        return packed.packed.data_ptr()

    def _floats(self, values: torch.Tensor) -> int:
        kept = values.detach().to(torch.float32).contiguous().clone()
        self.kept.append(kept)
        return kept.data_ptr()

    def _norm(self, norm: Any) -> int:
        """The weight that x / rms(x) is multiplied by: the module's, or one more than it (gemma)."""
        weight = norm.weight.detach().to(torch.float32)
        x = torch.linspace(-2, 3, weight.numel()).to(self.dtype)
        expected = norm(x).float()
        x = x.float()
        x = x * torch.rsqrt(x.square().mean() + _epsilon(norm))
        for given in (weight, weight + 1):
            if torch.allclose(x * given, expected, rtol=2e-2 if self.dtype == torch.bfloat16 else 3e-3, atol=1e-3):
                return self._floats(given)
        raise _unknown(f"norm {type(norm).__name__}")

    def _softcap(self, layer: Any) -> float:
        return float(getattr(layer.self_attn, "attn_logit_softcapping", None) or 0.0)

    # --- Running it ------------------------------------------------------------------------------------------------

    def tables(self, capacity: int) -> torch.Tensor:
        """float32 [tables, 2, capacity, rope_dim]: cosines and sines of the first positions."""
        if self.rope.dim() == 4 and self.rope.shape[2] == capacity:
            return self.rope
        x, positions = torch.empty(1, dtype=torch.float32), torch.arange(capacity).unsqueeze(0)
        tables = []
        for kind in self.ropes:
            cosines, sines = self.rotary(x, positions, kind) if self.named else self.rotary(x, positions)
            tables.append(torch.stack([cosines[0].float(), sines[0].float()]))
        self.rope = torch.stack(tables).contiguous() if tables else torch.zeros(1, 2, capacity, 2)
        return self.rope

    def begin(self, cache: Any, length: int) -> NativeSteps:
        states = _states(cache, rounded=bool(self.kv_kind))
        if len(states) != self.layers:
            raise _unknown("a cache of another size")
        steps = NativeSteps(self, max(_FIRST_CAPACITY, 2 * length), length)
        for layer, (window, *pair) in enumerate(states):
            if window not in (0, self.windows[layer]):  # a cache may hold all, and a mask keep the window
                raise _unknown(f"a cache with a window of {window} tokens for one of {self.windows[layer]}")
            for which, state in enumerate(pair):
                if (*state.shape[:2], state.shape[3]) != (
                    1,
                    self.kv_heads,
                    self.row,
                ) or state.dtype != steps.cache.dtype:
                    raise _unknown(f"a cache of {list(state.shape)} in {state.dtype}")
                steps.cache[layer, which, :, length - state.shape[2] : length] = state[
                    0
                ]  # a window holds the last ones
        return steps

    @contextmanager
    def exact(self) -> Iterator[None]:
        place = Header.input.offset
        inputs = [packed[place : place + 8] for packed in self.weights]
        before = [field.clone() for field in inputs]
        try:
            for field in inputs:
                field.zero_()
            yield
        finally:
            for field, value in zip(inputs, before, strict=True):
                field.copy_(value)


class NativeSteps:
    """One text: keys and values [layers, 2, kv_heads, capacity, row] in the model's type or in bytes, of which `length` are there."""

    def __init__(self, decoder: NativeDecoder, capacity: int, length: int) -> None:
        self.decoder, self.length = decoder, length
        self.cache = self._room(capacity)
        self.rope = decoder.tables(capacity)

    def step(self, token: int) -> torch.Tensor:
        decoder, capacity = self.decoder, self.cache.shape[3]
        if self.length == capacity:
            self._grow(capacity := 2 * capacity)
        hidden = decoder.embed(torch.tensor([token]))[0].to(torch.float32).contiguous()
        torch.ops.qcore_cpu.decode(hidden, decoder.plan, self.cache, self.rope, capacity, self.length)
        self.length += 1
        logits: torch.Tensor = decoder.head(hidden.to(decoder.dtype)).float()
        return torch.tanh(logits / decoder.softcap) * decoder.softcap if decoder.softcap else logits

    def _grow(self, capacity: int) -> None:
        before, self.cache = self.cache, self._room(capacity)
        self.cache[..., : before.shape[3], :] = before
        self.rope = self.decoder.tables(capacity)

    def _room(self, capacity: int) -> torch.Tensor:
        decoder = self.decoder
        dtype = torch.uint8 if decoder.kv_kind else decoder.dtype
        return torch.zeros(decoder.layers, 2, decoder.kv_heads, capacity, decoder.row, dtype=dtype)


def _rope_kind(layer: Any) -> str | None:
    """The rotary table that a layer uses; None where it has no positions (smollm3)."""
    attention = layer.self_attn
    if not getattr(attention, "use_rope", True):
        return None
    return str(getattr(attention, "layer_type", None) or getattr(layer, "attention_type", None) or "full_attention")


def _window(layer: Any, config: Any) -> int:
    """Tokens that a layer looks back on; 0 where it is all of them. Mistral's layers have it from the config alone."""
    whole = None if hasattr(config, "layer_types") else getattr(config, "sliding_window", None)
    return int(getattr(layer.self_attn, "sliding_window", whole) or 0)


def _epsilon(norm: torch.nn.Module) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)  # type: ignore[arg-type]


def _roundings(model: PreTrainedModel, layers: int) -> list[tuple[KvRounding, KvRounding]]:
    """How each layer's keys and values are rounded; nothing where they are not."""
    from qcore.model.kv_cache import kv_roundings_of

    found = kv_roundings_of(model)
    return [] if found is None else [found.layers.get(number, found.default) for number in range(layers)]


def _states(cache: Any, *, rounded: bool) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """Window, keys and values of each layer in transformers' plain caches, or in ours."""
    layers = getattr(cache, "layers", None)
    known = ("RoundedLayer", "RoundedSlidingLayer") if rounded else ("DynamicLayer", "DynamicSlidingWindowLayer")
    if layers is None or any(type(layer).__name__ not in known for layer in layers):
        raise _unknown(f"a cache of {type(cache).__name__}")
    return [(int(getattr(layer, "sliding_window", 0) or 0), layer.keys, layer.values) for layer in layers]


def _unknown(what: str) -> Refused:
    return Refused(
        Refusal("unknown-variant", "notimpl", "native_decoder", "it does not know a part of this model", f"found {what}",
                "The model takes its steps itself, more slowly.")
    )  # fmt: skip
