"""EleutherAI's lm_eval (lm-evaluation-harness) on a model that qcore loaded. Tried with lm_eval 0.4.13."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.refusal import Refusal, Refused

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PLACE = "--harness"


@dataclass(frozen=True)
class Asked:
    """tasks: names, patterns and YAML files, with commas between. folder: more tasks than lm_eval's own. limit: questions of each
    task, from its first on. fewshot: examples before a question, in place of the task's own number. batch: questions that the model reads at once."""

    tasks: str
    folder: Path | None = None
    limit: int | None = None
    fewshot: int | None = None
    batch: int = 1


@dataclass(frozen=True)
class Score:
    """One metric of a task or group. filter: what lm_eval did to answers before (`none`: nothing). stderr: the standard error, where
    lm_eval estimates it. samples: questions asked; None for a group."""

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    fewshot: int | None
    samples: int | None


class Harness:
    """lm_eval's tasks, loaded with their data. Raises Refused: missing-package without lm_eval, bad-argument where there is no such task,
    task-unavailable where it, or its data, cannot be had, or it runs code that the model writes."""

    def __init__(self, asked: Asked) -> None:
        try:
            import lm_eval
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise Refused(Refusal("missing-package", "missing-dep", _PLACE, "tasks are run by lm_eval", str(error),
                                  "pip install 'qcore[harness]'")) from error  # fmt: skip
        if not hasattr(TaskManager, "load"):
            raise Refused(Refusal("missing-package", "missing-dep", _PLACE, "lm_eval is too old", f"found {lm_eval.__version__}, expected 0.4.13",
                                  "pip install --upgrade 'qcore[harness]'"))  # fmt: skip
        self._evaluate, self._model = lm_eval.simple_evaluate, HFLM
        self.asked = asked
        if asked.folder is not None and not asked.folder.is_dir():
            raise Refused(Refusal("path-not-found", "bad-file", str(asked.folder), "there is no such folder of tasks",
                                  fix="Name a folder with lm_eval's YAML files.", file=str(asked.folder)))  # fmt: skip
        manager = TaskManager(include_path=None if asked.folder is None else str(asked.folder))
        self.items = _loaded(manager, _names(manager, asked.tasks))

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Score]:
        with _tied(model):
            wrapped = self._model(pretrained=model, tokenizer=tokenizer, batch_size=self.asked.batch)
        found = self._evaluate(
            wrapped, tasks=self.items, num_fewshot=self.asked.fewshot, limit=self.asked.limit, log_samples=False
        )
        return scores(found)


@contextmanager
def _tied(model: PreTrainedModel) -> Iterator[None]:
    """HFLM ties the weights of what it is given, which are tied already, and quantized ones have no parameter to share."""
    model.tie_weights = lambda: None
    try:
        yield
    finally:
        del model.tie_weights


def scores(found: dict[str, Any]) -> list[Score]:
    """Of what `simple_evaluate` returns: of each task and group, the values of `METRIC,FILTER`, beside them `METRIC_stderr,FILTER`."""
    rows = []
    for task, values in found["results"].items():
        samples = found.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{chosen}")
            stderr = None if error is None or isinstance(error, str) else float(error)  # a text says that there is none
            shots = found.get("n-shot", {}).get(task)
            rows.append(Score(task, metric, chosen, float(value), stderr, shots, samples))
    return rows


def _names(manager: Any, tasks: str) -> list[str]:
    """What lm_eval loads: names as they are, of patterns all that fit, paths of YAML files."""
    names: list[str] = []
    for word in filter(None, map(str.strip, tasks.split(","))):
        file = word.endswith((".yaml", ".yml")) and Path(word).is_file()
        if not (found := [str(Path(word).absolute())] if file else manager.match_tasks([word])):
            near = difflib.get_close_matches(word, manager.all_tasks, 3)
            fix = (
                f"Did you mean {', '.join(near)}?"
                if near
                else "`lm_eval ls tasks` lists them; a YAML file may be named too."
            )
            raise Refused(Refusal("bad-argument", "usage", _PLACE, "lm_eval has no such task", f"found {word!r}", fix))
        names += [name for name in found if name not in names]
    if not names:
        raise Refused(Refusal("bad-argument", "usage", _PLACE, "no task is named", f"found {tasks!r}",
                              "Example: --harness hellaswag,arc_easy"))  # fmt: skip
    return names


def _loaded(manager: Any, names: list[str]) -> list[Any]:
    """The groups, and the tasks that are in none. What goes wrong here is the tasks' fault, of any kind: they are configs, templates and Python
    code that others wrote, and their data come from wherever they say."""
    try:
        found = manager.load(names)
    except Exception as error:
        raise _unavailable(", ".join(names), "lm_eval cannot load it", f"{type(error).__name__}: {error}",
                           "Most data are on the Hugging Face hub: be online when a task is first used, or name a YAML "
                           "file whose data are here. Name each task once, groups' included.") from error  # fmt: skip
    for name, task in found["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise _unavailable(name, "it runs code that the model writes", "the task says that it is unsafe",
                               "Run it by lm_eval itself, in a container.")  # fmt: skip
    inside = {child for children in found.get("group_map", {}).values() for child in children}
    both = {**found.get("groups", {}), **found["tasks"]}
    return [item for name, item in both.items() if name not in inside]


def _unavailable(subject: str, reason: str, fact: str, fix: str) -> Refused:
    return Refused(Refusal("task-unavailable", "usage", subject, reason, fact, fix))
