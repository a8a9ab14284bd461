"""Names beside the points of a picture, where nothing else is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_DISTANCES = (7, 14, 24, 36, 50, 66, 84, 104, 126, 150)
"""From a point to its name, in pixels; beyond the first two, a line leads there."""
_DIRECTIONS = tuple(math.radians(angle) for angle in (0, 180, 90, 270, 45, 315, 135, 225, 20, 340, 160, 200))
_MARKER = 5

Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""left, bottom, right, top in pixels."""


def place_labels(
    axes: Any, names: Sequence[str], points: Sequence[Point], lines: Sequence[tuple[Point, Point]]
) -> None:
    """points: x, y in data. lines: from one such point to another, upright or level, which names are kept off as well. Each name, from the left, has the nearest
    place that is free, or else the one that covers least. Afterwards the picture's layout stays as it is."""
    figure = axes.figure
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    point = 72 / figure.dpi  # pixels are not those of the file
    frame = axes.get_window_extent()
    inside = (frame.x0, frame.y0, frame.x1, frame.y1)
    pixels = [tuple(axes.transData.transform(xy)) for xy in points]
    taken: list[Box] = [(x - _MARKER, y - _MARKER, x + _MARKER, y + _MARKER) for x, y in pixels]
    for ends in lines:
        (x0, y0), (x1, y1) = axes.transData.transform(ends)
        taken.append((min(x0, x1) - 1, min(y0, y1) - 1, max(x0, x1) + 1, max(y0, y1) + 1))
    if (legend := axes.get_legend()) is not None:
        extent = legend.get_window_extent()
        taken.append((extent.x0, extent.y0, extent.x1, extent.y1))
    for i in sorted(range(len(names)), key=lambda i: pixels[i]):
        text = axes.annotate(names[i], points[i], xytext=(0, 0), textcoords="offset points", fontsize=7,
                             ha="center", va="center", zorder=4)  # fmt: skip
        extent = text.get_window_extent()
        size = (extent.width + 4, extent.height)
        places = [
            (distance, _beside(pixels[i], size, distance, angle)) for distance in _DISTANCES for angle in _DIRECTIONS
        ]
        distance, box = min(places, key=lambda place: _covered(place[1], taken, inside))  # the first of equals
        taken.append(box)
        away = ((box[0] + box[2]) / 2 - pixels[i][0], (box[1] + box[3]) / 2 - pixels[i][1])
        text.xyann = (away[0] * point, away[1] * point)
        if distance > _DISTANCES[1]:
            near = (min(max(pixels[i][0], box[0]), box[2]), min(max(pixels[i][1], box[1]), box[3]))
            ends = axes.transData.inverted().transform([pixels[i], near])
            axes.plot(ends[:, 0], ends[:, 1], color="gray", linewidth=0.5, zorder=1, scalex=False, scaley=False)


def _beside(point: Point, size: tuple[float, float], distance: float, angle: float) -> Box:
    """The box of this size whose edge is so far from the point in this direction."""
    width, height = size
    x = point[0] + math.cos(angle) * (distance + width / 2)
    y = point[1] + math.sin(angle) * (distance + height / 2)
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _covered(box: Box, taken: Sequence[Box], inside: Box) -> float:
    """Pixels of the box that are taken, or outside."""
    common = sum(_common(box, other) for other in taken)
    return common + 4 * ((box[2] - box[0]) * (box[3] - box[1]) - _common(box, inside))


def _common(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)
