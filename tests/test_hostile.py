"""Every hostile file is refused by name, within a second and 64 MiB, and never with another exception."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import qcore
from hostile import Case, cases

CASES = cases()


def test_the_corpus_is_large_and_its_names_unique() -> None:
    assert len(CASES) >= 200
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case, tmp_path: Path) -> None:
    path = case.write(tmp_path)
    began = time.perf_counter()
    with pytest.raises(qcore.Refused) as caught:
        qcore.open_checkpoint(path)
    assert time.perf_counter() - began < 1.0
    refusal = caught.value.refusal
    assert refusal.code == case.code
    assert str(tmp_path) in refusal.subject and refusal.reason and refusal.fix


PROBE = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import qcore, qcore.checkpoint.open
from qcore.discovery import registry
from hostile import cases
registry()
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
folder = Path(sys.argv[2])
before, worst = peak(), ("", 0)
for i, case in enumerate(cases()):
    place = folder / str(i)
    place.mkdir()
    path = case.write(place)
    start = peak()
    try:
        qcore.open_checkpoint(path)
    except qcore.Refused:
        pass
    worst = max(worst, (case.name, peak() - start), key=lambda pair: pair[1])
print(peak() - before, worst)
assert "torch" not in sys.modules
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_stays_small(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(Path(__file__).parent), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) < 64 * 1024, done.stdout
