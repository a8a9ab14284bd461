"""A linear layer on the product in Pallas: a weight repacked into planes, some rows at a time, with its scales by group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch

from qcore.bits import unpack
from qcore.elements import Float, Int
from qcore.kernels.order import columns_by_group
from qcore.kernels.scales import by_group, finest_scales, group_size
from qcore.kernels.stacking import StackableLinear
from qcore_tpu.bridge import bucket, call, is_array
from qcore_tpu.chips import current
from qcore_tpu.kernels.form import LANES, Form, block_of
from qcore_tpu.kernels.planes import packed
from qcore_tpu.kernels.program import COLUMNS, ProductProgram, programs_of
from qcore_tpu.sharding import BY_OUTPUT, current_mesh, spread

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.platform import Target
    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors, QuantizedTensor

ROWS = 256
"""Rows of a weight repacked at a time."""


class PlanesLinear(StackableLinear):
    """The parts of qcore_tpu.kernels.pallas.product, as buffers of their names. outputs: of the weight, which are filled up to whole vectors with zeros: rows of other lengths XLA
    keeps turned, and would turn them at every call. On several chips each one's part is whole vectors, unless that were to more than double the weight."""

    PARTS: ClassVar[tuple[str, ...]] = (
        "codes", "scales", "zeros", "coarse", "coarse_zeros", "tail", "table", "input_scale", "grid", "order"
    )  # fmt: skip

    COMMON: ClassVar[tuple[str, ...]] = ("table", "grid")

    def __init__(self, form: Form, codes: torch.Tensor, **others: torch.Tensor | None) -> None:
        super().__init__()
        self.form, self.outputs = form, codes.shape[1]
        mesh = current_mesh()
        more = -self.outputs % (LANES if mesh is None else LANES * mesh.size)
        more = more if more <= self.outputs else -self.outputs % LANES
        for name in self.PARTS:
            part = codes if name == "codes" else others.get(name)
            if part is not None and more and name in BY_OUTPUT:
                part = torch.nn.functional.pad(part, (0, more))
            self.register_buffer(name, part)

    @classmethod
    def form_of(cls, scheme: Scheme, columns: int) -> Form:
        """How a weight of so many columns lies in memory."""
        raise NotImplementedError

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        """The layer's weight, repacked."""
        raise NotImplementedError

    @classmethod
    def programs(cls, scheme: Scheme, dtype: str, target: Target) -> list[ProductProgram]:
        """What libtpu compiles for the scheme (qcore.testing.compiled)."""
        weight = scheme.weight
        narrow = any(level.type in ("e8m0", "e4m3fn") for level in weight.scales)
        return programs_of(cls.form_of(scheme, COLUMNS), str(scheme), dtype, "bfloat16" if narrow else "float32",
                           tail=narrow and len(weight.scales) > 1, ordered=weight.ordered)  # fmt: skip

    @classmethod
    def stackable(cls, layers: Sequence[Self]) -> bool:
        """Not where other rows of a call decide which columns of one are rounded (LLM.int8)."""
        rounding = layers[0].form.rounding
        return (rounding is None or rounding.outliers is None) and super().stackable(layers)

    def forward(self, x: torch.Tensor, experts: torch.Tensor | None = None) -> torch.Tensor:
        from qcore_tpu.kernels.pallas import product

        form = replace(self.form, rounding=None) if _WHOLE.get() else self.form
        flat = x.reshape(-1, x.shape[-1])
        if not len(flat):
            return x.new_empty(*x.shape[:-1], self.outputs)
        parts = dict(self.named_buffers())
        if experts is not None:
            more = 0 if is_array(flat) else bucket(len(flat)) - len(flat)
            parts["experts"] = torch.cat([experts, experts[-1:].expand(more)]) if more else experts
            flat = torch.nn.functional.pad(flat, (0, 0, 0, more))
        out = call(product, flat, parts, fill=experts is None, form=form, chip=current(), mesh=current_mesh())[
            : x.shape[:-1].numel(), : self.outputs
        ]
        return out.reshape(*x.shape[:-1], self.outputs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """torch moves modules by it. What comes to chips is spread over them at once."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if current_mesh() is not None and is_array(self.get_buffer("codes")):
            spread(self)
        return self


_WHOLE: ContextVar[bool] = ContextVar("whole", default=False)


@contextmanager
def whole_inputs() -> Iterator[None]:
    """Inside of it, layers leave inputs whole that they round otherwise."""
    before = _WHOLE.set(True)
    try:
        yield
    finally:
        _WHOLE.reset(before)


class IntegerLinear(PlanesLinear):
    """Integers of 1 to 8 bits: w = (q - z) * s or q * s + z."""

    @classmethod
    def form_of(cls, scheme: Scheme, columns: int) -> Form:
        weight = scheme.weight
        assert isinstance(weight.element, Int)
        bits, group = weight.bits, group_size(weight.granularity)
        center = 1 << (bits - 1) if weight.element.signed and bits < 8 else 0
        block = block_of(columns, bits, group)
        zero = {None: "", "stored": "subtracted", "float": "added"}[weight.zero]
        return Form(bits, block, group or (block if zero else 0), center, zero=zero)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        """Raises Refused (shape-unsupported) where act-order groups are not all of one size."""
        weight = layer.weight
        (rows, columns), grid = weight.shape, weight.scheme.weight.granularity
        form = cls.form_of(weight.scheme, columns)
        order = None
        if weight.index is not None:
            order = columns_by_group(weight.index, form.group, "integers on TPUs").to(torch.int32)
        codes = packed((part if order is None else part[:, order] for part in rows_of(weight)), form, rows, columns)
        scales, zeros = by_group(weight.scales[0], grid, rows), None
        if weight.zeros is not None:
            zeros = grouped(narrow(by_group(weight.zeros, grid, rows)), form, columns)
        if not form.group:
            return cls(form, codes, tail=scales.to(torch.float32), order=order)
        return cls(form, codes, scales=grouped(narrow(scales), form, columns), zeros=zeros, order=order)


class FloatLinear(PlanesLinear):
    """Small floats of 4 to 8 bits, MX and NVFP4: w = q * s. Where a code is no number, its group's scale becomes none, so that the result is none."""

    @classmethod
    def form_of(cls, scheme: Scheme, columns: int) -> Form:
        element, group = scheme.weight.element, group_size(scheme.weight.granularity)
        assert isinstance(element, Float)
        exponent = int(element.format[1])
        bias = (1 << (exponent - 1)) - (element.format != "e4m3fnuz")
        return Form(element.bits, block_of(columns, element.bits, group), group, exponent=exponent, bias=bias)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        weight = layer.weight
        (rows, columns), levels = weight.shape, weight.scheme.weight.scales
        form = cls.form_of(weight.scheme, columns)
        fine = weight.scales[0].view(torch.float8_e8m0fnu) if levels[0].type == "e8m0" else weight.scales[0]
        scales = by_group(narrow(fine), levels[0].granularity, rows)
        element = weight.scheme.weight.element
        if isinstance(element, Float) and element.format in _SPECIAL:
            mask, value = _SPECIAL[element.format]
            for row, column in (weight.codes.view(torch.uint8) & mask == value).nonzero().tolist():
                scales[column // form.group if form.group else 0, row] = float("nan")
        codes = packed(rows_of(weight), form, rows, columns)
        if not form.group:
            return cls(form, codes, tail=scales.to(torch.float32))
        tail = weight.scales[1].to(torch.float32).expand(1, rows).contiguous() if len(levels) > 1 else None
        return cls(form, codes, scales=grouped(scales, form, columns), tail=tail)


class CodebookLinear(PlanesLinear):
    """bitsandbytes' codebooks of 16 values: w = table[q] * s, nested scales widened once."""

    @classmethod
    def form_of(cls, scheme: Scheme, columns: int) -> Form:
        bits, group = scheme.weight.bits, group_size(scheme.weight.granularity)
        return Form(bits, block_of(columns, bits, group), group, table=True)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        weight = layer.weight
        rows, columns = weight.shape
        assert weight.table is not None, "a codebook travels with its tensor"
        form = cls.form_of(weight.scheme, columns)
        scales = by_group(finest_scales(weight), weight.scheme.weight.granularity, rows)
        table = weight.table.to(torch.float32)[None].contiguous()
        codes = packed(rows_of(weight), form, rows, columns)
        return cls(form, codes, scales=grouped(scales, form, columns), table=table)


def rows_of(weight: QuantizedTensor) -> Iterator[torch.Tensor]:
    """[some rows, K], one after the other: codes as they are stored, a byte each; int8 where they are signed 8-bit integers."""
    bits = weight.scheme.weight.bits
    for part in weight.codes.split(ROWS):
        if bits < 8:
            yield unpack(part, bits, weight.shape[1])
        else:
            yield part if part.dtype == torch.int8 else part.view(torch.uint8)


def narrow(part: torch.Tensor) -> torch.Tensor:
    """In bfloat16 where that has all numbers of the type, small floats' and 8-bit integers'; else in float32."""
    wide = part.dtype.is_floating_point and part.dtype.itemsize > 1 and part.dtype != torch.bfloat16
    return part.to(torch.float32 if wide else torch.bfloat16)


def grouped(part: torch.Tensor, form: Form, columns: int, group: int = 0) -> torch.Tensor:
    """[groups, N], or [1, N] for all of them -> [blocks, groups of a block, N]; those that fill up are zeros. group: columns of one, if it is not the form's."""
    group = group or form.group
    blocks, each = -(-columns // form.block), form.block // group
    if len(part) == 1:
        part = part.expand(-(-columns // group), -1)
    return torch.nn.functional.pad(part, (0, 0, 0, blocks * each - len(part))).view(blocks, each, -1)


_SPECIAL = {"e4m3fn": (0x7F, 0x7F), "e4m3fnuz": (0xFF, 0x80), "e5m2": (0x7C, 0x7C)}
"""Mask and value of the codes that are no finite numbers."""
