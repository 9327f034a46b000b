"""What an ablation found: means over seeds, their spread, tests of significance; as files."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from genret_jax.ablation.variants import FULL
from genret_jax.evaluation import DEFAULT_METRICS
from genret_jax.harness.rows import Row
from genret_jax.harness.tables import (
    CHOOSES,
    NONE,
    Tests,
    best_means,
    best_of,
    csv_text,
    dict_row,
    failures_of,
    flat_row,
    markdown,
    mean_cell,
    p_cells,
    p_heads,
    shown_p,
    tests_against,
    write_files,
)
from genret_jax.significance import against

FILES = ("ablation.md", "ablation.json", "ablation.csv", "ablation.png")


@dataclasses.dataclass(frozen=True)
class Report:
    """A whole ablation.

    Attributes:
      rows: baselines, the full method, its variants.
      corpus, split, queries: what was searched, and how many queries.
      seeds, minutes: of the trainings.
      docids: kind of identifiers of the full method.
    """

    rows: tuple[Row, ...]
    corpus: str
    split: str
    queries: int
    seeds: tuple[int, ...]
    minutes: float | None
    docids: str

    @property
    def failures(self) -> dict[str, str]:
        """Row, and its seed -> why it failed."""
        return failures_of(self.rows)

    @property
    def best_baseline(self) -> str:
        """By MRR@10; "" where none was measured."""
        return best_of(row for row in self.rows if row.entry.group == "baseline")

    @functools.cached_property
    def tests(self) -> Tests:
        """Reference ("dogr", the best baseline) -> other row -> metric -> comparison."""
        return tests_against((FULL, self.best_baseline), self.rows)

    @functools.cached_property
    def beside(self) -> Tests:
        """Reference -> row that differs from it in one thing -> metric -> comparison.

        What stands beside the full method is in `tests`.
        """
        values = {row.name: row.per_query for row in self.rows if row.measured}
        pairs: dict[str, list[str]] = {}
        for row in self.rows:
            reference = getattr(row.entry, "beside", "")
            if reference in values and row.name in values:
                pairs.setdefault(reference, []).append(row.name)
        return {
            reference: against(values[reference], {name: values[name] for name in names})
            for reference, names in pairs.items()
        }

    def title(self) -> str:
        seeds = f"seed{'s' if len(self.seeds) > 1 else ''} {', '.join(map(str, self.seeds))}"
        time = f"{self.minutes:g} min a run" if self.minutes else "the recipe's steps"
        return f"{FULL} on {self.corpus}, {self.split}: {self.queries} queries, {time}, {seeds}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "corpus": self.corpus,
            "split": self.split,
            "queries": self.queries,
            "seeds": list(self.seeds),
            "minutes": self.minutes,
            "docids": self.docids,
            "best_baseline": self.best_baseline,
            "rows": {row.name: dict_row(row, self.tests) for row in self.rows},
            "beside": {
                reference: {
                    name: {m: dataclasses.asdict(test) for m, test in tests.items()}
                    for name, tests in rows.items()
                }
                for reference, rows in self.beside.items()
            },
            "failures": self.failures,
        }

    def table(self) -> str:
        """Markdown: a row a variant; the best mean of each metric is bold."""
        best = best_means(self.rows)
        lines = [
            [
                row.label,
                *(mean_cell(row, metric, best[metric]) for metric in DEFAULT_METRICS),
                NONE if row.minutes is None else f"{row.minutes:.1f}",
                *p_cells(row, self.tests),
            ]
            for row in self.rows
        ]
        return markdown(["variant", *DEFAULT_METRICS, "minutes", *p_heads(self.tests)], lines)

    def markdown(self) -> str:
        """Title, table, what the rows and numbers are, and what failed."""
        legend = [f"- {r.name}: {r.entry.what}" for r in self.rows]
        spread = "mean ± standard deviation over seeds" if len(self.seeds) > 1 else "one seed"
        notes = [
            f"{FULL} has identifiers of kind {self.docids}. Numbers are {spread}. p is two-sided, "
            "of the paired randomisation test over queries (each query's values averaged over "
            "seeds first), corrected by Holm over the rows of its column; the t-test and the "
            "uncorrected values are in ablation.json and ablation.csv. It says what another "
            "choice of queries might change, not another seed.",
        ]
        if self.best_baseline:
            notes.append(f"The best baseline by {CHOOSES} is {self.best_baseline}.")
        for reference, rows in self.beside.items():
            for name, tests in rows.items():
                found = ", ".join(
                    f"{metric} {test.difference:+.3f}, p {shown_p(test.randomisation_holm)}"
                    for metric, test in tests.items()
                )
                notes.append(f"{name} against {reference}: {found}.")
        parts = [f"# {self.title()}", self.table(), " ".join(notes), "\n".join(legend)]
        if self.failures:
            failed = [f"- {name}: {reason}" for name, reason in self.failures.items()]
            parts.append("Failed:\n\n" + "\n".join(failed))
        return "\n\n".join(parts) + "\n"

    def csv(self) -> str:
        """A line a variant: means, spreads, values by seed, and all p values."""
        return csv_text(
            [
                {"variant": row.name, "group": row.entry.group, **flat_row(row, self.tests)}
                for row in self.rows
            ]
        )

    def write(self, folder: Path) -> None:
        """Writes `FILES`, each whole or not at all."""
        from genret_jax.ablation.picture import draw

        writers: list[Callable[[Path], Any]] = [
            lambda path: path.write_text(self.markdown(), encoding="utf-8"),
            lambda path: path.write_text(json.dumps(self.to_dict(), indent=1)),
            lambda path: path.write_text(self.csv(), encoding="utf-8"),
            lambda path: draw(self, path),
        ]
        write_files(folder, dict(zip(FILES, writers, strict=True)))
