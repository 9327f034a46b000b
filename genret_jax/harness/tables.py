"""Tables of rows, and reports as files."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from genret_jax.evaluation import DEFAULT_METRICS
from genret_jax.files import replace_on_success
from genret_jax.harness.rows import Row
from genret_jax.significance import TESTED_METRICS, Paired, against

NONE = "–"
CHOOSES = "mrr@10"  # the metric by which a baseline is the best one

# Reference -> other row -> metric -> comparison.
Tests = dict[str, dict[str, dict[str, Paired]]]


def best_of(rows: Iterable[Row]) -> str:
    """Name of the row that is best by MRR@10; "" where none was measured."""
    there = [row for row in rows if row.measured]
    return max(there, key=lambda row: row.mean[CHOOSES]).name if there else ""


def tests_against(references: Sequence[str], rows: Sequence[Row]) -> Tests:
    """Every row against each reference that was measured."""
    values = {row.name: row.per_query for row in rows if row.measured}
    return {
        reference: against(
            values[reference], {name: one for name, one in values.items() if name != reference}
        )
        for reference in references
        if reference in values
    }


def best_means(rows: Sequence[Row]) -> dict[str, float]:
    """Metric -> the best mean, as a table prints it; not a number where nothing was measured."""
    return {
        m: max((round(r.mean[m], 3) for r in rows if r.measured), default=math.nan)
        for m in DEFAULT_METRICS
    }


def mean_cell(row: Row, metric: str, best: float) -> str:
    """A mean, bold where it is the best, and its spread over seeds."""
    if not row.measured:
        return NONE
    mean = row.mean[metric]
    text = f"**{mean:.3f}**" if round(mean, 3) == best else f"{mean:.3f}"
    return f"{text} ± {row.spread[metric]:.3f}" if row.spread else text


def p_cells(row: Row, tests: Tests) -> list[str]:
    """p of the tested metrics against each reference, corrected by Holm."""
    cells = []
    for found in tests.values():
        own = found.get(row.name, {})
        cells += [shown_p(own[m].randomisation_holm) if m in own else NONE for m in TESTED_METRICS]
    return cells


def p_heads(tests: Tests) -> list[str]:
    """The heads of `p_cells`."""
    return [f"p {metric}, {reference}" for reference in tests for metric in TESTED_METRICS]


def shown_p(p: float) -> str:
    """A p value in three digits, as tables have it."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def flat_row(row: Row, tests: Tests) -> dict[str, Any]:
    """A row for CSV: means, spreads, values by seed, all p values, and why it failed."""
    flat: dict[str, Any] = {"minutes": row.minutes, "seeds": len(row.measured)}
    flat |= dict(row.mean)
    flat |= {f"{metric} spread": value for metric, value in row.spread.items()}
    for one in row.measured:
        if one.seed is not None:
            flat |= {f"{metric} seed {one.seed}": v for metric, v in one.metrics.items()}
    flat |= row.figures
    for reference, rows in tests.items():
        for metric, test in rows.get(row.name, {}).items():
            values = dataclasses.asdict(test)
            flat |= {f"{metric} {what} {reference}": v for what, v in values.items()}
    return flat | {"failed": "; ".join(row.failures.values())}


def dict_row(row: Row, tests: Tests) -> dict[str, Any]:
    """A row for JSON."""
    return {
        "what": row.entry.what,
        "group": row.entry.group,
        "mean": row.mean,
        "spread": row.spread,
        "minutes": row.minutes,
        **({"figures": row.figures} if row.figures else {}),
        "seeds": {
            str(one.seed): {"metrics": one.metrics, "run": one.run, "steps": one.steps}
            for one in row.measured
            if one.seed is not None
        },
        "against": {
            reference: {m: dataclasses.asdict(t) for m, t in rows[row.name].items()}
            for reference, rows in tests.items()
            if row.name in rows
        },
        "failures": row.failures,
    }


def failures_of(rows: Iterable[Row]) -> dict[str, str]:
    """Row, and its seed -> why it failed."""
    return {
        f"{row.name}, seed {seed}" if seed else row.name: why
        for row in rows
        for seed, why in row.failures.items()
    }


def csv_text(lines: Sequence[Mapping[str, Any]]) -> str:
    """CSV of lines that may lack columns."""
    longest = sorted(lines, key=len, reverse=True)  # has the columns in their order
    names = list(dict.fromkeys(name for line in longest for name in line))
    file = io.StringIO()
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def write_files(folder: Path, writers: Mapping[str, Callable[[Path], Any]]) -> None:
    """Writes files into a folder, each whole or not at all.

    Args:
      writers: name -> writes what it is to hold to a path.
    """
    for name, write in writers.items():
        with replace_on_success(folder / name) as temporary:
            write(temporary)
