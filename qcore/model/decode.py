"""Reading a text: by a plugin's decoder once its first answers were the model's, else by the model itself."""

from __future__ import annotations

import inspect
import logging
import math
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from qcore.discovery import registry
from qcore.model.decoded import by_layers
from qcore.model.kv_cache import kv_hooks_of
from qcore.refusal import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qcore.decoder import TokenDecoder, TokenSteps

log = logging.getLogger("qcore")

_BOUNDS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""How far logits may be off at least (`_distance`): a whole model's rounding in its type."""

_NOISIEST = 4
"""Times that, at most, where the model is as far from itself: logits that have nothing to do with each other are 1.4 apart."""

_SAMPLE = 16
"""Tokens that a decoder reads beside the model before it is trusted."""

_CAPTURING = "transformers.utils.output_capturing"
"""Hooks of this module see what they are installed for only in calls that ask for it, which are no decoder's."""

_DECODERS: WeakKeyDictionary[torch.nn.Module, _Trial] = WeakKeyDictionary()


class _Trial:
    """A model's decoder, and whether it was seen to be right. state: what the model was when it was made (`_state`), of modules that are held
    as long. output: the class of the model's answers."""

    def __init__(self, model: PreTrainedModel, name: str = "", decoder: TokenDecoder | None = None) -> None:
        self.name, self.decoder, self.trusted = name, decoder, False
        self.state, self.modules = _state(model), [module for module in model.modules() if module is not model]
        self.output: Any = None

    def begin(self, model: PreTrainedModel, tokens: list[int], keep: int) -> tuple[TokenSteps, torch.Tensor] | None:
        """A text and the logits [keep, vocabulary] behind its first tokens; None where there is no decoder that can be trusted."""
        if self.decoder is None:
            return None
        if not self.trusted:
            return self._tried(model, self.decoder, tokens, keep)
        steps = self.decoder.begin()
        return steps, steps.take(tokens, keep)

    def _tried(
        self, model: PreTrainedModel, decoder: TokenDecoder, tokens: list[int], keep: int
    ) -> tuple[TokenSteps, torch.Tensor] | None:
        """The decoder's first text of all. What it makes of some tokens is held against the model's answers, at the beginning of a text and
        once more behind these tokens, for which the model gets the decoder's keys and values: a part that matters only far into a
        text shows there."""
        sample = (tokens * _SAMPLE)[:_SAMPLE]
        with decoder.exact():
            excess = self._excess(model, decoder.begin(), sample)
        steps = decoder.begin()
        logits = steps.take(tokens, keep)
        with decoder.exact():
            excess = max(excess, self._excess(model, steps, sample))
        self.state = _state(model)  # looking at it has changed nothing but counts of changes
        if excess <= 1:
            self.trusted = True
            return steps, logits
        self.decoder = None
        log.warning(
            "decoder %s does not give this model's logits (%.3g times the error allowed) and is not used",
            self.name,
            excess,
        )
        return None

    def _excess(self, model: PreTrainedModel, steps: TokenSteps, tokens: list[int]) -> float:
        """How far the decoder's logits are from the model's, in parts of what they may be: `_BOUNDS`, or three times as far as the model is
        from itself where it reads the same tokens in two calls, up to `_NOISIEST`. The steps are left as they were."""
        given, half = torch.tensor([tokens], device=model.device), len(tokens) // 2
        bound = _BOUNDS.get(model.dtype, 0.0)
        out = _read(model, given, steps.to_cache())
        self.output, expected = type(out), _logits(out)
        error = _distance(steps.take(tokens, len(tokens)), expected)
        steps.forget(len(tokens))
        if not error <= bound:  # only then is the model's own noise worth the time
            cache = _read(model, given[:, :half], steps.to_cache()).past_key_values
            noise = _distance(_logits(_read(model, given[:, half:], cache)), expected[half:])
            bound = max(bound, min(3 * noise, _NOISIEST * bound))
        found = error / bound if bound else math.inf
        return found if math.isfinite(found) else math.inf


def begin_text(model: PreTrainedModel, tokens: list[int], keep: int = 1) -> tuple[TokenSteps, torch.Tensor] | None:
    """As _Trial.begin, of the model's decoder."""
    return _trial(model).begin(model, tokens, keep)


