"""Attention to the rows of a kv cache in Triton, in its interpreter, against softmax attention in float64 to what the rows stand for."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

import pytest
import torch

import qcore.testing.interpreter  # noqa: F401  the first to import Triton
from qcore.elements import Element, Float, Int
from qcore.kernels.kv_cache import KvRounding
from qcore.kernels.triton.attention import AttendedKvCache, attention
from qcore.kernels.triton.halves import MANTISSAS, words_for
from qcore.platform import Target

INT8, E4M3, E5M2 = Int(8, signed=True), Float("e4m3fn"), Float("e5m2")
BOUNDS = {torch.bfloat16: 0.008, torch.float16: 0.002}
"""Of the largest difference, relative to the definition's largest number: results and the weights of tokens are rounded."""


@dataclass(frozen=True)
class Cache:
    """Rows of random keys and values. scale: of run time, one, or one for each head. shifted: with zero points."""

    element: Element = INT8
    scale: str = "dynamic"
    shifted: bool = False
    heads: int = 2
    size: int = 64
    value_size: int = 0
    tokens: int = 70
    texts: int = 1
    dtype: torch.dtype = torch.bfloat16

    def roundings(self) -> tuple[AttendedKvCache, AttendedKvCache]:
        """Of keys and values."""
        if self.scale == "dynamic":
            return AttendedKvCache(self.element), AttendedKvCache(self.element)
        count = self.heads if self.scale == "heads" else 1
        step = {INT8: 0.03, E4M3: 0.01, E5M2: 1.0}[self.element]
        made = []
        for times, zero in ((1.0, -7.0), (0.5, 11.0)):
            scale = step * times * torch.arange(1, count + 1).view(-1, *[1] * (2 * (count > 1)))
            made.append(AttendedKvCache(self.element, scale, torch.full_like(scale, zero) if self.shifted else None))
        return made[0], made[1]

    def states(self, size: int, heads: int | None = None, tokens: int | None = None, seed: int = 1) -> torch.Tensor:
        shape = (self.texts, heads or self.heads, tokens or self.tokens, size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.dtype)


