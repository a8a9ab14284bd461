"""qcore bench model: rows, a peer that fails, and bad questions."""

import json
from pathlib import Path

import pytest

from commands import command
from qcore.bench import model
from qcore.bench.model_probe import Task

GGUF = Path(__file__).parent / "golden" / "gguf-q4_0" / "tiny-q4_0.gguf"


def test_a_row_for_each_contender() -> None:
    done = command(
        "bench", "model", GGUF, "--prompt-tokens", 5, "--new-tokens", 3, "--rounds", 1, "--threads", 1, "--json"
    )
    answer = json.loads(done.stdout)
    assert (answer["threads"], answer["prompt_tokens"], answer["new_tokens"]) == (1, 5, 3)
    (row,) = answer["rows"]
    assert row["name"] == "qcore" and row["by"] in ("native_decoder", "the model")
    assert min(row[key] for key in model.MEDIANS) > 0 and row["peak_rss_mib"] >= row["baseline_rss_mib"]


def test_several_texts_at_once() -> None:
    done = command(
        "bench", "model", GGUF, "--prompt-tokens", 5, "--new-tokens", 3, "--texts", 3, "--rounds", 1, "--json"
    )
    answer = json.loads(done.stdout)
    (row,) = answer["rows"]
    assert answer["texts"] == 3 and row["by"] in ("native_decoder", "the model")
    assert min(row[key] for key in model.MEDIANS) > 0
    tokens = Task("model", 1, 5, 3, "auto", "exact", 3).tokens(128)
    assert len({tuple(text) for text in tokens}) == 3 and {len(text) for text in tokens} == {8}


def test_peers_take_turns_and_one_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def turn(name: str, task: Task) -> dict[str, object]:
        asked.append(name)
        if name == "transformers":
            return {"failed": "ValueError: no such model"}
        return {"name": name, "by": name, **dict.fromkeys(model.MEDIANS, float(len(asked)))}

    asked: list[str] = []
    monkeypatch.setattr(model, "_turn", turn)
    rows = model.measure(Task("model", 1, 4, 4, "checkpoint", "exact"), True, 3, lambda line: None)
    assert asked == ["qcore", "transformers", "qcore", "qcore"]
    assert rows[0]["load_s"] == 3 and rows[1] == {"name": "transformers", "failed": "ValueError: no such model"}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--new-tokens", 1), 2),
        (("--rounds", 0), 2),
        (("--texts", 0), 2),
        (("--activations", "int3"), 2),
        (("--dtype", "int8"), 2),
    ],
)
def test_bad_questions_are_refused(arguments: tuple[object, ...], code: int) -> None:
    done = command("bench", "model", GGUF, *arguments)
    assert done.returncode == code and "Traceback" not in done.stderr and done.stderr


def test_a_model_that_is_not_there_is_refused() -> None:
    done = command("bench", "model", "nowhere.gguf", "--rounds", 1, "--threads", 1, "--json")
    assert done.returncode != 0 and json.loads(done.stdout)["refusal"]["code"] == "path-not-found"
