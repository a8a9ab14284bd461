"""Weight-only int4, int8 and e4m3 on tensor cores in CUDA C++ (native/marlin.cuh): the weight permuted as these take it, from Turing on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qcore.bits import unpack
from qcore.elements import Float, Group, Int
from qcore.kernels.order import columns_by_group
from qcore_cuda.cpp import CppProgram, splits

if TYPE_CHECKING:
    from typing_extensions import Self

    from qcore.platform import Target
    from qcore.scheme import Scheme
    from qcore.tensor import LayerTensors

_CHUNK = 64
"""Columns of a chunk, whose rows are 16."""
_WARPS = 8
_BLOCKS = 264
"""Blocks that there should be at least: two for each of a large GPU's processors."""
_MOST = 64
"""Rows of x up to which the weight is decoded for each product; more are multiplied by a dense one."""
_DENSE_ELEMENTS = 1 << 25
"""Weights that are dense at a time: 64 MiB."""
_TYPES = {torch.float16: "Half", torch.bfloat16: "Brain", torch.float32: "Single"}
_TILES = ((8, 1), (16, 2), (32, 4), (_MOST, 8))
"""Up to how many rows of x, and how many times eight of them a block has."""
_AHEAD = 4
"""Chunks that may be read behind the last one."""
_ROWS = 256
"""Rows repacked at a time."""
_MULTIPLY = "const u16* x, const Vector* weight, const void* scales, const u8* zeros, void* out, int M, int N, int chunks, int center"
_DENSE = "const Vector* weight, const void* scales, const u8* zeros, u16* out, int start, int rows, int N, int chunks, int center"


@dataclass(frozen=True)
class Form:
    """What a program is made for. code: of native/marlin.cuh. group: chunks of one, 0: all. zeros: there are zero points. dtype, scales: types of the
    activations and of scales."""

    code: str
    group: int
    zeros: bool
    dtype: torch.dtype
    scales: torch.dtype

    def product(self, tokens: int) -> CppProgram:
        """For up to 8 times `tokens` rows of x."""
        call = f"multiply<{self._types(tokens)}>(x, weight, scales, zeros, out, M, N, chunks, center);"
        return CppProgram(f"marlin_{self._name}_{8 * tokens}", "marlin.cuh", _MULTIPLY, call, 32 * _WARPS)

    def dense(self) -> CppProgram:
        call = f"make_dense<{self._types()}>(weight, scales, zeros, out, start, rows, N, chunks, center);"
        return CppProgram(f"marlin_{self._name}_dense", "marlin.cuh", _DENSE, call, 32 * _WARPS)

    def _types(self, *tokens: int) -> str:
        words = (
            self.code,
            _TYPES[self.dtype],
            _TYPES[self.scales],
            *map(str, tokens),
            str(self.group),
            str(self.zeros).lower(),
        )
        return ", ".join(words)

    @property
    def _name(self) -> str:
        group = f"g{self.group * _CHUNK}" if self.group else "channel"
        return (
            f"{self.code}_{group}_{'asym' if self.zeros else 'sym'}_{_TYPES[self.dtype]}_{_TYPES[self.scales]}".lower()
        )


@torch.library.custom_op("qcore::cuda_marlin", mutates_args=())
def product(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, code: str, group: int, center: int
) -> torch.Tensor:  # fmt: skip
    """[M, N] of contiguous x [M, K]. group: chunks of one, 0: all. The rest as native/marlin.cuh takes it."""
    (rows, columns), outputs = x.shape, scales.shape[1]
    chunks, form = columns // _CHUNK, Form(code, group, zeros is not None, x.dtype, scales.dtype)
    if not rows:
        return x.new_empty(0, outputs)
    if rows > _MOST:
        return _by_dense(x, weight, scales, zeros, form, center)
    tokens = next(tokens for most, tokens in _TILES if rows <= most)
    blocks = outputs // 16
    shares = splits(-(-chunks // max(1, group)), blocks, _WARPS, _BLOCKS)
    out = x.new_empty(shares, rows, outputs, dtype=torch.float32 if shares > 1 else x.dtype)
    form.product(tokens).run((blocks, shares, 1), x, weight, scales, zeros, out, rows, outputs, chunks, center)
    return out[0] if shares == 1 else out.sum(0).to(x.dtype)


@product.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, code: str, group: int, center: int
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], scales.shape[1])


