"""How a product is launched: few rows of x share sums among programs, many are multiplied densely.

A kernel here is a Triton function of (x, parts .., out, M, N, K, start, x_stride, .., shares): grid (blocks of out, shares of the columns), out
[shares, M, N]; or, where its constant DENSE is true, out [.., K], the weight's rows from `start` on in x's type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
import triton

from qcore.kernels.triton.program import Program
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
POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8", torch.int8: "*i8", torch.int16: "*i16",
    torch.int32: "*i32",
}  # fmt: skip
"""Triton's words for pointers."""


class Launch(Protocol):
    """Runs a kernel on a grid for `rows` rows of x; constants: `constants_of` the tiling's."""

    def __call__(
        self,
        grid: tuple[int, int],
        x: torch.Tensor,
        out: torch.Tensor,
        rows: int,
        start: int,
        constants: dict[str, Any],
    ) -> None: ...


def multiplied(x: torch.Tensor, outputs: int, turn: int, launch: Launch) -> torch.Tensor:
    """[M, N] in x's dtype of x [M, K]. outputs: N. turn: columns of one turn of the kernel's loop."""
    rows, columns = x.shape
    if not rows:
        return x.new_empty(0, outputs)
    tiling = next((tiling for tiling in tilings_on(x.device) if rows <= tiling.most), None)
    if tiling is None:
        return _dense_product(x, outputs, turn, launch)

    def run(grid: tuple[int, int], out: torch.Tensor) -> None:
        launch(grid, x, out, rows, 0, {"DENSE": False} | constants_of(tiling))

    return in_shares(x.dtype, rows, outputs, triton.cdiv(columns, turn), tiling, x.device, run)


def in_shares(
    dtype: torch.dtype, rows: int, outputs: int, turns: int, tiling: Tiling, place: torch.device, run: Callable[[tuple[int, int], torch.Tensor], None]
) -> torch.Tensor:  # fmt: skip
    """[rows, outputs] in dtype. turns: of the kernel's loop, which programs share where there are few; their parts are added in a fixed order, so that
    results do not change from run to run. run: launches the kernel on a grid (blocks, shares) that fills [shares, rows, outputs]."""
    blocks = triton.cdiv(rows, tiling.rows) * triton.cdiv(outputs, tiling.outputs)
    shares = max(1, min(_MOST_SHARES, _PROGRAMS // blocks, triton.cdiv(turns, 2)))
    out = torch.empty(shares, rows, outputs, dtype=torch.float32 if shares > 1 else dtype, device=place)
    run((blocks, shares), out)
    return out[0] if shares == 1 else out.sum(0).to(dtype)


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
            1,
            start,
            {"DENSE": True} | constants_of(DENSE),
        )
        torch.mm(x, dense[: part.shape[1]].t(), out=part)
    return out


def constants_of(tiling: Tiling) -> dict[str, Any]:
    """What a program is made for, of its tiling, and how it is launched."""
    return {"BM": tiling.rows, "BN": tiling.outputs, "num_warps": tiling.warps, "num_stages": tiling.stages}


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
    name: str, kernel: Any, parts: Mapping[str, torch.dtype], sizes: tuple[str, ...], constants: Mapping[str, object], dtype: str, target: Target
) -> list[Program]:  # fmt: skip
    """All that a layer may run on the target. name: the scheme. parts: types of the kernel's own pointers. sizes: its own other arguments. dtype: of the
    activations, `float16` or `bfloat16`."""
    floats = getattr(torch, dtype)
    pointers = {"x_ptr": floats, **parts, "out_ptr": floats}
    return [
        built(f"{name} {dtype}", kernel, pointers, ("M", "N", "K", "start", "x_stride", *sizes), {**constants, "DENSE": tiling is DENSE}, tiling)
        for tiling in (*tilings_of(target), DENSE)
    ]  # fmt: skip
