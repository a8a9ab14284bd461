"""The bounded JSON reader against Python's own parser."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qcore
from qcore.checkpoint.json_file import parse_json, read_json


def nested(value: object) -> int:
    """Levels of lists and objects in one another."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(nested, inner), default=0)


texts = st.text(alphabet='ab"\\[]{},\u00e9\U0001f600\n', max_size=8)
values = st.recursive(
    st.none() | st.floats() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    value=st.dictionaries(texts, values, max_size=4),
    cuts=st.lists(st.integers(1, 7), min_size=1, max_size=9),
    ascii_only=st.booleans(),
)
def test_json_is_scanned_as_it_is_parsed(value: dict[str, object], cuts: list[int], ascii_only: bool) -> None:
    data = json.dumps(value, ensure_ascii=ascii_only).encode()
    pieces, at = [], 0
    for cut in itertools.cycle(cuts):
        pieces.append(data[at : at + cut])
        at += cut
        if at >= len(data):
            break
    depth = nested(value)
    assert repr(parse_json(pieces, file=Path("x.json"), max_depth=depth)) == repr(value)
    with pytest.raises(qcore.Refused, match="nests too deeply"):
        parse_json(pieces, file=Path("x.json"), max_depth=depth - 1)


def test_numbers_that_python_writes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    value = {"limits": [float("inf"), float("-inf")], "none": float("nan"), "large": 10**30, "text": "é😀"}
    path.write_text(json.dumps(value))
    assert repr(read_json(path)) == repr(value)


def test_a_long_index_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    names = (f"model.layers.{i}.mlp.experts.{j}.down_proj.weight_packed" for i in range(60) for j in range(1000))
    value = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    path.write_text(json.dumps(value, indent=2))
    assert read_json(path) == value
    with pytest.raises(qcore.Refused, match="limit-exceeded"):
        read_json(path, max_bytes=1 << 20)
