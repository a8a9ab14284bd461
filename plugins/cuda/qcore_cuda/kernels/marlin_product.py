"""y = x W^T with W in chunks as tensor cores take them (native/): which program runs how many rows of x, and how it is launched."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qcore_cuda.cpp import CppProgram, Grid
from qcore_cuda.driver import limits

CHUNK = 64
"""Columns of a chunk, whose rows are 16."""
PRODUCT = 16
"""Columns of one product on a matrix unit, by which groups are counted."""
_WARPS, _TILES = 8, 2
"""Of a block of every program, and blocks of 16 rows of the weight of a warp of wide.cuh."""
_DEPTHS = (4, 3)
"""Pairs of chunks that a warp of vector.cuh has a place for: the latter on Hopper where with the former no four blocks have memory on a processor, two of a
layer and two of the next, which begins while the layer ends."""
_SHARED_CHUNKS, _LEAST_SHARES = 28, 4
"""Of a row, that a block of vector.cuh has at least where blocks share it, and of such blocks: fewer do not make up for what adds their sums (measured on an
H200: 1.3 us, in which a block reads 64 chunks)."""
_MOST = 256
"""Rows of x up to which the weight is decoded for each product; more are multiplied by a dense one."""
HOPPER = 90
"""The compute capability that warpgroup.cuh is for."""
WARPGROUP_ROWS = (16, 32, 64, 128)
"""Of x, that a block of warpgroup.cuh has."""
TOKENS = (1, 2, 4, 8)
"""How many times eight rows of x a block of wide.cuh has."""
DEEP = (4, 2, 1)
"""Chunks of its step."""
_SUMS = 1 << 10
"""Bytes that a block of vector.cuh has for its sums, besides."""
_TAKEN = _SUMS + (1 << 10)
"""And what the driver takes of every block."""
_DEEP_ROWS = 32
"""Rows of x up to which a step of warpgroup.cuh is four chunks, and not two."""
_STEPS = 6
"""Of wide.cuh and warpgroup.cuh, that have their places, where there is the memory for them."""
_LEAST_STEPS = 3
_DENSE_ELEMENTS = 1 << 25
"""Weights that are dense at a time: 64 MiB."""
_DENSE_CHUNKS = 4
"""Chunks of a warp of dense.cuh."""
_TYPES = {torch.float16: "Half", torch.bfloat16: "Brain", torch.float32: "Single"}
_VECTOR = "const u32* x, const Vector* weight, const Vector* records, const Vector* table, void* out, int N, int chunks, int center"
_MULTIPLY = "const u16* x, const Vector* weight, const Vector* records, const Vector* table, void* out, int M, int N, int chunks, int center"
_ROUTES = ", const int* routes, int single"
_DENSE = (
    "const Vector* weight, const Vector* records, const Vector* table, Vector* out, int start, int chunks, int center"
)
_ADD = "const Pair* parts, u32* out, int shares, int count"


@dataclass(frozen=True)
class Form:
    """What programs are made for. code: of native/codes.cuh. group: products of one, 0: all. zeros: there are zero points. dtype, scales: types of the
    activations and of scales."""

    code: str
    group: int
    zeros: bool
    dtype: torch.dtype
    scales: torch.dtype

    @property
    def vectors(self) -> int:
        """Of 16 bytes that a thread has of a chunk."""
        return 1 if self.code.endswith("4") else 2

    @property
    def record(self) -> int:
        """Bytes of a record."""
        return 16 * self.scales.itemsize + 16 * self.zeros

    @property
    def records(self) -> int:
        """Records of a chunk that has some of its own."""
        return 4 // self.group if 0 < self.group < 4 else 1

    def vector(self, columns: int, depth: int = _DEPTHS[0]) -> CppProgram:
        """For one row of x. columns: that a block has."""
        long = max(1, self.group // 4)  # chunks of a record
        unit = 1 if long > 1 and long % 2 else 2
        own = (unit if self.group and long == 1 else 1) * self.records * self.record
        shared = _WARPS * depth * (unit * 512 * self.vectors + own) + 2 * columns + 4 * CHUNK
        return self._program("vector", (self.group,), _VECTOR, (depth,), shared)

    def wide(self, tokens: int, deep: int, shared: int, *, routed: bool = False) -> CppProgram:
        """For blocks of 8 times `tokens` rows of x. shared: bytes of it that a block may have. routed: of experts (marlin_experts.py)."""
        steps = self.steps(tokens, deep, shared)
        parameters, more = (_MULTIPLY + _ROUTES, ("true",)) if routed else (_MULTIPLY, ())
        return self._program(
            "wide", (tokens, self.group), parameters, (deep, steps, *more), steps * self._step(tokens, deep)
        )

    def steps(self, tokens: int, deep: int, shared: int) -> int:
        """Of that program, which have their places."""
        return min(_STEPS, shared // self._step(tokens, deep))

    def wide_in(self, tokens: int, deep: int, shared: int, *, routed: bool = False) -> tuple[CppProgram, int]:
        """The one with steps of up to `deep` chunks, of which two have their places, and the chunks of its step."""
        fit = (d for d in DEEP if d <= deep and self.steps(tokens, d, shared) > 1)
        deep = next(fit, DEEP[-1])
        return self.wide(tokens, deep, shared, routed=routed), deep

    def vector_in(self, columns: int, shared: int, *, hopper: bool = False) -> CppProgram | None:
        """The one for one row of x, where a block's memory suffices."""
        program, other = (self.vector(columns, depth) for depth in _DEPTHS)
        if hopper and 4 * (program.shared + _TAKEN) > shared >= 4 * (other.shared + _TAKEN):
            return other
        return program if program.shared + _SUMS <= shared else None

    def _step(self, tokens: int, deep: int) -> int:
        return tokens * 8 * deep * 2 * CHUNK + _WARPS * _TILES * (self.vectors * 512 + self.records * self.record)

    def warpgroup(self, rows: int, shared: int) -> CppProgram:
        """For blocks of so many rows of x, on Hopper. shared: bytes of it that a block may have."""
        for chunks in (4, 2) if rows <= _DEEP_ROWS else (2,):
            step = chunks * (rows * 2 * CHUNK + _WARPS * (self.vectors * 512 + self.records * self.record))
            step = -(-step // 1024) * 1024
            steps = (shared // 2 - 2048) // step  # of two blocks, each with a kilobyte that the driver takes
            if steps >= _LEAST_STEPS:
                break
        else:
            steps = (shared - 2048) // step
        steps = min(_STEPS, steps)
        return self._program("warpgroup", (rows, self.group), _MULTIPLY, (_WARPS, chunks, steps), steps * step)

    def dense(self) -> CppProgram:
        return self._program("make_dense", (self.group,), _DENSE)

    def _program(
        self, name: str, before: tuple[int, ...], parameters: str, after: tuple[int | str, ...] = (), shared: int = 0
    ) -> CppProgram:
        kinds = (self.code, _TYPES[self.dtype], _TYPES[self.scales])
        words = [*kinds, *map(str, before), str(self.zeros).lower(), *map(str, after)]
        given = ", ".join(part.split()[-1].lstrip("*") for part in parameters.split(","))
        entry = "_".join(["marlin", name, *words]).lower()
        source = "dense.cuh" if name == "make_dense" else f"{name}.cuh"
        body = f"{name}<{', '.join(words)}>({given});"
        return CppProgram(entry, source, parameters, body, 32 * _WARPS, shared, own=name == "warpgroup")


def adding(dtype: torch.dtype) -> CppProgram:
    """Sums what blocks share."""
    return CppProgram(f"marlin_add_{_TYPES[dtype]}".lower(), "dense.cuh", _ADD, f"add<{_TYPES[dtype]}>(parts, out, shares, count);", 32 * _WARPS)  # fmt: skip


@torch.library.custom_op("qcore::cuda_marlin", mutates_args=())
def product(
    x: torch.Tensor, weight: torch.Tensor, records: torch.Tensor, table: torch.Tensor | None, outputs: int, code: str, group: int, scales: torch.dtype, zeros: bool,
    center: int, most_shared: int,
) -> torch.Tensor:  # fmt: skip
    """[M, N] of contiguous x [M, K]. group: products of one, 0: all. scales: their type. most_shared: bytes of shared memory that a block may have; 0: as much as there
    is. The rest as native/vector.cuh takes it."""
    rows, columns = x.shape
    form = Form(code, group, zeros, x.dtype, scales)
    if not rows:
        return x.new_empty(0, outputs)
    if x.data_ptr() % 16:  # programs read it in vectors
        x = x.clone()
    if rows > _MOST:
        return _by_dense(x, weight, records, table, outputs, form, center)
    chunks, (processors, shared, hopper) = columns // CHUNK, _limits(x.device)
    shared = most_shared or shared
    given: tuple[int, ...] = (rows, outputs, chunks, center)
    grid = vector_grid(outputs // 16, chunks, processors, shared)
    program = form.vector_in(-(-columns // grid[1]), shared, hopper=hopper) if rows == 1 else None
    if program is not None:
        given = given[1:]
    elif hopper:
        block = next((most for most in WARPGROUP_ROWS if rows <= most), WARPGROUP_ROWS[-1])
        across = -(-outputs // (16 * _WARPS)) * -(-rows // block)
        wanted = processors if block == WARPGROUP_ROWS[-1] else 2 * processors
        program, grid = form.warpgroup(block, shared), (across, max(1, min(wanted // across, chunks // 8)), 1)
    else:
        tokens = next((tokens for tokens in TOKENS if rows <= 8 * tokens), TOKENS[-1])
        deep, shares = wide_split(outputs // 16, chunks, -(-rows // (8 * tokens)), processors)
        program, deep = form.wide_in(tokens, deep, shared)
        grid = (-(-outputs * deep // (16 * _TILES * _WARPS)) * -(-rows // (8 * tokens)), shares, 1)
    parts = x.new_empty(grid[1], rows, outputs, dtype=torch.float32 if grid[1] > 1 else x.dtype)
    program.run(grid, x, weight, records, table, parts, *given)
    if grid[1] == 1:
        return parts[0]
    out = x.new_empty(rows, outputs)
    adding(x.dtype).run((-(-out.numel() // (2 * 32 * _WARPS)), 1, 1), parts, out, grid[1], out.numel())
    return out


@product.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, records: torch.Tensor, table: torch.Tensor | None, outputs: int, code: str, group: int, scales: torch.dtype, zeros: bool,
    center: int, most_shared: int,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], outputs)


def vector_grid(tiles: int, chunks: int, processors: int, shared: int) -> Grid:
    """Blocks along rows of chunks, and along their columns where there are too few rows for all processors, or more columns than a block has memory for."""
    shares = min(2 * processors // tiles, chunks // _SHARED_CHUNKS)
    least = -(-2 * CHUNK * chunks * 3 // shared)  # a third of it is x's
    shares = max(shares if shares >= _LEAST_SHARES else 1, least)
    blocks = tiles * shares
    if blocks > 3 * processors:
        blocks = (4 if blocks > 8 * processors else 2) * processors
    return (-(-blocks // shares), shares, 1)


def wide_split(tiles: int, chunks: int, blocks: int, processors: int) -> tuple[int, int]:
    """Chunks of a step, and among how many blocks columns are shared. tiles: rows of chunks. blocks: along rows of x."""
    deep = next((deep for deep in (1, 2) if tiles * deep * blocks >= _TILES * _WARPS * processors), 4)
    across = -(-tiles * deep // (_TILES * _WARPS)) * blocks
    return deep, max(1, min(processors // across, chunks // (4 * deep)))


def _limits(place: torch.device) -> tuple[int, int, bool]:
    """As `limits`, and whether the matrix unit is Hopper's. A CPU stands for a small GPU."""
    if place.type == "cpu":
        return 4, 160 << 10, False
    return *limits(place), torch.cuda.get_device_capability(place) == divmod(HOPPER, 10)


def _by_dense(
    x: torch.Tensor, weight: torch.Tensor, records: torch.Tensor, table: torch.Tensor | None, outputs: int, form: Form, center: int
) -> torch.Tensor:  # fmt: skip
    """Rows of the weight are made dense, some at a time, and multiplied by cuBLAS."""
    rows, columns = x.shape
    chunks, step = columns // CHUNK, max(1, _DENSE_ELEMENTS // columns // 16) * 16
    out, dense = x.new_empty(rows, outputs), x.new_empty(min(step, outputs), columns)
    for start in range(0, outputs, len(dense)):
        part = out[:, start : start + len(dense)]
        grid = (-(-chunks // (_WARPS * _DENSE_CHUNKS)), part.shape[1] // 16, 1)
        form.dense().run(grid, weight, records, table, dense, start, chunks, center)
        torch.mm(x, dense[: part.shape[1]].t(), out=part)
    return out
