"""qcore bench linear: rows, peers, the picture, and bad questions."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import command
from qcore.bench.linear import Question, measure
from qcore.model.devices import find_device
from qcore.scheme import Scheme


def rows(scheme: str, **more: Any) -> list[dict[str, Any]]:
    question = Question((Scheme.parse(scheme),), (1, 5), ((64, 96),), torch.bfloat16, cold=1 << 16, rounds=2, **more)
    return list(measure(question, find_device("cpu")))


@pytest.mark.parametrize("scheme", ["W4A16-g32-sym", "W8A8-int8-dyn", "W8A8-fp8-dyn", "W8A16-gguf:q8_0"])
def test_a_row_for_each_batch(scheme: str) -> None:
    found = rows(scheme, peers=True)
    assert [row["m"] for row in found] == [1, 5] and all(row["n"] == 64 and row["k"] == 96 for row in found)
    for row in found:
        assert row["seconds"] > 0 and row["cpu_seconds"] > 0 and row["relative_error"] < 0.02
        assert row["tops"] == pytest.approx(2 * row["m"] * 64 * 96 / row["seconds"] / 1e12)
        dense = row["peers"]["dense bfloat16"]
        assert row["vs_bf16"] == pytest.approx(dense["seconds"] / row["seconds"])
        assert all(peer["relative_error"] < 0.05 for peer in row["peers"].values())


def test_peers_are_the_other_kernels_that_take_the_layer() -> None:
    found = {name for row in rows("W4A16-g32-sym", peers=True) for name in row["peers"]}
    alone = {name for row in rows("W4A16-g32-sym") for name in row["peers"]}
    assert alone == {"dense bfloat16"} < found


def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    return command("bench", "linear", *arguments)


def test_json_and_picture(tmp_path: Path) -> None:
    done = ask("--scheme", "W4A16-g32-sym", "--m", "1", "--shape", "64x64", "--cold", "1", "--rounds", "1", "--threads", "1",
               "--plot", str(tmp_path / "roof.png"), "--json")  # fmt: skip
    answer = json.loads(done.stdout)
    assert set(answer["limits"]) == {"read_gbps", "int8_tops", "bf16_tflops"} and min(answer["limits"].values()) > 0
    assert answer["threads"] == 1 and answer["rows"][0]["scheme"] == "W4A16-g32-sym"
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--m", "0"),
        ("--shape", "12"),
        ("--shape", "0x8"),
        ("--scheme", "W4A16-x"),
        ("--dtype", "float64"),
        ("--threads", "-1"),
    ],
)
def test_bad_questions_are_refused(arguments: tuple[str, str]) -> None:
    done = ask(*arguments)
    assert done.returncode == 2 and "refused" in done.stderr and "Traceback" not in done.stderr
