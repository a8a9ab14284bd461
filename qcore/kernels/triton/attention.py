"""Attention to keys and values as they lie in the cache, in 8 bits: no 16-bit copy of them is made.

Codes become float16, which has all that they stand for (halves.py); scales of keys multiply scores, those of values weights or their sums. The tokens
are divided among programs (flash-decoding: Dao et al., 2023), each of which keeps the largest score, the sum of the exponentials and that of the values
under them (online softmax: Milakov and Gimelshein, 2018), all in float32; what they found is added in a fixed order. The query heads of one head of
keys are rows of one product, so that codes are read once for all of them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from qcore.elements import Float
from qcore.kernels.triton.halves import MANTISSAS, halves_of, words_for
from qcore.kernels.triton.kv_cache import KvCache
from qcore.kernels.triton.launch import POINTERS
from qcore.kernels.triton.program import Program
from qcore.kernels.triton.tilings import Tiling, target_on

if TYPE_CHECKING:
    from qcore.kernels.kv_cache import KvRounding
    from qcore.platform import Target
    from qcore.scheme import Scheme

_MOST_QUERIES = 16
"""Tokens in a row that ask at a time. Of more, a prompt's, every code would be decoded many times."""
_LARGEST_HEAD = 256
"""Numbers of a key or value at most; and they are whole pieces of _HEAD_PIECE, which matrix units multiply."""
_HEAD_PIECE = 16

_PROGRAMS = 512
"""That there should be, by sharing tokens: some for each of a large GPU's processors."""
_MOST_SHARES = 128
_COLUMNS = 64
"""Of a value, whose shares a program adds."""
_MASKS: dict[torch.dtype, str] = {
    torch.bool: "kept",
    torch.float16: "added",
    torch.bfloat16: "added",
    torch.float32: "added",
}
"""What a mask's numbers say: whether a score is kept, or what is added to it."""
_QUERY_STRIDES = ("query_batch", "query_head", "query_row")
_OTHER_STRIDES = ("key_batch", "key_head", "value_batch", "value_head", "mask_batch", "mask_head", "mask_row")
_ALL = 1 << 30
_AHEAD = (Tiling(16, 16, 64, 4, 2), Tiling(_ALL, 64, 32, 8, 2))
"""Rows are queries times query heads of a head of keys, what stands for outputs are tokens. Loads run one tile ahead of products into shared memory, of
which some programs beside each other have enough."""
_WIDE_WARPS = (Tiling(16, 16, 64, 4, 2), Tiling(_ALL, 64, 64, 4, 1))
_NARROW_WARPS = (Tiling(_ALL, 16, 32, 8, 1),)
"""Of 32 where there are 64 KiB of it: more would not fit into their registers."""
_LONG_HEAD = 128
_LONG_HEAD_TOKENS = 32
"""At a time, of longer heads, at most."""


