"""A model without its weights: what transformers makes of a checkpoint's config, with parameters that take no memory."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from qcore.checkpoint.architecture import model_class, unbuildable
from qcore.checkpoint.json_file import read_json
from qcore.checkpoint.open import Checkpoint
from qcore.model.bounds import check_size
from qcore.refusal import bad_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger("qcore")

_FILLS = (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.zero_, torch.Tensor.fill_)
"""What new parameters are filled with does not matter; finding out that they have no memory takes a while."""
_INITS = ("torch.nn.init", "transformers.initialization")
"""Modules of functions that fill a parameter, `tensor`; transformers puts its own in the place of torch's."""


class _MetaParameters(TorchFunctionMode):
    """Parameters, which torch makes with torch.empty, take no memory; buffers, which are computed, are real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        elif func in _FILLS or getattr(func, "__module__", "") in _INITS:
            filled = args[0] if args else kwargs.get("tensor")
            if getattr(filled, "is_meta", False):
                return filled
        check_size(func, args)
        return func(*args, **kwargs)


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model, with parameters on the meta device. Raises Refused (unknown-architecture, remote-code, bad-field)."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    _, config = model_class(checkpoint)
    layers, tensors = getattr(config, "num_hidden_layers", 0), len(checkpoint.files.source.tensors)
    if isinstance(layers, int) and layers > tensors:  # building that many would take for ever
        raise bad_file("bad-field", "the config has more layers than the checkpoint has tensors", file=checkpoint.path,
                       field="num_hidden_layers", found=layers, expected=f"at most {tensors}")  # fmt: skip
    _check_experts(checkpoint, config)
    # transformers renamed the key in 4.56
    setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", dtype)
    try:
        with _MetaParameters():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # which one depends on the value and on transformers' version
        raise unbuildable(checkpoint, error) from error
    folder = checkpoint.files.folder
    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_dict(read_json(folder / "generation_config.json"))
        except Exception as error:
            log.warning("%s is not used: %s", folder / "generation_config.json", error)
    return model.eval()


def decoder_blocks(model: PreTrainedModel) -> tuple[str, torch.nn.ModuleList] | None:
    """The decoder blocks, with their name; None where there is no list of as many as the config says."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = ((name, part) for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList))
    return next(((name, part) for name, part in lists if len(part) == count), None)


def _check_experts(checkpoint: Checkpoint, config: PretrainedConfig) -> None:
    """A router has a row for every expert, and is made with its zeros: their number must be of something in the files."""
    for field in ("num_local_experts", "num_experts", "n_routed_experts"):
        experts = getattr(config, field, None)
        tensors = checkpoint.files.source.tensors.values()
        if isinstance(experts, int) and experts > max((info.shape[0] for info in tensors if info.shape), default=0):
            raise bad_file("bad-field", "no tensor of the checkpoint has as many rows as the config has experts",
                           file=checkpoint.path, field=field, found=experts)  # fmt: skip
