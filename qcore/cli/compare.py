"""qcore eval of a folder: its checkpoints side by side, their size against their distance from a reference."""

from __future__ import annotations

import gc
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.cli.inspect import describe
from qcore.cli.output import DONE, exit_status, mebibytes, note, print_json, print_refusal, print_table
from qcore.refusal import Refusal, Refused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qcore.cli.scoring import Scoring
    from qcore.kept_logits import KeptLogits

_MEASURES = (("perplexity", "perplexity"), ("kld_mean", "kld"), ("kld_p99", "99 %"), ("kld_p999", "99.9 %"),
             ("top1_agreement", "same top-1"))  # fmt: skip
"""Of `Evaluation.summary`, and what the table calls them."""


@dataclass(frozen=True)
class Row:
    """A checkpoint's. facts: its JSON object, with all measures where it is not refused."""

    facts: dict[str, Any]
    refusal: Refusal | None = None


def compare(paths: Sequence[Path], reference: str | None, scoring: Scoring, *, json: bool, plot: Path | None) -> int:
    """Scores all, shows them and gives the exit status: of the first one that is refused. With a reference, which runs once, all read its tokens.
    Raises Refused where it is the reference that is."""
    from qcore.kept_logits import KeptLogits

    base = None
    with KeptLogits() if reference else nullcontext() as kept:
        if reference is not None:
            base = _measured(Path(reference), scoring, keep=kept)
        rows = [_row(path, scoring, kept) for path in paths]
    measured = [row.facts for row in rows if row.refusal is None]
    quality = "perplexity" if base is None else "kld_mean"
    _mark_front(measured, quality)
    drawn = [facts for facts in measured if math.isfinite(facts[quality])] if plot is not None else []
    if plot is not None and drawn:
        from qcore.cli.plots import draw_comparison

        draw_comparison(drawn, quality, plot, None if base is None else base["name"])
    if json:
        print_json({"reference": base, "context": scoring.context, "checkpoints": [row.facts for row in rows]})
    else:
        _print(rows)
        if drawn:
            note(f"drawn into {plot}")
    return next((exit_status(row.refusal) for row in rows if row.refusal), DONE)


def _row(path: Path, scoring: Scoring, kept: KeptLogits | None) -> Row:
    try:
        facts = _measured(path, scoring, reference=kept)
    except Refused as error:
        note(f"{path.name}: refused, {error.refusal.reason}")
        return Row({"name": path.name, "path": str(path), "refusal": error.refusal.to_dict()}, error.refusal)
    return Row(facts)


def _measured(
    path: Path, scoring: Scoring, *, reference: KeptLogits | None = None, keep: KeptLogits | None = None
) -> dict[str, Any]:
    """One checkpoint's JSON object. Raises Refused."""
    from qcore.checkpoint.open import open_checkpoint

    checkpoint = open_checkpoint(path)
    tokens = reference.tokens if reference else scoring.tokens(checkpoint)
    gc.collect()  # the model before refers to itself, and this one needs the room
    evaluation = scoring.score(scoring.load(checkpoint), tokens, reference, keep)
    described = describe(checkpoint)
    kept = ("method", "schemes", "parameters", "size_bytes", "bits_per_weight")
    facts = {"name": path.name, "path": str(path), **{key: described[key] for key in kept}, **evaluation.summary()}
    note(f"{path.name}: " + ", ".join(f"{title} {facts[key]:.4g}" for key, title in _MEASURES if key in facts))
    return facts


def _mark_front(measured: list[dict[str, Any]], quality: str) -> None:
    from qcore.evaluation import pareto_front

    front = pareto_front((facts["size_bytes"], facts[quality]) for facts in measured)
    for facts, best in zip(measured, front, strict=True):
        facts["pareto"] = best


def _print(rows: list[Row]) -> None:
    """By size, those that are refused at the end, with their reasons on stderr."""
    done = sorted((row.facts for row in rows if row.refusal is None), key=lambda facts: int(facts["size_bytes"]))
    refused = [(row.facts["name"], row.refusal) for row in rows if row.refusal is not None]
    measures = [(key, title) for key, title in _MEASURES if done and key in done[0]]
    lines: list[tuple[object, ...]] = [
        (facts["name"], facts["method"], _scheme(facts["schemes"]), mebibytes(facts["size_bytes"]),
         f"{facts['bits_per_weight']:.2f}", *(_cell(facts, key) for key, _ in measures), "*" if facts["pareto"] else "")
        for facts in done
    ]  # fmt: skip
    lines += [(name, f"refused: {refusal.code}", *[""] * (len(measures) + 4)) for name, refusal in refused]
    print_table(("name", "format", "scheme", "MiB", "bits", *(title for _, title in measures), "best"), lines)
    for _, refusal in refused:
        print_refusal(refusal, as_json=False)


def _scheme(counts: dict[str, int]) -> str:
    """That of most layers that are quantized, and how many others there are."""
    names = [name for name in counts if name != "not quantized"]
    return f"{names[0]} +{len(names) - 1}" if len(names) > 1 else names[0] if names else "not quantized"


def _cell(facts: dict[str, Any], key: str) -> str:
    interval = facts.get(f"{key}_ci95")
    between = "" if interval is None else f" [{interval[0]:.4g}, {interval[1]:.4g}]"
    return f"{facts[key]:.4g}{between}"
