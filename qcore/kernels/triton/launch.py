"""How a product is launched: few rows of x share sums among programs, many are multiplied densely.

A kernel here is a Triton function of (x, parts .., blocks, out, M, N, K, start, x_stride, .., shares): grid (blocks of out, shares of the columns), out
[shares, M, N]; or, where its constant DENSE is true, out [.., K], the weight's rows from `start` on in x's type. Where ROUTED is true, parts are those of a
stack of experts, and `blocks` says which rows of x meet which (qcore.kernels.triton.routing); else it is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import triton
import triton.language as tl

from qcore.kernels.triton.program import Program
from qcore.kernels.triton.routing import blocks_of, routed_tiling, routed_tilings, routing_programs
from qcore.kernels.triton.tilings import DENSE, Tiling, tilings_of, tilings_on

if TYPE_CHECKING:
    from qcore.platform import Target

_DENSE_ELEMENTS = 1 << 25
"""Weights that are dense at a time: 64 MiB."""
_DENSE_TURNS = 4
"""Turns of the loop of a program that makes a weight dense."""
_PROGRAMS = 512
"""Programs that there should be at least, by sharing sums: some for each of a large GPU's processors."""
_MOST_SHARES = 16
_VECTOR_PROGRAMS = 1024
"""The same for one row of x, whose programs are small."""
_SLOW_ROWS = 16
"""Of x, that a block has at most where weights take long to decode."""
_SUMS = 128
"""Outputs whose shares a program adds."""
POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8", torch.int8: "*i8", torch.int16: "*i16",
    torch.int32: "*i32",
}  # fmt: skip
"""Triton's words for pointers."""


class Launch(Protocol):
    """Runs a kernel on a grid for `rows` rows of x; constants: `constants_of` the tiling's, and DENSE and ROUTED."""

    def __call__(
        self,
        grid: tuple[int, int],
        x: torch.Tensor,
        blocks: torch.Tensor,
        out: torch.Tensor,
        rows: int,
        start: int,
        constants: dict[str, Any],
    ) -> None: ...


