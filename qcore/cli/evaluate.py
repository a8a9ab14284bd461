"""qcore eval: perplexity on a text, and the distance from a reference model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcore.cli import options
from qcore.cli.output import note, print_json, print_table, progress_bar
from qcore.cli.plots import draw_evaluation, pyplot
from qcore.refusal import Refusal, Refused
from qcore.select import exact_activations

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qcore.checkpoint.open import Checkpoint
    from qcore.evaluation import Evaluation


def evaluate_command(
    path: options.Path,
    text: Annotated[Path, typer.Option(help="A UTF-8 text file to score.")],
    reference: Annotated[str | None, typer.Option(help="Another checkpoint of the same model to compare with.")] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens in a window; windows do not overlap.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Score only the text's first tokens.")] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "checkpoint",
    activations: options.Activations = "exact",
    json: options.Json = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the distribution over tokens into this PNG file.")] = None,
) -> None:
    """Measure perplexity and, with a reference, KL divergence (nats) and top-1 agreement.

    Example: qcore eval ./model-w4a16 --text wiki.txt --reference ./model
    """
    options.checked_dtype(dtype)
    exact_activations(activations)
    words = read_text(text)
    from qcore.checkpoint.open import open_checkpoint

    checkpoint = open_checkpoint(path)
    other = open_checkpoint(reference) if reference else None
    if plot is not None:
        pyplot()
    evaluation = _evaluate(checkpoint, other, words, context, max_tokens, device, dtype, activations)
    from qcore.cli.inspect import describe

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


def _evaluate(
    checkpoint: Checkpoint, other: Checkpoint | None, words: str, context: int, max_tokens: int | None,
    device: str, dtype: str, activations: str,
) -> Evaluation:  # fmt: skip
    from qcore.evaluation import evaluate
    from qcore.model.devices import find_device, wanted_dtype
    from qcore.model.load import load_model

    target = find_device(device)

    def loaded(which: Checkpoint) -> PreTrainedModel:
        computed = wanted_dtype(dtype, target, which)
        return load_model(which, target, computed, activations=activations, progress=progress)

    tokens = list(checkpoint.load_tokenizer()(words)["input_ids"])[:max_tokens]
    with progress_bar("loading") as progress:
        model, base = loaded(checkpoint), loaded(other) if other else None
    with progress_bar("scoring") as progress:
        step = (lambda done, total: progress("", done, total)) if progress else None
        return evaluate(model, tokens, reference=base, context=context, progress=step)


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


def _between(interval: list[float] | None) -> str:
    return "" if interval is None else " to ".join(map(_shown, interval))


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.5g}"
