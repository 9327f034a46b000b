"""An ablation as horizontal bars, the seeds as dots on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genret_jax.ablation.variants import FULL
from genret_jax.significance import TESTED_METRICS

if TYPE_CHECKING:
    from genret_jax.ablation.report import Report
    from genret_jax.harness.rows import Row

# Group of rows -> colour; from the palette of Okabe and Ito, which colour-blind readers tell apart.
_COLOURS = {
    "baseline": "#9a9a9a",
    "method": "#0072b2",
    "loss": "#e69f00",
    "views": "#cc79a7",
    "scoring": "#56b4e9",
    "docids": "#009e73",
}
_LABELS = {
    "baseline": "baseline",
    "method": "the whole method",
    "loss": "other training",
    "views": "fewer vectors",
    "scoring": "other score",
    "docids": "other identifiers",
}
_LEVEL = 0.05


def draw(report: Report, path: Path) -> None:
    """Writes a PNG: hits@1 on the left, MRR@10 on the right, a bar a row.

    A dashed line stands at the full method. A star marks the rows that differ from it by the
    randomisation test, corrected by Holm, at 0.05.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    places, place = [], 0.0
    for i, row in enumerate(report.rows):
        changed = i > 0 and row.entry.group != report.rows[i - 1].entry.group
        place += 1.45 if changed else float(i > 0)  # a gap between groups
        places.append(place)
    figure = Figure(figsize=(11, 1.9 + 0.36 * place), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, metric in zip(panels, TESTED_METRICS, strict=True):
        _bars(axes, report, metric, places)
    panels[0].set_yticks(places, [row.label for row in report.rows])
    panels[0].set_ylim(place + 0.6, -0.6)
    for label, row in zip(panels[0].get_yticklabels(), report.rows, strict=True):
        label.set_fontweight("bold" if row.name == FULL else "normal")
    groups = dict.fromkeys(row.entry.group for row in report.rows)
    handles: list[Any] = [Patch(color=_COLOURS[g], label=_LABELS[g]) for g in groups]
    if len(report.seeds) > 1:
        from matplotlib.lines import Line2D

        dot: dict[str, Any] = {"marker": "o", "ls": "", "mfc": "white", "mec": "black", "ms": 4}
        handles.append(Line2D([], [], label="one seed", **dot))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(report.title(), fontsize=11)
    figure.savefig(path, format="png")


def _bars(axes: Any, report: Report, metric: str, places: list[float]) -> None:
    """One panel: bars, the seeds on them, and the means in a column on the right."""
    tests = report.tests.get(FULL, {})
    full = next(row for row in report.rows if row.name == FULL)
    if full.measured:
        axes.axvline(full.mean[metric], color=_COLOURS["method"], ls="--", lw=1, zorder=0)
    furthest = max((_reach(row, metric) for row in report.rows), default=0.0) or 1.0
    axes.set_xlim(0, 1.2 * furthest)
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= min(1, 1.2 * furthest)])
    margin = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 9.5}
    for place, row in zip(places, report.rows, strict=True):
        if not row.measured:
            axes.text(0.98, place, "failed", ha="right", color="#b00020", **margin)
            continue
        axes.barh(place, row.mean[metric], 0.8, color=_COLOURS[row.entry.group], zorder=1)
        seeds = [one.metrics[metric] for one in row.measured]
        if len(seeds) > 1:  # one above the other, so that equal ones are seen
            heights = place + np.linspace(-0.24, 0.24, len(seeds))
            dots = {"facecolor": "white", "edgecolor": "black", "lw": 0.8, "zorder": 3}
            axes.scatter(seeds, heights, s=16, **dots)
        weight = "bold" if row is full else "normal"
        axes.text(0.98, place, f"{row.mean[metric]:.3f}", ha="right", weight=weight, **margin)
        test = tests.get(row.name, {}).get(metric)
        if test and test.randomisation_holm < _LEVEL:
            axes.text(0.985, place, "*", ha="left", **margin)
    name = metric.replace("mrr", "MRR")
    axes.set_xlabel(f"{name}     (* differs from {FULL}, p < {_LEVEL}, Holm)" if tests else name)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _reach(row: Row, metric: str) -> float:
    """Where a row's bar and dots end."""
    return max((one.metrics[metric] for one in row.measured), default=0.0)
