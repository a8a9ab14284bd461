"""A model's way from tokens to the next one in native calls (native/decoder.cpp): llama's decoder layers and their kin.

What a model is made of is read off its modules, not its name: norms around attention and MLP, norms of queries and keys, biases,
sliding windows, rotary tables. A part that is not known refuses; whatever is overlooked shows in the first step's logits, which
qcore.model.trial compares.
"""

from __future__ import annotations

import ctypes
import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from qcore.elements import Float
from qcore.model.experts import QuantizedExperts
from qcore.model.kv_cache import kv_roundings_of
from qcore.model.linear import QuantizedLinear
from qcore_cpu.decoder_modules import (
    activation_of,
    cache_of,
    epsilon_of,
    is_plainly_gated,
    only_row_of,
    rope_kind_of,
    routing_of,
    unknown_part,
    window_of,
)
from qcore_cpu.kernels.native import NativeLinear
from qcore_cpu.library import register
from qcore_cpu.packed import input_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from qcore.kernels.kv_cache import KvRounding


_NORMS = ("input_norm", "query_norm", "key_norm", "attention_norm", "mlp_norm", "output_norm")
_MLP = ("gate", "up", "down")
_WEIGHTS = ("query", "key", "value", "out", "gate", "up", "down")
_MIXTURE = {"gate", "experts", "shared_expert", "shared_expert_gate"}
_BIASES = ("query_bias", "key_bias", "value_bias", "out_bias")
_SIDES = tuple(f"{side}_{part}" for side in ("key", "value") for part in ("scale", "zero", "inverse"))
_KEPT = {"int8": 1, "e4m3fn": 2, "e5m2": 3}
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ACTIVATIONS = {"SiLUActivation": 0, "SiLU": 0, "GELUTanh": 1, "PytorchGELUTanh": 1}
_FIRST_CAPACITY = 256
"""Tokens that there is room for at first; it grows by as many, or by a quarter where that is more."""
_AT_ONCE = 256
"""Tokens that go through all layers together; native/linear.h allows 512."""


class _Layer(ctypes.Structure):
    """native/decoder.h's `Layer`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_NORMS, *_WEIGHTS, *_BIASES, *_SIDES)),
        ("window", ctypes.c_int64),
        ("rope", ctypes.c_int64),
        ("mixture", ctypes.c_void_p),
    ]


class _Mixture(ctypes.Structure):
    """native/decoder.h's `Mixture`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("experts", "chosen", "normalized")),
        *((name, ctypes.c_void_p) for name in (
            "router", "gate", "up", "down", "shared_gate", "shared_up", "shared_down", "shared_router")),
    ]  # fmt: skip


