"""Checkpoints of every format and variant, changed at random: each is decoded whole, or refused by name.

An example takes about a millisecond, and one that takes seconds fails: nothing that a file says may hang its reader.
"""

import random
import time
from pathlib import Path

import pytest

import qcore
from mutations import Sample, mutated, mutated_gguf
from qcore.checkpoint.gguf import GgufSource
from variants import VARIANTS, made, read_all

EXAMPLES = 2000
SLOWEST = 2.0
"""Seconds; a hang is what is looked for, and a busy machine is none."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_changed_checkpoints_are_read_or_refused(variant: str, tmp_path: Path) -> None:
    whole = made(variant, tmp_path / "whole")
    read_all(whole)
    folder, refused = tmp_path / "changed", 0
    folder.mkdir()
    if packed := variant.startswith("gguf"):
        data = (whole / "model.gguf").read_bytes()
        header = min(info.offset for info in GgufSource.open(whole / "model.gguf").tensors.values())
    else:
        sample = Sample.read(whole)
    for seed in range(EXAMPLES):
        chance = random.Random(f"{variant} {seed}")
        files = {"model.gguf": mutated_gguf(data, header, chance)} if packed else mutated(sample, chance)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        began = time.perf_counter()
        try:
            read_all(folder)
        except qcore.Refused as error:
            refused += 1
            refusal = error.refusal
            assert refusal.reason and refusal.fix and str(folder) in refusal.subject, refusal
        except Exception as error:
            pytest.fail(f"{variant}, seed {seed}: {type(error).__name__}: {error}")
        assert time.perf_counter() - began < SLOWEST, seed
    assert EXAMPLES // 5 < refused < EXAMPLES * 19 // 20, "changes must matter, and not all of them"
