"""Searchers against one another on the same queries: numbers, a table and a picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genret_jax.baselines.protocol import Searcher
from genret_jax.corpus import Corpus, Run
from genret_jax.evaluation import DEFAULT_METRICS, markdown_table, randomisation_test
from genret_jax.files import replace_on_success
from genret_jax.harness.measuring import rank
from genret_jax.harness.tables import shown_p
from genret_jax.significance import TESTED_METRICS, PerQuery


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was measured.

    Attributes:
      split: of the corpus.
      methods: name -> metric -> value; besides the metrics, "queries" and "queries_per_second".
      runs: name -> query id -> document id -> score.
      significance: name of every method but the first -> metric -> p value of the first against
        it, by the paired randomisation test, uncorrected.
    """

    split: str
    methods: dict[str, dict[str, float]]
    runs: dict[str, Run]
    significance: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "split": self.split,
            "methods": self.methods,
            "significance": self.significance,
        }

    def table(self) -> str:
        """Markdown; the best value of each metric is bold."""
        shown = {
            name: {m: v for m, v in values.items() if m in DEFAULT_METRICS}
            for name, values in self.methods.items()
        }
        return markdown_table(shown)

    def text(self) -> str:
        """The table, and whether the first method's distance to the others could be chance."""
        lines = [self.table()]
        if self.significance:
            lines += ["", "paired randomisation test, two-sided p:", ""]
        first = next(iter(self.methods))
        for name, metrics in self.significance.items():
            values = ", ".join(f"{shown_p(p)} in {metric}" for metric, p in metrics.items())
            lines.append(f"- {first} against {name}: {values}")
        return "\n".join(lines)

    def write(self, folder: str | Path, name: str = "") -> list[Path]:
        """Writes comparison-NAME.json, .md and .png; returns their paths. NAME is the split's."""
        stem = Path(folder) / f"comparison-{name or self.split}"
        paths = [stem.with_name(f"{stem.name}{end}") for end in (".json", ".md", ".png")]
        with replace_on_success(paths[0]) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1))
        with replace_on_success(paths[1]) as temporary:
            temporary.write_text(self.text() + "\n")
        _draw(self, paths[2])
        return paths


def compare_searchers(
    searchers: Mapping[str, Searcher], corpus: Corpus, *, split: str, k: int = 100
) -> Comparison:
    """Runs every searcher over the judged queries of a split.

    Args:
      searchers: by the name in the result. One that compiles is warmed up first, so that its
        speed is what a running service would see.
      corpus: with the split.
      split: its name.
      k: documents a query, at least 100 for recall@100.
    """
    queries = corpus.split_queries(split)
    methods: dict[str, dict[str, float]] = {}
    runs: dict[str, Run] = {}
    values: dict[str, PerQuery] = {}
    for name, searcher in searchers.items():
        found = rank(searcher, queries, corpus.qrels[split], k=k)
        methods[name] = {
            **found.metrics,
            "queries": len(queries),
            "queries_per_second": round(found.queries_per_second, 2),
        }
        runs[name], values[name] = found.run, found.per_query
    first, *others = values
    significance = {
        name: {m: randomisation_test(values[first][m], values[name][m]) for m in TESTED_METRICS}
        for name in others
    }
    return Comparison(split, methods, runs, significance)


def _draw(comparison: Comparison, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = [m for m in DEFAULT_METRICS if m in next(iter(comparison.methods.values()))]
    figure = Figure(figsize=(9, 4), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / len(comparison.methods)
    for i, (name, values) in enumerate(comparison.methods.items()):
        places = [x + (i - (len(comparison.methods) - 1) / 2) * width for x in range(len(metrics))]
        bars = axes.bar(places, [values[m] for m in metrics], width * 0.92, label=name)
        axes.bar_label(bars, fmt="%.3f", fontsize=8, padding=2)
    queries = int(next(iter(comparison.methods.values()))["queries"])
    axes.set_xticks(range(len(metrics)), metrics)
    axes.set(ylim=(0, 1.08), title=f"{comparison.split}: {queries} queries")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=len(comparison.methods), loc="upper left", frameon=False)
    with replace_on_success(path) as temporary:
        figure.savefig(temporary, format="png")
