"""What everything that searches has in common, so that it can be compared and served alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


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
