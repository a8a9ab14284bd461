"""load_model: checkpoint -> transformers model whose quantized layers run on chosen kernels.

Modules are decoded, prepacked and released one at a time, so that loading never holds more than the packed model and
the largest tensor.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from qcore.checkpoint.kv_scales import chosen_scheme, spelled
from qcore.checkpoint.open import Checkpoint, open_checkpoint
from qcore.discovery import registry
from qcore.kernel import Kernel, Op
from qcore.model.bounds import check_counts, check_size
from qcore.model.devices import find_device
from qcore.model.linear import QuantizedEmbedding, QuantizedLinear
from qcore.model.memory import released_buffers
from qcore.model.probe import failed, wrong_answer
from qcore.platform import Device
from qcore.refusal import Refusal, Refused, bad_file
from qcore.scheme import Scheme
from qcore.select import LayerRequest, exact_activations, select
from qcore.tensor import LayerTensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

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
    kv_cache: str | None = "auto",
    progress: Progress | None = None,
) -> PreTrainedModel:
    """A transformers model of the checkpoint, ready to run, on one device.

    dtype: of activations and unquantized weights; None means the checkpoint's own (`Checkpoint.own_dtype`). kernel: run every
    layer that takes it with this kernel. activations: `exact` keeps them in `dtype` unless the scheme quantizes them;
    `int8` lets kernels round them. kv_cache: `auto` as the checkpoint declares; none, fp8, fp8_e4m3, fp8_e5m2 or int8.
    Raises Refused.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    target = device if isinstance(device, Device) else find_device(device)
    exact = exact_activations(activations)
    wanted = _torch_dtype(checkpoint.own_dtype if dtype is None else dtype)
    _check_memory(checkpoint, target)
    scheme = chosen_scheme(kv_cache, checkpoint)
    model = _skeleton(checkpoint, wanted)
    if scheme is not None:
        from qcore.model.kv_cache import quantize_kv_cache

        quantize_kv_cache(model, scheme, checkpoint.kv_scales, checkpoint.path)
    with released_buffers():
        _Loader(checkpoint, model, target, wanted, kernel, exact, progress).run()
    return model


def layer_request(
    op: Op, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, *, exact: bool = True, kernel: str | None = None
) -> LayerRequest:
    """A request in torch's words."""
    return LayerRequest(op, scheme, shape, str(dtype).removeprefix("torch."), exact, kernel)


class _MetaParameters(TorchFunctionMode):
    """Parameters, which torch makes with torch.empty, take no memory; buffers, which are computed, are real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        check_size(func, args)
        return func(*args, **kwargs)


def kernel_counts(model: torch.nn.Module) -> dict[str, int]:
    """How many modules of a loaded model each kernel runs."""
    names = Counter(m.kernel_name for m in model.modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding))
    return dict(names.most_common())


def model_class(checkpoint: Checkpoint) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """The transformers class that the config asks for, imported, and the config. Code from the checkpoint is never run.

    Raises Refused (unknown-architecture, remote-code, bad-field).
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    check_counts(checkpoint)
    values = {k: v for k, v in checkpoint.config.items() if k not in ("dtype", "torch_dtype", "auto_map")}
    model_type = values.get("model_type")
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    config_class = CONFIG_MAPPING[model_type] if known else None
    if config_class is None or config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        code, reason = "unknown-architecture", "the installed transformers has no causal language model of this type"
        if "auto_map" in checkpoint.config:
            code, reason = "remote-code", "its classes are Python code in the checkpoint, which is never run"
        raise Refused(
            Refusal(code, "notyet", str(checkpoint.path), reason, f"found model_type {model_type!r}",
                    "Upgrade transformers if a newer one has this type.", str(checkpoint.files.quantization_file),
                    field="model_type")
        )  # fmt: skip
    try:
        config = config_class.from_dict(values)
    except Exception as error:  # which one depends on the value and on transformers' version
        raise _unbuildable(checkpoint, error) from error
    return MODEL_FOR_CAUSAL_LM_MAPPING[config_class], config


def _unbuildable(checkpoint: Checkpoint, error: Exception) -> Refused:
    return bad_file("bad-field", "transformers cannot build a model from the config", file=checkpoint.path,
                    field="config", found=f"{type(error).__name__}: {error}")  # fmt: skip


