"""The kv cache in 8 bits: rounded as keys and values are written, numbers again as attention gets them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qcore.elements import Float, Int
from qcore.kernels.kv_cache import KvRounding
from qcore_tpu.ahead import Typed, compiled, footprint, prepare
from qcore_tpu.bridge import call

if TYPE_CHECKING:
    from qcore.platform import Target
    from qcore.scheme import Scheme

_STATES = (1, 8, 4096, 128)
"""Texts, heads, tokens and head_dim of what is compiled."""


class KvCache(KvRounding):
    """KvRounding's rows, byte by byte."""

    def encode(self, states: torch.Tensor) -> torch.Tensor:
        from qcore_tpu.kernels.states import encode

        self._follow(states.device)
        return call(encode, states, dict(self.named_buffers()), fill=False, element=self._element())

    def decode(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        from qcore_tpu.kernels.states import decode

        self._follow(rows.device)
        name = str(dtype).removeprefix("torch.")
        return call(decode, rows, dict(self.named_buffers()), fill=False, element=self._element(), dtype=name)

    @classmethod
    def programs(cls, scheme: Scheme, dtype: str, target: Target) -> list[StatesProgram]:
        """What libtpu compiles for the scheme: a stored scale for each head, and, without zero points, those of run time."""
        name = _name(scheme.weight.element)
        scale: Typed = ((_STATES[1], 1, 1), "float32")
        stored = ("scale", *(("zero",) if scheme.weight.zero else ()))
        return [
            StatesProgram(
                f"{scheme} {dtype}, {way} {'stored' if parts else 'dynamic'}",
                way,
                name,
                dtype,
                tuple((part, *scale) for part in parts),
            )
            for parts in (stored, *(() if scheme.weight.zero else ((),)))
            for way in ("encode", "decode")
        ]

    def _element(self) -> str:
        return _name(self.element)


@dataclass(frozen=True)
class StatesProgram:
    """qcore_tpu.kernels.states' encode or decode (way). dtype: of the states."""

    name: str
    way: str
    element: str
    dtype: str
    parts: tuple[tuple[str, tuple[int, ...], str], ...]

    def compile(self, target: Target) -> Mapping[str, int]:
        """What libtpu says of the program. Raises ValueError where it holds states beside its argument and its result; with scales of run time, more than those again."""
        prepare()
        from qcore_tpu.kernels import states

        parts: dict[str, Typed] = {name: (shape, kind) for name, shape, kind in self.parts}
        if self.way == "encode":
            made = compiled(states.encode, target, (_STATES, self.dtype), parts, element=self.element)
        else:
            shape = (*_STATES[:-1], _STATES[-1] + (0 if parts else 4))
            made = compiled(states.decode, target, (shape, "uint8"), parts, element=self.element, dtype=self.dtype)
        found = footprint(made)
        most = found["bytes needed"] // (64 if parts else 1)  # rows and their scales are put together in memory
        if found["temporary bytes"] > most:
            raise ValueError(f"it has {found['temporary bytes']:,} temporary bytes, expected at most {most:,}")
        return found


def _name(element: object) -> str:
    assert isinstance(element, Int | Float)
    return element.format if isinstance(element, Float) else "int8"
