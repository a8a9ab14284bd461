"""Which layers a kernel is tried with: every scheme of a catalogue that its row claims."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from qcore.elements import (
    FLOAT_BITS,
    Codebook,
    FlatGroup,
    Float,
    Granularity,
    Group,
    Int,
    Level,
    PerChannel,
    PerTensor,
    Tile,
)
from qcore.kernel import Kernel
from qcore.scheme import PRESETS, SHORTHANDS, Scheme, TensorScheme, Zero
from qcore.support.rows import ROWS

GROUPS = (16, 32, 64, 128, 256)
_INPUTS = ("int8-token-sym-dyn", "int8-token-asym-dyn", "int8-tensor-sym", "int8-tensor-asym", "int8-tensor-sym-dyn")
_FLOAT_INPUTS = ("fp8-token-dyn", "fp8-tensor", "fp8-tensor-dyn", "fp8-g128-dyn")


@cache
def row_schemes() -> tuple[Scheme, ...]:
    """The schemes that the matrix's rows ask for."""
    return tuple(dict.fromkeys(scheme for row in ROWS for scheme in row.parsed))


@cache
def catalogue() -> tuple[Scheme, ...]:
    """Every combination of elements, scales, zero points, act-order and inputs that formats write, and some that no
    format has yet; the matrix's own first."""
    found = [*row_schemes(), *PRESETS.values(), *SHORTHANDS.values()]
    weights = [*_integers(), *_floats(), *_codebooks()]
    found += [Scheme(weight) for weight in weights]
    grids: tuple[Granularity, ...] = (PerChannel(), PerTensor(), Group(128))
    for bits in (4, 8):
        for grid in grids:
            weight = TensorScheme(Int(bits, signed=True), (Level(grid),))
            found += [Scheme(weight, TensorScheme.parse(text)) for text in _INPUTS]
    for grid in (*grids[:2], Tile(128, 128)):
        weight = TensorScheme(Float("e4m3fn"), (Level(grid),))
        found += [Scheme(weight, TensorScheme.parse(text)) for text in _FLOAT_INPUTS]
    return tuple(dict.fromkeys(found))


def claimed(kernel: Kernel, schemes: Iterable[Scheme]) -> list[Scheme]:
    """Those that the kernel's row takes."""
    return [scheme for scheme in schemes if kernel.accepts.refuse(scheme) is None]


def _integers() -> Iterable[TensorScheme]:
    forms: tuple[tuple[bool, Zero | None], ...] = ((True, None), (False, "stored"), (False, "float"), (True, "stored"))
    for bits in range(1, 9):
        for signed, zero in forms:
            if bits == 1 and (signed, zero) == (True, "stored"):
                continue  # one bit has no room for it
            element = Int(bits, signed)
            grids: tuple[Granularity, ...] = (PerChannel(), PerTensor(), *map(Group, GROUPS))
            for grid in grids:
                yield TensorScheme(element, (Level(grid),), zero)
            yield TensorScheme(element, (Level(Group(128)),), zero, ordered=True)


def _floats() -> Iterable[TensorScheme]:
    grids: tuple[Granularity, ...] = (PerTensor(), PerChannel(), Group(128), Group(512), Tile(128, 128))
    for name, bits in FLOAT_BITS.items():
        element = Float(name)  # type: ignore[arg-type]
        if bits == 16:
            continue
        for grid in grids:
            yield TensorScheme(element, (Level(grid),))
        yield TensorScheme(element, (Level(Group(32), "e8m0"),))
        yield TensorScheme(element, (Level(Group(16), "e4m3fn"), Level(PerTensor())))


def _codebooks() -> Iterable[TensorScheme]:
    for element in (Codebook("nf4"), Codebook("fp4")):
        for size in (64, 128, 256):
            yield TensorScheme(element, (Level(Group(size)),))
            yield TensorScheme(element, (Level(FlatGroup(size)),))
        yield TensorScheme(element, (Level(FlatGroup(64), "dynamic8"), Level(FlatGroup(64 * 256))))
