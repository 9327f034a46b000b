"""A comparison in pictures: quality against its costs, by identifier kind, and by split."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from genret_jax.comparison.labels import label_points
from genret_jax.harness.rows import Row

if TYPE_CHECKING:
    from genret_jax.comparison.collections import Collections
    from genret_jax.comparison.report import Report

METRIC, LABEL = "mrr@10", "MRR@10"
# Group of rows -> colour; from the palette of Okabe and Ito, which colour-blind readers tell apart.
_COLOURS = {
    "lexical": "#7f7f7f",
    "dense": "#e69f00",
    "generative": "#0072b2",
    "hybrid": "#009e73",
}
_MARKERS = {"lexical": "s", "dense": "^", "generative": "o", "hybrid": "D"}
_SPLITS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")


def draw_all(report: Report) -> dict[str, bytes]:
    """Name -> PNG. Pictures that would show nothing are left out."""
    made: dict[str, Callable[[Report], Any]] = {}
    if any(_measured(rows) for rows in report.tables.values()):
        made["quality-latency"] = lambda r: _scatter(r, "p50_ms", "latency p50, ms")
        made["quality-training"] = lambda r: _scatter(r, "minutes", "fit, minutes")
    kinds = {row.entry.docids for rows in report.tables.values() for row in _generative(rows)}
    if len(kinds) > 1:
        made["identifiers"] = _identifiers
    if len(report.tables) > 1 and "quality-latency" in made:
        made["splits"] = _splits
    return {name: _png(draw(report)) for name, draw in made.items()}


def _scatter(report: Report, cost: str, label: str) -> Any:
    """A panel a split: each method at its cost and quality, seeds as bars of their range."""
    from genret_jax.comparison.report import costs

    most = max(len(rows) for rows in report.tables.values())
    figure, panels = _panels(len(report.tables), width=7.5, height=4.6 + 0.15 * max(0, most - 6))
    named: list[tuple[Any, list[tuple[float, float, str]]]] = []
    for axes, (split, rows) in zip(panels, report.tables.items(), strict=True):
        points: list[tuple[float, float, str]] = []
        named.append((axes, points))
        for row in _measured(rows):
            found = costs(row)
            if cost not in found:
                continue
            x, y, group = max(found[cost], 1e-3), row.mean[METRIC], row.entry.group
            seeds = [one.metrics[METRIC] for one in row.measured]
            bars = [[y - min(seeds)], [max(seeds) - y]]
            axes.errorbar(
                [x], [y], yerr=bars, color=_COLOURS[group], marker=_MARKERS[group], ms=8, capsize=3
            )
            points.append((x, y, row.name))
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel=label, ylabel=LABEL, title=report.heading(split))
        axes.margins(x=0.25, y=0.12)  # room for the names
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, {row.entry.group for rows in report.tables.values() for row in _measured(rows)})
    for axes, points in named:  # when all else stands
        label_points(axes, points)
    return figure


def _legend(figure: Any, groups: set[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=_COLOURS[g], marker=_MARKERS[g], ls="", ms=8, label=g)
        for g in _COLOURS
        if g in groups
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def _identifiers(report: Report) -> Any:
    """Generative methods side by side, in the order of their kinds of identifiers."""
    most = max(len(_generative(rows)) for rows in report.tables.values())
    figure, panels = _panels(len(report.tables), width=max(6.5, 0.75 * most))
    for axes, (split, rows) in zip(panels, report.tables.items(), strict=True):
        shown = sorted(_generative(rows), key=lambda row: (row.entry.docids, row.name))
        labels = [
            row.name if row.name == row.entry.docids else f"{row.entry.docids} ({row.name})"
            for row in shown
        ]
        _bars(axes, [shown], labels, [_COLOURS["generative"]], [""])
        axes.set(ylabel=LABEL, title=f"{split}: by identifier kind")
    return figure


def _splits(report: Report) -> Any:
    """Every method on every split, such as seen and unseen documents."""
    names = [row.name for row in next(iter(report.tables.values()))]
    figure, (axes,) = _panels(1, width=max(7.0, 0.85 * len(names)))
    tables = [list(rows) for rows in report.tables.values()]
    colours = [_SPLITS[i % len(_SPLITS)] for i in range(len(tables))]
    _bars(axes, tables, names, colours, list(report.tables))
    axes.set(ylabel=LABEL)
    axes.legend(frameon=False, ncols=len(tables), loc="lower left", bbox_to_anchor=(0, 1.0))
    axes.set_title("by split", loc="right")
    return figure


def draw_collections(found: Collections) -> bytes:
    """PNG: a line a method, a mark a collection and split, with the range of its seeds."""
    columns, methods = found.columns, found.methods
    figure, (axes,) = _panels(1, width=9.0, height=1.6 + 0.36 * len(methods))
    markers = "osD^vP*Xp"
    for i, (name, rows) in enumerate(columns.items()):
        shown = [(methods.index(row.name), row) for row in _measured(rows)]
        # Beside one another, so that equal values are seen.
        places = [place + 0.4 * ((i + 0.5) / len(columns) - 0.5) for place, _ in shown]
        values = np.array([row.mean[METRIC] for _, row in shown])
        seeds = [[one.metrics[METRIC] for one in row.measured] for _, row in shown]
        bars = [values - [min(s) for s in seeds], [max(s) for s in seeds] - values]
        axes.errorbar(
            values,
            places,
            xerr=bars,
            ls="",
            marker=markers[i % len(markers)],
            color=_SPLITS[i % len(_SPLITS)],
            ms=6,
            label=name,
        )
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.set(xlabel=LABEL)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=min(3, len(columns)), frameon=False)
    return _png(figure)


def _bars(
    axes: Any,
    tables: Sequence[Sequence[Row]],
    labels: Sequence[str],
    colours: Sequence[str],
    names: Sequence[str],
) -> None:
    """Groups of bars, one a label, with the seeds as dots."""
    width = 0.8 / len(tables)
    inches = width * axes.figure.get_figwidth() / max(1, len(labels))
    narrow = {"rotation": 90} if inches < 0.42 else {}  # than a value is long
    for i, (rows, colour, name) in enumerate(zip(tables, colours, names, strict=True)):
        places = np.arange(len(rows)) + (i - (len(tables) - 1) / 2) * width
        values = [row.mean[METRIC] if row.measured else 0.0 for row in rows]
        axes.bar(places, values, width * 0.92, color=colour, label=name or None)
        for place, row in zip(places, rows, strict=True):
            seeds = [one.metrics[METRIC] for one in row.measured]
            text = f"{row.mean[METRIC]:.3f}" if row.measured else "failed"
            top = (place, max(seeds, default=0.0))  # above the dots
            axes.annotate(
                text,
                top,
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                **narrow,
            )
            if len(seeds) > 1:
                dots: dict[str, Any] = {"facecolor": "white", "edgecolor": "black", "zorder": 3}
                axes.scatter(
                    np.linspace(-0.2, 0.2, len(seeds)) * width + place, seeds, s=14, **dots
                )
    many = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len(labels) > 5 else {}
    axes.set_xticks(range(len(labels)), labels, **many)
    axes.margins(y=0.18)
    axes.spines[["top", "right"]].set_visible(False)


def _measured(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.measured]


def _generative(rows: Sequence[Row]) -> list[Row]:
    return [row for row in _measured(rows) if row.entry.group == "generative"]


def _panels(count: int, *, width: float = 6.5, height: float = 4.6) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
