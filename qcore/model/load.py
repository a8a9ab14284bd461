"""load_model: checkpoint -> transformers model whose quantized layers run on chosen kernels.

Modules are decoded, prepacked and released one at a time, so that loading never holds more than the packed model and
the largest tensor.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qcore.checkpoint.kv_scales import chosen_scheme, spelled
from qcore.checkpoint.open import Checkpoint, open_checkpoint
from qcore.discovery import registry
from qcore.model.decoded import read_by_decoder
from qcore.model.devices import find_device
from qcore.model.linear import QuantizedEmbedding, QuantizedLinear, StackedLinear
from qcore.model.memory import released_buffers
from qcore.model.pack import Packer, agreed_bias
from qcore.model.places import Places, Slot
from qcore.model.skeleton import skeleton
from qcore.model.stacks import ExpertLoader
from qcore.pages import promote_pages
from qcore.platform import Device
from qcore.pool import memory_used_again
from qcore.refusal import Refusal, Refused, bad_file
from qcore.select import exact_activations
from qcore.tensor import LayerTensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("qcore")
Progress = Callable[[str, int, int], None]
"""Called with a module's name, bytes loaded so far and bytes in all."""

_STALE_BUFFERS = (r"rotary_emb\.inv_freq$", r"\.attn\.(masked_)?bias$")
"""Buffers that older models saved and that are computed now."""


def load_model(
    path: str | Path | Checkpoint,
    device: str | Device = "auto",
    dtype: torch.dtype | str | None = None,
    *,
    kernel: str | None = None,
    activations: str = "exact",
    quantize: str | None = None,
    kv_cache: str | None = "auto",
    progress: Progress | None = None,
) -> PreTrainedModel:
    """A transformers model of the checkpoint, ready to run, on one device.

    dtype: of activations and unquantized weights; None means the checkpoint's own (`Checkpoint.own_dtype`, and of layers what
    `ModulePlan.computes` states beside it). kernel: run every layer that takes it with this kernel. activations: `exact` keeps them in `dtype` unless the scheme quantizes them;
    `int8` lets kernels round them. quantize: how unquantized layers are quantized while they are loaded, in the words of
    `Checkpoint.quantized`. kv_cache: `auto` as the checkpoint declares; none, fp8, fp8_e4m3, fp8_e5m2 or int8.
    Raises Refused.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    if quantize is not None:
        checkpoint = checkpoint.quantized(quantize)
    target = device if isinstance(device, Device) else find_device(device)
    target.prepare()
    exact = exact_activations(activations)
    wanted = _torch_dtype(checkpoint.own_dtype if dtype is None else dtype)
    _check_memory(checkpoint, target)
    scheme = chosen_scheme(kv_cache, checkpoint)
    packer = Packer(target, wanted, kernel, exact, own=dtype is None)
    model = skeleton(checkpoint, wanted)
    if scheme is not None:
        from qcore.model.kv_cache import quantize_kv_cache

        quantize_kv_cache(model, scheme, checkpoint.kv_scales, checkpoint.path, packer.kv_cache(scheme))
    with released_buffers(), memory_used_again():
        _Loader(checkpoint, model, packer, progress).run()
    promote_pages()
    if registry().decoders:
        read_by_decoder(model)
    return model


def kernel_counts(model: torch.nn.Module) -> dict[str, int]:
    """How many layers of a loaded model each kernel runs, each expert's counted."""
    names: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            names[module.kernel_name] += 1
        elif isinstance(module, StackedLinear):
            names[module.kernel_name] += module.count
    return dict(names.most_common())


