"""Schemes: frozen, hashable, and printed so that they parse back."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcore.blocks.types import BLOCK_TYPES
from qcore.elements import (
    CODEBOOK_BITS,
    FLOAT_BITS,
    Block,
    Codebook,
    FlatGroup,
    Float,
    Group,
    Int,
    Level,
    PerChannel,
    PerTensor,
    PerToken,
    Tile,
)
from qcore.refusal import Refused
from qcore.scheme import PRESETS, SHORTHANDS, Scheme, TensorScheme, integer_weight

sizes = st.integers(1, 1 << 20)
granularities = st.one_of(
    st.just(PerTensor()),
    st.just(PerChannel()),
    sizes.map(Group),
    sizes.map(FlatGroup),
    st.builds(Tile, sizes, sizes),
)
levels = st.builds(Level, granularities, st.sampled_from(["float", "e8m0", "e4m3fn", "dynamic8"]))
level_tuples = st.lists(levels, min_size=1, max_size=3).map(tuple)
floats = st.sampled_from(sorted(FLOAT_BITS)).map(Float)
codebooks = st.sampled_from(sorted(CODEBOOK_BITS)).map(Codebook)


@st.composite
def integers(draw: st.DrawFn) -> TensorScheme:
    element = Int(draw(st.integers(1, 8)), draw(st.booleans()))
    scales = draw(level_tuples)
    ordered = draw(st.booleans()) and any(isinstance(level.granularity, Group) for level in scales)
    return TensorScheme(element, scales, draw(st.sampled_from([None, "stored", "float"])), ordered)


weights = st.one_of(
    integers(),
    st.builds(TensorScheme, st.one_of(floats, codebooks), level_tuples),
    st.builds(TensorScheme, floats),
    st.sampled_from(sorted(BLOCK_TYPES)).map(lambda name: TensorScheme(Block(name))),
)
inputs = st.builds(
    TensorScheme,
    st.one_of(st.builds(Int, st.integers(1, 8), st.booleans()), floats),
    st.builds(Level, st.one_of(st.just(PerToken()), granularities)).map(lambda level: (level,)),
    dynamic=st.booleans(),
    outliers=st.none() | st.floats(min_value=1e-9, max_value=1e9),
)


@settings(derandomize=True, max_examples=1000)
@given(st.builds(Scheme, weights, st.none() | inputs))
def test_schemes_print_and_parse_back(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme)) == scheme
    assert hash(Scheme.parse(str(scheme))) == hash(scheme)


@settings(derandomize=True, max_examples=300)
@given(st.one_of(weights, inputs))
def test_tensor_schemes_print_and_parse_back(scheme: TensorScheme) -> None:
    assert TensorScheme.parse(str(scheme)) == scheme


@settings(derandomize=True, max_examples=500)
@given(st.text("WA0123456789-:+/gintsymacholepfbxkd_.", max_size=40))
def test_other_text_is_refused_or_parses_to_what_it_prints(text: str) -> None:
    try:
        scheme = Scheme.parse(text)
    except Refused as error:
        assert error.refusal.code == "bad-scheme" and error.refusal.fix
    else:
        assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("W4A16-g128-sym", Scheme(integer_weight(4, Group(128), symmetric=True))),
        ("W4A16-g32-asym-actorder", Scheme(integer_weight(4, Group(32), symmetric=False, ordered=True))),
        ("W8A8-int8-dyn", SHORTHANDS["W8A8-int8-dyn"]),
        ("W8A8-fp8-block128", SHORTHANDS["W8A8-fp8-block128"]),
        ("W4A16-nf4-g64", Scheme(TensorScheme(Codebook("nf4"), (Level(Group(64)),)))),
        ("W4A16-gguf:q4_k", Scheme(TensorScheme(Block("q4_k")))),
    ],
)
def test_documented_names(text: str, scheme: Scheme) -> None:
    assert str(scheme) == text and Scheme.parse(text) == scheme


def test_presets_and_shorthands_are_schemes() -> None:
    for name, scheme in {**PRESETS, **SHORTHANDS}.items():
        assert Scheme.parse(name) == scheme


def test_schemes_are_frozen() -> None:
    scheme = PRESETS["W4A16"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.input = None  # type: ignore[misc]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Int(9, True),
        lambda: Group(0),
        lambda: Float("e9m9"),
        lambda: Block("q9_9"),
        lambda: TensorScheme(Block("q4_0"), (Level(Group(32)),)),
        lambda: TensorScheme(Float("e4m3fn"), (Level(PerTensor()),), zero="stored"),
        lambda: TensorScheme(Int(4, True), (Level(PerChannel()),), ordered=True),
        lambda: Scheme(TensorScheme(Int(8, True), (Level(PerChannel()),), dynamic=True)),
    ],
)
def test_contradictions_are_errors(make: object) -> None:
    with pytest.raises(ValueError, match=r".+"):
        make()  # type: ignore[operator]
