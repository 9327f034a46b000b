"""Names beside the points of a scatter plot, none over another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

# Places tried, nearest first: distances from the point in points (1/72 inch), and directions.
_DISTANCES = (8.0, 14.0, 22.0, 32.0, 44.0, 58.0)
_ANGLES = np.deg2rad([20, 160, -20, -160, 60, 120, -60, -120, 90, -90])
_MARK = 5.0  # half the width of a point's mark, in points
_LINE_FROM = 10.0  # a name farther from its point than this has a line to it

_Box = npt.NDArray[np.float64]  # left, bottom, right, top


def label_points(
    axes: Any, points: Sequence[tuple[float, float, str]], *, fontsize: float = 8.5
) -> list[Any]:
    """Writes a name beside each point, where it covers no other name and no point.

    Greedy: the highest point first, each name at the free place that is nearest to its point; where
    none is free, at the one that covers least.

    Args:
      axes: of matplotlib, whose limits are final.
      points: x, y in the axes' own units, and the name.
      fontsize: in points.

    Returns:
      The annotations, in the order of the points.
    """
    figure = axes.figure
    figure.draw_without_rendering()
    pixel = figure.dpi / 72
    places = (
        axes.transData.transform([(x, y) for x, y, _ in points]) if points else np.zeros((0, 2))
    )
    marks = np.concatenate([places - _MARK * pixel, places + _MARK * pixel], axis=1)
    inside = np.array(axes.get_window_extent().extents)
    taken: list[_Box] = []
    made: list[Any] = [None] * len(points)
    for i in sorted(range(len(points)), key=lambda i: -places[i, 1]):
        x, y, name = points[i]
        text = axes.annotate(name, (x, y), xytext=(0, 0), textcoords="offset points")
        text.set_fontsize(fontsize)
        size = text.get_window_extent().size
        offset, box = _best(places[i], size, [*taken, *marks], inside, pixel)
        text.remove()
        line = {"arrowstyle": "-", "lw": 0.6, "color": "#888888", "shrinkA": 0, "shrinkB": 3}
        far = bool(np.hypot(*offset) > _LINE_FROM)
        made[i] = axes.annotate(
            name,
            (x, y),
            xytext=tuple(offset),
            textcoords="offset points",
            ha="left" if offset[0] > 0 else "right" if offset[0] < 0 else "center",
            va="center",
            fontsize=fontsize,
            arrowprops=line if far else None,
        )
        taken.append(box)
    return made


def _best(
    place: _Box, size: _Box, others: Sequence[_Box], inside: _Box, pixel: float
) -> tuple[_Box, _Box]:
    """Offset in points and box in pixels of the place that covers least; of equals the nearest."""
    found: list[tuple[float, _Box, _Box]] = []
    for distance in _DISTANCES:
        for angle in _ANGLES:
            offset = np.round(distance * np.array([np.cos(angle), np.sin(angle)]), 6)
            centre = place + offset * pixel + np.array([np.sign(offset[0]) * size[0] / 2, 0.0])
            box = np.concatenate([centre - size / 2, centre + size / 2])
            covered = sum(_common(box, other) for other in others)
            outside = size.prod() - _common(box, inside)
            found.append((covered + 2 * outside, offset, box))
            if found[-1][0] <= 0:
                return offset, box
    _, offset, box = min(found, key=lambda one: one[0])
    return offset, box


def _common(one: _Box, other: _Box) -> float:
    """Area that two boxes share."""
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    return float(np.maximum(sides, 0.0).prod())
