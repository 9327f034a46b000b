"""Comparisons over several collections in one table; as files."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from genret_jax.comparison import page, pictures
from genret_jax.comparison.report import Report
from genret_jax.evaluation import DEFAULT_METRICS
from genret_jax.harness.rows import Row
from genret_jax.harness.tables import NONE, best_means, csv_text, markdown, mean_cell, write_files

MARKDOWN = "collections.md"
SHOWN = ("hits@1", "hits@10", "mrr@10")
_PICTURE = "collections.png"


@dataclasses.dataclass(frozen=True)
class Collections:
    """The reports of all collections, in the order in which they were named.

    Attributes:
      reports: name of a collection -> its report; all are of the same methods.
    """

    reports: Mapping[str, Report]

    @property
    def files(self) -> list[str]:
        """What `write` writes, besides each collection's own."""
        return [MARKDOWN, "collections.json", "collections.csv", "collections.html", _PICTURE]

    @property
    def failures(self) -> dict[str, str]:
        """Row, its split, seed and collection -> why it failed."""
        return {
            f"{row}, {name}": why
            for name, report in self.reports.items()
            for row, why in report.failures.items()
        }

    @functools.cached_property
    def columns(self) -> dict[str, tuple[Row, ...]]:
        """ "NAME", or "NAME SPLIT" where there are several -> the rows of that table."""
        found = {}
        for name, report in self.reports.items():
            for split, rows in report.tables.items():
                several = len(report.tables) > 1 or split != "test"
                found[f"{name} {split}" if several else name] = rows
        return found

    @property
    def methods(self) -> list[str]:
        return [row.name for row in next(iter(self.columns.values()))]

    def mean(self, method: str, metric: str) -> float:
        """Over columns; not a number where one was not measured."""
        rows = [next(r for r in rows if r.name == method) for rows in self.columns.values()]
        return float(np.mean([r.mean.get(metric, math.nan) for r in rows]))

    def title(self) -> str:
        first = next(iter(self.reports.values()))
        seeds = f"seed{'s' if len(first.seeds) > 1 else ''} {', '.join(map(str, first.seeds))}"
        return f"{', '.join(self.reports)}: {first.budget}, {seeds}"

    def head(self) -> list[str]:
        return ["method", *self.columns, "mean"]

    def lines(self, metric: str) -> list[list[str]]:
        """The cells of a metric's table; the best of each column is bold (**)."""
        best = {name: best_means(rows)[metric] for name, rows in self.columns.items()}
        means = {method: self.mean(method, metric) for method in self.methods}
        most = max((round(m, 3) for m in means.values() if not math.isnan(m)), default=math.nan)
        lines = []
        for i, (method, mean) in enumerate(means.items()):
            cells = [mean_cell(rows[i], metric, best[n]) for n, rows in self.columns.items()]
            shown = NONE if math.isnan(mean) else f"{mean:.3f}"
            lines.append([method, *cells, f"**{shown}**" if round(mean, 3) == most else shown])
        return lines

    def tables(self) -> Iterator[tuple[str, list[list[str]]]]:
        """(metric, lines) of the metrics that are shown."""
        for metric in SHOWN:
            yield metric, self.lines(metric)

    def notes(self) -> list[str]:
        """What the numbers are, and where more of them are."""
        first = next(iter(self.reports.values()))
        spread = "mean ± standard deviation over seeds" if len(first.seeds) > 1 else "one seed"
        places = ", ".join(f"{name}/comparison.md" for name in self.reports)
        notes = [
            f"A value is {spread}; the last column is the mean of the others. Costs, tests of "
            f"significance and pictures of each collection: {places}."
        ]
        drawn = [
            f"{name} {report.heading(split)}"
            for name, report in self.reports.items()
            for split in report.tables
            if report.drawn(split)
        ]
        if drawn:
            notes.append(f"Not all queries were searched: {'; '.join(drawn)}.")
        return notes

    def legend(self) -> dict[str, str]:
        """Method -> what it is."""
        return next(iter(self.reports.values())).legend()

    def markdown(self) -> str:
        parts = [f"# {self.title()}"]
        for metric, lines in self.tables():
            parts += [f"## {metric}", markdown(self.head(), lines)]
        parts += self.notes()
        parts.append(f"![{pictures.LABEL} of every method]({_PICTURE})")
        parts.append("\n".join(f"- {name}: {what}" for name, what in self.legend().items()))
        if self.failures:
            failed = [f"- {name}: {reason}" for name, reason in self.failures.items()]
            parts.append("Failed:\n\n" + "\n".join(failed))
        return "\n\n".join(parts) + "\n"

    def to_dict(self) -> dict[str, Any]:
        return {
            "collections": {name: report.to_dict() for name, report in self.reports.items()},
            "mean": {
                method: {metric: self.mean(method, metric) for metric in DEFAULT_METRICS}
                for method in self.methods
                if not math.isnan(self.mean(method, DEFAULT_METRICS[0]))
            },
            "failures": self.failures,
        }

    def csv(self) -> str:
        """The lines of all collections' tables, each with its collection."""
        return csv_text(
            [
                {"collection": name, **line}
                for name, report in self.reports.items()
                for line in csv.DictReader(io.StringIO(report.csv()))
            ]
        )

    def write(self, folder: Path) -> None:
        """Writes `files`, each whole or not at all."""
        png = pictures.draw_collections(self)
        html = page.collections_html(self, png)
        texts = {
            MARKDOWN: self.markdown(),
            "collections.json": json.dumps(self.to_dict(), indent=1),
            "collections.csv": self.csv(),
            "collections.html": html,
        }

        def text_writer(text: str) -> Any:
            return lambda path: path.write_text(text, encoding="utf-8")

        writers: dict[str, Any] = {name: text_writer(text) for name, text in texts.items()}
        writers[_PICTURE] = lambda path: path.write_bytes(png)
        write_files(folder, writers)
