"""qcore eval: perplexity on a text, and the distance from a reference model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcore.cli import options
from qcore.cli.output import note, print_json, print_table, progress_bar
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
        _matplotlib()
    evaluation = _evaluate(checkpoint, other, words, context, max_tokens, device, dtype, activations)
    from qcore.cli.inspect import describe

    result = {**evaluation.summary(), "bits_per_weight": describe(checkpoint)["bits_per_weight"]}
    if plot is not None:
        _draw(evaluation, plot, checkpoint.path.name)
    if json:
        print_json(result)
    else:
        print_table(("measure", "value"), ((key, _shown(value)) for key, value in result.items()))
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


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise Refused(Refusal("missing-package", "missing-dep", "--plot", "drawing needs matplotlib", str(error),
                              "pip install 'qcore[plot]'")) from error  # fmt: skip
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def _draw(evaluation: Evaluation, file: Path, name: str) -> None:
    """A histogram over tokens: of the divergence where there is a reference, else of the loss."""
    pyplot = _matplotlib()
    compared = evaluation.divergences is not None
    values = evaluation.divergences if compared else evaluation.losses
    assert values is not None
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    if compared:
        floor = 1e-9
        logs = values.double().clamp(min=floor).log10().numpy()
        axes.hist(logs, bins=80, color="#3b6ea8")
        for part, style in ((0.5, "-"), (0.99, "--"), (0.999, ":")):
            at = float(values.double().clamp(min=floor).log10().quantile(part))
            axes.axvline(at, color="#c8553d", linestyle=style, label=f"{part:.1%}: {10**at:.2g}")
        axes.set_xlabel("KL(reference || model) of a token, log10 nats")
        axes.legend(frameon=False)
    else:
        axes.hist(values.numpy(), bins=80, color="#3b6ea8")
        axes.set_xlabel("-ln p of a token, nats")
    axes.set_ylabel("tokens")
    axes.set_title(f"{name}: {values.numel()} tokens")
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise Refused(Refusal("bad-argument", "usage", "--plot", "the picture cannot be written", str(error),
                              "Name a .png file in a folder that you may write to.")) from error  # fmt: skip
    pyplot.close(figure)


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.5g}"
