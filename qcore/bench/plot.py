"""The roofline of a host with what kernels and their peers reach."""

from __future__ import annotations

from typing import Any

from qcore.refusal import Refusal, Refused


def draw(answer: dict[str, Any], path: str) -> None:
    """A PNG: operations per second over operations per byte of the weight. Raises Refused (missing-package, cannot-write)."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Refused(Refusal("missing-package", "missing-dep", "--plot", "matplotlib is not installed", str(error),
                              "pip install 'qcore[plot]'")) from error  # fmt: skip
    limits, rows = answer["limits"], answer["rows"]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    intensities = [row["tops"] / row["gbps"] * 1e3 for row in rows]
    span = [min(intensities) / 4, max(intensities) * 4]
    steps = [span[0] * (span[1] / span[0]) ** (i / 60) for i in range(61)]
    for name, peak, style in (("int8", limits["int8_tops"], "-"), ("bfloat16", limits["bf16_tflops"], "--")):
        roof = [min(peak, step * limits["read_gbps"] / 1e3) for step in steps]
        axes.plot(steps, roof, style, color="0.4", linewidth=1, label=f"torch's limit, {name}")
    names = [name for row in rows for name in (row["kernel"], *row["peers"])]
    colours = {name: f"C{i % 10}" for i, name in enumerate(dict.fromkeys(names))}
    seen: set[str] = set()
    for row, intensity in zip(rows, intensities, strict=True):
        work = 2 * row["m"] * row["n"] * row["k"] / 1e12
        points = [(row["kernel"], row["seconds"]), *((name, peer["seconds"]) for name, peer in row["peers"].items())]
        for name, seconds in points:
            axes.scatter(intensity, work / seconds, color=colours[name], marker="o" if name == row["kernel"] else "x", s=36,
                         label=None if name in seen else name)  # fmt: skip
            seen.add(name)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte of the packed weight", ylabel="10^12 operations/s",
             title="Linear layers, weights from memory")  # fmt: skip
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise Refused(Refusal("cannot-write", "usage", path, "the picture cannot be written", str(error),
                              "Name a file in a folder that you may write to.")) from error  # fmt: skip
