"""Retrieved negatives: what a searcher finds for a train query and nobody judged relevant."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int, Int32
from tqdm import tqdm

from genret_jax.errors import UserError

if TYPE_CHECKING:
    from genret_jax.corpus import Document

log = logging.getLogger(__name__)
# (queries, k) -> positions of at most k documents for each query, best first.
Search: TypeAlias = Callable[[list[str], int], Sequence[Any]]


class Positives(NamedTuple):
    """Train queries by their text.

    Attributes:
      queries: the different texts, case and blanks aside, in the order of their first pair.
      relevant: int32[queries, most], ascending positions of what is relevant, then -1.
      query_of: int32[pairs], the query of each pair.
    """

    queries: list[str]
    relevant: Int32[np.ndarray, "queries most"]
    query_of: Int32[np.ndarray, " pairs"]


def known_positives(pairs: Sequence[tuple[str, int]]) -> Positives:
    """All documents relevant to a text: the same question may be asked, and judged, repeatedly.

    Args:
      pairs: (query, position of a relevant document), as `Corpus.pairs` gives them.

    Example:
      >>> known_positives([("a", 3), ("b", 1), ("a", 0)]).relevant.tolist()
      [[0, 3], [1, -1]]
    """
    number: dict[str, int] = {}
    texts: list[str] = []
    query_of = []
    for query, _ in pairs:
        key = " ".join(query.casefold().split())
        if key not in number:
            number[key] = len(texts)
            texts.append(query)
        query_of.append(number[key])
    sets: list[set[int]] = [set() for _ in texts]
    for row, (_, position) in zip(query_of, pairs, strict=True):
        sets[row].add(position)
    relevant = np.full((len(sets), max(map(len, sets), default=0)), -1, np.int32)
    for known, positions in zip(relevant, sets, strict=True):
        known[: len(positions)] = sorted(positions)
    return Positives(texts, relevant, np.array(query_of, np.int32))


def mine(
    search: Search,
    queries: Sequence[str],
    relevant: Int[np.ndarray, "queries most"],
    *,
    count: int,
    batch: int = 64,
    description: str = "negatives",
    keep_going: Callable[[], bool] | None = None,
) -> Int32[np.ndarray, "queries count"]:
    """The best documents that a search finds for each query and that are not relevant.

    Args:
      search: (queries, k) -> arrays of document positions, best first; k is always
        `count + most`, so that a jitted search is compiled once. Positions below 0 are padding.
      queries, relevant: of `known_positives`.
      count: negatives of a query.
      batch: queries of one call, at most.
      description: of the progress bar.
      keep_going: asked before every batch; once it says no, the queries that are left get none.

    Returns:
      int32[queries, count], best first, -1 where no more were found.
    """
    if count < 1 or batch < 1:
        raise UserError(f"negatives: count {count}, batch {batch}; give 1 or more of each")
    out = np.full((len(queries), count), -1, np.int32)
    log.info("%s: %d queries", description, len(queries))
    with tqdm(total=len(queries), unit="query", desc=description, disable=None) as bar:
        for start in range(0, len(queries), batch):
            if keep_going and not keep_going():
                break
            texts = list(queries[start : start + batch])
            results = search(texts, count + relevant.shape[1])
            here = slice(start, start + len(texts))
            for row, known, result in zip(out[here], relevant[here], results, strict=True):
                found = np.asarray(result, np.int64)
                kept = found[(found >= 0) & ~np.isin(found, known)][:count]
                row[: len(kept)] = kept
            bar.update(len(texts))
    return out


def bm25_search(documents: Sequence[Document]) -> Search:
    """BM25 over the documents, as `mine` takes it."""
    from genret_jax.baselines.sparse import BM25

    index = BM25.index(documents)
    position = {document.id: i for i, document in enumerate(documents)}

    def search(queries: list[str], k: int) -> list[np.ndarray]:
        hits = index.search(queries, k=k)
        return [np.array([position[hit.document] for hit in h], np.int32) for h in hits]

    return search
