"""Whether a program in StableHLO's text is within what Neuron's compiler is known to take (qcore_neuron/operators.py).

Every operation and every type is looked at, and what the compiler's errors say: static shapes only, no integers in products, shifts of 32 bits only,
reductions by sum, product, least and largest, gathers of whole slices, and e4m3fn where the chip or the compiler's setting has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from qcore_neuron.operators import LIST, OPERATIONS, REDUCTIONS, TYPES, error_page

_OPERATION = re.compile(r'^\s*(?:%[\w:]+(?:, %[\w:]+)* = )?"?([a-z_]+\.\w+)"?(?=[ (<])')
_APPLIES = re.compile(r"applies stablehlo\.(\w+)")
_TYPE = re.compile(r"tensor<((?:[\d?]+x)*)([^<>]+(?:<[^<>]*>)?)>")
_ATTRIBUTES = re.compile(r"\{(?:\"[^\"]*\"|[^{}\"])*\}")
"""Layouts and dimensions, whose own types are no tensors'; texts in them have braces."""
_GATHERED = re.compile(r"(collapsed_slice_dims|start_index_map) = \[([\d, ]*)\]")
_STRUCTURE = frozenset({"func.func", "func.return", "stablehlo.return"})
_CUT = frozenset({"func.func", "stablehlo.convert"})
"""Where integers of 64 bits may be, which are cut to 32 on chips before Trn2: arguments, such as tokens, and what makes them narrow."""
_INTEGERS = frozenset({"i8", "ui8", "i32", "ui32", "i64", "ui64", "i16", "ui16", "i4", "ui4"})
_NO_SHIFT = frozenset({"i8", "ui8", "i16", "ui16"})


@dataclass(frozen=True)
class Operation:
    """One line. name: with its dialect. types: of all operands and results. applies: what a reduction computes. dynamic: a shape of it is."""

    name: str
    types: tuple[str, ...]
    applies: str
    dynamic: bool
    line: str


@dataclass(frozen=True)
class Fault:
    """What the compiler is not known to take, and where that is said."""

    what: str
    line: str
    source: str


def operations(text: str) -> Iterator[Operation]:
    """Those of a program, in its order. Raises ValueError where there are none, for then this is no StableHLO."""
    found = False
    for line in text.splitlines():
        if match := _OPERATION.match(line):
            found = True
            shapes, applies = _TYPE.findall(_ATTRIBUTES.sub("", line)), _APPLIES.search(line)
            yield Operation(match[1], tuple(kind for _, kind in shapes), applies[1] if applies else "",
                            any("?" in shape for shape, _ in shapes), line.strip())  # fmt: skip
    if not found:
        raise ValueError("there is no operation of StableHLO in this text")


def faults(text: str, *, e4m3fn: bool) -> list[Fault]:
    """All that is not known to be taken. e4m3fn: the chip is Trn3, or the compiler's setting is in force."""
    return [fault for operation in operations(text) for fault in _of(operation, e4m3fn)]


def _of(operation: Operation, e4m3fn: bool) -> Iterator[Fault]:
    def fault(what: str, source: str) -> Fault:
        return Fault(what, operation.line, source)

    dialect, _, name = operation.name.partition(".")
    if operation.name not in _STRUCTURE and (dialect != "stablehlo" or name not in OPERATIONS):
        yield fault(f"operation {operation.name}", error_page("EVRF001"))
    for kind in dict.fromkeys(operation.types):
        if kind not in TYPES and not (kind == "i64" and operation.name in _CUT):
            yield fault(f"type {kind}", error_page("ESPP004"))
        if kind == "f8E4M3FN" and not e4m3fn:
            yield fault("type f8E4M3FN", error_page("EVRF051"))
    if operation.dynamic:
        yield fault("a dynamic shape", error_page("EMOD025"))
    if name == "dot_general" and _INTEGERS & set(operation.types):
        yield fault("a product of integers", error_page("EVRF035"))
    if name == "shift_right_arithmetic" and _NO_SHIFT & set(operation.types):
        yield fault("a shift of fewer than 32 bits", error_page("EVRF022"))
    if name == "gather":
        gathered = {key: set(places.split(", ")) for key, places in _GATHERED.findall(operation.line)}
        if not gathered.get("start_index_map", {""}) <= gathered.get("collapsed_slice_dims", set()):
            yield fault("a gather of slices along what is looked up", LIST)
    if name == "reduce" and operation.applies not in REDUCTIONS:
        yield fault(f"a reduction by {operation.applies or 'a computation of its own'}", LIST)
