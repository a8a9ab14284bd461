"""qcore eval --harness: tasks of lm_eval."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from qcore.cli.output import print_json, print_table

if TYPE_CHECKING:
    from qcore.cli.scoring import Loading
    from qcore.integrations.lm_eval import Asked


def harness_command(path: str, asked: Asked, loading: Loading, *, json: bool) -> None:
    """Tasks are loaded before the model, which takes longer. Raises Refused."""
    from qcore.checkpoint.open import open_checkpoint
    from qcore.integrations.lm_eval import Harness

    checkpoint = open_checkpoint(path)
    with contextlib.redirect_stdout(sys.stderr):  # what lm_eval and its tasks say
        harness = Harness(asked)
        scores = harness.run(loading.load(checkpoint), checkpoint.load_tokenizer())
    if json:
        print_json({"tasks": [asdict(score) for score in scores]})
        return
    print_table(
        ("task", "metric", "filter", "value", "stderr", "shots", "questions"),
        (
            (row.task, row.metric, row.filter, f"{row.value:.4g}", "" if row.stderr is None else f"{row.stderr:.2g}",
             "" if row.fewshot is None else row.fewshot, "" if row.samples is None else row.samples)
            for row in scores
        ),
    )  # fmt: skip
