"""The product as a program that libtpu compiles where there is no TPU, and what it says of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qcore.platform import Target
from qcore_tpu.ahead import compiled, footprint, prepare
from qcore_tpu.chips import chip
from qcore_tpu.kernels.form import FEWEST, Form
from qcore_tpu.traffic import traffic

ROWS = (1, 16, 512)
"""Of x: a token, some at a time, and a prompt."""
OUTPUTS = COLUMNS = 4096
"""Of a layer of ordinary size."""
EXPERTS = 8
"""Layers of that size that are held as one, of which each may have rows."""
_FEW = 16
"""Rows up to which reading the weight takes the time."""
_DENSE = 1 / 64
"""Of a dense weight in bfloat16: what temporary memory stays below."""
_LANES = 128
"""What XLA fills rows of a turned x up to."""
_MOVED = 1.15
"""Bytes that a token's program moves, over those of the packed weight, x and the result."""


@dataclass(frozen=True)
class ProductProgram:
    """qcore_tpu.kernels.pallas.product for so many rows. dtype: of x. parts: as it takes them; those of experts are stacked."""

    name: str
    form: Form
    rows: int
    columns: int
    dtype: str
    parts: tuple[tuple[str, tuple[int, ...], str], ...]

    def footprint(self, target: Target) -> dict[str, int]:
        """What libtpu says of the program, and by its text its `traffic` (qcore_tpu.traffic), to which each of Pallas's arrays adds once."""
        prepare()
        from qcore_tpu.kernels.pallas import product

        parts = {name: (shape, kind) for name, shape, kind in self.parts}
        x = ((self.rows, self.columns), self.dtype)
        program = compiled(product, target, x, parts, form=self.form, chip=chip(target.architecture))
        return {**footprint(program), "traffic": traffic(program.as_text())}

    def compile(self, target: Target) -> Mapping[str, int]:
        """The same. Raises ValueError where it holds the weight dense, or moves more bytes than it needs to. Where x is reordered or rounded before, by XLA, two copies
        of it in float32 are allowed; rows that come to experts' blocks and back are written and read once more. There the traffic is looked at, for XLA's own count has what
        stays within the core."""
        found = self.footprint(target)
        *experts, _, outputs = next(shape for name, shape, _ in self.parts if name == "codes")
        dense, rounding = 2 * outputs * self.columns * math.prod(experts), self.form.rounding
        ordered = any(name == "order" for name, _, _ in self.parts)
        remade = ordered or self.form.tuples > 0 or (rounding is not None and rounding.before)
        copies = 2 * max(self.rows, _LANES) * self.columns * 4 if remade else 0
        spread = 2 * FEWEST * min(self.rows, *experts) * (self.columns + outputs) * 2 if experts else 0
        temporary, needed = found["temporary bytes"], found["bytes needed"]
        moved = found["traffic" if remade or experts else "bytes moved"]
        if temporary > _DENSE * dense + copies:
            raise ValueError(f"it has {temporary:,} temporary bytes; the weight is {dense:,} where it is dense")
        if self.rows <= _FEW and moved > _MOVED * needed + copies + spread:
            raise ValueError(f"it moves {moved:,} bytes; weight, x and result are {needed:,}")
        return found


def programs_of(
    form: Form, name: str, dtype: str, narrow: str = "float32", *, tail: bool = False, ordered: bool = False
) -> list[ProductProgram]:
    """All that are tried for a scheme, the last for experts, if they can be held as one. form: of a weight of COLUMNS columns. narrow: the type of scales."""
    parts = tuple(_parts(form, OUTPUTS, COLUMNS, narrow, tail, ordered))
    size = f"x {COLUMNS} x {OUTPUTS}"
    found = [ProductProgram(f"{name} {dtype}, {rows} {size}", form, rows, COLUMNS, dtype, parts) for rows in ROWS]
    if form.rounding is None or form.rounding.outliers is None:
        stacked = (part if part[0] in ("table", "grid") else (part[0], (EXPERTS, *part[1]), part[2]) for part in parts)
        each = (*stacked, ("experts", (_FEW,), "int32"))
        title = f"{name} {dtype}, {_FEW} {size} of {EXPERTS} experts"
        found.append(ProductProgram(title, form, _FEW, COLUMNS, dtype, each))
    return found


def _parts(
    form: Form, outputs: int, columns: int, narrow: str, tail: bool, ordered: bool
) -> Iterator[tuple[str, tuple[int, ...], str]]:
    blocks = -(-columns // form.block)
    signed = form.bits == 8 and not form.center and not form.exponent
    yield "codes", (form.byte_rows(blocks * form.block), outputs), "int8" if signed else "uint8"
    for names, group, kind in (
        (("scales", "zeros"), form.group, "int8" if form.coarse else narrow),
        (("coarse", "coarse_zeros"), form.coarse, "float32"),
    ):
        for name in names[: 1 + bool(form.zero)] if group else ():
            yield name, (blocks, form.block // group, outputs), kind
    if tail or not form.group:
        yield "tail", (1, outputs), "float32"
    if form.table:
        yield "table", (1, 1 << form.bits), "float32"
    if form.rounding is not None and (not form.rounding.dynamic or form.rounding.scale == "e4m3fn"):
        yield "input_scale", (1, 1), "float32"
    if form.tuples:
        yield "grid", ((1 << form.tuples) // 128, 128), "int32"
    if ordered:
        yield "order", (columns,), "int32"