@triton.jit(do_not_specialize=("shares",))  # type: ignore[untyped-decorator]
def add_shares(parts_ptr, out_ptr, size, shares, MOST: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out [size]: of parts, float32 [shares, size], the sums, from the first to the last. shares: MOST at most."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for share in tl.static_range(MOST):
        total += tl.load(parts_ptr + share * size + at, mask=at < tl.minimum(1, shares - share) * size, other=0.0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < size)


def multiplied(
    x: torch.Tensor, outputs: int, turn: int, launch: Launch, vector: int = 0, slow: bool = False
) -> torch.Tensor:
    """[M, N] in x's dtype of x [M, K]. outputs: N. turn: columns of one turn of the kernel's loop. vector: of the kernel for one row of x, which `launch`
    takes where the constant BM is 1; 0: there is none. slow: weights take long to decode, and are made dense for fewer rows."""
    rows, columns = x.shape
    if not rows:
        return x.new_empty(0, outputs)
    tiling = next((tiling for tiling in _fit(tilings_on(x.device), vector > 0, slow) if rows <= tiling.most), None)
    if tiling is None:
        return _dense_product(x, outputs, turn, launch)

    def run(grid: tuple[int, int], out: torch.Tensor) -> None:
        launch(grid, x, x, out, rows, 0, {"DENSE": False, "ROUTED": False} | constants_of(tiling))

    turns, blocks = triton.cdiv(columns, vector if tiling.rows == 1 else turn), triton.cdiv(rows, tiling.rows)
    return in_shares(x.dtype, rows, outputs, blocks, turns, tiling, x.device, run)


def routed(
    x: torch.Tensor, experts: torch.Tensor, count: int, outputs: int, turn: int, launch: Launch, vector: int = 0
) -> torch.Tensor:
    """As `multiplied`, each row of x by the weight of its own of `count` experts: int32 [M], ascending. Nothing is waited for, so that graphs of the device's can
    hold it. However many rows there are, no weight is made dense: the host does not know whose rows are many."""
    rows, columns = x.shape
    if not rows:
        return x.new_empty(0, outputs)
    tiling = routed_tiling(routed_tilings(tilings_on(x.device), vector > 0), rows, count)
    blocks = blocks_of(experts, count, tiling.rows)

    def run(grid: tuple[int, int], out: torch.Tensor) -> None:
        launch(grid, x, blocks, out, rows, 0, {"DENSE": False, "ROUTED": True} | constants_of(tiling))

    turns = triton.cdiv(columns, vector if tiling.rows == 1 else turn)
    return in_shares(x.dtype, rows, outputs, len(blocks), turns, tiling, x.device, run)


def _fit(tilings: Sequence[Tiling], vector: bool, slow: bool) -> list[Tiling]:
    """Those that a product may take. Measured on Hopper: codes of several planes, tables and blocks are slower beyond 16 rows than dense."""
    return [t for t in tilings if (vector or t.rows > 1) and (not slow or t.rows <= _SLOW_ROWS)]


def in_shares(
    dtype: torch.dtype, rows: int, outputs: int, blocks: int, turns: int, tiling: Tiling, place: torch.device, run: Callable[[tuple[int, int], torch.Tensor], None]
) -> torch.Tensor:  # fmt: skip
    """[rows, outputs] in dtype. blocks: along rows of x. turns: of the kernel's loop, which programs share where there are few; their parts are added in a
    fixed order, so that results do not change from run to run. run: launches the kernel on a grid (blocks, shares) that fills [shares, rows, outputs]."""
    blocks *= triton.cdiv(outputs, tiling.outputs)
    programs, least = (_PROGRAMS, 2) if tiling.rows > 1 else (_VECTOR_PROGRAMS, 1)
    shares = max(1, min(_MOST_SHARES, programs // blocks, triton.cdiv(turns, least)))
    shares = triton.cdiv(turns, triton.cdiv(turns, shares))  # none without a turn
    if shares == 1:
        out = torch.empty(rows, outputs, dtype=dtype, device=place)
        run((blocks, 1), out)
        return out
    parts = torch.empty(shares, rows, outputs, dtype=torch.float32, device=place)
    run((blocks, shares), parts)
    out = torch.empty(rows, outputs, dtype=dtype, device=place)
    grid = (triton.cdiv(out.numel(), _SUMS),)
    add_shares[grid](parts, out, out.numel(), shares, MOST=_MOST_SHARES, BLOCK=_SUMS)
    return out


def _dense_product(x: torch.Tensor, outputs: int, turn: int, launch: Launch) -> torch.Tensor:
    """Rows of the weight are made dense, some at a time, and multiplied by the vendor's library."""
    rows, columns = x.shape
    blocks = min(max(1, _DENSE_ELEMENTS // columns // DENSE.outputs), triton.cdiv(outputs, DENSE.outputs))
    dense = x.new_empty(blocks * DENSE.outputs, columns)
    out = x.new_empty(rows, outputs)
    for start in range(0, outputs, len(dense)):
        part = out[:, start : start + len(dense)]
        launch(
            (blocks, triton.cdiv(columns, _DENSE_TURNS * turn)),
            dense,
            dense,
            dense,
            1,
            start,
            {"DENSE": True, "ROUTED": False} | constants_of(DENSE),
        )
        torch.mm(x, dense[: part.shape[1]].t(), out=part)
    return out


def constants_of(tiling: Tiling) -> dict[str, Any]:
    """What a program is made for, of its tiling, and how it is launched."""
    found = {"BM": tiling.rows, "BN": tiling.outputs, "num_warps": tiling.warps, "num_stages": tiling.stages}
    # Triton has loads run ahead of products on a matrix unit only, unless the loop itself says so.
    return found if tiling.rows > 1 else found | {"STAGES": tiling.stages}


def built(
    name: str, kernel: Any, pointers: Mapping[str, torch.dtype], sizes: tuple[str, ...], constants: Mapping[str, object], tiling: Tiling
) -> Program:  # fmt: skip
    """A program for one tiling. pointers: types of the kernel's pointers in their order. sizes: its other arguments, but `shares`, the last."""
    of_tiling = constants_of(tiling)
    options = {key: of_tiling.pop(key) for key in ("num_warps", "num_stages")}
    signature = {part: POINTERS[kind] for part, kind in pointers.items()} | dict.fromkeys((*sizes, "shares"), "i32")
    size = "made dense" if tiling is DENSE else f"{tiling.rows} x {tiling.outputs}"
    return Program(
        f"{name}, {size}",
        kernel,
        signature,
        {**constants, **of_tiling},
        frozenset(signature) - {"M", "shares"},
        options,
    )


def programs(
    name: str, kernel: Any, parts: Mapping[str, torch.dtype], sizes: tuple[str, ...], constants: Mapping[str, object], dtype: str, target: Target,
    vector: Any = None, slow: bool = False,
) -> list[Program]:  # fmt: skip
    """All that a layer may run on the target. name: the scheme. parts: types of the kernel's own pointers. sizes: its own other arguments. dtype: of the
    activations, `float16` or `bfloat16`. vector: the kernel for one row of x, where there is one, of the same arguments. slow: as `multiplied`
    has it."""
    floats = getattr(torch, dtype)

    def made(tiling: Tiling, *, routed: bool = False) -> Program:
        pointers = {"x_ptr": floats, **parts, "blocks_ptr": torch.int32 if routed else floats, "out_ptr": floats}
        return built(
            f"{name} {dtype}{' of experts' * routed}", vector if tiling.rows == 1 else kernel, pointers,
            ("M", "N", "K", "start", "x_stride", *sizes), {**constants, "DENSE": tiling is DENSE, "ROUTED": routed}, tiling,
        )  # fmt: skip

    every = tilings_of(target)
    one_weight = [made(tiling) for tiling in (*_fit(every, vector is not None, slow), DENSE)]
    experts = routed_tilings(every, vector is not None)
    signature = {"parts_ptr": "*fp32", "out_ptr": POINTERS[floats], "size": "i32", "shares": "i32"}
    sums = Program(
        f"sums of shares {dtype}",
        add_shares,
        signature,
        {"MOST": _MOST_SHARES, "BLOCK": _SUMS},
        frozenset(signature) - {"shares"},
    )
    return [
        *one_weight,
        *(made(tiling, routed=True) for tiling in experts),
        *routing_programs([tiling.rows for tiling in experts]),
        sums,
    ]
