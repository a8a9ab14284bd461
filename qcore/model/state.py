"""Whether a model is still what a decoder was made for, and no more than its classes say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qcore.model.kv_cache import kv_hooks_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NUMBERS = (bool, int, float, str)

_SHORT = 1 << 16
"""Elements of tensors that are compared, at most."""

_CAPTURING = "transformers.utils.output_capturing"
"""Hooks of this module see what they are installed for only in calls that ask for it, which are no decoder's."""


def state_of(model: PreTrainedModel) -> list[object]:
    """What tells one state of a model from another, as long as its parts are held: modules, their numbers and hooks, and tensors, whose memory may
    have been written to. Tensors made in inference mode do not count that; the short ones, of which decoders hold copies, are compared."""
    state: list[object] = [model.device.type, model.dtype, repr(vars(model.config))]
    for module in model.modules():
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        numbers = (value for value in vars(module).values() if type(value) in _NUMBERS)
        state += (id(module), type(module).forward, "forward" in vars(module), *hooks, *numbers)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                changes = _contents(tensor) if tensor.is_inference() else tensor._version
                state += (id(tensor), changes, tensor.requires_grad)
    return state


def is_altered(model: PreTrainedModel) -> bool:
    """Whether a part does more than its class says, or gradients are wanted of it."""
    everywhere, every, known = torch.nn.modules.module, list(model.modules()), kv_hooks_of(model)
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return True
    if any(part.requires_grad for part in model.parameters()) or any("forward" in vars(module) for module in every):
        return True
    inner = (module for module in every if module is not model)
    hooks = (hook for m in inner for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    return any(hook not in known and getattr(hook, "__module__", "") != _CAPTURING for hook in hooks)


def _contents(tensor: torch.Tensor) -> bytes:
    short = tensor.dim() == 1 and tensor.numel() <= _SHORT and tensor.device.type == "cpu"
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if short else b""
