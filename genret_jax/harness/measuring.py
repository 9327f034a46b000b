"""A searcher on the queries of a split: what it finds, how fast, and in how many bytes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from genret_jax.baselines.protocol import Searcher
from genret_jax.corpus import Corpus, Qrels, Run
from genret_jax.errors import UserError
from genret_jax.evaluation import DEFAULT_METRICS, per_query, run_of

DEPTH = 100  # documents a query, for recall@100
BASELINES = ("bm25", "bm25+q", "tfidf", "tfidf+q")
_CHUNK = 64  # queries searched together, and so a step of a progress bar
_ALONE = 200  # queries asked one by one, at most
_SECONDS_ALONE = 20.0
# Of a retriever's folder, what no search reads to rank documents: their texts, and reports.
_NOT_INDEX = ("documents.jsonl", "documents.offsets.npy", "README.md", "metrics.json")


class Asked:
    """A searcher with options of its own set, and a progress bar.

    Args:
      searcher: its `search` takes the options besides queries and k.
      **options: such as beam=50 of a retriever.
    """

    def __init__(self, searcher: Any, **options: Any):
        self._searcher, self._options = searcher, options
        self.name: str = searcher.name

    def search(self, queries: Sequence[str], *, k: int) -> list[list[Any]]:
        from tqdm import tqdm

        hits: list[list[Any]] = []
        bar = tqdm(total=len(queries), unit="query", desc=self.name, leave=False, disable=None)
        with bar:
            for start in range(0, len(queries), _CHUNK):
                chunk = queries[start : start + _CHUNK]
                hits += self._searcher.search(chunk, k=k, **self._options)
                bar.update(len(chunk))
        return hits


def baseline(name: str, corpus: Corpus) -> Searcher:
    """A baseline by the name that `--baseline` takes, in memory.

    Raises:
      UserError: for an unknown name, or one with train queries on a corpus without any.
    """
    from genret_jax.baselines.sparse import bm25_for
    from genret_jax.baselines.tfidf import tfidf_for

    if name not in BASELINES:
        raise UserError(f"baseline {name!r} is not known; choose one of {', '.join(BASELINES)}")
    make = bm25_for if name.startswith("bm25") else tfidf_for
    return make(corpus, with_train_queries=name.endswith("+q"))


@dataclasses.dataclass(frozen=True)
class Ranking:
    """What a searcher made of the queries of a split.

    Attributes:
      run: the ranking.
      per_query: metric -> float64[queries], in the order of the qrels.
      queries_per_second: of all queries in batches.
      latencies: milliseconds of some queries, each asked alone; none where they were not wanted.
    """

    run: Run
    per_query: dict[str, npt.NDArray[np.float64]]
    queries_per_second: float
    latencies: tuple[float, ...] = ()

    @property
    def metrics(self) -> dict[str, float]:
        return {metric: float(array.mean()) for metric, array in self.per_query.items()}


def rank(
    searcher: Searcher,
    queries: Mapping[str, str],
    qrels: Qrels,
    *,
    k: int = DEPTH,
    warm_up: bool = True,
    latency: bool = False,
) -> Ranking:
    """Runs a searcher over queries.

    Args:
      searcher: what searches.
      queries: query id -> text, in the order of the qrels.
      qrels: their judgements.
      k: documents a query, at least 100 for recall@100.
      warm_up: whether it is asked some queries before its time is taken, so that its speed is what
        a running service would see: searchers compile.
      latency: whether some queries are also asked one by one.
    """
    texts = list(queries.values())
    if warm_up:
        searcher.search(texts[:_CHUNK], k=k)  # the sizes of batch that the whole run will have
        if len(texts) % _CHUNK and len(texts) > _CHUNK:
            searcher.search(texts[: len(texts) % _CHUNK], k=k)
    run, speed = run_of(searcher, queries, k)
    values = per_query(run, qrels, DEFAULT_METRICS)
    return Ranking(run, values, speed, latencies(searcher, texts, k=k) if latency else ())


def latencies(searcher: Searcher, queries: Sequence[str], *, k: int) -> tuple[float, ...]:
    """Milliseconds of queries asked one by one: up to 200 of them, evenly spread, for 20 s."""
    chosen = [
        queries[i] for i in np.linspace(0, len(queries) - 1, min(len(queries), _ALONE)).astype(int)
    ]
    searcher.search(chosen[:1], k=k)  # compiles
    found, began = [], time.perf_counter()
    for query in chosen:
        start = time.perf_counter()
        searcher.search([query], k=k)
        end = time.perf_counter()
        found.append(1000 * (end - start))
        if end - began > _SECONDS_ALONE:
            break
    return tuple(found)


def latency_figures(found: Sequence[float]) -> dict[str, float]:
    """The 50th and 95th percentile, in milliseconds."""
    return {f"p{q}_ms": float(np.percentile(found, q)) for q in (50, 95)}


def index_bytes(folder: Path) -> int:
    """Bytes of a retriever's folder that ranking needs: weights, identifiers, vectors, postings.

    The documents' texts, which are only shown, and reports do not count.
    """
    return sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file()
        and path.name not in _NOT_INDEX
        and not path.name.startswith("comparison-")
    )
