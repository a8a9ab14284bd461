"""qcore eval --harness. lm_eval is not needed: a small one with its names stands in, and answers by the model that it is given."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from commands import command as qcore
from qcore.cli.harness import harness_command
from qcore.cli.scoring import Loading
from qcore.integrations.lm_eval import Asked, Harness, Score, scores
from qcore.model.devices import find_device
from qcore.refusal import Refused

GOLDEN = Path(__file__).parent / "golden"
GGUF = GOLDEN / "gguf-q4_0"
SENTENCES = ("The jury said on Friday", "He went to the city", "A bill on taxes")


class Task:
    def __init__(self, name: str, unsafe: bool = False) -> None:
        self.task_name, self.UNSAFE_CODE = name, unsafe


class TaskManager:
    """lm_eval 0.4.13's, as far as it is used."""

    all_tasks = ("arc_easy", "hellaswag", "humaneval", "arc", "hub_only")

    def __init__(self, include_path: str | None = None) -> None:
        self.include_path = include_path

    def match_tasks(self, task_list: list[str]) -> list[str]:
        from fnmatch import fnmatch

        return sorted(name for name in self.all_tasks for word in task_list if fnmatch(name, word))

    def load(self, task_list: list[str]) -> dict[str, Any]:
        if "hub_only" in task_list:
            raise ConnectionError("Couldn't reach 'a/b' on the Hub")
        groups = {"arc": SimpleNamespace(name="arc")} if "arc" in task_list else {}
        names = {("arc_easy" if name == "arc" else name) for name in task_list}
        tasks = {name: Task(name, unsafe=name == "humaneval") for name in sorted(names)}
        return {"tasks": tasks, "groups": groups, "group_map": {"arc": ["arc_easy"]} if groups else {}}


class HFLM:
    def __init__(self, pretrained: Any, tokenizer: Any = None, batch_size: int = 1) -> None:
        self.model, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size
        self.model.tie_weights()  # lm_eval's does


def simple_evaluate(
    model: HFLM,
    tasks: list[Any] | None = None,
    num_fewshot: int | None = None,
    limit: int | float | None = None,
    log_samples: bool = True,
) -> dict[str, Any]:
    """The mean of -ln p of sentences, under the names that lm_eval has for results."""
    assert not log_samples, "all answers would be kept"
    losses = []
    for sentence in SENTENCES[:limit]:
        ids = torch.tensor([model.tokenizer(sentence)["input_ids"]])
        with torch.no_grad():
            losses.append(float(model.model(input_ids=ids, labels=ids).loss))
    names = [getattr(item, "task_name", None) or item.name for item in tasks or []]
    values = {"alias": "x", "loss,none": sum(losses) / len(losses), "loss_stderr,none": "N/A",
              "acc,strict": 0.5, "acc_stderr,strict": 0.25}  # fmt: skip
    return {
        "results": dict.fromkeys(names, values),
        "n-shot": dict.fromkeys(names, num_fewshot or 0),
        "n-samples": {name: {"original": len(SENTENCES), "effective": len(losses)} for name in names},
    }


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: dict[str, dict[str, Any]] = {
        "lm_eval": {"simple_evaluate": simple_evaluate, "__version__": "0.4.13"},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": HFLM},
        "lm_eval.tasks": {"TaskManager": TaskManager},
    }
    for name, facts in parts.items():
        module = ModuleType(name)
        vars(module).update(facts)
        monkeypatch.setitem(sys.modules, name, module)


def refused(asked: Asked) -> Any:
    with pytest.raises(Refused) as caught:
        Harness(asked)
    return caught.value.refusal


def test_without_lm_eval_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    found = refused(Asked("hellaswag"))
    assert (found.code, found.kind, found.fix) == ("missing-package", "missing-dep", "pip install 'qcore[harness]'")


