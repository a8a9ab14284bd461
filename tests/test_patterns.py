"""Patterns from configs: real ones match as re.match does, hostile ones are refused at once."""

import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qcore
from qcore.checkpoint.patterns import matches, wildcard
from qcore.checkpoint.regular import matches_regular, parser

pytestmark = pytest.mark.alone
REAL = [
    r".*\.down_proj.*", r".*\.1\.self_attn\.k_proj.*", r".*lm_head", r"model\.layers\.\d+\.mlp\.(gate|up)_proj$", r".*mlp\.gate$",
    r"^(?!.*visual).*(?:self_attn|mlp|linear_attn).*(?:q|k|v|o|gate|up|down)_proj.*$", r"(?:model\.)?layers\.[0-3]\..*", r".*",
]  # fmt: skip
NAMES = [
    "lm_head",
    "model.layers.1.self_attn.k_proj",
    "model.layers.12.mlp.down_proj",
    "model.layers.0.mlp.gate",
    "visual.a",
]


@pytest.mark.parametrize("pattern", REAL)
def test_real_patterns(pattern: str) -> None:
    for name in NAMES:
        assert matches(pattern, name, file=Path("config.json"), field="ignore") == bool(re.match(pattern, name))


@pytest.mark.parametrize(
    ("pattern", "code"),
    [
        ("(", "bad-field"),
        ("[z-a]", "bad-field"),
        ("*", "bad-field"),
        ("(?P<a>x)(?P<a>y)", "bad-field"),
        ("(a+)+$", "limit-exceeded"),
        ("(a*)*b", "limit-exceeded"),
        ("((a|b)*c*)*d", "limit-exceeded"),
        ("(.*,){200}x", "limit-exceeded"),
        ("(?:(?:a{1,1000}){1,1000}){1,1000}b", "limit-exceeded"),
        (".*" * 20 + "x", "limit-exceeded"),
        ("a" * 2000, "limit-exceeded"),
        ("(?:(?=.*.*!).)*!", "limit-exceeded"),
        (r"(?i)(\w\w?)*!", "limit-exceeded"),
        (r"(\w\w?)*(\w)\2!", "limit-exceeded"),
    ],
)
def test_hostile_patterns(pattern: str, code: str) -> None:
    began = time.process_time()
    with pytest.raises(qcore.Refused) as caught:
        matches(pattern, "a" * 60 + "!", file=Path("config.json"), field="ignore")
    assert caught.value.refusal.code == code and caught.value.refusal.field == "ignore"
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "pattern",
    [r"(\w\w?)*!", r"(a|aa|b)*c", ".*.*.*.*.*.*.*.*!", "(a{1,100}){1,100}b", "(a?){90}" * 9 + "b", r"(\w\w?)*(?<=a)!",
     "(?=.*(?=.*(?=.*(?=.*(?=.*!))))).*!", "(?:(?:.?.?(?=.?.?)){90}){500}!"],
)  # fmt: skip
@pytest.mark.parametrize("anywhere", [False, True])
def test_what_backtracking_would_not_end_is_matched_without(pattern: str, anywhere: bool) -> None:
    began = time.process_time()
    for name, expected in (("a" * 60, False), ("a" * 500, False), ("a" * 60 + pattern[-1], True)):
        assert matches(pattern, name, file=Path("config.json"), field="ignore", anywhere=anywhere) == expected
    assert time.process_time() - began < 2


ATOMS = st.sampled_from(
    [
        *"ab.",
        r"\w",
        r"\d",
        r"\W",
        "[ab]",
        "[^a]",
        r"[\d_]",
        "^",
        "$",
        r"\b",
        r"\B",
        "(?=a)",
        "(?!b)",
        "(?=.*b)",
        "(?!a*b)",
        "(?<=a)",
        "(?<![ab]_)",
        "(?=b(?=.*(?<=a)))",
    ]
)
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{2,}"])).map(
            lambda p: f"(?:{p[0]}){p[1]}"
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=1000, deadline=None)
@given(PATTERNS, st.text("ab1_ \n", min_size=1, max_size=8))  # of an empty text, what \B means changed in Python 3.14
def test_matching_without_backtracking_is_the_same(pattern: str, text: str) -> None:
    for anywhere, expected in ((False, re.match(pattern, text)), (True, re.search(pattern, text))):
        assert matches_regular(parser.parse(pattern), text, anywhere=anywhere) == (expected is not None), pattern


def test_wildcards_are_bounded() -> None:
    assert wildcard("*up_proj", "model.up_proj", file=Path("config.json"), field="ignore")
    for pattern in ("[" * 100_000, "?*" * 50_000):
        began = time.process_time()
        with pytest.raises(qcore.Refused, match="limit-exceeded"):
            wildcard(pattern, "a" * 60, file=Path("config.json"), field="ignore")
        assert time.process_time() - began < 0.5
