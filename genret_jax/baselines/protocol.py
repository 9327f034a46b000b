"""What everything that searches has in common, so that it can be compared and served alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True, slots=True)
class Hit:
    """One result of one query.

    Attributes:
      document: id of the document.
      score: higher is better; comparable within one query of one searcher only.
      rank: from 1.
    """

    document: str
    score: float
    rank: int


@runtime_checkable
class Searcher(Protocol):
    """Anything that ranks documents for queries."""

    @property
    def name(self) -> str:
        """Name for tables and messages."""
        ...

    def search(self, queries: Sequence[str], *, k: int) -> list[list[Hit]]:
        """At most `k` hits for each query, best first; fewer, or none, where no more match."""
        ...


def best_hits(
    scores: Float[np.ndarray, " documents"],
    found: Int[np.ndarray, " some"],
    ids: Sequence[str],
    order: Int[np.ndarray, " documents"],
    *,
    k: int,
) -> list[Hit]:
    """The best k of the found documents as hits.

    Documents of equal score are ordered by id descending, as trec_eval does, so that the cut at k
    does not depend on the order of the corpus.

    Args:
      scores: of every document, by position.
      found: positions that may be hits, each once.
      ids: document ids by position.
      order: place of each document among all ids in descending order.
    """
    if len(found) > k:
        bound = np.partition(scores[found], -k)[-k]
        found = found[scores[found] >= bound]
    best = found[np.lexsort((order[found], -scores[found]))][:k]
    return [
        Hit(ids[position], float(scores[position]), rank)
        for rank, position in enumerate(best.tolist(), start=1)
    ]