def output_of(model: PreTrainedModel) -> Any:
    """The class of the model's answers, once a text has begun."""
    return _DECODERS[model].output


class Stepper:
    """One text: its prompt, then token after token."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.arguments = last_only(model)
        self.cache: Any = None
        self.trial: _Trial | None = None
        self.steps: TokenSteps | None = None

    @property
    def decoder(self) -> str:
        """The name of the decoder that reads the text; empty where the model does."""
        return self.trial.name if self.trial is not None and self.steps is not None else ""

    def prompt(self, tokens: list[int]) -> torch.Tensor:
        """The logits [vocabulary] behind the first tokens, float32 on the CPU."""
        self.trial = _trial(self.model)
        begun = self.trial.begin(self.model, tokens, 1)
        if begun is None:
            return self._by_model(tokens)
        self.steps, logits = begun
        return logits[-1]

    def step(self, token: int) -> torch.Tensor:
        """The same behind one more."""
        return self._by_model([token]) if self.steps is None else self.steps.take([token])[-1]

    def _by_model(self, tokens: list[int]) -> torch.Tensor:
        out = _read(self.model, torch.tensor([tokens], device=self.model.device), self.cache, **self.arguments)
        self.cache = out.past_key_values
        return _logits(out)[-1]


def _read(model: PreTrainedModel, tokens: torch.Tensor, cache: Any, **arguments: int) -> Any:
    """The answer of the model's layers."""
    with by_layers():
        return model(input_ids=tokens, past_key_values=cache, use_cache=True, **arguments)


def _logits(out: Any) -> torch.Tensor:
    """float32 [tokens, vocabulary], on the CPU."""
    logits: torch.Tensor = out.logits[0].float().cpu()
    return logits


def _distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the errors, relative to that of the logits about their mean, in the median of the tokens."""
    return float(((logits - expected).square().mean(-1) / expected.var(-1, correction=0)).sqrt().median())


def last_only(model: PreTrainedModel) -> dict[str, int]:
    """Arguments that ask for the last position's logits alone, where the model's forward can (transformers 4.55 and later can)."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _trial(model: PreTrainedModel) -> _Trial:
    """The model's decoder; another one once the model is not what it was."""
    found = _DECODERS.get(model)
    if found is None or found.state != _state(model):
        found = _DECODERS[model] = _first(model)
    return found


def _state(model: PreTrainedModel) -> list[object]:
    """What tells whether a model is still the one that a decoder was made for: its modules, what hooks they have, and its tensors, whose memory may
    have been written to. Tensors made in inference mode do not count that; the short ones, of which decoders hold copies, are compared."""
    state: list[object] = [model.device.type, model.dtype, model.training]
    for module in model.modules():
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        state += (id(module), type(module).forward, "forward" in vars(module), *hooks)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                changes = _contents(tensor) if tensor.is_inference() else tensor._version
                state += (id(tensor), changes, tensor.requires_grad)
    return state


def _contents(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().view(torch.uint8).numpy().tobytes() if tensor.dim() == 1 else b""


def _is_altered(model: PreTrainedModel) -> bool:
    """Whether a part does more than its class says, or gradients are wanted of it."""
    everywhere, every, known = torch.nn.modules.module, list(model.modules()), kv_hooks_of(model)
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return True
    if any(part.requires_grad for part in model.parameters()) or any("forward" in vars(module) for module in every):
        return True
    inner = (module for module in every if module is not model)
    hooks = (hook for m in inner for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    return any(hook not in known and getattr(hook, "__module__", "") != _CAPTURING for hook in hooks)


def _first(model: PreTrainedModel) -> _Trial:
    """The first decoder that knows the model."""
    if _is_altered(model):
        return _Trial(model)
    for row in registry().decoders:
        if row.device != model.device.type:
            continue
        try:
            return _Trial(model, row.name, row.load().from_model(model))
        except Refused as refused:
            log.info("%s is not used: %s", row.name, refused)
        except Exception as fault:  # a plugin's fault is to harm nobody
            log.warning("decoder %s failed: %s: %s", row.name, type(fault).__name__, fault)
    return _Trial(model)
