"""What an ablation found: means over seeds, their spread, tests of significance; as files."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from genret_jax.ablation.variants import FULL, Variant
from genret_jax.comparison import shown_p
from genret_jax.evaluation import DEFAULT_METRICS
from genret_jax.files import replace_on_success
from genret_jax.significance import TESTED_METRICS, Paired, against

FILES = ("ablation.md", "ablation.json", "ablation.csv", "ablation.png")
_CHOOSES = "mrr@10"  # the metric by which a baseline is the best one
_NONE = "–"


@dataclasses.dataclass(frozen=True)
class Measured:
    """A variant with one seed.

    Attributes:
      seed: None for a baseline.
      per_query: metric -> float64[queries], in the order of the split's qrels.
      run: folder of the training, inside the ablation's; "" for a baseline.
      steps, seconds: of the training, both stages together.
    """

    seed: int | None
    per_query: dict[str, npt.NDArray[np.float64]]
    run: str = ""
    steps: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        values = {metric: array.tolist() for metric, array in self.per_query.items()}
        return {**dataclasses.asdict(self), "metrics": self.metrics, "per_query": values}

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Measured:
        """From what `to_dict` gave."""
        values = {m: np.asarray(v, dtype=np.float64) for m, v in found["per_query"].items()}
        return cls(found["seed"], values, found["run"], found["steps"], found["seconds"])

    @property
    def metrics(self) -> dict[str, float]:
        return {metric: float(array.mean()) for metric, array in self.per_query.items()}


@dataclasses.dataclass(frozen=True)
class Row:
    """A variant with all its seeds.

    Attributes:
      measured: those seeds that ended.
      failures: seed, or "" for a baseline -> why it failed, in one line.
    """

    variant: Variant
    measured: tuple[Measured, ...]
    failures: dict[str, str]

    @property
    def name(self) -> str:
        return self.variant.name

    @property
    def label(self) -> str:
        """The name, and what is missing."""
        if not self.failures:
            return self.name
        if not self.measured:
            return f"{self.name} (failed)"
        ended, seeds = len(self.measured), len(self.measured) + len(self.failures)
        return f"{self.name} ({ended} of {seeds} seeds)"

    @functools.cached_property
    def per_query(self) -> dict[str, npt.NDArray[np.float64]]:
        """Metric -> float64[queries], the mean over seeds; empty where all failed."""
        names = self.measured[0].per_query if self.measured else ()
        return {m: np.mean([one.per_query[m] for one in self.measured], axis=0) for m in names}

    @property
    def mean(self) -> dict[str, float]:
        return {metric: float(array.mean()) for metric, array in self.per_query.items()}

    @property
    def spread(self) -> dict[str, float]:
        """Standard deviation of the metrics over seeds (n - 1); empty for a single seed."""
        if len(self.measured) < 2:
            return {}
        seeds = [one.metrics for one in self.measured]
        return {m: float(np.std([s[m] for s in seeds], ddof=1)) for m in seeds[0]}

    @property
    def minutes(self) -> float | None:
        """Of training, the mean over seeds; None for a baseline."""
        seconds = [one.seconds for one in self.measured if one.run]
        return float(np.mean(seconds)) / 60 if seconds else None


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
        return {
            f"{row.name}, seed {seed}" if seed else row.name: reason
            for row in self.rows
            for seed, reason in row.failures.items()
        }

    @property
    def best_baseline(self) -> str:
        """By MRR@10; "" where none was measured."""
        rows = [r for r in self.rows if r.variant.group == "baseline" and r.measured]
        return max(rows, key=lambda row: row.mean[_CHOOSES]).name if rows else ""

    @functools.cached_property
    def tests(self) -> dict[str, dict[str, dict[str, Paired]]]:
        """Reference ("dogr", the best baseline) -> other row -> metric -> comparison."""
        values = {row.name: row.per_query for row in self.rows if row.measured}
        return {
            reference: against(
                values[reference],
                {name: one for name, one in values.items() if name != reference},
            )
            for reference in (FULL, self.best_baseline)
            if reference in values
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
            "rows": {row.name: self._row(row) for row in self.rows},
            "failures": self.failures,
        }

    def _row(self, row: Row) -> dict[str, Any]:
        return {
            "what": row.variant.what,
            "group": row.variant.group,
            "mean": row.mean,
            "spread": row.spread,
            "minutes": row.minutes,
            "seeds": {
                str(one.seed): {"metrics": one.metrics, "run": one.run, "steps": one.steps}
                for one in row.measured
                if one.seed is not None
            },
            "against": {
                reference: {m: dataclasses.asdict(t) for m, t in rows[row.name].items()}
                for reference, rows in self.tests.items()
                if row.name in rows
            },
            "failures": row.failures,
        }

    def table(self) -> str:
        """Markdown: a row a variant; the best mean of each metric is bold."""
        references = list(self.tests)
        head = ["variant", *DEFAULT_METRICS, "minutes"]
        head += [
            f"p {metric}, {reference}" for reference in references for metric in TESTED_METRICS
        ]
        lines = [head, ["---", *["---:"] * (len(head) - 1)]]
        best = {
            m: max((round(r.mean[m], 3) for r in self.rows if r.measured), default=math.nan)
            for m in DEFAULT_METRICS
        }
        for row in self.rows:
            cells = [row.label]
            cells += [_value(row, metric, best[metric]) for metric in DEFAULT_METRICS]
            cells.append(_NONE if row.minutes is None else f"{row.minutes:.1f}")
            for reference in references:
                tests = self.tests[reference].get(row.name, {})
                cells += [
                    shown_p(tests[m].randomisation_holm) if m in tests else _NONE
                    for m in TESTED_METRICS
                ]
            lines.append(cells)
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

    def markdown(self) -> str:
        """Title, table, what the rows and numbers are, and what failed."""
        legend = [f"- {r.name}: {r.variant.what}" for r in self.rows]
        spread = "mean ± standard deviation over seeds" if len(self.seeds) > 1 else "one seed"
        notes = [
            f"{FULL} has identifiers of kind {self.docids}. Numbers are {spread}. p is two-sided, "
            "of the paired randomisation test over queries (each query's values averaged over "
            "seeds first), corrected by Holm over the rows of its column; the t-test and the "
            "uncorrected values are in ablation.json and ablation.csv. It says what another "
            "choice of queries might change, not another seed.",
        ]
        if self.best_baseline:
            notes.append(f"The best baseline by {_CHOOSES} is {self.best_baseline}.")
        parts = [f"# {self.title()}", self.table(), " ".join(notes), "\n".join(legend)]
        if self.failures:
            failed = [f"- {name}: {reason}" for name, reason in self.failures.items()]
            parts.append("Failed:\n\n" + "\n".join(failed))
        return "\n\n".join(parts) + "\n"

    def csv(self) -> str:
        """A line a variant: means, spreads, values by seed, and all p values."""
        lines = [self._flat(row) for row in self.rows]
        longest = sorted(lines, key=len, reverse=True)  # has the columns in their order
        names = list(dict.fromkeys(name for line in longest for name in line))
        file = io.StringIO()
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return file.getvalue()

    def _flat(self, row: Row) -> dict[str, Any]:
        flat: dict[str, Any] = {"variant": row.name, "group": row.variant.group}
        flat |= {"minutes": row.minutes, "seeds": len(row.measured)}
        flat |= dict(row.mean)
        flat |= {f"{metric} spread": value for metric, value in row.spread.items()}
        for one in row.measured:
            if one.seed is not None:
                flat |= {f"{metric} seed {one.seed}": v for metric, v in one.metrics.items()}
        for reference, rows in self.tests.items():
            for metric, test in rows.get(row.name, {}).items():
                values = dataclasses.asdict(test)
                flat |= {f"{metric} {what} {reference}": v for what, v in values.items()}
        return flat | {"failed": "; ".join(row.failures.values())}

    def write(self, folder: Path) -> None:
        """Writes `FILES`, each whole or not at all."""
        from genret_jax.ablation.picture import draw

        writers: list[Callable[[Path], Any]] = [
            lambda path: path.write_text(self.markdown(), encoding="utf-8"),
            lambda path: path.write_text(json.dumps(self.to_dict(), indent=1)),
            lambda path: path.write_text(self.csv(), encoding="utf-8"),
            lambda path: draw(self, path),
        ]
        for name, write in zip(FILES, writers, strict=True):
            with replace_on_success(folder / name) as temporary:
                write(temporary)


def _value(row: Row, metric: str, best: float) -> str:
    if not row.measured:
        return _NONE
    mean = row.mean[metric]
    text = f"**{mean:.3f}**" if round(mean, 3) == best else f"{mean:.3f}"
    return f"{text} ± {row.spread[metric]:.3f}" if row.spread else text