def defined(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float, causal: bool
) -> torch.Tensor:  # fmt: skip
    """[texts, queries, heads, size] in float64."""
    group, queries, tokens = query.shape[1] // keys.shape[1], query.shape[2], keys.shape[2]
    keys, values = (part.double().repeat_interleave(group, 1) for part in (keys, values))
    scores = query.double() @ keys.mT * scaling
    if causal:
        scores = scores.masked_fill(~torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    weights = torch.softmax(scores, -1).nan_to_num(0.0)  # a query that sees nothing
    return (weights @ values).transpose(1, 2)


def check(
    cache: Cache, group: int = 4, queries: int = 1, mask: torch.Tensor | None = None, causal: bool = False, query: torch.Tensor | None = None,
    bound: float | None = None,
) -> None:  # fmt: skip
    of_keys, of_values = cache.roundings()
    states = cache.states(cache.size), cache.states(cache.value_size or cache.size, seed=2)
    rows = of_keys.encode(states[0]), of_values.encode(states[1])
    if query is None:
        query = cache.states(cache.size, group * cache.heads, queries, seed=3)
    assert of_keys.attends(query, *rows, of_values, mask)
    got = of_keys.attention(query, *rows, of_values, mask, 0.11, causal)
    dense = (KvRounding.decode(way, part, torch.float32) for way, part in zip((of_keys, of_values), rows, strict=True))
    wanted = defined(query, *dense, mask, 0.11, causal)
    assert got.shape == wanted.shape and got.dtype == cache.dtype and got.is_contiguous()
    assert (got.double() - wanted).abs().max() <= (bound or BOUNDS[cache.dtype]) * wanted.abs().max()


SCHEMES = [
    Cache(INT8), Cache(INT8, "tensor"), Cache(INT8, "heads"), Cache(INT8, "tensor", shifted=True), Cache(INT8, "heads", shifted=True),
    Cache(E4M3), Cache(E4M3, "tensor"), Cache(E4M3, "heads"), Cache(E5M2, "tensor"), Cache(E5M2, "heads"), Cache(E5M2),
]  # fmt: skip


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("cache", SCHEMES, ids=lambda cache: f"{cache.element}-{cache.scale}{'-zero' * cache.shifted}")
def test_every_scheme(cache: Cache, dtype: torch.dtype) -> None:
    check(replace(cache, dtype=dtype, texts=2), queries=2, causal=True)


@pytest.mark.parametrize("cache", [Cache(INT8), Cache(E4M3, "heads")], ids=["dynamic", "heads"])
@pytest.mark.parametrize("size", [16, 64, 80, 96, 128, 256])
def test_sizes_of_heads(cache: Cache, size: int) -> None:
    check(replace(cache, size=size, tokens=40))
    check(replace(cache, size=size, tokens=40), queries=5, causal=True)


@pytest.mark.parametrize("cache", [Cache(INT8), Cache(E4M3, "tensor")], ids=["dynamic", "tensor"])
def test_values_may_be_shorter_than_keys(cache: Cache) -> None:
    check(replace(cache, size=192, value_size=128, tokens=40))


@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("tokens", [1, 17, 64, 1000])
def test_ratios_of_heads_and_lengths(group: int, tokens: int) -> None:
    check(Cache(tokens=tokens), group)
    check(Cache(E4M3, "tensor", tokens=tokens, texts=2), group, queries=min(3, tokens), causal=True)


@pytest.mark.parametrize("queries", [1, 2, 4, 5, 16])
def test_queries(queries: int) -> None:
    check(Cache(INT8, "heads", tokens=queries), queries=queries, causal=queries > 1)
    check(Cache(tokens=66), 7, queries, causal=True)


def windows(texts: int, queries: int, tokens: int, padding: int, window: int) -> torch.Tensor:
    """As transformers' `sdpa` masks are: of the queries that come last, the first text filled up from the left."""
    query, token = torch.arange(tokens - queries, tokens)[:, None], torch.arange(tokens)
    seen = ((token <= query) & (token > query - window)).expand(texts, 1, queries, tokens).clone()
    seen[0, ..., :padding] = False
    return seen


@pytest.mark.parametrize("queries", [1, 4])
def test_masks(queries: int) -> None:
    cache = Cache(texts=3, tokens=90)
    seen = windows(3, queries, 90, 20, 40)
    check(cache, 4, queries, seen)
    check(cache, 4, queries, windows(3, queries, 90, 20, 1000))
    for least in (-torch.inf, torch.finfo(torch.bfloat16).min):
        check(cache, 4, queries, torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, least))
    biases = torch.randn(3, 8, queries, 90, generator=torch.Generator().manual_seed(5))
    check(cache, 4, queries, biases)
    check(cache, 4, queries, biases[:, :1, :, ::2].repeat_interleave(2, -1)[:1, :, :1])
    check(cache, 4, queries, torch.ones(1, 1, 1, 1, dtype=torch.bool))
    check(cache, 4, queries, torch.zeros(1, 1, queries, 91)[..., 1:], causal=True)


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    seen = windows(2, 3, 300, 299, 1000)  # the first two queries of the first text are of the padding
    check(Cache(texts=2, tokens=300), 4, 3, seen)
    check(Cache(texts=2, tokens=10), 4, 3, seen[..., -10:])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_queries_of_any_magnitude(dtype: torch.dtype) -> None:
    """Those of bfloat16 are beyond float16 at either end."""
    for magnitude in (1e-7, 1e4) if dtype == torch.float16 else (1e-30, 1e-7, 1e6, 1e30):
        cache = Cache(E4M3, "tensor", dtype=dtype, tokens=1 if magnitude > 1e4 else 70)
        check(cache, query=cache.states(64, 8, 1, seed=3) * magnitude)


