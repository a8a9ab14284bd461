"""A transformers model's steps in graphs of torch-xla's that are of few shapes: keys and values have their room from the beginning, tokens come in buckets, and what
differs from step to step is data, so that reading on compiles nothing. The model is on torch's device `xla` (qcore_tpu.lazy)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from qcore.model.cache_name import CACHE
from qcore.model.decode import last_only
from qcore.model.kv_cache import kv_cache_of
from qcore.model.trial import by_layers
from qcore.refusal import Refusal, Refused
from qcore_tpu.decoder import CompiledSteps, bucket, heads_of, keeps_all, unknown
from qcore_tpu.kernels.linear import PlanesLinear, whole_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qcore.model.kv_cache import KvRoundings

_NAME = "tpu_lazy_decoder"


class LazyDecoder:
    """A qcore.decoder.TokenDecoder, of which texts are CompiledSteps."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.roundings: KvRoundings | None = None
        self.config: Any = model.config.get_text_config(decoder=True)
        self._last_only = bool(last_only(model))

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> LazyDecoder:
        """Raises Refused (unknown-variant) where the model keeps something else than all keys and values, or keeps them rounded; and where it has
        nothing to do with TPUs (other chips are torch's `xla` too)."""
        from torch_xla.core.xla_model import xla_device_hw

        own = any(isinstance(module, PlanesLinear) for module in model.modules())
        if not own and xla_device_hw(model.device) != "TPU":
            raise Refused(Refusal("unknown-variant", "notimpl", _NAME, "the model is on no TPU", f"found {xla_device_hw(model.device)}",
                                  "The model's layers are run one operator after the other."))  # fmt: skip
        keeps_all(model, _NAME)
        if rounded := kv_cache_of(model):
            raise unknown(_NAME, f"a kv cache in {rounded}")
        return cls(model)

    def begin(self, texts: int = 1) -> CompiledSteps:
        return CompiledSteps(self, texts)

    @contextmanager
    def exact(self) -> Iterator[None]:
        with whole_inputs():
            yield

    def room(self, tokens: int) -> list[torch.Tensor]:
        """Of each layer keys and values [1, heads, tokens, head_dim] of nothing."""
        heads, size = heads_of(self.config)
        kind: dict[str, Any] = {"dtype": self.model.dtype, "device": self.model.device}
        return [torch.zeros(1, heads, tokens, size, **kind) for _ in range(2 * self.config.num_hidden_layers)]

    def to_torch(self, states: list[torch.Tensor]) -> list[torch.Tensor]:
        return states

    def from_torch(self, states: list[torch.Tensor]) -> list[torch.Tensor]:
        return states

    def step(
        self, states: list[torch.Tensor], start: int, tokens: list[int], keep: int
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits float32 [at most keep, vocabulary] on the CPU of what follows the last of the tokens, which begin at `start` of a text, and the keys and values then."""
        import torch_xla

        torch_xla.sync()  # whatever waits is none of the step's graph
        logits, states = self.traced(states, start, tokens, keep)
        torch_xla.sync()
        kept = min(keep, len(tokens))
        first = 0 if self._last_only else len(tokens) - kept
        return logits.cpu()[first : first + kept].float(), states

    def traced(
        self, states: list[torch.Tensor], start: int, tokens: list[int], keep: int
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The step's graph: logits [rows, vocabulary], those that are kept and what fills them up, or all where the model can give no others; and keys and values."""
        from transformers import StaticCache

        device, count, room = self.model.device, bucket(len(tokens)), states[0].shape[2]
        filled = torch.tensor([tokens + [0] * (count - len(tokens))], dtype=torch.int32).to(device)
        place = torch.arange(start, start + count, dtype=torch.int32).to(device)
        seen = torch.arange(room, dtype=torch.int32, device=device)[None] <= place[:, None]
        mask = torch.where(seen, 0.0, torch.finfo(states[0].dtype).min).to(states[0].dtype)[None, None]
        cache: Any = StaticCache(config=self.model.config, max_cache_len=room)
        for layer, keys, values in zip(cache.layers, states[::2], states[1::2], strict=True):
            layer.keys, layer.values, layer.is_initialized = keys, values, True
            layer.dtype, layer.device, layer.cumulative_length = keys.dtype, device, place[0].clone()
        given: dict[str, Any] = {"input_ids": filled, "position_ids": place[None], "attention_mask": mask}
        if self._last_only:
            kept = range(max(0, len(tokens) - keep), len(tokens))
            rows = [*kept, *[0] * (min(bucket(len(kept)), count) - len(kept))]
            given["logits_to_keep"] = torch.tensor(rows, dtype=torch.int32).to(device)
        with by_layers(), torch.no_grad():
            out: Any = self.model(**given, **{CACHE: cache}, use_cache=True)
        return out.logits[0], [part for layer in cache.layers for part in (layer.keys, layer.values)]
