"""What a comparison found: a table a split, costs, tests of significance; as files."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from genret_jax.comparison import page, pictures
from genret_jax.evaluation import DEFAULT_METRICS
from genret_jax.harness.measuring import latency_figures
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
    tests_against,
    write_files,
)

MARKDOWN = "comparison.md"
_PICTURES = "pictures"
_COSTS = ("index", "minutes", "queries/s", "p50 ms", "p95 ms")
# Who is a baseline: what was there before a model wrote docids.
_BASELINE_GROUPS = ("lexical", "dense")


@dataclasses.dataclass(frozen=True)
class Report:
    """A whole comparison.

    Attributes:
      tables: split -> rows, in the order in which the methods were named.
      corpus, documents: what was searched.
      queries: split -> how many were searched.
      judged: split -> how many it has; as many as were searched where it is not said.
      against: a row that the others are also tested against; None: the best baseline alone.
      seeds, budget: of the trainings; the budget in words.
      also_failed: what failed on dev, where weights are fitted.
    """

    tables: dict[str, tuple[Row, ...]]
    corpus: str
    documents: int
    queries: dict[str, int]
    seeds: tuple[int, ...]
    budget: str
    also_failed: dict[str, str] = dataclasses.field(default_factory=dict)
    judged: dict[str, int] = dataclasses.field(default_factory=dict)
    against: str | None = None

    @property
    def files(self) -> list[str]:
        """What `write` writes, besides the rankings."""
        texts = [MARKDOWN, "comparison.json", "comparison.csv", "comparison.html"]
        return texts + [f"{_PICTURES}/{name}.png" for name in self._pictures]

    @functools.cached_property
    def _pictures(self) -> dict[str, bytes]:
        """Name -> PNG."""
        return pictures.draw_all(self)

    @property
    def failures(self) -> dict[str, str]:
        """Row, and its split and seed -> why it failed."""
        several = len(self.tables) > 1
        found = {
            f"{name}, {split}" if several else name: why
            for split, rows in self.tables.items()
            for name, why in failures_of(rows).items()
        }
        return found | self.also_failed

    def best_baseline(self, split: str) -> str:
        """The best by MRR@10 of what writes no docids; "" where none was measured."""
        return best_of(r for r in self.tables[split] if r.entry.group in _BASELINE_GROUPS)

    @functools.cached_property
    def tests(self) -> dict[str, Tests]:
        """Split -> the best baseline, and `against` -> other row -> metric -> comparison."""
        return {
            split: tests_against((self.best_baseline(split), self.against or ""), rows)
            for split, rows in self.tables.items()
        }

    def title(self) -> str:
        seeds = f"seed{'s' if len(self.seeds) > 1 else ''} {', '.join(map(str, self.seeds))}"
        return f"{self.corpus}: {self.documents} documents, {self.budget}, {seeds}"

    def drawn(self, split: str) -> bool:
        """Whether a part of the queries was searched."""
        return self.queries[split] != self.judged.get(split, self.queries[split])

    def heading(self, split: str) -> str:
        """Of a split's table or picture."""
        whole = f"of {self.judged[split]} " if self.drawn(split) else ""
        return f"{split}: {self.queries[split]} {whole}queries"

    def head(self, split: str) -> list[str]:
        """The head of a split's table."""
        return ["method", *DEFAULT_METRICS, *_COSTS, *p_heads(self.tests[split])]

    def lines(self, split: str) -> list[list[str]]:
        """The cells of a split's table; the best mean of each metric is bold (**)."""
        rows = self.tables[split]
        best = best_means(rows)
        return [
            [
                row.label,
                *(mean_cell(row, metric, best[metric]) for metric in DEFAULT_METRICS),
                *_cost_cells(row),
                *p_cells(row, self.tests[split]),
            ]
            for row in rows
        ]

    def notes(self) -> list[str]:
        """What the numbers are, a paragraph each."""
        spread = "mean ± standard deviation over seeds" if len(self.seeds) > 1 else "of one seed"
        others = [s for s in self.tables if self.against not in (None, self.best_baseline(s))]
        there = any(self.against in self.tests[split] for split in others)
        chosen = f" and against {self.against}" if there else ""
        if others and not there:
            chosen = f" (not against {self.against}, which failed)"
        return [
            f"Quality is {spread}. Index: bytes on disk that ranking reads (weights, identifiers, "
            "vectors, postings; not the documents' texts). Minutes: of the whole fit, indexing "
            "included. Queries/s: these queries in batches; p50 and p95 ms: queries asked one by "
            "one, after warming up; a hybrid asks its parts one after the other.",
            "p is two-sided, of the paired randomisation test over queries against the best by "
            f"{CHOOSES} of the lexical and dense methods{chosen} (each query's values averaged "
            "over seeds first), corrected by Holm over the rows of its column; the t-test and the "
            "uncorrected values are in comparison.json and comparison.csv. It says what another "
            "choice of queries might change, not another seed.",
        ]

    def legend(self) -> dict[str, str]:
        """Method -> what it is."""
        return {row.name: row.entry.what for row in next(iter(self.tables.values()))}

    def markdown(self) -> str:
        """Title, tables, notes, pictures, what the rows are, and what failed."""
        parts = [f"# {self.title()}"]
        for split in self.tables:
            parts += [f"## {self.heading(split)}", self._table(split)]
        parts += self.notes()
        parts += [f"![{name}]({_PICTURES}/{name}.png)" for name in self._pictures]
        parts.append("\n".join(f"- {name}: {what}" for name, what in self.legend().items()))
        if self.failures:
            failed = [f"- {name}: {reason}" for name, reason in self.failures.items()]
            parts.append("Failed:\n\n" + "\n".join(failed))
        return "\n\n".join(parts) + "\n"

    def _table(self, split: str) -> str:
        return markdown(self.head(split), self.lines(split))

    def to_dict(self) -> dict[str, Any]:
        return {
            "corpus": self.corpus,
            "documents": self.documents,
            "queries": self.queries,
            "judged": self.queries | self.judged,
            "seeds": list(self.seeds),
            "budget": self.budget,
            "against": self.against,
            "splits": {
                split: {
                    "best_baseline": self.best_baseline(split),
                    "rows": {
                        row.name: {**dict_row(row, self.tests[split]), "costs": costs(row)}
                        for row in rows
                    },
                }
                for split, rows in self.tables.items()
            },
            "failures": self.failures,
        }

    def csv(self) -> str:
        """A line a method and split: means, spreads, values by seed, costs, all p values."""
        return csv_text(
            [
                {
                    "split": split,
                    "queries": self.queries[split],
                    "judged": self.judged.get(split, self.queries[split]),
                    "method": row.name,
                    "group": row.entry.group,
                    **flat_row(row, self.tests[split]),
                    **latency_of(row),
                }
                for split, rows in self.tables.items()
                for row in rows
            ]
        )

    def write(self, folder: Path) -> None:
        """Writes `files`, each whole or not at all."""
        html = page.html(self, self._pictures)
        writers: dict[str, Callable[[Path], Any]] = {
            MARKDOWN: lambda path: path.write_text(self.markdown(), encoding="utf-8"),
            "comparison.json": lambda path: path.write_text(json.dumps(self.to_dict(), indent=1)),
            "comparison.csv": lambda path: path.write_text(self.csv(), encoding="utf-8"),
            "comparison.html": lambda path: path.write_text(html, encoding="utf-8"),
        }
        for name, png in self._pictures.items():
            writers[f"{_PICTURES}/{name}.png"] = functools.partial(_write_bytes, png)
        write_files(folder, writers)


def latency_of(row: Row) -> dict[str, float]:
    """p50 and p95 in milliseconds, the means over seeds; empty where nothing was measured."""
    seeds = [latency_figures(one.latencies) for one in row.measured if one.latencies]
    return {n: float(np.mean([s[n] for s in seeds])) for n in seeds[0]} if seeds else {}


def costs(row: Row) -> dict[str, float]:
    """What a method costs: index_bytes, minutes, queries_per_second, p50_ms, p95_ms."""
    if not row.measured:
        return {}
    return {**row.figures, "minutes": row.minutes or 0.0, **latency_of(row)}


def _cost_cells(row: Row) -> list[str]:
    found = costs(row)
    if not found:
        return [NONE] * len(_COSTS)
    return [
        size(found["index_bytes"]),
        f"{found['minutes']:.1f}",
        f"{found['queries_per_second']:,.0f}",
        *(f"{found[name]:.1f}" if name in found else NONE for name in ("p50_ms", "p95_ms")),
    ]


def size(count: float) -> str:
    """Bytes in a unit that makes three digits of them, such as "12.3 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            return f"{count:.3g} {unit}" if count < 999.5 else f"{count:,.0f} {unit}"
        count /= 1000
    raise AssertionError


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)
