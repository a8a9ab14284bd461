"""Checkpoints of every format and variant, changed by Hypothesis: each is decoded whole, or refused by name.

An example takes about a millisecond, and one that takes a second fails: nothing that a file says may hang its reader.
tools/fuzz.py does the same for as long as one likes, led by the code that is reached.
"""

import random
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qcore
from mutations import Sample, mutated, mutated_gguf, put_files
from qcore.checkpoint.gguf import GgufSource
from variants import VARIANTS, format_of, made, read_all

EXAMPLES, LEAST = 2000, 500
"""Of every format together, and of each of its variants."""
VARIANTS_OF = Counter(map(format_of, VARIANTS))
SLOWEST = 1.0
"""Seconds of the processor: a busy machine is no hang."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_changed_checkpoints_are_read_or_refused(variant: str, tmp_path: Path) -> None:
    whole = made(variant, tmp_path / "whole")
    read_all(whole)
    folder, seen, refused = tmp_path / "changed", 0, 0
    examples = max(LEAST, -(-EXAMPLES // VARIANTS_OF[format_of(variant)]))
    folder.mkdir()
    if packed := variant.startswith("gguf"):
        data = (whole / "model.gguf").read_bytes()
        header = min(info.offset for info in GgufSource.open(whole / "model.gguf").tensors.values())
    else:
        sample = Sample.read(whole)

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @given(st.randoms(use_true_random=True))
    def check(chance: random.Random) -> None:
        nonlocal seen, refused
        files = {"model.gguf": mutated_gguf(data, header, chance)} if packed else mutated(sample, chance)
        put_files(folder, files)
        seen, began = seen + 1, time.process_time()
        try:
            read_all(folder)
        except qcore.Refused as error:
            refused += 1
            refusal = error.refusal
            assert refusal.reason and refusal.fix and str(folder) in refusal.subject, refusal
        assert time.process_time() - began < SLOWEST

    check()
    assert seen >= examples
    assert examples // 5 < refused < examples * 19 // 20, "changes must matter, and not all of them"
