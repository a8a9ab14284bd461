"""Embeddings, whose rows are looked up packed: the layouts of the linear layers, turned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qcore.elements import Block
from qcore_tpu.ahead import Typed, compiled, footprint, prepare
from qcore_tpu.bridge import call
from qcore_tpu.kernels.blocks import BlockLinear
from qcore_tpu.kernels.form import Form
from qcore_tpu.kernels.linear import IntegerLinear, PlanesLinear
from qcore_tpu.kernels.program import COLUMNS, OUTPUTS, ProductProgram

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.platform import Target
    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors
    from qcore_tpu.kernels.rows import Part

_TOKENS = 16
"""That a program is compiled for."""
_COPIES = 16
"""Of the rows in float32: what a program may hold."""
_WIDTHS = {"uint8": 1, "int8": 1, "bfloat16": 2, "float32": 4}
"""Bytes of a number."""


class PlanesEmbedding(torch.nn.Module):
    """words, table: as qcore_tpu.kernels.rows.look_up takes them, and layout, columns and dtype."""

    words: torch.Tensor
    table: torch.Tensor | None

    def __init__(
        self, form: Form, layout: tuple[Part, ...], columns: int, dtype: torch.dtype, words: torch.Tensor, table: torch.Tensor | None
    ) -> None:  # fmt: skip
        super().__init__()
        self.form, self.layout, self.columns, self.dtype = form, layout, columns, dtype
        self.register_buffer("words", words)
        self.register_buffer("table", table)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        made: PlanesLinear = _family(layer.weight.scheme).from_layer(layer, dtype)
        parts = {name: part for name, part in made.named_buffers() if name != "table"}
        layout = tuple((name, tuple(part.shape[:-1]), _kind(part.dtype)) for name, part in parts.items())
        rows = (
            part.movedim(-1, 0).flatten(1).clone(memory_format=torch.contiguous_format).view(torch.uint8)
            for part in parts.values()
        )
        whole = torch.cat([torch.nn.functional.pad(part, (0, -part.shape[1] % 4)) for part in rows], 1)
        words = whole.view(len(whole), 4, -1).transpose(1, 2).contiguous().view(torch.int32)
        return cls(
            made.form,
            layout,
            layer.weight.shape[1],
            dtype,
            words.flatten(),
            dict(made.named_buffers()).get("table"),
        )

    @classmethod
    def programs(cls, scheme: Scheme, dtype: str, target: Target) -> list[RowsProgram]:
        """What libtpu compiles for the scheme (qcore.testing.compiled)."""
        product: ProductProgram = _family(scheme).programs(scheme, dtype, target)[0]
        layout = tuple((name, shape[:-1], kind) for name, shape, kind in product.parts if name != "table")
        return [RowsProgram(f"{scheme} {dtype}, {_TOKENS} rows of {COLUMNS}", product.form, layout, dtype)]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        from qcore_tpu.kernels.rows import look_up

        flat = tokens.reshape(-1, 1).to(torch.int32)
        if not len(flat):
            return torch.empty(*tokens.shape, self.columns, dtype=self.dtype, device=tokens.device)
        out = call(
            look_up,
            flat,
            dict(self.named_buffers()),
            form=self.form,
            layout=self.layout,
            columns=self.columns,
            dtype=_kind(self.dtype),
        )
        return out.reshape(*tokens.shape, self.columns)


@dataclass(frozen=True)
class RowsProgram:
    """qcore_tpu.kernels.rows.look_up of an embedding of OUTPUTS rows."""

    name: str
    form: Form
    layout: tuple[Part, ...]
    dtype: str

    def compile(self, target: Target) -> Mapping[str, int]:
        """What libtpu says of the program. Raises ValueError where it holds more than a few copies of the rows that are looked up."""
        prepare()
        from qcore_tpu.kernels.rows import look_up

        words = sum(-(-math.prod(shape) * _WIDTHS[kind] // 4) for _, shape, kind in self.layout)
        parts: dict[str, Typed] = {"words": ((OUTPUTS * words,), "int32")}
        parts |= {"table": ((1, 1 << self.form.bits), "float32")} if self.form.table else {}
        given = {"form": self.form, "layout": self.layout, "columns": COLUMNS, "dtype": self.dtype}
        found = footprint(compiled(look_up, target, ((_TOKENS, 1), "int32"), parts, **given))
        most = _COPIES * _TOKENS * COLUMNS * 4
        if found["temporary bytes"] > most:
            raise ValueError(f"it has {found['temporary bytes']:,} temporary bytes, expected at most {most:,}")
        return found


def _family(scheme: Scheme) -> type[BlockLinear] | type[IntegerLinear]:
    return BlockLinear if isinstance(scheme.weight.element, Block) else IntegerLinear


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
