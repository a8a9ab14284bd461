"""torch's operators on Intel GPUs: that the installed torch declares them, and kernels on what stands in for them."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.resources import files

import pytest
import torch

from qcore.discovery import registry
from qcore_xpu import ipex, operators, stand_in
from qcore_xpu.operators import OPERATORS, available

KERNELS = [kernel.name for kernel, plugin in registry().kernels if plugin == "xpu"]


@pytest.mark.parametrize("operator", OPERATORS.values())
def test_torch_declares_it_for_intel_gpus(operator: str) -> None:
    """In the table that every build of torch carries."""
    table = files("torchgen").joinpath("packaged/ATen/native/native_functions.yaml").read_text()
    (entry,) = (part for part in table.split("\n- func: ") if part.startswith(f"{operator}("))
    assert f" XPU: {operator.removesuffix('_with_scales_and_zeros')}_xpu" in entry


def test_a_torch_for_the_cpu_has_none_of_them() -> None:
    assert available() == frozenset()


def test_every_feature_has_a_double() -> None:
    assert set(stand_in._DOUBLES) == set(OPERATORS)


@pytest.mark.parametrize(
    ("operator", "given", "fault"),
    [
        ("int4pack", lambda: (torch.zeros(2, 64), torch.zeros(4, 64, dtype=torch.int32), 32, torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.int8)), "int32"),
        ("int4pack", lambda: (torch.zeros(2, 64), torch.zeros(4, 8, dtype=torch.int32), 16, torch.zeros(4, 4), torch.zeros(4, 4, dtype=torch.int8)), "groups"),
        ("int8pack", lambda: (torch.zeros(2, 64), torch.zeros(64, 4, dtype=torch.int8).t(), torch.zeros(4)), "codes"),
        ("int_mm", lambda: (torch.zeros(2, 64), torch.zeros(64, 4, dtype=torch.int8)), "int8"),
        ("scaled_mm", lambda: (torch.zeros(2, 24).to(torch.float8_e4m3fn), torch.zeros(16, 24).to(torch.float8_e4m3fn).t(), torch.ones(1), torch.ones(1)), "multiples"),
    ],
)  # fmt: skip
def test_a_double_takes_what_the_operator_takes(operator: str, given, fault: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=fault):
        stand_in._DOUBLES[operator](*given())


def test_nothing_stands_in_for_a_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="nothing stands in"):
        stand_in.load.__wrapped__()


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name.startswith("xpu_")])
def test_kernels_on_the_stand_in(kernel: str) -> None:
    """In a process of its own, for operators of the CPU are overridden."""
    command = [sys.executable, "-m", "qcore", "verify", "--plugin", "xpu", "--simulate", "--kernel", kernel, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    findings = json.loads(done.stdout)["findings"]
    assert findings and {finding["device"] for finding in findings} == {"xpu-stand-in"}
    assert not any(finding["failures"] for finding in findings) and min(finding["cases"] for finding in findings) >= 18


def test_rows_name_features_that_a_device_can_have() -> None:
    known = {*operators.OPERATORS, *ipex.OPERATORS, "xmx"}
    for kernel, plugin in registry().kernels:
        if plugin == "xpu":
            assert set().union(*kernel.features) <= known
