"""Retrieval metrics by trec_eval's definitions, paired significance, and tables."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from genret_jax.baselines.protocol import Searcher
from genret_jax.corpus import Qrels, Run
from genret_jax.errors import UserError
from genret_jax.trec import ranked

DEFAULT_METRICS = ("hits@1", "hits@10", "mrr@10", "ndcg@10", "recall@100")

_METRIC = re.compile(r"([a-z]+)@([1-9][0-9]{0,8})", re.ASCII)
# Permutations are drawn in blocks of about this many signs, so that memory stays small.
_SIGNS_A_BLOCK = 1 << 22


class TimedRun(NamedTuple):
    """What `run_of` gives: the run, and how many queries a second it took to make it."""

    run: Run
    queries_per_second: float


def per_query(
    run: Run,
    qrels: Qrels,
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    relevance_level: int = 1,
) -> dict[str, npt.NDArray[np.float64]]:
    """Value of each metric for each judged query.

    Results are ordered by score descending, equal scores by document id descending, whatever the
    order in `run`. With R the number of documents of grade >= relevance_level, k the cutoff
    (trec_eval's name of the measure in brackets):

      hits@k    1 if any of the first k is relevant, else 0 (success_k)
      recall@k  relevant among the first k / R (recall_k)
      mrr@k     1 / rank of the first relevant one if that is at most k, else 0 (recip_rank)
      ndcg@k    sum over ranks i <= k of grade_i / log2(i + 1), divided by the same sum of the
                judged grades in descending order (ndcg_cut_k); grades below 1 gain nothing, and
                relevance_level plays no part

    Every query of `qrels` counts, as with `trec_eval -c`: one that the run lacks has 0, and so has
    one without any relevant document. Queries without judgements are left out. Documents without
    judgement are not relevant.

    Args:
      run: query id -> document id -> score.
      qrels: query id -> document id -> grade.
      metrics: names as above.
      relevance_level: lowest grade that is relevant (`trec_eval -l`).

    Returns:
      metric -> float64[queries], in the order of `qrels`.

    Raises:
      UserError: an unknown metric, empty qrels, or a score that is not a number.

    Warns:
      UserWarning: the run has queries and none of them is judged: the ids are of two collections.

    Example:
      >>> per_query({"q": {"a": 2.0, "b": 1.0}}, {"q": {"b": 1}}, ["mrr@10"])
      {'mrr@10': array([0.5])}
    """
    names = [metrics] if isinstance(metrics, str) else metrics
    measures = {metric: _parsed(metric) for metric in names}
    if not measures:
        raise UserError("no metrics given; name at least one, such as ndcg@10")
    if relevance_level < 1:
        raise UserError(f"relevance level {relevance_level}; give 1 or more")
    if not qrels:
        raise UserError("the qrels have no judgements; there is nothing to average over")
    if run and qrels.keys().isdisjoint(run):
        warnings.warn(
            f"none of the run's {len(run)} queries (such as {next(iter(run))!r}) is among the "
            f"{len(qrels)} judged ones (such as {next(iter(qrels))!r}): every metric is 0",
            stacklevel=2,
        )
    depth = max(cutoff for _, cutoff in measures.values())
    values = {metric: np.zeros(len(qrels), dtype=np.float64) for metric in measures}
    for row, (query, judged) in enumerate(qrels.items()):
        results = run.get(query)
        relevant = sum(grade >= relevance_level for grade in judged.values())
        if not results or not any(grade > 0 for grade in judged.values()):
            continue
        best = ranked(results, query=query)[:depth]
        grades = [judged.get(document, 0) for document, _ in best]
        ideal = sorted(judged.values(), reverse=True)
        for metric, (measure, cutoff) in measures.items():
            if measure is _ndcg:
                values[metric][row] = _ndcg(grades[:cutoff], ideal[:cutoff])
            elif relevant:
                hits = [grade >= relevance_level for grade in grades[:cutoff]]
                values[metric][row] = measure(hits, relevant)
    return values


def evaluate(
    run: Run,
    qrels: Qrels,
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    relevance_level: int = 1,
) -> dict[str, float]:
    """Mean of each metric over all judged queries; `per_query` has definitions and errors.

    Example:
      >>> evaluate({"q": {"a": 2.0, "b": 1.0}}, {"q": {"b": 1}, "unanswered": {"a": 1}}, ["mrr@10"])
      {'mrr@10': 0.25}
    """
    values = per_query(run, qrels, metrics, relevance_level=relevance_level)
    return {metric: float(array.mean()) for metric, array in values.items()}


def run_of(searcher: Searcher, queries: Mapping[str, str], k: int) -> TimedRun:
    """Searches all queries in one call and times it.

    Args:
      queries: query id -> text.
      k: documents a query.

    Returns:
      The run and the speed. A document that comes several times keeps its best score.

    Raises:
      UserError: no queries.
    """
    if not queries:
        raise UserError(f"no queries to search with {searcher.name}; give at least one")
    start = time.perf_counter()
    results = searcher.search(list(queries.values()), k=k)
    seconds = time.perf_counter() - start
    run: Run = {}
    for query, hits in zip(queries, results, strict=True):
        scores = run.setdefault(query, {})
        for hit in hits:
            scores[hit.document] = max(hit.score, scores.get(hit.document, -math.inf))
    return TimedRun(run, len(queries) / max(seconds, 1e-9))


def randomisation_test(
    a: npt.ArrayLike, b: npt.ArrayLike, *, samples: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p value of the paired randomisation test on the difference of means.

    Under the null hypothesis the two systems' values of a query could as well be swapped, so the
    signs of the differences are drawn at random. The p value is (1 + number of draws whose mean
    differs from 0 at least as much as the observed one) / (1 + samples), which is never 0 and keeps
    the level of the test exact (Phipson and Smyth 2010; the test for retrieval: Smucker, Allan and
    Carterette 2007).

    Args:
      a, b: float[queries], the same queries in the same order, as from `per_query`.
      samples: number of draws; the smallest p value is 1 / (1 + samples).
      seed: equal seeds give equal results.

    Raises:
      UserError: different lengths, no queries, values that are not finite, or no draws.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or not first.size:
        raise UserError(
            f"randomisation test: values of shapes {first.shape} and {second.shape}; give two "
            "equally long lists, one value a query, in the same order"
        )
    if samples < 1:
        raise UserError(f"randomisation test: {samples} samples; give 1 or more")
    differences = first - second
    if not np.isfinite(differences).all():
        raise UserError("randomisation test: a value is not finite; mend the metric first")
    # A query on which both agree adds 0 whatever its sign.
    differences = differences[differences != 0]
    if not differences.size:
        return 1.0
    total = differences.sum()
    # Sums of the same terms in another order differ in the last bits and must count as equal.
    bound = abs(total) - 1e-12 * np.abs(differences).sum()
    generator = np.random.default_rng(seed)
    block = max(1, _SIGNS_A_BLOCK // differences.size)
    extreme = 0
    for start in range(0, samples, block):
        shape = (min(block, samples - start), differences.size)
        swapped = generator.integers(0, 2, size=shape, dtype=np.int8)
        extreme += int((np.abs(total - 2 * (swapped @ differences)) >= bound).sum())
    return (1 + extreme) / (1 + samples)


def markdown_table(methods: Mapping[str, Mapping[str, float]], *, digits: int = 3) -> str:
    """A Markdown table, one row a method and one column a metric, the best of each column in bold.

    Columns are in order of first appearance; a value that a method lacks is a dash. Values that
    print alike are bold together, and nothing is bold where there is nothing to compare with.

    Args:
      methods: name -> metric -> value, higher is better.
      digits: digits after the point.

    Raises:
      UserError: no methods.
    """
    if not methods:
        raise UserError("no methods to put into a table; give at least one")
    metrics = list(dict.fromkeys(metric for values in methods.values() for metric in values))
    columns = []
    for metric in metrics:
        numbers = [values.get(metric, math.nan) for values in methods.values()]
        rounded = [round(number, digits) for number in numbers]
        comparable = [number for number in rounded if not math.isnan(number)]
        best = max(comparable) if len(comparable) > 1 else None
        cells = ["–" if math.isnan(number) else f"{number:.{digits}f}" for number in rounded]
        columns.append(
            [
                f"**{cell}**" if number == best else cell
                for cell, number in zip(cells, rounded, strict=True)
            ]
        )
    rows = [["method", *metrics], ["---", *["---:"] * len(metrics)]]
    for place, name in enumerate(methods):
        rows.append([name.replace("|", "\\|"), *(column[place] for column in columns)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _hits(hits: Sequence[bool], relevant: int) -> float:
    return float(any(hits))


def _recall(hits: Sequence[bool], relevant: int) -> float:
    return sum(hits) / relevant


def _mrr(hits: Sequence[bool], relevant: int) -> float:
    return 1.0 / (hits.index(True) + 1) if any(hits) else 0.0


def _ndcg(grades: Sequence[int], ideal: Sequence[int]) -> float:
    return _gain(grades) / _gain(ideal)


def _gain(grades: Sequence[int]) -> float:
    return sum(
        grade / math.log2(rank + 1) for rank, grade in enumerate(grades, start=1) if grade > 0
    )


_MEASURES: dict[str, Callable[..., float]] = {
    "hits": _hits,
    "recall": _recall,
    "mrr": _mrr,
    "ndcg": _ndcg,
}


def _parsed(metric: str) -> tuple[Callable[..., float], int]:
    """(function, cutoff) of a metric's name."""
    measure, cutoff = parse_metric(metric)
    return _MEASURES[measure], cutoff


def parse_metric(metric: str) -> tuple[str, int]:
    """("mrr", 10) of "mrr@10".

    Raises:
      UserError: there is no such metric.
    """
    match = _METRIC.fullmatch(metric)
    if match is None or match[1] not in _MEASURES:
        forms = ", ".join(f"{name}@K" for name in _MEASURES)
        raise UserError(
            f"unknown metric {metric!r}; the forms are {forms} with a whole number K from 1, "
            "such as ndcg@10"
        )
    return match[1], int(match[2])
