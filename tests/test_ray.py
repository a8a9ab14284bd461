"""Calibrated runs as Ray tasks: the same bytes as those of one process, with a worker that is killed; and what is refused."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import command
from golden_checkpoints import FOLDERS
from qcore.calibration.engine import engine_of
from qcore.calibration.run import quantize
from qcore.refusal import Refused
from test_calibrated_experts import mixture, written

BASE = FOLDERS[0] / "base"
TEXT = (FOLDERS[0] / "text.txt").read_text(encoding="utf-8")[:6000]


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.mark.alone
def test_two_workers_of_which_one_is_killed_give_the_same_bytes(tmp_path: Path) -> None:
    """Of a dense model in three parts of windows, and of a mixture whose experts some windows do not reach, with learned roundings."""
    experts = written(mixture("mixtral", num_experts_per_tok=1), tmp_path / "experts")
    requests: list[dict[str, Any]] = [
        {"model": str(BASE), "scheme": "W4A16-g128-sym", "algorithm": "gptq", "calibration": TEXT, "samples": 20, "seqlen": 64},
        {"model": str(experts), "scheme": "W4A16-g32-sym", "algorithm": "auto_round", "calibration": TEXT, "samples": 12, "seqlen": 16, "iterations": 2},
    ]  # fmt: skip
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    driver = Path(__file__).with_name("ray_driver.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local"}
    process = subprocess.run([sys.executable, driver, tmp_path], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number, request in enumerate(requests):
            quantize(**request, out=tmp_path / f"local-{number}")
            assert digests(tmp_path / f"out-{number}") == digests(tmp_path / f"local-{number}")
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "killed").exists()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["order"] == [0, 1, 1, 2, 1, 3, 4, 1, 5, 6, 1]
    assert found["refused"] == {"code": "bad-content", "kind": "bad-file", "subject": "x", "reason": "a reason", "fact": "a fact", "fix": "a fix", "tensor": "t"}  # fmt: skip
    assert found["versions"]["code"] == "engine-failed" and found["versions"]["fact"].endswith("expected 0.1")
    assert found["threads"]["fact"] == "found 2, expected 3"


def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    asked = ("quantize", BASE, "--scheme", "W4A16", "-o", tmp_path / "out")
    for more, message in (
        (("--engine", "ray"), "goes with calibration"),
        (("--engine", "magic", "--calibration", text), "no engine of this name"),
        (("--engine", "ray", "--calibration", text, "--seqlen", 64), "[engine-failed, usage]"),
    ):
        refused = command(*asked, *more, RAY_ADDRESS="127.0.0.1:1")
        assert refused.returncode == 2 and message in refused.stderr and "Traceback" not in refused.stderr
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Refused, match=r"pip install 'qcore\[ray\]'"):
        engine_of("ray")
    quantize(BASE, "W4A16", calibration=TEXT, out=tmp_path / "out", samples=1, seqlen=16, engine="local")
