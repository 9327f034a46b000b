"""Candidates of many judged queries as arrays, so that any score of them is soon measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int, Int64

from genret_jax.evaluation import parse_metric
from genret_jax.scoring import Candidates
from genret_jax.trec import Qrels

_PADDED = {"positions": -1, "rows": -1, "lengths": 1, "generation": -np.inf}


@dataclasses.dataclass(frozen=True, eq=False)
class Judged:
    """Attributes:
    candidates: of all judged queries, in the order of their qrels: arrays[queries, most], padded
      with what has log p = -inf. Within a query they stand in the order in which equal scores do.
      A query that reached nothing is a row of padding. Query vectors are left out.
    query, place: int64[relevant reached], where in these arrays a relevant document is.
    grade: float64[relevant reached], of it.
    relevant: int64[queries], documents that are relevant, reached or not.
    grades: of each query, those above 0, descending.
    """

    candidates: Candidates
    query: Int64[np.ndarray, " reached"]
    place: Int64[np.ndarray, " reached"]
    grade: Float64[np.ndarray, " reached"]
    relevant: Int64[np.ndarray, " queries"]
    grades: Sequence[Sequence[int]]

    @classmethod
    def of(
        cls,
        found: Mapping[str, Candidates],
        qrels: Qrels,
        document_ids: Sequence[str],
        order: Int[np.ndarray, " documents"],
    ) -> Judged:
        """Puts candidates and judgements together.

        Args:
          found: query id -> candidates; of queries without judgement nothing is made.
          qrels: judgements; all queries of it count.
          document_ids: by position.
          order: place of each document among all ids in descending order; see `Ranker.order`.
        """
        named = set().union(*qrels.values())
        position = {name: i for i, name in enumerate(document_ids) if name in named}
        places, query, grade = [], [], []
        sorted_: list[Candidates | None] = []
        for row, (name, judged) in enumerate(qrels.items()):
            one = found.get(name)
            sorted_.append(one if one is None else _in_order(one, order))
            wanted = {position[d]: g for d, g in judged.items() if g > 0 and d in position}
            if one is None or not wanted:
                continue
            here = sorted_[-1].positions  # type: ignore[union-attr]
            at = np.flatnonzero(np.isin(here, list(wanted)))
            places += at.tolist()
            query += [row] * len(at)
            grade += [wanted[p] for p in here[at].tolist()]
        grades = [sorted((g for g in j.values() if g > 0), reverse=True) for j in qrels.values()]
        return cls(
            _stacked(sorted_),
            np.array(query, np.int64),
            np.array(places, np.int64),
            np.array(grade, np.float64),
            np.array([len(some) for some in grades], np.int64),
            grades,
        )

    def __len__(self) -> int:
        return len(self.relevant)

    def ranks(self, scores: Float32[np.ndarray, "queries most"]) -> Int64[np.ndarray, " reached"]:
        """The rank, from 1, of each relevant document that was reached."""
        own = scores[self.query, self.place][:, None]
        others = scores[self.query]
        before = np.arange(scores.shape[1]) < self.place[:, None]
        return 1 + ((others > own) | ((others == own) & before)).sum(1)

    def metrics(
        self, scores: Float32[np.ndarray, "queries most"], names: Sequence[str]
    ) -> dict[str, Float64[np.ndarray, " queries"]]:
        """What `genret_jax.evaluation.per_query` says of the run with these scores.

        Args:
          scores: of the candidates; those of padding are -inf.
          names: metrics, such as "mrr@10".
        """
        ranks = self.ranks(scores)
        return {name: self._metric(ranks, *parse_metric(name)) for name in names}

    def _metric(
        self, ranks: Int64[np.ndarray, " reached"], measure: str, cutoff: int
    ) -> Float64[np.ndarray, " queries"]:
        among = ranks <= cutoff
        if measure in ("hits", "mrr"):
            best = np.full(len(self), np.inf)
            np.minimum.at(best, self.query[among], ranks[among])
            return np.isfinite(best).astype(np.float64) if measure == "hits" else 1 / best
        if measure == "recall":
            return self._sums(among.astype(np.float64)) / np.maximum(self.relevant, 1)
        gains = np.where(among, self.grade / np.log2(ranks + 1), 0.0)
        ideal = [
            sum(g / np.log2(rank + 1) for rank, g in enumerate(some[:cutoff], 1))
            for some in self.grades
        ]
        return self._sums(gains) / np.maximum(ideal, 1e-12)

    def _sums(self, values: Float64[np.ndarray, " reached"]) -> Float64[np.ndarray, " queries"]:
        return np.bincount(self.query, values, minlength=len(self))

    def some(self, rows: Bool[np.ndarray, " queries"]) -> Judged:
        """Of some queries alone."""
        kept = rows[self.query]
        moved = np.cumsum(rows) - 1
        return Judged(
            _each(self.candidates, lambda array: array[rows]),
            moved[self.query[kept]],
            self.place[kept],
            self.grade[kept],
            self.relevant[rows],
            [some for some, kept in zip(self.grades, rows, strict=True) if kept],
        )


def _each(one: Candidates, change: Callable[[np.ndarray], np.ndarray]) -> Candidates:
    """With all arrays but the query's vector changed alike."""
    arrays: dict[str, Any] = {
        name: None if value is None else change(value)
        for name, value in vars(one).items()
        if name != "query"
    }
    return Candidates(query=one.query, **arrays)


def _in_order(one: Candidates, order: Int[np.ndarray, " documents"]) -> Candidates:
    by = np.argsort(order[one.positions])
    return _each(one, lambda array: array[by])


def _stacked(rows: Sequence[Candidates | None]) -> Candidates:
    """[queries, most] of each array; without a query's own vector."""
    reached = [row for row in rows if row is not None]
    most = max((len(row.positions) for row in reached), default=0)
    arrays: dict[str, np.ndarray | None] = {"query": np.zeros((len(rows), 0), np.float32)}
    types: dict[str, Any] = dict.fromkeys(("positions", "rows", "lengths"), np.int32)
    types |= dict.fromkeys(("generation", "text", "asked"), np.float32) | {"unseen": np.bool_}
    for name, dtype in types.items():
        if any(getattr(row, name) is None for row in reached):
            arrays[name] = None
            continue
        table = np.full((len(rows), most), _PADDED.get(name, 0), dtype)
        for target, row in zip(table, rows, strict=True):
            if row is not None:
                value = getattr(row, name)
                target[: len(value)] = value
        arrays[name] = table
    return Candidates(**arrays)  # type: ignore[arg-type]