def test_an_old_lm_eval(lm_eval: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(TaskManager, "load")
    found = refused(Asked("hellaswag"))
    assert found.code == "missing-package" and "expected 0.4.13" in found.fact


@pytest.mark.parametrize(
    ("tasks", "code", "clue"),
    [
        ("helaswag", "bad-argument", "Did you mean hellaswag"),
        ("zzzz", "bad-argument", "lm_eval ls tasks"),
        (" , ", "bad-argument", "Example"),
        ("no/such.yaml", "bad-argument", "no/such.yaml"),
        ("arc_easy,hub_only", "task-unavailable", "Couldn't reach 'a/b' on the Hub"),
        ("humaneval", "task-unavailable", "code that the model writes"),
    ],
)
def test_tasks_that_cannot_be_run(lm_eval: None, tasks: str, code: str, clue: str) -> None:
    found = refused(Asked(tasks))
    assert found.code == code and found.fix and clue in str(found)


def test_a_folder_of_tasks_that_is_not_there(lm_eval: None, tmp_path: Path) -> None:
    assert refused(Asked("arc_easy", tmp_path / "none")).code == "path-not-found"


def test_names_patterns_files_and_groups(lm_eval: None, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("task: own")
    items = Harness(Asked(f"arc*, hellaswag,{file},hellaswag")).items
    names = [getattr(item, "task_name", None) or item.name for item in items]
    assert names == ["arc", str(file), "hellaswag"]  # arc_easy is the group's


def test_a_loaded_model_answers(lm_eval: None, capsys: pytest.CaptureFixture[str]) -> None:
    import qcore

    loading = Loading(find_device("cpu"), "float32", "exact")
    asked = Asked("arc_easy,hellaswag", limit=2, fewshot=3, batch=4)
    harness_command(str(GGUF), asked, loading, json=True)
    rows = [Score(**row) for row in json.loads(capsys.readouterr().out)["tasks"]]
    assert [(row.task, row.metric, row.filter) for row in rows] == [
        (task, *metric) for task in ("arc_easy", "hellaswag") for metric in (("loss", "none"), ("acc", "strict"))
    ]
    checkpoint = qcore.open_checkpoint(GGUF)
    model, tokenizer = qcore.load_model(checkpoint, "cpu", "float32"), checkpoint.load_tokenizer()
    with torch.no_grad():
        ids = [torch.tensor([tokenizer(sentence)["input_ids"]]) for sentence in SENTENCES[:2]]
        mean = sum(float(model(input_ids=row, labels=row).loss) for row in ids) / 2
    assert math.isclose(rows[0].value, mean, rel_tol=1e-6) and rows[0].stderr is None
    assert (rows[1].value, rows[1].stderr, rows[1].fewshot, rows[1].samples) == (0.5, 0.25, 3, 2)
    harness_command(str(GGUF), Asked("arc_easy", limit=1), loading, json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["task", "metric", "filter", "value", "stderr", "shots", "questions"]
    assert lines[2].split() == ["arc_easy", "acc", "strict", "0.5", "0.25", "0", "1"]


class Untieable(torch.nn.Module):
    def tie_weights(self) -> None:
        raise AttributeError("a quantized embedding has no weight")


def test_weights_are_not_tied_again_and_the_model_is_as_it_was(lm_eval: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = Untieable()
    harness = Harness(Asked("arc_easy", batch=4))
    monkeypatch.setattr(harness, "_evaluate", lambda wrapped, **options: {"results": {}, "given": wrapped})
    assert harness.run(model, None) == []  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="no weight"):
        model.tie_weights()


def test_a_group_has_no_questions_of_its_own() -> None:
    found = scores(
        {"results": {"mmlu": {"acc,none": 1, "acc_stderr,none": 0.1, "alias": "mmlu"}}, "n-shot": {"mmlu": 5}}
    )
    assert found == [Score("mmlu", "acc", "none", 1.0, 0.1, 5, None)]


@pytest.mark.parametrize(
    ("arguments", "clue"),
    [([], "--harness"), (["--harness", "arc_easy", "--text", "t.txt"], "--text"),
     (["--harness", "arc_easy", "--reference", GGUF], "--reference"), (["--harness", "arc_easy", "--limit", "0"], "--limit")],
)  # fmt: skip
def test_wrong_usage(arguments: list[object], clue: str) -> None:
    done = qcore("eval", GGUF, *arguments)
    assert done.returncode == 2 and clue in done.stderr and "Traceback" not in done.stderr