def test_small_weights_are_not_lost() -> None:
    """One token has e^9.6 times the weight of each other one, and all others together as much again."""
    cache = Cache(E4M3, "tensor", tokens=15000, heads=1, size=16)
    of_keys, of_values = cache.roundings()
    keys, values = torch.zeros(1, 1, 15000, 16), torch.ones(1, 1, 15000, 16)
    keys[:, :, 7], values[:, :, 7] = 1.0, -1.0
    rows = of_keys.encode(keys), of_values.encode(values)
    query = torch.full((1, 1, 1, 16), 0.6, dtype=torch.bfloat16)
    got = of_keys.attention(query, *rows, of_values, None, 1.0, False)
    wanted = defined(
        query, of_keys.decode(rows[0], torch.float32), of_values.decode(rows[1], torch.float32), None, 1.0, False
    )
    assert abs(float(wanted.mean())) < 0.2 and (got - wanted).abs().max() < 4e-3


def test_what_is_no_number_stays_none() -> None:
    of_keys, of_values = Cache(E4M3, "tensor").roundings()
    rows = of_keys.encode(torch.ones(1, 2, 9, 64)), of_values.encode(torch.ones(1, 2, 9, 64))
    rows[1][0, 1, 4, 5] = 0xFF
    got = of_keys.attention(torch.ones(1, 2, 1, 64, dtype=torch.bfloat16), *rows, of_values, None, 0.1, False)
    assert got.isnan().nonzero().tolist() == [[0, 0, 1, 5]]


def test_views_are_read_where_they_lie() -> None:
    """Queries as a model's projections leave them, rows of a cropped cache and of a part of its texts; and what has to be copied first."""
    cache = Cache(texts=4, tokens=50)
    of_keys, of_values = cache.roundings()
    rows = of_keys.encode(cache.states(64)), of_values.encode(cache.states(64, seed=2))
    query = cache.states(64, 3, 8, seed=3).transpose(1, 2)  # [4, 8, 3, 64]
    mask = windows(4, 3, 50, 5, 1000)
    for part in (slice(2, 40), slice(None, -3)):
        cut = [each[1:3, :, part] for each in rows]
        asked = [each[..., part] for each in (mask[1:3],)]
        got = of_keys.attention(query[1:3], *cut, of_values, *asked, 0.1, False)
        whole = [each.contiguous() for each in cut]
        assert torch.equal(
            got, of_keys.attention(query[1:3].contiguous(), *whole, of_values, asked[0].clone(), 0.1, False)
        )
    turned = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in rows]
    strided = torch.stack([query, query], -1)[..., 0]
    expected = of_keys.attention(query, *rows, of_values, mask, 0.1, False)
    assert torch.equal(of_keys.attention(strided, *turned, of_values, mask, 0.1, False), expected)


def test_what_is_not_taken() -> None:
    of_keys, of_values = Cache(INT8, "heads").roundings()
    rows = torch.zeros(1, 2, 9, 64, dtype=torch.uint8)
    query = torch.zeros(1, 4, 3, 64, dtype=torch.bfloat16)
    seen = torch.ones(1, 1, 3, 9, dtype=torch.bool)
    assert of_keys.attends(query, rows, rows, of_values, seen)
    for asked in (
        (query.float(), rows, rows, of_values, None),
        (query.repeat(1, 1, 6, 1), rows, rows, of_values, None),
        (query[:, :3], rows, rows, of_values, None),
        (query[..., :40], rows[..., :40], rows, of_values, None),
        (query, rows, rows.repeat(1, 1, 1, 5), of_values, None),
        (query, rows[:, :, :0], rows[:, :, :0], of_values, None),
        (query, rows, rows, AttendedKvCache(INT8), None),
        (query, rows, rows, Cache(INT8, "heads", shifted=True).roundings()[1], None),
        (query, rows, rows, Cache(INT8, "tensor").roundings()[1], None),
        (query, rows, rows, of_values, seen.int()),
        (query, rows, rows, of_values, seen[..., :8]),
        (query, rows, rows, of_values, seen[0]),
    ):
        assert not of_keys.attends(*asked)


