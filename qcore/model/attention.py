"""Attention to keys and values that a kernel reads as they lie in a quantized cache, and torch's own to a dense copy of them everywhere else.

The cache hands a model's attention states of which only the rows are in memory. Whatever touches them finds dense tensors, made at the first touch, so
that every architecture runs with them; only `sdpa_attention`, which stands in the place of transformers' own, looks at the rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import torch
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from qcore.kernels.kv_cache import KvRounding

_SDPA = "sdpa"


@runtime_checkable
class RowAttention(Protocol):
    """What a kernel of a kv cache offers, of keys, where it reads rows in attention; qcore.kernels.triton.kv_cache says what the arguments are."""

    def attends(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, of_values: KvRounding, mask: torch.Tensor | None
    ) -> bool: ...  # fmt: skip

    def attention(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, of_values: KvRounding, mask: torch.Tensor | None, scaling: float, causal: bool
    ) -> torch.Tensor: ...  # fmt: skip


class RowStates(torch.Tensor):
    """Keys or values [texts, heads, tokens, head_dim] that are rows of a cache until an operator takes them. From then on they are what that one made of
    them: an operator may have changed them in place."""

    rows: torch.Tensor
    rounding: KvRounding
    _dense: torch.Tensor | None

    @staticmethod
    def __new__(cls, rows: torch.Tensor, rounding: KvRounding, like: torch.Tensor) -> RowStates:
        """like: states of the same dtype and head_dim."""
        shape = (*rows.shape[:-1], like.shape[-1])
        made: RowStates = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=rows.device)
        made.rows, made.rounding, made._dense = rows, rounding, None
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(RowStates, RowStates.dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    @property
    def untouched(self) -> bool:
        """Whether the rows are still what the states are."""
        return self._dense is None

    def dense(self) -> torch.Tensor:
        """An ordinary tensor, always the same one."""
        if self._dense is None:
            self._dense = self.rounding.decode(self.rows, self.dtype)
        return self._dense


@torch.compiler.disable  # type: ignore[untyped-decorator]
def row_states(rows: torch.Tensor, rounding: KvRounding, like: torch.Tensor) -> RowStates:
    """As RowStates takes them. Dynamo makes no such tensors: where a model is compiled, a graph ends here and another begins behind attention."""
    return RowStates(rows, rounding, like)


def sdpa_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' `sdpa`, [texts, queries, heads, head_dim], but that it reads rows where their kernel takes what is asked for."""
    if isinstance(key, RowStates) and isinstance(value, RowStates):
        plain = not dropout and all(kwargs.get(name) is None for name in _MORE)
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        out = _read(query, key, value, attention_mask, scaling, causal) if plain else None
        if out is not None:
            return out, None
        key, value = key.dense(), value.dense()
    dense: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return dense


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _read(
    query: torch.Tensor, key: RowStates, value: RowStates, mask: torch.Tensor | None, scaling: float | None, causal: bool
) -> torch.Tensor | None:  # fmt: skip
    """What the kernel gives; None where it does not take this."""
    queries = query.shape[2]
    causal = causal and mask is None and queries > 1
    # Without a mask torch counts causal tokens from the first query on; that the last query sees the last token too is so only in a square.
    if not (key.untouched and value.untouched) or (causal and queries != key.shape[2]):
        return None
    of_keys, asked = cast("RowAttention", key.rounding), (query, key.rows, value.rows, value.rounding, mask)
    if not of_keys.attends(*asked):
        return None
    return of_keys.attention(*asked, query.shape[-1] ** -0.5 if scaling is None else scaling, causal)


_MORE = ("position_bias", "softcap", "s_aux", "cache")
"""What else transformers' attention may be asked to do with scores, or with states."""


def read_rows() -> None:
    """From now on transformers' `sdpa` is `sdpa_attention`, in the whole process; where somebody has put another in its place, that one stays, and gets
    dense states."""
    if ALL_ATTENTION_FUNCTIONS[_SDPA] is sdpa_attention_forward:
        AttentionInterface.register(_SDPA, sdpa_attention)
