"""Patterns from configs: real ones match as re.match does, hostile ones are refused at once."""

import re
import time
from pathlib import Path

import pytest

import qcore
from qcore.checkpoint.patterns import matches

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
    ],
)
def test_hostile_patterns(pattern: str, code: str) -> None:
    began = time.perf_counter()
    with pytest.raises(qcore.Refused) as caught:
        matches(pattern, "a" * 60 + "!", file=Path("config.json"), field="ignore")
    assert caught.value.refusal.code == code and caught.value.refusal.field == "ignore"
    assert time.perf_counter() - began < 1