@triton.jit(do_not_specialize=("tokens", "queries", "shares", "key_batch", "key_head", "value_batch", "value_head", "mask_row"))  # type: ignore[untyped-decorator]  # fmt: skip
def attend_rows(  # type: ignore[no-untyped-def]
    query_ptr, keys_ptr, values_ptr, key_scale_ptr, key_zero_ptr, value_scale_ptr, value_zero_ptr, mask_ptr, out_ptr, totals_ptr,
    tokens, queries, kv_heads, group, shares, factor, query_batch, query_head, query_row, key_batch, key_head, value_batch, value_head,
    mask_batch, mask_head, mask_row,
    MANTISSA: tl.constexpr, WORDS: tl.constexpr, DYNAMIC: tl.constexpr, ZERO: tl.constexpr, BY_HEAD: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    SHARED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of BM rows, of `queries` times `group` query heads, to a share of the tokens of one head of keys and values. Grid: blocks of rows of all
    heads of all texts; shares.

    keys, values: uint8 rows of D and DV codes, behind which the row's float32 scale is where it is DYNAMIC; strides of texts and heads are counted in
    rows. Scales and zero points: float32 [kv_heads] where they are BY_HEAD, else [1]. factor: of scores, in base 2. MASK: `kept` (bytes), `added`
    (floats) or empty; CAUSAL: the last query sees the last token. out: [text, query, head, DV]; where SHARED float32 [share, ...], and totals float32
    [2, share, text, query, head], the largest score and the sum of exponentials."""
    key_bytes: tl.constexpr = D + 4 if DYNAMIC else D
    value_bytes: tl.constexpr = DV + 4 if DYNAMIC else DV
    blocks = tl.cdiv(queries * group, BM)
    which = tl.program_id(0) // blocks
    text, head = which // kv_heads, which % kv_heads
    share = tl.program_id(1)
    m = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    asks, query, own_head = m < queries * group, m // group, head * group + m % group
    d, dv, near = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BN)
    of_query = text.to(tl.int64) * query_batch + own_head * query_head + query * query_row
    q = tl.load(query_ptr + of_query[:, None] + d[None, :], mask=asks[:, None] & (d < D)[None, :], other=0.0)
    q = q.to(tl.float32)
    # A query is brought near to 1 by a power of two, for float16 has fewer of them than bfloat16.
    power = tl.max(tl.abs(q), 1).to(tl.int32, bitcast=True) & 0x7F800000
    power = tl.minimum(tl.maximum(power, 64 << 23), 253 << 23).to(tl.float32, bitcast=True)
    q = (q / power[:, None]).to(tl.float16)
    keys = keys_ptr + (text.to(tl.int64) * key_batch + head * key_head.to(tl.int64)) * key_bytes
    values = values_ptr + (text.to(tl.int64) * value_batch + head * value_head.to(tl.int64)) * value_bytes
    masked = mask_ptr + text.to(tl.int64) * mask_batch + own_head * mask_head + query * mask_row.to(tl.int64)
    place = head if BY_HEAD else 0
    value_scale = 1.0
    if ZERO:
        key_zero = tl.load(key_zero_ptr + place).to(tl.float16)
        value_zero = tl.load(value_zero_ptr + place).to(tl.float16)
    if not DYNAMIC:
        factor *= tl.load(key_scale_ptr + place)
        value_scale = tl.load(value_scale_ptr + place)

    factors = power * factor
    largest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    out = tl.zeros((BM, BLOCK_DV), dtype=tl.float32)
    turns = tl.cdiv(tokens, BN)
    each = tl.cdiv(turns, shares)
    for turn in tl.range(share * each, tl.minimum(turns, share * each + each), num_stages=STAGES):
        token = turn * BN + near
        there = token < tokens
        codes = tl.load(keys + token[:, None] * key_bytes + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0)
        halves = halves_of(codes, MANTISSA, WORDS, True)
        if ZERO:
            halves -= key_zero
        scores = tl.dot(q, tl.trans(halves))
        if DYNAMIC:
            scale = tl.load((keys + token * key_bytes + D).to(tl.pointer_type(tl.float32)), mask=there, other=0.0)
            scores *= scale[None, :]
        scores *= factors[:, None]
        seen = asks[:, None] & there[None, :]
        if MASK == "kept":
            seen = seen & (tl.load(masked[:, None] + token[None, :], mask=seen, other=0) != 0)
        elif MASK == "added":
            added = tl.load(masked[:, None] + token[None, :], mask=seen, other=0.0)
            scores += added.to(tl.float32) * 1.4426950408889634  # base 2
        if CAUSAL:
            seen = seen & (token[None, :] <= (query + tokens - queries)[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1))
        # Of rows that have seen nothing yet, any; 2^10 keeps small weights among float16's normal numbers, and goes with the total.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - (level - 10.0)[:, None])
        fade = tl.exp2(largest - level)
        total = total * fade + tl.sum(weights, 1)
        largest = higher

        inside = there[:, None] & (dv < DV)[None, :]
        codes = tl.load(values + token[:, None] * value_bytes + dv[None, :], mask=inside, other=0)
        # They are turned on their way to the matrix unit, which is faster in 16 bits than in 8.
        halves = halves_of(codes, MANTISSA, WORDS, False)
        if ZERO:
            halves -= value_zero
        if DYNAMIC:
            # Weights times scales could be too small for float16: the tile's largest scale multiplies the sum.
            scale = tl.load((values + token * value_bytes + DV).to(tl.pointer_type(tl.float32)), mask=there, other=0.0)
            most = tl.max(scale, 0)
            weights *= (scale / most)[None, :]
            out = out * fade[:, None] + tl.dot(weights.to(tl.float16), halves) * most
        else:
            out = tl.dot(weights.to(tl.float16), halves, out * fade[:, None])

    out *= value_scale
    row = (text * queries + query) * (kv_heads * group) + own_head
    if SHARED:
        rows = tl.num_programs(0) // blocks * queries * group
        row += share * rows
        tl.store(totals_ptr + row, largest, mask=asks)
        tl.store(totals_ptr + shares * rows + row, total, mask=asks)
    else:
        out /= tl.where(total == 0.0, 1.0, total)[:, None]
    at = out_ptr + row.to(tl.int64)[:, None] * DV + dv[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=asks[:, None] & (dv < DV)[None, :])


@triton.jit(do_not_specialize=("shares",))  # type: ignore[untyped-decorator]
def add_attended(parts_ptr, totals_ptr, out_ptr, rows, shares, DV: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """out [rows, DV], one row and BLOCK columns a program, of what attend_rows left of `shares` shares, MOST at most."""
    row, share = tl.program_id(0), tl.arange(0, MOST)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    found = share < shares
    largest = tl.load(totals_ptr + share * rows + row, mask=found, other=float("-inf"))
    level = tl.max(largest, 0)
    weights = tl.exp2(largest - tl.where(level == float("-inf"), 0.0, level))
    total = tl.sum(weights * tl.load(totals_ptr + (shares + share) * rows + row, mask=found, other=0.0), 0)
    at = parts_ptr + (share * rows + row).to(tl.int64)[:, None] * DV + column[None, :]
    parts = tl.load(at, mask=found[:, None] & (column < DV)[None, :], other=0.0)
    out = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row.to(tl.int64) * DV + column, out.to(out_ptr.dtype.element_ty), mask=column < DV)


@torch.library.custom_op("qcore::triton_kv_attention", mutates_args=())
def attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, key_scale: torch.Tensor | None, key_zero: torch.Tensor | None,
    value_scale: torch.Tensor | None, value_zero: torch.Tensor | None, mask: torch.Tensor | None, element: str, scaling: float, causal: bool,
) -> torch.Tensor:  # fmt: skip
    """As of AttendedKvCache.attention. keys, values: [texts, kv heads, tokens, D or DV], and four more bytes a row where there is no scale. scales, zero
    points: float32, all of one length: 1 or kv heads."""
    texts, heads, queries, head = query.shape
    _, kv_heads, tokens, _ = keys.shape
    dynamic = key_scale is None
    query = query if query.stride(-1) == 1 else query.contiguous()
    keys, values = _by_row(keys), _by_row(values)
    spread = None if mask is None else _spread(mask, (texts, heads, queries, tokens))
    group, size = heads // kv_heads, values.shape[-1] - 4 * dynamic
    target = target_on(query.device)
    tilings = _tilings(max(head, size), target)
    block = next(tiling for tiling in tilings if queries * group <= tiling.most)
    blocks = texts * kv_heads * triton.cdiv(queries * group, block.rows)
    shares = _shares(blocks, triton.cdiv(tokens, block.outputs))
    rows = texts * queries * heads
    out = query.new_empty((texts, queries, heads, size))
    parts = query.new_empty((shares, rows, size), dtype=torch.float32) if shares > 1 else out
    totals = query.new_empty((2, shares, rows), dtype=torch.float32) if shares > 1 else out
    scales = (key_scale, key_zero, value_scale, value_zero)
    attend_rows[(blocks, shares)](
        query, keys, values, *(out if part is None else part for part in scales),
        out if spread is None else spread, parts, totals, tokens, queries, kv_heads, group, shares, scaling * math.log2(math.e),
        *query.stride()[:3], *_rows_apart(keys), *_rows_apart(values), *((0, 0, 0) if spread is None else spread.stride()[:3]),
        MANTISSA=MANTISSAS[element], WORDS=words_for(element, target), DYNAMIC=dynamic, ZERO=key_zero is not None, BY_HEAD=key_scale is not None and len(key_scale) > 1,
        MASK="" if mask is None else _MASKS[mask.dtype], CAUSAL=causal, SHARED=shares > 1, **_constants(head, size, block),
    )  # fmt: skip
    if shares > 1:
        grid = (rows, triton.cdiv(size, _COLUMNS))
        add_attended[grid](parts, totals, out, rows, shares, DV=size, MOST=_MOST_SHARES, BLOCK=_COLUMNS)
    return out


@attention.register_fake
def _(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, key_scale: torch.Tensor | None, key_zero: torch.Tensor | None,
    value_scale: torch.Tensor | None, value_zero: torch.Tensor | None, mask: torch.Tensor | None, element: str, scaling: float, causal: bool,
) -> torch.Tensor:  # fmt: skip
    texts, heads, queries, _ = query.shape
    return query.new_empty((texts, queries, heads, values.shape[-1] - 4 * (key_scale is None)))


class AttendedKvCache(KvCache):
    """A cache of such rows: what KvCache does, and attention."""

    def attends(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, of_values: KvRounding, mask: torch.Tensor | None
    ) -> bool:  # fmt: skip
        """Whether `attention`, whose arguments these are, takes them; else the rows are to be decoded."""
        parts = [part for part in (self.scale, self.zero, of_values.scale, of_values.zero) if part is not None]
        dynamic, heads = self.scale is None, keys.shape[1]
        return (
            query.dtype in (torch.bfloat16, torch.float16)
            and 0 < query.shape[2] <= _MOST_QUERIES
            and keys.shape[2] > 0
            and query.shape[1] % heads == 0
            and _fits(query.shape[-1])
            and _fits(values.shape[-1] - 4 * dynamic)
            and (of_values.scale is None) == dynamic
            and (of_values.zero is None) == (self.zero is None)
            and {part.numel() for part in parts} in (set(), {1}, {heads})
            and (mask is None or _takes(mask, (*query.shape[:3], keys.shape[2])))
        )

    def attention(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, of_values: KvRounding, mask: torch.Tensor | None, scaling: float, causal: bool
    ) -> torch.Tensor:  # fmt: skip
        """[texts, queries, heads, head_dim of values] in the type of query [texts, heads, queries, head_dim], float16 or bfloat16.

        keys, values: rows, uint8 [texts, kv heads, tokens, bytes], that this rounding and `of_values` encoded. mask: bool or float, spreads over [texts,
        heads, queries, tokens]; a query that sees nothing gets zeros. scaling: of scores. causal: the last query sees the last token, each before it one
        less."""
        self._follow(query.device)
        of_values._follow(query.device)
        parts = (self._flat(part) for part in (self.scale, self.zero, of_values.scale, of_values.zero))
        out: torch.Tensor = attention(query, keys, values, *parts, mask, self._element, scaling, causal)
        return out

    @classmethod
    def programs(cls, scheme: Scheme, dtype: str, target: Target) -> list[Program]:
        """KvCache's; what attends to few and to many rows of heads of 128 and 64 numbers, with and without a mask and scales of run time; and what adds
        shares."""
        stored, zero = scheme.weight.element, scheme.weight.zero is not None
        element = stored.format if isinstance(stored, Float) else "int8"
        floats = POINTERS[getattr(torch, dtype)]
        ways = [(128, 0, "", True, False), (128, -1, "kept", True, False), (64, 0, "kept", False, False)]
        if not zero:
            ways.append((128, 0, "", True, True))
        made = [_program(f"{scheme} {dtype}", floats, element, zero, *way, target) for way in ways]
        signature = {"parts_ptr": "*fp32", "totals_ptr": "*fp32", "out_ptr": floats, "rows": "i32", "shares": "i32"}
        constants = {"DV": 128, "MOST": _MOST_SHARES, "BLOCK": _COLUMNS}
        aligned = frozenset(signature) - {"shares"}
        added = Program(f"shares of attention {dtype}", add_attended, signature, constants, aligned)
        return [*super().programs(scheme, dtype, target), *made, added]


def _fits(head: int) -> bool:
    """Whether the kernel takes keys or values of so many numbers."""
    return 0 < head <= _LARGEST_HEAD and head % _HEAD_PIECE == 0


def _takes(mask: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether the mask is of a type that the kernel reads, and spreads over the shape."""
    return mask.dtype in _MASKS and mask.dim() == 4 and all(a in (1, b) for a, b in zip(mask.shape, shape, strict=True))


def _by_row(rows: torch.Tensor) -> torch.Tensor:
    """Rows in one piece, any number of them from one head or text to the next."""
    size = rows.shape[-1]
    whole = rows.stride()[2:] == (size, 1) and not any(stride % size for stride in rows.stride()[:2])
    return rows if whole else rows.contiguous()


def _rows_apart(rows: torch.Tensor) -> tuple[int, int]:
    """Rows from one text, and from one head, to the next."""
    return rows.stride(0) // rows.shape[-1], rows.stride(1) // rows.shape[-1]


def _spread(mask: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The mask as bytes or floats of this shape, most of which it has once in memory."""
    held = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    wide = held.expand(shape)
    return wide if wide.stride(-1) == 1 else held.expand(*held.shape[:-1], shape[-1]).contiguous().expand(shape)


def _shares(blocks: int, turns: int) -> int:
    """Programs that share the tokens of one block of rows, each with a turn of the loop at least."""
    shares = max(1, min(_MOST_SHARES, _PROGRAMS // blocks, turns))
    each = -(-turns // shares)
    return -(-turns // each)  # none without a turn


def _tilings(head: int, target: Target | None) -> tuple[Tiling, ...]:
    """From the one for the fewest rows on. head: numbers of a key or a value, whichever has more."""
    tilings: tuple[Tiling, ...] = _AHEAD
    if target is not None and target.shared < 96 << 10:
        tilings = _WIDE_WARPS if target.warp == 64 else _NARROW_WARPS
    if head <= _LONG_HEAD:
        return tilings
    return tuple(replace(tiling, outputs=min(tiling.outputs, _LONG_HEAD_TOKENS)) for tiling in tilings)


def _constants(head: int, value: int, tiling: Tiling) -> dict[str, Any]:
    """What attend_rows is made for, of the sizes of keys and values, and how it is launched."""
    return {
        "D": head, "DV": value, "BLOCK_D": triton.next_power_of_2(head), "BLOCK_DV": triton.next_power_of_2(value), "BM": tiling.rows, "BN": tiling.outputs,
        "STAGES": tiling.stages, "num_warps": tiling.warps, "num_stages": tiling.stages,
    }  # fmt: skip


def _program(
    name: str, floats: str, element: str, zero: bool, head: int, size: int, mask: str, shared: bool, dynamic: bool, target: Target
) -> Program:  # fmt: skip
    """For keys and values of `head` numbers. size: the place of the tiling."""
    tiling = _tilings(head, target)[size]
    constants = _constants(head, head, tiling)
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    scales = dict.fromkeys(("key_scale_ptr", "key_zero_ptr", "value_scale_ptr", "value_zero_ptr"), "*fp32")
    pointers = {"query_ptr": floats, "keys_ptr": "*u8", "values_ptr": "*u8", **scales, "mask_ptr": "*u8", "out_ptr": "*fp32" if shared else floats,
                "totals_ptr": "*fp32"}  # fmt: skip
    sizes = dict.fromkeys(("tokens", "queries", "kv_heads", "group", "shares"), "i32") | {"factor": "fp32"}
    strides = dict.fromkeys((*_QUERY_STRIDES, *_OTHER_STRIDES), "i32")
    constants |= {"MANTISSA": MANTISSAS[element], "WORDS": words_for(element, target), "DYNAMIC": dynamic, "ZERO": zero, "BY_HEAD": False, "MASK": mask,
                  "CAUSAL": False, "SHARED": shared}  # fmt: skip
    about = f"{name}, {tiling.rows} x {tiling.outputs} of heads of {head}"
    about += ", masked" * bool(mask) + ", scales of run time" * dynamic
    aligned = frozenset({*pointers, *_QUERY_STRIDES})
    return Program(about, attend_rows, pointers | sizes | strides, constants, aligned, options)