class _Loader:
    """Fills a skeleton."""

    def __init__(
        self, checkpoint: Checkpoint, model: PreTrainedModel, packer: Packer, progress: Progress | None
    ) -> None:
        self.checkpoint, self.model, self.packer, self.progress = checkpoint, model, packer, progress
        self.device, self.dtype = packer.device, packer.dtype
        self.done = 0
        self.places = Places(model)
        self.missing = set(self.places.state)
        self.experts = ExpertLoader(checkpoint, model, self.places, self.packer, self._step)
        self.taken: dict[str, str] = {}

    def run(self) -> None:
        tied = self._tied_head()
        for module, entry in self.checkpoint.layers.items():
            if entry.scheme is not None and not self._ignored(f"{module}.weight"):
                self._quantized(module, tied)
        for name in self.checkpoint.parameters:
            self._dense(name, tied)
        self.missing -= self.experts.run()
        if self.missing:
            raise bad_file("missing-tensor", "the model needs tensors that the checkpoint does not hold",
                           file=self.checkpoint.path, tensor=min(self.missing),
                           found=f"{len(self.missing)} missing: {', '.join(sorted(self.missing)[:4])}")  # fmt: skip
        self.model.to(self.device.torch_device)

    def _quantized(self, module: str, tied: str | None) -> None:
        place = self.places.module(module)
        if isinstance(place, Slot):
            self.experts.add(place, module, quantized=True)
            return
        self._take(f"{place}.weight", module)
        layer = self.checkpoint.layer(module)
        self._replace(module, place, layer)
        if tied is not None and self._is_input_embedding(place):
            self._replace(module, tied, LayerTensors(layer.weight))
        self._step(module, layer.weight.nbytes)

    def _replace(self, module: str, place: str, layer: LayerTensors) -> None:
        parent, name = self._parent(place)
        old: Any = getattr(parent, name, None)
        router = f"{place.rpartition('.')[0]}.experts" in self.places.experts and layer.weight.scheme.input is None
        if not isinstance(old, torch.nn.Linear | torch.nn.Embedding) and not (router and hasattr(old, "weight")):
            raise bad_file("unexpected-tensor", "a quantized weight belongs to no linear layer or embedding",
                           file=self.checkpoint.path, tensor=module,
                           found="no such module" if old is None else type(old).__name__,
                           expected=f"a layer of {type(self.model).__name__}",
                           fix="Check model_type in the config; it names another architecture than the weights'.")  # fmt: skip
        self._same_shape(module, layer.weight.shape, old.weight)
        if isinstance(old, torch.nn.Embedding):
            scale = getattr(old, "embed_scale", None)
            setattr(parent, name, self.packer.embedding(layer, None if scale is None else float(scale)))
        else:
            bias = agreed_bias(self.checkpoint, module, layer.bias, wanted=getattr(old, "bias", None) is not None)
            if isinstance(old, torch.nn.Linear):
                setattr(parent, name, self.packer.linear(replace(layer, bias=bias), self._computes(module)))
            else:  # a mixture's router, beside its experts, is no linear layer of transformers
                old.weight = self.packer.parameter(layer.weight.dequantize())
                old.bias = None if bias is None else self.packer.parameter(bias)
        self.missing -= {f"{place}.weight", f"{place}.bias"}

    def _computes(self, module: str) -> str:
        """What the plan of the module, or of the embedding that a tied head shares, states."""
        return self.checkpoint.layers[module].computes

    def _dense(self, name: str, tied: str | None) -> None:
        place = self.places.parameter(name)
        if isinstance(place, Slot):
            self.experts.add(place, name, quantized=False)
            return
        if place not in self.places.state:
            self._unexpected(name)
            return
        self._take(place, name)
        tensor = self.checkpoint.parameter(name)
        parent, leaf = self._parent(place)
        old = getattr(parent, leaf)
        self._same_shape(name, tensor.shape, old)
        if old.is_floating_point() and not (tensor.is_floating_point() and tensor.element_size() > 1):
            raise bad_file("bad-dtype", "a quantized tensor belongs to no layer that the format describes",
                           file=self.checkpoint.path, tensor=name, field="dtype", found=str(tensor.dtype),
                           expected="a float of 16 bits or more")  # fmt: skip
        parameter = self.packer.parameter(tensor, self._kept_dtype(place, old))
        setattr(parent, leaf, parameter if leaf in parent._parameters else parameter.data)
        self.missing.discard(place)
        if tied is not None and leaf == "weight" and self._is_input_embedding(place.removesuffix(".weight")):
            self.model.get_submodule(tied).weight = parameter
            self.missing.discard(f"{tied}.weight")
        self._step(name, tensor.nbytes)

    def _take(self, place: str, name: str) -> None:
        """Two spellings of one weight are one too many."""
        if (first := self.taken.setdefault(place, name)) != name:
            raise bad_file("unexpected-tensor", "two tensors are the same weight of the model", tensor=name,
                           file=self.checkpoint.path, found=f"{first} and {name}", expected="one of them")  # fmt: skip

    def _same_shape(self, name: str, shape: tuple[int, ...], old: Any) -> None:
        if tuple(shape) != tuple(old.shape):
            raise bad_file("bad-shape", "the tensor is not of the model's size", file=self.checkpoint.path,
                           tensor=name, field="shape", found=list(shape), expected=list(old.shape))  # fmt: skip

    def _kept_dtype(self, place: str, old: torch.Tensor) -> torch.dtype:
        """What a tensor is computed in: as the model says where more than the model's own precision is needed."""
        if not old.is_floating_point():
            return old.dtype
        kept = getattr(self.model, "_keep_in_fp32_modules_strict", None) or ()
        return torch.float32 if any(part in kept for part in place.split(".")) else self.dtype

    def _tied_head(self) -> str | None:
        """The output layer's module name, when it has no weights of its own in the checkpoint."""
        head = self.model.get_output_embeddings()
        names = [name for name, module in self.model.named_modules() if module is head and head is not None]
        if not names or names[0] in self.checkpoint.layers:
            return None
        return names[0] if self.model.config.get_text_config().tie_word_embeddings else None

    def _is_input_embedding(self, module: str) -> bool:
        try:
            found = self.model.get_submodule(module)
        except AttributeError:
            return False
        embedding = self.model.get_input_embeddings()
        return found is embedding

    def _parent(self, name: str) -> tuple[torch.nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        try:
            return self.model.get_submodule(path), leaf
        except AttributeError:
            return torch.nn.Module(), leaf

    def _ignored(self, name: str) -> bool:
        """Whether the model does without the tensor: stale buffers, and layers that only predict further tokens."""
        known = (*_STALE_BUFFERS, *(self.model._keys_to_ignore_on_load_unexpected or ()))
        return name not in self.places.state and any(re.search(pattern, name) for pattern in known)

    def _unexpected(self, name: str) -> None:
        if self._ignored(name) or spelled(name):
            return  # a kv cache's scales were taken, or said to be unused, before the weights were read
        raise bad_file("unexpected-tensor", "a tensor belongs to no part of the model", file=self.checkpoint.path,
                       tensor=name, expected=f"a parameter of {type(self.model).__name__}",
                       fix="Check model_type in the config, or upgrade transformers.")  # fmt: skip

    def _step(self, name: str, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(name, self.done, self.checkpoint.loaded_bytes)


def _check_memory(checkpoint: Checkpoint, device: Device) -> None:
    """Refuses before a byte of weight is read, rather than being killed half way."""
    if device.memory is not None and checkpoint.loaded_bytes > device.memory:
        sizes = f"found {checkpoint.loaded_bytes / 2**30:.1f} GiB of weights, expected at most {device.memory / 2**30:.1f} GiB"
        raise Refused(
            Refusal("not-enough-memory", "never", str(checkpoint.path), f"it does not fit into {device.name}", sizes,
                    "Free memory, use a larger device, or quantize the model to fewer bits.")
        )  # fmt: skip


def _torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in known:
        raise Refused(Refusal("bad-argument", "usage", "dtype", "this is not a data type to compute in",
                              f"found {dtype!r}", "Use float32, bfloat16 or float16."))  # fmt: skip
    return known[dtype]
