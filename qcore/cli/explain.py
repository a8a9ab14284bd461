"""qcore explain: what would run each layer, and why not the other kernels."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcore.cli import options
from qcore.cli.layers import collapse
from qcore.cli.output import print_json, styled
from qcore.select import exact_activations

if TYPE_CHECKING:
    from qcore.explanation import Explanation, LayerExplanation


def explain_command(
    path: options.Path,
    platform: Annotated[
        str | None, typer.Option(help="A column of the matrix, such as hopper; it need not be here.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="A device of this host; the default is the one `run` takes.")
    ] = None,
    dtype: options.Dtype = "auto",
    activations: options.Activations = "exact",
    json: options.Json = False,
) -> None:
    """Say what would run each layer, and why every other kernel would not. Reads configs and headers only.

    Example: qcore explain ./model --platform x86_cpu
    """
    options.checked_dtype(dtype)
    exact_activations(activations)
    from qcore.explanation import explain

    explanation = explain(path, platform, device, dtype, activations)
    if json:
        print_json(document(explanation))
    else:
        _print(explanation)
    if not explanation.runs:
        raise typer.Exit(3)


def document(explanation: Explanation) -> dict[str, Any]:
    """The command's JSON document."""
    return {
        "runs": explanation.runs,
        "platform": explanation.platform,
        "device": explanation.device,
        "dtype": explanation.dtype,
        "refusal": explanation.refusal.to_dict() if explanation.refusal else None,
        "layers": [_layer(layer) for layer in explanation.layers],
    }


def _layer(layer: LayerExplanation) -> dict[str, Any]:
    chosen = layer.selection.kernel if layer.selection else None
    candidates = layer.selection.candidates if layer.selection else ()
    return {
        "module": layer.module,
        "scheme": str(layer.scheme) if layer.scheme else None,
        "reason": layer.reason,
        "kernel": chosen.name if chosen else None,
        "evidence": layer.evidence,
        "candidates": [
            {
                "kernel": candidate.kernel.name,
                "plugin": candidate.plugin,
                "accepted": candidate.accepted,
                "refusal": candidate.refusal.to_dict() if candidate.refusal else None,
            }
            for candidate in candidates
        ],
    }


def _print(explanation: Explanation) -> None:
    where = explanation.platform + (f", device {explanation.device}" if explanation.device else ", no such device here")
    verdict = (
        styled("runs", "green", sys.stdout.isatty())
        if explanation.runs
        else styled("does not run", "red", sys.stdout.isatty())
    )
    print(f"{explanation.path} {verdict} on {where}, {explanation.dtype} activations")
    if explanation.refusal:
        print(f"\n{explanation.refusal}")
    groups: dict[tuple[str, ...], list[LayerExplanation]] = {}
    for layer in explanation.layers:
        groups.setdefault(_facts(layer), []).append(layer)
    for layers in groups.values():
        _print_group(layers)


def _facts(layer: LayerExplanation) -> tuple[str, ...]:
    """Layers with equal facts are printed together; shapes and the like stand in the candidates' reasons."""
    if layer.selection is None:
        return ("", "")
    trace = tuple(f"{c.kernel.name} {c.refusal.reason if c.refusal else ''}" for c in layer.selection.candidates)
    return (str(layer.scheme), layer.selection.kernel.name if layer.selection.kernel else "", *trace)


def _print_group(layers: list[LayerExplanation]) -> None:
    first = layers[0]
    if first.selection is None:
        print(f"\nnot quantized: torch's own layers ({len(layers)} modules)")
    else:
        chosen = first.selection.kernel
        proved = {"declared": ", not proved on this platform", None: ""}.get(first.evidence, f", {first.evidence}")
        print(f"\n{first.scheme}: {chosen.name if chosen else 'no kernel'}{proved} ({len(layers)} modules)")
    for names, _ in collapse((layer.module, "") for layer in layers):
        print(f"    {names}")
    if first.selection is None:
        return
    for candidate in first.selection.candidates:
        kernel = candidate.kernel
        if candidate.refusal is None:
            mark, text = (
                ("+", kernel.note) if kernel is first.selection.kernel else ("=", f"would run too: {kernel.note}")
            )
        else:
            mark, text = "-", f"{candidate.refusal.reason}: {candidate.refusal.fact}"
        print(f"  {mark} {kernel.name} ({candidate.plugin}): {text}")
    if first.selection.refusal:
        print(f"  fix: {first.selection.refusal.fix}")
