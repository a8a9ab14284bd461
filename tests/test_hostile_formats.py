"""Every format's hostile checkpoints are refused by name and place, within a second and 64 MiB, wherever they are read."""

import subprocess
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

import qcore
from hostile_configs import config_cases
from hostile_tensors import Change, tensor_cases
from mutations import Sample, put_files
from qcore.refusal import Refusal
from variants import FORMATS, format_of, made, read_all

CASES = [*tensor_cases(), *config_cases()]
pytestmark = pytest.mark.alone


@cache
def sample(variant: str) -> Sample:
    with TemporaryDirectory() as folder:
        return Sample.read(made(variant, Path(folder)))


def write(variant: str, change: Change, folder: Path) -> Path:
    changed = sample(variant).copy()
    change(changed)
    put_files(folder, changed.files())
    return folder


def test_the_corpus_has_every_format() -> None:
    assert len(CASES) >= 1000
    assert len({(variant, what) for variant, what, _, _ in CASES}) == len(CASES)
    count = Counter(format_of(variant) for variant, *_ in CASES)
    # test_hostile.py has GGUF's, and formats that are quantized at load or stacked have theirs beside their own tests
    own = {"gguf", "deepspeedfp", "inc", "mxfp4"}
    assert all(count[name] >= 10 for name in FORMATS if name not in own), count


@pytest.mark.parametrize(("variant", "what", "code", "change"), CASES, ids=[f"{c[0]}: {c[1]}"[:80] for c in CASES])
def test_refused(variant: str, what: str, code: str, change: Change, tmp_path: Path) -> None:
    path = write(variant, change, tmp_path)
    began = time.process_time()
    with pytest.raises(qcore.Refused) as caught:
        read_all(path)
    assert time.process_time() - began < 1.0
    refusal: Refusal = caught.value.refusal
    assert refusal.code == code, refusal
    assert refusal.file and refusal.file.startswith(str(tmp_path)) and (refusal.field or refusal.tensor), refusal
    assert refusal.reason and refusal.fix and len(str(refusal)) < 4000


PROBE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import qcore
from test_hostile_formats import CASES, sample, write
from variants import read_all
def memory(line):
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(text.split()[1]) for text in status if text.startswith(line))
for variant in {case[0] for case in CASES}:
    read_all(write(variant, lambda sample: None, Path(sys.argv[2])))
before = memory("VmRSS")
for variant, what, code, change in CASES:
    try:
        read_all(write(variant, change, Path(sys.argv[2])))
    except qcore.Refused:
        pass
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_stays_small(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROBE, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 * 1024, done.stdout
