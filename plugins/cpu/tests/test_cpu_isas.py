"""The conformance suite on the instruction sets that this processor has besides its best, which the other tests run on."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from qcore_cpu.library import ISA_VARIABLE, status

OTHERS = status().available[1:]
ROWS = ("gptq", "bitsandbytes", "fp8_w8a8", "gguf", "nvfp4", "mxfp4", "int8_w8a8")

pytestmark = pytest.mark.skipif(not OTHERS, reason="no other instruction set here")


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("isa", OTHERS)
def test_a_row_of_the_matrix(isa: str, row: str) -> None:
    environment = os.environ | {ISA_VARIABLE: isa, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "qcore", "verify", "--plugin", "cpu", "--row", row, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    findings = json.loads(done.stdout)["findings"]
    assert any(finding["kernel"].startswith("native_") for finding in findings)
    assert not [finding for finding in findings if finding["failures"]]


@pytest.mark.parametrize("isa", OTHERS)
def test_it_is_the_one_in_use(isa: str) -> None:
    environment = os.environ | {ISA_VARIABLE: isa}
    command = [sys.executable, "-c", "from qcore_cpu.library import status; print(status().isa)"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == isa