def _skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model, with parameters on the meta device."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    _, config = model_class(checkpoint)
    layers, tensors = getattr(config, "num_hidden_layers", 0), len(checkpoint.files.source.tensors)
    if isinstance(layers, int) and layers > tensors:  # building that many would take for ever
        raise bad_file("bad-field", "the config has more layers than the checkpoint has tensors", file=checkpoint.path,
                       field="num_hidden_layers", found=layers, expected=f"at most {tensors}")  # fmt: skip
    # transformers renamed the key in 4.56
    setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", dtype)
    try:
        with _MetaParameters():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # which one depends on the value and on transformers' version
        raise _unbuildable(checkpoint, error) from error
    folder = checkpoint.files.folder
    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(str(folder))
        except Exception as error:
            log.warning("%s is not used: %s", folder / "generation_config.json", error)
    return model.eval()


class _Loader:
    """Fills a skeleton."""

    def __init__(
        self, checkpoint: Checkpoint, model: PreTrainedModel, device: Device, dtype: torch.dtype,
        kernel: str | None, exact: bool, progress: Progress | None,
    ) -> None:  # fmt: skip
        self.checkpoint, self.model, self.device, self.dtype = checkpoint, model, device, dtype
        self.kernel, self.exact, self.progress = kernel, exact, progress
        self.kernels = registry().kernels
        self.trusted: set[tuple[str, Scheme]] = set()
        self.done = 0
        self.expected = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.missing = set(self.expected)

    def run(self) -> None:
        self._check_kernel_name()
        tied = self._tied_head()
        for module, entry in self.checkpoint.layers.items():
            if entry.scheme is not None:
                self._quantized(module, tied if self._is_input_embedding(module) else None)
        for name in self.checkpoint.parameters:
            self._dense(name, tied)
        if self.missing:
            raise bad_file("missing-tensor", "the model needs tensors that the checkpoint does not hold",
                           file=self.checkpoint.path, tensor=min(self.missing),
                           found=f"{len(self.missing)} missing: {', '.join(sorted(self.missing)[:4])}")  # fmt: skip
        self.model.to(self.device.torch_device)

    def _quantized(self, module: str, tied: str | None) -> None:
        layer = self.checkpoint.layer(module)
        self._replace(module, layer)
        if tied is not None:
            self._replace(tied, LayerTensors(layer.weight))
        self._step(module, layer.weight.nbytes)

    def _replace(self, module: str, layer: LayerTensors) -> None:
        parent, name, old = self._find(module)
        weight = layer.weight
        shape = (weight.shape[0], weight.shape[1])
        if tuple(old.weight.shape) != shape:
            raise bad_file("bad-shape", "the weight is not of the model's size", file=self.checkpoint.path,
                           tensor=module, field="shape", found=list(shape), expected=list(old.weight.shape))  # fmt: skip
        op: Op = "embedding" if isinstance(old, torch.nn.Embedding) else "linear"
        kernel, packed = self._pack(op, layer, shape)
        new: torch.nn.Module
        if op == "embedding":
            scale = getattr(old, "embed_scale", None)
            new = QuantizedEmbedding(weight.scheme, shape, kernel, packed, None if scale is None else float(scale))
        else:
            bias = self._bias(module, layer.bias, wanted=old.bias is not None)
            new = QuantizedLinear(weight.scheme, shape, kernel, packed, bias, layer.input_multiplier)
        setattr(parent, name, new.to(self.device.torch_device))
        self.missing -= {f"{module}.weight", f"{module}.bias"}

    def _bias(self, module: str, bias: torch.Tensor | None, *, wanted: bool) -> torch.Tensor | None:
        if bias is not None and not wanted and not bool(bias.any()):
            return None  # AutoGPTQ writes zeros where a layer has no bias
        if (bias is not None) != wanted:
            raise bad_file("missing-tensor" if wanted else "unexpected-tensor",
                           "the model and the checkpoint disagree on a bias", file=self.checkpoint.path,
                           tensor=f"{module}.bias", expected="a bias" if wanted else "none")  # fmt: skip
        return None if bias is None else bias.to(self.dtype)

    def _pack(self, op: Op, layer: LayerTensors, shape: tuple[int, int]) -> tuple[Kernel, torch.nn.Module]:
        """The layer on its kernel. A kernel that refuses the tensors' contents gives way to the next, and it is said."""
        named = self.kernel if op == "linear" else None
        kernels = self.kernels
        while True:
            request = layer_request(op, layer.weight.scheme, shape, self.dtype, exact=self.exact, kernel=named)
            selection = select(request, self.device.platform, kernels, self.device)
            if selection.kernel is None:
                assert selection.refusal is not None
                if named is None:
                    raise Refused(selection.refusal)
                log.warning("kernel %s does not take %s; another is chosen for it", named, layer.weight.scheme)
                named = None
                continue
            chosen = selection.kernel
            packed = self._packed(chosen, layer)
            if isinstance(packed, torch.nn.Module):
                return chosen, packed
            log.warning("%s", packed)
            kernels = [row for row in kernels if row[0] is not chosen]

    def _packed(self, kernel: Kernel, layer: LayerTensors) -> torch.nn.Module | Refusal:
        """The layer on the kernel, or why the kernel cannot have it after all."""
        try:
            packed = kernel.load().from_layer(layer, self.dtype).to(self.device.torch_device)
        except Refused as error:
            return error.refusal
        except Exception as fault:  # a plugin's fault is to harm nobody
            return failed(kernel, fault)
        trusted = (kernel.name, layer.weight.scheme)
        if trusted not in self.trusted and kernel.family != "reference":
            if wrong := wrong_answer(kernel, packed, layer, self.dtype, self.device.torch_device):
                self.kernels = [row for row in self.kernels if row[0] is not kernel]
                return wrong
            self.trusted.add(trusted)
        return packed

    def _dense(self, name: str, tied: str | None) -> None:
        if name not in self.expected:
            self._unexpected(name)
            return
        tensor = self.checkpoint.parameter(name)
        parent, leaf = self._parent(name)
        old = getattr(parent, leaf)
        if tuple(tensor.shape) != tuple(old.shape):
            raise bad_file("bad-shape", "the tensor is not of the model's size", file=self.checkpoint.path,
                           tensor=name, field="shape", found=list(tensor.shape), expected=list(old.shape))  # fmt: skip
        wanted = self.dtype if old.is_floating_point() else old.dtype
        parameter = torch.nn.Parameter(tensor.to(self.device.torch_device, wanted), requires_grad=False)
        setattr(parent, leaf, parameter)
        self.missing.discard(name)
        module = name.rpartition(".")[0]
        if tied is not None and leaf == "weight" and self._is_input_embedding(module):
            self.model.get_submodule(tied).weight = parameter
            self.missing.discard(f"{tied}.weight")
        self._step(name, tensor.nbytes)

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

    def _find(self, module: str) -> tuple[torch.nn.Module, str, Any]:
        parent, name = self._parent(module)
        old = getattr(parent, name, None)
        if not isinstance(old, torch.nn.Linear | torch.nn.Embedding):
            found = "no such module" if old is None else type(old).__name__
            raise bad_file("unexpected-tensor", "a quantized weight belongs to no linear layer or embedding",
                           file=self.checkpoint.path, tensor=module, found=found,
                           expected=f"a layer of {type(self.model).__name__}",
                           fix="Check model_type in the config; it names another architecture than the weights'.")  # fmt: skip
        return parent, name, old

    def _parent(self, name: str) -> tuple[torch.nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        try:
            return self.model.get_submodule(path), leaf
        except AttributeError:
            return torch.nn.Module(), leaf

    def _unexpected(self, name: str) -> None:
        known = (*_STALE_BUFFERS, *(self.model._keys_to_ignore_on_load_unexpected or ()))
        if any(re.search(pattern, name) for pattern in known):
            return
        if spelled(name):
            return  # a kv cache's: taken, or said to be unused, before the weights were read
        raise bad_file("unexpected-tensor", "a tensor belongs to no part of the model", file=self.checkpoint.path,
                       tensor=name, expected=f"a parameter of {type(self.model).__name__}",
                       fix="Check model_type in the config, or upgrade transformers.")  # fmt: skip

    def _check_kernel_name(self) -> None:
        names = sorted({kernel.name for kernel, _ in self.kernels if kernel.op == "linear"})
        if self.kernel is not None and self.kernel not in names:
            raise Refused(Refusal("unknown-kernel", "usage", self.kernel, "no registered kernel has this name",
                                  fix=f"Name one of: {', '.join(names)}."))  # fmt: skip

    def _step(self, name: str, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(name, self.done, self.checkpoint.size_bytes)


def _check_memory(checkpoint: Checkpoint, device: Device) -> None:
    """Refuses before a byte of weight is read, rather than being killed half way."""
    if device.memory is not None and checkpoint.size_bytes > device.memory:
        sizes = f"found {checkpoint.size_bytes / 2**30:.1f} GiB of weights, expected at most {device.memory / 2**30:.1f} GiB"
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