class _Stack(ctypes.Structure):
    """native/decoder.h's `Stack`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "size", "layers", "hidden", "heads", "kv_heads", "head_dim", "rope_dim", "activation", "type")),
        *((name, ctypes.c_double) for name in ("norm_epsilon", "scale", "softcap")),
        ("final_norm", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("kept", "row_bytes", "joint_norms")),
    ]  # fmt: skip


class NativeDecoder:
    """A model's plan, and the rotary tables of as many positions as its texts have had."""

    def __init__(self, model: PreTrainedModel) -> None:
        register()
        self.dtype, self.embed, self.head = model.dtype, model.get_input_embeddings(), model.get_output_embeddings()
        self.softcap = float(getattr(model.config, "final_logit_softcapping", None) or 0.0)
        if self.dtype not in _TYPES or self.head is None:
            raise unknown_part(f"a model in {self.dtype}")
        base = model.model
        self.rotary, layers = base.rotary_emb, list(base.layers)
        self.kept: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []
        """Tensors that the plan points into: norms and biases, and packed weights."""
        self.windows = [window_of(layer, model.config) for layer in layers]
        self.kinds = [rope_kind_of(layer) for layer in layers]
        self.named = "layer_type" in inspect.signature(self.rotary.forward).parameters
        if not self.named:  # one table for all
            self.kinds = [None if kind is None else "" for kind in self.kinds]
        if hasattr(base, "rotary_emb_local"):  # gemma3 of transformers 4
            raise unknown_part("a second rotary embedding")
        self.ropes = sorted({kind for kind in self.kinds if kind is not None})
        if getattr(self.rotary, "rope_type", "default") in ("dynamic", "longrope") or (
            isinstance(rope_type := getattr(self.rotary, "rope_type", None), dict)
            and {"dynamic", "longrope"} & set(rope_type.values())
        ):
            raise unknown_part("rotary tables that change with the length")
        attention = layers[0].self_attn
        self.head_dim, self.heads = attention.head_dim, attention.o_proj.in_features // attention.head_dim
        self.kv_heads = self.heads // attention.num_key_value_groups
        self.layers = len(layers)
        self.config = model.config.get_text_config(decoder=True)
        self.roundings = kv_roundings_of(model)
        self.kv_kind, self.row = self._rows()
        self.rope = torch.empty(0)
        self.plan = self._plan(model, layers, base.norm)

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> NativeDecoder:
        try:
            return cls(model)
        except AttributeError as error:  # a module without what llama's have
            raise unknown_part(str(error)) from error

    def _rows(self) -> tuple[int, int]:
        """How keys and values are kept (native/decoder.h's `Kept`), and elements of a row: of the model's type, or bytes."""
        if self.roundings is None:
            return 0, self.head_dim
        sides = [side for number in range(self.layers) for side in self._sides(number)]
        kinds = {
            (side.element.format if isinstance(side.element, Float) else "int8", side.scale is None) for side in sides
        }
        if len(kinds) != 1:
            raise unknown_part("a kv cache of several kinds")
        ((kind, dynamic),) = kinds
        return _KEPT[kind], self.head_dim + 4 * dynamic

    def _sides(self, number: int) -> tuple[KvRounding, ...]:
        """How a layer's keys and its values are rounded; nothing where they are not."""
        return () if self.roundings is None else self.roundings.layers.get(number, self.roundings.default)

    # --- What the model is made of ---------------------------------------------------------------------------------

    def _plan(self, model: PreTrainedModel, layers: list[Any], final: torch.nn.Module) -> torch.Tensor:
        if self.head_dim % 16 or self.heads % self.kv_heads:
            raise unknown_part(f"heads of {self.head_dim}")
        activations = {type(activation_of(layer.mlp)).__name__ for layer in layers}
        if len(activations) != 1 or not activations <= _ACTIVATIONS.keys():
            raise unknown_part(f"activation {' and '.join(sorted(activations))}")
        (activation,) = activations
        scales = {(float(layer.self_attn.scaling), self._softcap(layer)) for layer in layers}
        if len(scales) != 1:
            raise unknown_part("layers with scales of their own")
        ((scale, softcap),) = scales
        stack = _Stack(
            layers=len(layers), hidden=model.config.hidden_size, heads=self.heads, kv_heads=self.kv_heads,
            head_dim=self.head_dim, rope_dim=self.tables(1).shape[-1], activation=_ACTIVATIONS[activation], type=_TYPES[self.dtype],
            norm_epsilon=epsilon_of(final), scale=scale, softcap=softcap, final_norm=self._norm(final), kept=self.kv_kind,
            row_bytes=self.row if self.kv_kind else self.row * self.dtype.itemsize, joint_norms=self._joint_norms(layers),
        )  # fmt: skip
        stack.size = ctypes.sizeof(_Stack) + len(layers) * ctypes.sizeof(_Layer)
        rows = b"".join(bytes(self._layer(number, layer, stack)) for number, layer in enumerate(layers))
        return torch.frombuffer(bytearray(bytes(stack) + rows), dtype=torch.uint8)

    def _layer(self, number: int, layer: Any, stack: _Stack) -> _Layer:
        kind, window = self.kinds[number], self.windows[number]
        attention, mlp = layer.self_attn, layer.mlp
        around = hasattr(layer, "pre_feedforward_layernorm")  # gemma's: what a block gives is normalized too
        joined = hasattr(attention, "qkv_proj")  # phi3's: the rows of all three in one weight
        names = {"query": "qkv_proj"} if joined else {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
        parts = {part: getattr(attention, name) for part, name in (names | {"out": "o_proj"}).items()}
        made = _Layer(rope=-1 if kind is None else self.ropes.index(kind), window=window)
        if hasattr(mlp, "experts"):
            made.mixture = self._kept(torch.frombuffer(bytearray(self._mixture(mlp, stack)), dtype=torch.uint8))
        else:
            names = (
                {"gate": "gate_up", "down": "down"} if hasattr(mlp, "gate_up_proj") else {part: part for part in _MLP}
            )
            parts |= {part: getattr(mlp, f"{name}_proj") for part, name in names.items()}
        for name, module in parts.items():
            setattr(made, name, self._weight(module))
        for name, module in parts.items():
            if module.bias is not None:
                if f"{name}_bias" not in _BIASES:
                    raise unknown_part(f"a bias of {name}")
                setattr(made, f"{name}_bias", self._floats(module.bias))
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
                if epsilon_of(norm) != stack.norm_epsilon:
                    raise unknown_part("norms with epsilons of their own")
                setattr(made, name, self._norm(norm))
        for side, rounding in zip(("key", "value"), self._sides(number), strict=False):
            for part in ("scale", "zero", "inverse"):
                values = getattr(rounding, part)
                if values is not None:
                    setattr(made, f"{side}_{part}", self._floats(values.flatten().expand(self.kv_heads)))
        return made

    def _mixture(self, mlp: Any, stack: _Stack) -> _Mixture:
        """Experts and their router, as transformers 5 has them; a router is known by what it answers."""
        experts, router = mlp.experts, mlp.gate
        if not isinstance(experts, QuantizedExperts) or not experts.layout.gated or experts.layout.biased:
            raise unknown_part("experts that are no quantized layers, or have biases or no gates")
        count = experts.layout.count
        chosen, normalized = routing_of(router, stack.hidden, self.dtype)
        made = _Mixture(experts=count, chosen=chosen, normalized=normalized, router=self._floats(router.weight))
        joined = "gate_up" in experts.parts
        if (joined and experts.layout.interleaved) or not is_plainly_gated(experts):
            raise unknown_part("experts with gates of their own kind")
        for part in ("gate_up", "down") if joined else _MLP:
            places = [self._weight(expert) for expert in experts.parts[part].children()]
            setattr(made, part.removesuffix("_up"), self._kept(torch.tensor(places, dtype=torch.int64)))
        if (shared := getattr(mlp, "shared_expert", None)) is not None:
            for part in _MLP:
                setattr(made, f"shared_{part}", self._weight(getattr(shared, f"{part}_proj")))
            made.shared_router = self._floats(only_row_of(mlp.shared_expert_gate))
        if unknown := {name for name, _ in mlp.named_children()} - _MIXTURE:
            raise unknown_part(f"a mixture with {min(unknown)}")
        return made

    def _kept(self, values: torch.Tensor) -> int:
        self.kept.append(values)
        return values.data_ptr()

    def _weight(self, module: torch.nn.Module) -> int:
        packed = module.packed if isinstance(module, QuantizedLinear) else None
        if not isinstance(packed, NativeLinear) or packed.given is not None:
            raise unknown_part(f"a linear layer on {getattr(module, 'kernel_name', 'no native kernel')}")
        assert isinstance(module, QuantizedLinear)
        if module.input_multiplier is not None or module.computes not in (None, self.dtype):
            raise unknown_part("a linear layer with an input multiplier or a type of its own")
        self.weights.append(packed.packed)
        return packed.packed.data_ptr()

    def _floats(self, values: torch.Tensor) -> int:
        return self._kept(values.detach().to(torch.float32).contiguous().clone())

    def _norm(self, norm: Any) -> int:
        """The weight that x / rms(x) is multiplied by: the module's, or one more than it (gemma)."""
        weight = norm.weight.detach().to(torch.float32)
        x = torch.linspace(-2, 3, weight.numel()).to(self.dtype)
        expected = norm(x).float()
        x = x.float()
        x = x * torch.rsqrt(x.square().mean() + epsilon_of(norm))
        for given in (weight, weight + 1):
            if torch.allclose(x * given, expected, rtol=2e-2 if self.dtype == torch.bfloat16 else 3e-3, atol=1e-3):
                return self._floats(given)
        raise unknown_part(f"norm {type(norm).__name__}")

    def _joint_norms(self, layers: list[Any]) -> bool:
        """Whether queries are normalized all heads together (olmoe), and so keys; else each head."""
        found = set()
        for heads, name in ((self.heads, "q_norm"), (self.kv_heads, "k_norm")):
            norms = [getattr(layer.self_attn, name, None) for layer in layers]
            sizes = {norm.weight.numel() for norm in norms if norm is not None}
            if sizes and heads > 1:
                found |= {size == heads * self.head_dim for size in sizes}
            if not sizes <= {self.head_dim, heads * self.head_dim}:
                raise unknown_part(f"norms of {sorted(sizes)}")
        if len(found) > 1:
            raise unknown_part("norms of several kinds")
        return found == {True}

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

    def begin(self, texts: int = 1) -> NativeSteps:
        return NativeSteps(self, texts=texts)

    @contextmanager
    def exact(self) -> Iterator[None]:
        inputs = [input_of(packed) for packed in self.weights]
        before = [field.clone() for field in inputs]
        try:
            for field in inputs:
                field.zero_()
            yield
        finally:
            for field, value in zip(inputs, before, strict=True):
                field.copy_(value)


class NativeSteps:
    """Texts under way: keys and values [texts, layers, 2, kv_heads, capacity, row] in the model's type or in bytes, of which `lengths` are there."""

    def __init__(self, decoder: NativeDecoder, capacity: int = _FIRST_CAPACITY, texts: int = 1) -> None:
        self.decoder, self.lengths = decoder, [0] * texts
        self.cache = self._room(capacity)
        self.rope = decoder.tables(capacity)

    def take(self, texts: list[list[int]], keep: int = 1) -> list[torch.Tensor]:
        self._reserve(max(length + len(tokens) for length, tokens in zip(self.lengths, texts, strict=True)))
        found: list[list[torch.Tensor]] = [[] for _ in texts]
        for parts in _parts([len(tokens) for tokens in texts]):
            wanted = [max(1, last - max(first, len(texts[text]) - keep)) for text, first, last in parts]
            tokens = [token for text, first, last in parts for token in texts[text][first:last]]
            hidden = self._decode(tokens, parts, wanted)
            for (text, first, last), rows in zip(parts, hidden.split(wanted), strict=True):
                self.lengths[text] += last - first
                found[text].append(rows)
        rows = [torch.cat(each)[-keep:] for each in found]
        return list(self._logits(torch.cat(rows)).split([len(each) for each in rows]))

    def forget(self, count: int) -> None:
        self.lengths = [length - count for length in self.lengths]

    def to_cache(self, length: int = 0) -> Any:
        longest = max(length, *self.lengths)
        states = self.cache[..., :longest, :].transpose(0, 2)  # [2, layers, texts, kv_heads, longest, row]
        if min(self.lengths) < longest:
            states = torch.zeros_like(states)
            for text, own in enumerate(self.lengths):
                states[:, :, text, :, longest - own :] = self.cache[text, ..., :own, :].transpose(0, 1)
        return cache_of(self.decoder.config, self.decoder.roundings, zip(*states, strict=True))

    def _decode(self, tokens: list[int], parts: list[tuple[int, int, int]], wanted: list[int]) -> torch.Tensor:
        """float32 [sum of wanted, hidden]: of each part the last ones, behind the last norm."""
        hidden: torch.Tensor = self.decoder.embed(torch.tensor(tokens)).to(torch.float32).contiguous()
        places = [
            (self.lengths[text], last - first, count) for (text, first, last), count in zip(parts, wanted, strict=True)
        ]
        cache = self.cache[parts[0][0] : parts[-1][0] + 1]
        torch.ops.qcore_cpu.decode(
            hidden, self.decoder.plan, cache, self.rope, torch.tensor(places), self.cache.shape[4]
        )
        return hidden[-sum(wanted) :]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        decoder = self.decoder
        logits: torch.Tensor = decoder.head(hidden.to(decoder.dtype)).float()
        return torch.tanh(logits / decoder.softcap) * decoder.softcap if decoder.softcap else logits

    def _reserve(self, length: int) -> None:
        before = self.cache
        if length <= before.shape[4]:
            return
        capacity = -(-max(length, before.shape[4] * 5 // 4) // _FIRST_CAPACITY) * _FIRST_CAPACITY
        self.cache, self.rope = self._room(capacity), self.decoder.tables(capacity)
        kept = max(self.lengths)
        self.cache[..., :kept, :] = before[..., :kept, :]

    def _room(self, capacity: int) -> torch.Tensor:
        decoder = self.decoder
        shape = (len(self.lengths), decoder.layers, 2, decoder.kv_heads, capacity, decoder.row)
        dtype = torch.uint8 if decoder.kv_kind else decoder.dtype
        return torch.empty(shape, dtype=dtype)  # nothing is read that was not written


def _parts(counts: list[int]) -> Iterator[list[tuple[int, int, int]]]:
    """What goes through the layers together of texts of so many tokens, _AT_ONCE tokens at most: (text, first token, the one behind the last)."""
    parts: list[tuple[int, int, int]] = []
    room = _AT_ONCE
    for text, count in enumerate(counts):
        first = 0
        while first < count:
            last = min(count, first + room)
            parts.append((text, first, last))
            first, room = last, room - (last - first)
            if not room:
                yield parts
                parts, room = [], _AT_ONCE
    if parts:
        yield parts