def _by_dense(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, form: Form, center: int
) -> torch.Tensor:  # fmt: skip
    """Rows of the weight are made dense, some at a time, and multiplied by cuBLAS."""
    (rows, columns), outputs = x.shape, scales.shape[1]
    chunks, step = columns // _CHUNK, max(1, _DENSE_ELEMENTS // columns // 16) * 16
    out, dense = x.new_empty(rows, outputs), x.new_empty(min(step, outputs), columns)
    for start in range(0, outputs, len(dense)):
        part = out[:, start : start + len(dense)]
        count = part.shape[1]
        grid = (-(-chunks // _WARPS), count // 16, 1)
        form.dense().run(grid, weight, scales, zeros, dense, start, count, outputs, chunks, center)
        torch.mm(x, dense[:count].t(), out=part)
    return out


class MarlinLinear(torch.nn.Module):
    """weight: int32, chunks as native/marlin.cuh has them, and some zeros. scales: [groups, N], in the checkpoint's dtype. zeros: uint8, alike.
    order: int64 [K], act-order columns sorted by group."""

    weight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    order: torch.Tensor | None

    def __init__(
        self, code: str, center: int, group: int, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, order: torch.Tensor | None
    ) -> None:  # fmt: skip
        super().__init__()
        self.code, self.center, self.group = code, center, group // _CHUNK
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("order", order)

    @classmethod
    def from_layer(cls, layer: LayerTensors, dtype: torch.dtype) -> Self:
        """Raises Refused (shape-unsupported) where act-order groups are not all of one size."""
        weight = layer.weight
        scheme, (rows, columns) = weight.scheme.weight, weight.shape
        code, center = _code(scheme.element)
        grid = scheme.granularity
        group = grid.size if isinstance(grid, Group) else 0
        order = None if weight.index is None else columns_by_group(weight.index, group, "Marlin")
        scales = weight.scales[0].to(torch.float32) if weight.scales[0].dtype not in _TYPES else weight.scales[0]
        scales = scales.expand(rows, -1).t().contiguous()
        packed = []
        for part in weight.codes.split(_ROWS):
            codes = unpack(part, 4, columns) if code == "Int4" else part.view(torch.uint8)
            if code == "Int8":
                codes = codes ^ 128
            packed.append(permuted(codes if order is None else codes[:, order], code).flatten())
        if code == "Float8":
            for row, _ in (weight.codes.view(torch.uint8) & 0x7F == 0x7F).nonzero().tolist():
                scales[:, row] = float("nan")  # codes that are no numbers are decoded as if they were
        zeros = weight.zeros
        if zeros is not None:  # those of signed codes are held as they are, and codes `center` higher
            zeros = (zeros.to(torch.int16) + center).to(torch.uint8).t().contiguous()
        packed.append(torch.zeros(_AHEAD * (128 if code == "Int4" else 256), dtype=torch.int32))
        return cls(code, center, group, torch.cat(packed), scales, zeros, order)

    @classmethod
    def programs(cls, scheme: Scheme, dtype: str, target: Target) -> list[CppProgram]:
        """What may run a scheme on a target. dtype: of the activations, `float16` or `bfloat16`."""
        weight, kind = scheme.weight, getattr(torch, dtype)
        code, grid = _code(weight.element)[0], weight.granularity
        group = grid.size // _CHUNK if isinstance(grid, Group) else 0
        form = Form(code, group, weight.zero is not None, kind, torch.float32 if code == "Float8" else kind)
        return [*(form.product(tokens) for _, tokens in _TILES), form.dense()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        flat = flat.contiguous() if self.order is None else flat[:, self.order]
        out: torch.Tensor = product(flat, self.weight, self.scales, self.zeros, self.code, self.group, self.center)
        return out.reshape(*x.shape[:-1], out.shape[-1])


def _code(element: object) -> tuple[str, int]:
    """The codes' name in native/marlin.cuh, and what codes of integers without zero points are too great by."""
    if isinstance(element, Float):
        return "Float8", 0
    assert isinstance(element, Int)
    return ("Int4", 8 if element.signed else 0) if element.bits == 4 else ("Int8", 128)


def permuted(codes: torch.Tensor, code: str) -> torch.Tensor:
    """codes: uint8 [rows, K], multiples of 16 and 64. int32 [rows / 16, K / 64, 128 or 256]: a chunk's lanes one after the other, for each the words of its
    four products."""
    rows, columns = codes.shape
    # [rows / 16, K / 64, g, t, s, pair, half, which of two]
    parts = codes.view(rows // 16, 2, 8, columns // _CHUNK, 4, 4, 2, 2).permute(0, 3, 2, 4, 5, 6, 1, 7).to(torch.int64)
    pair, half, which = torch.meshgrid(*(torch.arange(2, device=codes.device),) * 3, indexing="ij")
    if code == "Int4":
        words = (parts << 4 * (half + 2 * pair) + 16 * which).sum((-3, -2, -1))  # [.., g, t, s]
        return _int32(words).flatten(2)
    byte = 2 * half + which if code == "Int8" else 2 * which + 1 - half
    words = (parts << 8 * byte).sum((-2, -1))  # [.., g, t, s, pair]
    return _int32(words.unflatten(4, (2, 2)).permute(0, 1, 4, 2, 3, 5, 6)).flatten(2)  # a vector holds two products


def _int32(words: torch.Tensor) -> torch.Tensor:
    """The low 32 bits of int64 numbers."""
    return (
        words.contiguous().view(torch.int32)[..., ::2].contiguous()
        if words.dim() == 1
        else _int32(words.flatten()).view(words.shape)
    )
