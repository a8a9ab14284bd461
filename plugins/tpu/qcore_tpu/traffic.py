"""What a compiled program moves between a TPU's memory and the core, by its text. XLA's own count takes each array that an operation has for moved, those too that lie in vector
memory, where XLA puts what is needed soon, and a whole array for each slice that is fetched of it.

Source: XLA's text says of each array where it lies (`S(1)` is vector memory; without any S it is the chip's memory), the order of its dimensions, the fastest first, and the tiles
that its rows and columns are filled up to (openxla.org/xla/shapes, tiled_layout).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_WIDTHS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "bf16": 16,
    "f16": 16,
    "s16": 16,
    "u16": 16,
    "f32": 32,
    "s32": 32,
    "u32": 32,
}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::((?:\w+\([^)]*\)|\([^)]*\))*))?\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
_STILL = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"})
"""Operations that move nothing."""
_INSIDE = frozenset({"while", "conditional", "call"})
"""Those that run programs of their own, which are not looked into."""
_PARTS = frozenset({"slice", "dynamic-slice", "gather"})
"""Those that read of an array what they give."""


@dataclass(frozen=True)
class _Array:
    """bytes: with what fills up tiles. layout: order and tiles. outside: in the chip's memory."""

    bytes: int
    layout: str
    outside: bool


@dataclass(frozen=True)
class _Instruction:
    name: str
    shape: tuple[_Array, ...]
    op: str
    operands: tuple[str, ...]
    calls: str
    number: int
    root: bool


_Program = Mapping[str, _Instruction]


def traffic(text: str) -> int:
    """Bytes that a program reads and writes. Raises ValueError where it has loops or branches, or where its text is not understood."""
    programs, entry = _programs(text)
    return sum(_moved(one, programs[entry], programs) for one in programs[entry].values())


def laid_out_anew(text: str) -> int:
    """Bytes of all arrays that a program copies for no other reason than that an operation wants them in another order of dimensions or in other tiles."""
    programs, entry = _programs(text)
    program = programs[entry]
    copies = [one for one in program.values() if one.op == "copy"]
    return sum(one.shape[0].bytes for one in copies if program[one.operands[0]].shape[0].layout != one.shape[0].layout)


def _moved(one: _Instruction, program: _Program, programs: Mapping[str, _Program]) -> int:
    if one.op in _STILL or one.op.endswith("-done"):
        return 0
    if one.op in _INSIDE:
        raise ValueError(f"{one.name} is a {one.op}, whose bytes are not known")
    given = [program[name].shape for name in one.operands]
    if one.op.endswith("-start"):  # its shape has the argument, the result and a flag, a copy's the result first
        result = one.shape[0 if one.op == "copy-start" else len(one.operands)]
        return result.bytes * (result.outside + given[0][0].outside)
    if one.op == "dynamic-update-slice":
        return 2 * given[1][0].bytes if one.shape[0].outside else 0
    if one.op in _PARTS:
        return one.shape[0].bytes * (one.shape[0].outside + given[0][0].outside)
    inside = programs[one.calls] if one.op == "fusion" else {}
    read = sum(
        _read(place, part, inside, programs) for place, parts in enumerate(given) for part in parts if part.outside
    )
    return read + _written(one, inside)


def _read(place: int, whole: _Array, inside: _Program, programs: Mapping[str, _Program]) -> int:
    """Of an argument of an operation, or of the program that it is."""
    parameter = next((one for one in inside.values() if one.op == "parameter" and one.number == place), None)
    if parameter is None:
        return whole.bytes
    return min(whole.bytes, sum(_used(parameter.name, whole, inside, programs)))


def _used(name: str, whole: _Array, inside: _Program, programs: Mapping[str, _Program]) -> Iterator[int]:
    """By each operation that takes it."""
    for one in inside.values():
        if name not in one.operands:
            continue
        place = one.operands.index(name)
        if one.op == "bitcast" and not one.root:  # as a result it goes on whole
            yield from _used(one.name, whole, inside, programs)
        elif one.op in _PARTS and place == 0:
            yield one.shape[0].bytes
        elif one.op == "dynamic-update-slice" and place == 0:
            yield 0
        elif one.op == "fusion":
            yield _read(place, whole, programs[one.calls], programs)
        else:
            yield whole.bytes


def _written(one: _Instruction, inside: _Program) -> int:
    """Of an operation's results; of an array that is written to in place, what is written."""
    roots = [part for part in inside.values() if part.root]
    if roots and roots[0].op == "tuple":
        roots = [inside[name] for name in roots[0].operands]
    written = 0
    for place, array in enumerate(one.shape):
        root = roots[place] if place < len(roots) else None
        while root is not None and root.op == "bitcast":
            root = inside[root.operands[0]]
        updates = root is not None and root.op == "dynamic-update-slice"
        part = inside[root.operands[1]].shape[0] if root is not None and updates else array
        written += part.bytes if array.outside else 0
    return written


def _programs(text: str) -> tuple[dict[str, _Program], str]:
    """All of a module's programs by name, and the name of that which runs."""
    found: dict[str, dict[str, _Instruction]] = {}
    entry, own = "", dict[str, _Instruction]()
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
            own = found[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif match := _INSTRUCTION.match(line):
            own[match[2]] = _instruction(match)
    if not entry:
        raise ValueError("no program is said to be the first")
    return dict(found), entry


def _instruction(match: re.Match[str]) -> _Instruction:
    root, name, shape, op, rest = match.groups()
    arguments, _, facts = rest.partition(")")
    calls = re.search(r"calls=%([\w.\-]+)", facts)
    number = int(arguments) if op == "parameter" else -1
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return _Instruction(name, tuple(map(_array, _ARRAY.finditer(shape))), op, operands, calls[1] if calls else "", number, bool(root))  # fmt: skip


def _array(match: re.Match[str]) -> _Array:
    kind, sizes, order, facts = match.groups()
    dimensions = [int(size) for size in sizes.split(",") if size]
    fastest = [dimensions[int(place)] for place in (order or "").split(",") if place]
    space, tiles = re.search(r"S\((\d+)\)", facts or ""), re.search(r"T\(([\d,]+)\)", facts or "")
    tile = [int(size) for size in reversed(tiles[1].split(","))] if tiles else []
    filled = [-(-size // tile[place]) * tile[place] if place < len(tile) else size for place, size in enumerate(fastest or dimensions)]  # fmt: skip
    width = _WIDTHS.get(kind) or (8 if kind.startswith("f8") else 0)
    return _Array(math.prod(filled) * width // 8, f"{order}:{tiles[1] if tiles else ''}", space is None)
