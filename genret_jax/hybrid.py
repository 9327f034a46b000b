"""Two rankings into one: by ranks, or by scores with weights from dev queries."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Mapping, Sequence

import numpy as np

from genret_jax.corpus import Qrels, Run
from genret_jax.errors import UserError
from genret_jax.evaluation import evaluate
from genret_jax.trec import ranked

RANK_CONSTANT = 60  # of Cormack, Clarke and Buettcher (2009)
_SHARES = tuple(np.linspace(0, 1, 21).round(2).tolist())


def reciprocal_ranks(runs: Sequence[Run], *, k: int = 100, constant: int = RANK_CONSTANT) -> Run:
    """Reciprocal rank fusion: score(q, d) = sum over runs of 1 / (constant + rank of d).

    Ranks count from 1 in trec_eval's order; a run that lacks a document adds nothing to it.

    Args:
      runs: two or more.
      k: documents a query that are kept.
      constant: how little the first ranks differ.

    Example:
      >>> fused = reciprocal_ranks([{"q": {"a": 2.0, "b": 1.0}}, {"q": {"b": 9.0}}])
      >>> {d: round(s * 61 * 62) for d, s in fused["q"].items()}
      {'b': 123, 'a': 62}
    """
    _check(runs)

    def scores(results: Mapping[str, float], query: str) -> dict[str, float]:
        best = ranked(dict(results), query=query)
        return {d: 1.0 / (constant + rank) for rank, (d, _) in enumerate(best, start=1)}

    return _summed([{q: scores(found, q) for q, found in run.items()} for run in runs], k)


def weighted(runs: Sequence[Run], weights: Sequence[float], *, k: int = 100) -> Run:
    """score(q, d) = sum over runs of weight * score of d, brought to 0 ... 1 for each query.

    The best document of a query has 1, the last of those found 0; where all are equal they have 1.
    A run that lacks a document adds 0 to it.

    Args:
      runs: two or more.
      weights: one a run, from 0.
      k: documents a query that are kept.
    """
    _check(runs)
    if len(weights) != len(runs) or min(weights) < 0:
        raise UserError(f"weights {list(weights)} for {len(runs)} runs; give one each, from 0")
    scaled = [
        {q: {d: w * s for d, s in _unit(found).items()} for q, found in run.items()}
        for run, w in zip(runs, weights, strict=True)
    ]
    return _summed(scaled, k)


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights of two runs.

    Attributes:
      first: of the first; the second has 1 - first.
      dev: the metric on dev over the weight of the first.
    """

    first: float
    dev: dict[float, float]


def fit_weights(first: Run, second: Run, qrels: Qrels, *, metric: str = "mrr@10") -> Weights:
    """The weights of `weighted` with the best metric; among equals those nearest to one half.

    Args:
      first, second: on dev queries.
      qrels: of the dev queries.
      metric: for example "mrr@10".
    """
    dev = {
        share: evaluate(weighted([first, second], [share, 1 - share]), qrels, [metric])[metric]
        for share in _SHARES
    }
    best = max(dev, key=lambda share: (dev[share], -abs(share - 0.5), share))
    return Weights(best, dev)


def _unit(found: Mapping[str, float]) -> dict[str, float]:
    if not found:
        return {}
    low, high = min(found.values()), max(found.values())
    return {d: (s - low) / (high - low) if high > low else 1.0 for d, s in found.items()}


def _summed(runs: Sequence[Run], k: int) -> Run:
    out: Run = {}
    for query in dict.fromkeys(query for run in runs for query in run):
        total: dict[str, float] = {}
        for run in runs:
            for document, score in run.get(query, {}).items():
                total[document] = total.get(document, 0.0) + score
        best = heapq.nlargest(k, total.items(), key=lambda item: (item[1], item[0]))
        out[query] = dict(best)
    return out


def _check(runs: Sequence[Run]) -> None:
    if len(runs) < 2:
        raise UserError(f"{len(runs)} runs to fuse; give two or more")
