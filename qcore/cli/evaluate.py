"""qcore eval: perplexity on a text and the distance from a reference model, of one checkpoint or several; or a harness's tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcore.checkpoint.folder import checkpoints_in
from qcore.cli import options
from qcore.cli.compare import compare
from qcore.cli.harness import harness_command
from qcore.cli.output import note, print_json, print_table
from qcore.cli.plots import draw_evaluation, pyplot
from qcore.cli.scoring import Loading, Scoring
from qcore.integrations.lm_eval import Asked
from qcore.refusal import Refusal, Refused
from qcore.select import exact_activations


def evaluate_command(
    path: Annotated[
        str,
        typer.Argument(help="A safetensors folder, a .gguf file, or a folder with one or several.", metavar="PATH"),
    ],
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file to score.")] = None,
    reference: Annotated[str | None, typer.Option(help="Another checkpoint of the same model to compare with.")] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens in a window; windows do not overlap.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Score only the text's first tokens.")] = None,
    harness: Annotated[
        str | None,
        typer.Option(
            metavar="TASKS",
            help="Instead of a text: tasks of EleutherAI's lm_eval, by name, pattern or YAML file, with commas between.",
        ),
    ] = None,
    harness_path: Annotated[Path | None, typer.Option(help="A folder with more tasks for lm_eval.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions of each of lm_eval's tasks.")] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question, in place of the task's own number.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions that the model reads at once.")] = 1,
    device: options.Device = "auto",
    dtype: options.Dtype = "checkpoint",
    activations: options.Activations = "exact",
    json: options.Json = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw into this PNG file: the distribution over tokens, or of several checkpoints the size "
                          "against the divergence."),
    ] = None,
) -> None:  # fmt: skip
    """Measure perplexity and, with a reference, KL divergence (nats) and top-1 agreement.

    Example: qcore eval ./model-w4a16 --text wiki.txt --reference ./model

    Example: qcore eval ./quantized --text wiki.txt --reference ./model --plot kld.png

    Example: qcore eval ./model-w4a16 --harness hellaswag,arc_easy --limit 200
    """
    options.checked_dtype(dtype)
    exact_activations(activations)
    from qcore.model.devices import find_device

    if harness is not None:
        for name, given in (("--text", text), ("--reference", reference), ("--plot", plot)):
            if given is not None:
                raise _usage(name, "it has no meaning beside --harness", str(given), "Leave one of them out.")
        asked = Asked(harness, harness_path, limit, fewshot, batch)
        harness_command(path, asked, Loading(find_device(device), dtype, activations), json=json)
        return
    if text is None:
        raise _usage("--text", "there is nothing to measure by", "found neither --text nor --harness",
                     "Give a text by --text, or tasks by --harness.")  # fmt: skip
    words = read_text(text)
    if plot is not None:
        pyplot()
    scoring = Scoring(find_device(device), dtype, activations, words, context, max_tokens)
    if several := checkpoints_in(path):
        raise typer.Exit(compare(several, reference, scoring, json=json, plot=plot))
    _one(path, reference, scoring, json=json, plot=plot)


def _one(path: str, reference: str | None, scoring: Scoring, *, json: bool, plot: Path | None) -> None:
    from qcore.checkpoint.open import open_checkpoint
    from qcore.cli.inspect import describe

    checkpoint = open_checkpoint(path)
    other = open_checkpoint(reference) if reference else None
    tokens = scoring.tokens(checkpoint)
    model, base = scoring.load(checkpoint), scoring.load(other) if other else None
    evaluation = scoring.score(model, tokens, base)
    result = {**evaluation.summary(), "bits_per_weight": describe(checkpoint)["bits_per_weight"]}
    if plot is not None:
        draw_evaluation(evaluation, plot, checkpoint.path.name)
    if json:
        print_json(result)
    else:
        shown = (
            (key, _shown(value), _between(result.get(f"{key}_ci95")))
            for key, value in result.items()
            if not key.endswith("_ci95")
        )
        print_table(("measure", "value", "95 of 100"), shown)
        if plot is not None:
            note(f"drawn into {plot}")


def read_text(path: Path) -> str:
    """The text. Raises Refused where it cannot be read, is not UTF-8, or is empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        code = "bad-text" if isinstance(error, UnicodeDecodeError) else "path-not-found"
        raise Refused(Refusal(code, "bad-file", str(path), "the text cannot be read", str(error),
                              "Name a UTF-8 text file.", str(path))) from error  # fmt: skip
    if not text.strip():
        raise Refused(Refusal("bad-argument", "bad-file", str(path), "the text is empty", "found 0 words",
                              "Name a file with some text in it.", str(path)))  # fmt: skip
    return text


def _usage(option: str, reason: str, fact: str, fix: str) -> Refused:
    return Refused(Refusal("bad-argument", "usage", option, reason, fact, fix))


def _between(interval: list[float] | None) -> str:
    return "" if interval is None else " to ".join(map(_shown, interval))


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.5g}"
