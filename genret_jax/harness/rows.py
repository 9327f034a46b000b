"""What was measured: a searcher with one seed, and with all of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a row of a table is of.

    Attributes:
      name: of the row; on the command line with hyphens for blanks.
      what: one line of explanation, for the legend.
      group: its colour in the picture.
      docids: kind of identifiers, where it has its own.
    """

    name: str
    what: str
    group: str
    docids: str = ""

    @property
    def slug(self) -> str:
        """The name in file names and on the command line."""
        return self.name.replace(" ", "-").replace(":", "-")


@dataclasses.dataclass(frozen=True)
class Measured:
    """An entry with one seed, on one split.

    Attributes:
      seed: None where nothing is random.
      per_query: metric -> float64[queries], in the order of the split's qrels.
      run: folder of the training, inside that of the whole; "" where there was none.
      steps, seconds: of the training, all stages together.
      figures: what else was measured, such as "index_bytes".
      latencies: milliseconds of some queries, each asked alone.
    """

    seed: int | None
    per_query: dict[str, npt.NDArray[np.float64]]
    run: str = ""
    steps: int = 0
    seconds: float = 0.0
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    latencies: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        values = {metric: array.tolist() for metric, array in self.per_query.items()}
        return {**dataclasses.asdict(self), "metrics": self.metrics, "per_query": values}

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Measured:
        """From what `to_dict` gave."""
        fields = {f.name: found[f.name] for f in dataclasses.fields(cls) if f.name in found}
        values = {m: np.asarray(v, dtype=np.float64) for m, v in found["per_query"].items()}
        latencies = tuple(found.get("latencies", ()))
        return cls(**{**fields, "per_query": values, "latencies": latencies})

    @property
    def metrics(self) -> dict[str, float]:
        return {metric: float(array.mean()) for metric, array in self.per_query.items()}


@dataclasses.dataclass(frozen=True)
class Row:
    """An entry with all its seeds.

    Attributes:
      measured: those seeds that ended.
      failures: seed, or "" where there is none -> why it failed, in one line.
    """

    entry: Entry
    measured: tuple[Measured, ...]
    failures: dict[str, str]

    @property
    def name(self) -> str:
        return self.entry.name

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
        """Of training, the mean over seeds; None where there was none."""
        seconds = [one.seconds for one in self.measured if one.run]
        return float(np.mean(seconds)) / 60 if seconds else None

    @property
    def figures(self) -> dict[str, float]:
        """The means over seeds."""
        names = self.measured[0].figures if self.measured else ()
        return {n: float(np.mean([one.figures[n] for one in self.measured])) for n in names}