def test_the_operator_is_one_that_compilers_know() -> None:
    cache = Cache(E4M3, "tensor")
    of_keys, _ = cache.roundings()
    keys, scale = of_keys.encode(cache.states(64)), of_keys.scale
    given = (cache.states(64, 8, 2, seed=3), keys, keys, scale, None, scale, None, None, "e4m3fn", 0.1, True)
    torch.library.opcheck(attention, given, test_utils=("test_schema", "test_faketensor"))


# --- Four codes of a word, in instructions that no CPU has ----------------------------------------------------------


def halves(words: list[int]) -> list[float]:
    return [value for word in words for value in struct.unpack("<ee", struct.pack("<I", word))]


def run(text: str, word: int) -> list[float]:
    """What the instructions make of a word. PTX ISA, for `prmt`: a selector's digit is a byte of both words, and its upper bit asks for that byte's sign."""
    held = {"$2": word}

    def value(name: str) -> int:
        return held[name] if name in held else int(name, 0)

    def chosen(digit: int, pair: int) -> int:
        byte = pair >> 8 * (digit & 7) & 255
        return (255 if byte & 128 else 0) if digit & 8 else byte

    def each_half(a: int, b: int, way: str) -> int:
        results = [x - y if way == "sub" else x * y for x, y in zip(halves([a]), halves([b]), strict=True)]
        return int.from_bytes(struct.pack("<ee", *results), "little")

    for line in text.strip("{} \n").split(";"):
        name, _, rest = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        if rest.startswith("{"):
            low, high, source = rest.replace("{", "").replace("}", "").replace(" ", "").split(",")
            held |= {low: value(source) & 0xFFFF, high: value(source) >> 16}
            continue
        target, *others = rest.replace(" ", "").split(",")
        given = [value(other) for other in others]
        match name:
            case "mov.b32":
                made = given[0]
            case "xor.b32":
                made = given[0] ^ given[1]
            case "and.b32":
                made = given[0] & given[1]
            case "or.b32":
                made = given[0] | given[1]
            case "add.u32":
                made = given[0] + given[1] & 0xFFFFFFFF
            case "shr.u32":
                made = given[0] >> given[1]
            case "prmt.b32":
                pair = given[0] | given[1] << 32
                made = sum(chosen(given[2] >> 4 * place & 15, pair) << 8 * place for place in range(4))
            case "sub.f16x2" | "mul.f16x2":
                made = each_half(*given, name[:3])
            case "cvt.rn.f16x2.e4m3x2":
                codes = torch.tensor([given[0] & 255, given[0] >> 8], dtype=torch.uint8).view(torch.float8_e4m3fn)
                made = int.from_bytes(struct.pack("<ee", *codes.float().tolist()), "little")
            case _:
                raise AssertionError(f"{name} is not known")
        held[target] = made
    return halves([held["$0"], held["$1"]])


@pytest.mark.parametrize("fp8", ["", "e4m3fn"])
@pytest.mark.parametrize("element", MANTISSAS)
def test_instructions_for_four_codes(element: str, fp8: str) -> None:
    text = words_for(element, Target("sm_90", "cuda", 90, 32, 227 << 10, fp8=fp8))
    kind = {"int8": torch.int8, "e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[element]
    for first in range(256):
        codes = torch.tensor([first, (first * 7 + 3) % 256, 255 - first, (first + 128) % 256], dtype=torch.uint8)
        word = int.from_bytes(bytes(codes.tolist()), "little")
        wanted = codes.view(kind).float()
        torch.testing.assert_close(torch.tensor(run(text, word)), wanted, rtol=0, atol=0, equal_nan=True)


def test_other_compilers_get_no_instructions() -> None:
    assert not words_for("int8", None) and not words_for("int8", Target("gfx942", "hip", "gfx942", 64, 64 << 10))
