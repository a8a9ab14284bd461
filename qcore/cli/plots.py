"""Pictures that commands draw with --plot, by matplotlib, which is imported for them alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.cli.labels import place_labels
from qcore.refusal import Refusal, Refused

if TYPE_CHECKING:
    from qcore.evaluation import Evaluation

_BLUE, _RED = "#3b6ea8", "#c8553d"


def pyplot() -> Any:
    """matplotlib's, drawing into files. Raises Refused (missing-package)."""
    try:
        import matplotlib
    except ImportError as error:
        raise Refused(Refusal("missing-package", "missing-dep", "--plot", "drawing needs matplotlib", str(error),
                              "pip install 'qcore[plot]'")) from error  # fmt: skip
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw_evaluation(evaluation: Evaluation, file: Path, name: str) -> None:
    """A histogram over tokens: of the divergence where there is a reference, else of the loss. Raises Refused (missing-package, bad-argument)."""
    figure, axes = pyplot().subplots(figsize=(8, 4.5), layout="constrained")
    compared = evaluation.divergences is not None
    values = evaluation.divergences if compared else evaluation.losses
    assert values is not None
    if compared:
        floor = 1e-9
        logs = values.double().clamp(min=floor).log10()
        axes.hist(logs.numpy(), bins=80, color=_BLUE)
        for part, style in ((0.5, "-"), (0.99, "--"), (0.999, ":")):
            at = float(logs.quantile(part))
            axes.axvline(at, color=_RED, linestyle=style, label=f"{part:.1%}: {10**at:.2g}")
        axes.set_xlabel("KL(reference || model) of a token, log10 nats")
        axes.legend(frameon=False)
    else:
        axes.hist(values.numpy(), bins=80, color=_BLUE)
        axes.set_xlabel("-ln p of a token, nats")
    axes.set_ylabel("tokens")
    axes.set_title(f"{name}: {values.numel()} tokens")
    _save(figure, file)


def draw_comparison(measured: Sequence[Mapping[str, Any]], quality: str, file: Path, reference: str | None) -> None:
    """Of checkpoints, as `qcore eval` gives them in JSON: size against `quality` (kld_mean, or perplexity) with its interval. The Pareto front is joined by a line. Raises Refused (missing-package, bad-argument)."""
    figure, axes = pyplot().subplots(figsize=(10, 6.5), layout="constrained")
    least = min((facts[quality] for facts in measured if facts[quality] > 0), default=1e-9)
    floor = least / 3 if quality == "kld_mean" else 0.0
    points = [(facts["size_bytes"] / 2**20, max(facts[quality], floor)) for facts in measured]
    bars = []
    for facts, (x, y) in zip(measured, points, strict=True):
        low, high = facts.get(f"{quality}_ci95", (y, y))
        bars.append(((x, max(low, floor)), (x, max(high, floor))))
    colors = [_RED if facts["pareto"] else _BLUE for facts in measured]
    for (x, y), ((_, low), (_, high)), color in zip(points, bars, colors, strict=True):
        axes.plot([x, x], [low, high], color=color, linewidth=1.2)
        axes.plot(x, y, color=color, marker="o", markersize=5)
    front = sorted(point for point, facts in zip(points, measured, strict=True) if facts["pareto"])
    corners = [corner for (x, y), (right, _) in pairwise(front) for corner in ((x, y), (right, y))] + front[-1:]
    axes.plot(*zip(*corners, strict=True), color=_RED, linewidth=1, alpha=0.6, label="Pareto front")
    axes.set_yscale("log" if reference else "linear")
    axes.margins(0.08)
    axes.set_xlabel("size of all tensors, MiB")
    axes.set_ylabel("KL(reference || model), mean of a token, nats" if reference else "perplexity")
    compared = f" beside {reference}" if reference else ""
    axes.set_title(f"{len(measured)} checkpoints{compared}, {measured[0]['tokens']} tokens, intervals of 95 %")
    axes.legend(frameon=False, loc="upper right")
    names = [f"{facts['name']} (0)" if facts[quality] <= 0 else facts["name"] for facts in measured]
    place_labels(axes, names, points, [*bars, *pairwise(corners)])
    _save(figure, file)


def draw_errors(errors: Mapping[str, float], file: Path, name: str) -> None:
    """Of each layer, over the number in its name, a line for each kind of layer. Raises Refused (missing-package, bad-argument)."""
    figure, axes = pyplot().subplots(figsize=(8, 4.5), layout="constrained")
    kinds: dict[str, list[tuple[int, float]]] = {}
    for module, error in errors.items():
        number = next((int(word) for word in module.split(".") if word.isdecimal()), 0)
        kinds.setdefault(module.rpartition(".")[2], []).append((number, error))
    for kind, points in sorted(kinds.items()):
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, linewidth=1, label=kind)
    axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("block")
    axes.set_ylabel("error of outputs, squared, of the squared outputs")
    axes.set_title(f"{name}: {len(errors)} layers")
    axes.legend(frameon=False, ncols=2, fontsize="small")
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise Refused(Refusal("bad-argument", "usage", "--plot", "the picture cannot be written", str(error),
                              "Name a .png file in a folder that you may write to.")) from error  # fmt: skip
    pyplot().close(figure)
