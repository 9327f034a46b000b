"""Queries -> ranked documents, by constrained beam search with given parameters.

The same code ranks dev queries while a model trains and answers a user's query later.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from genret_jax.decoding import BeamResult
from genret_jax.modeling.model import Params, RetrievalModel
from genret_jax.trie import DeviceTrie, Trie
from genret_jax.vocabularies import Vocabulary

# Batches are filled up to one of these, so that a handful of programs serves every call.
BATCH_SIZES = (1, 8, 64)


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A document that the beam reached.

    Attributes:
      position: of the document in the corpus.
      score: log p of its identifier given the query, in nats.
      row: of the trie.
    """

    position: int
    score: float
    row: int


@dataclasses.dataclass(frozen=True)
class Ranker:
    """A model and its identifiers, ready for any parameters.

    Attributes:
      document_id: position -> id; documents of equal score stand in descending order of id,
        which is trec_eval's rule, so that a written run is scored as it was ranked.
      input_length: encoder tokens a query is cut and padded to.
    """

    model: RetrievalModel
    vocabulary: Vocabulary
    trie: Trie
    document_id: Callable[[int], str]
    input_length: int

    @functools.cached_property
    def device_trie(self) -> DeviceTrie:
        return self.trie.on_device()

    @functools.cached_property
    def _search(self) -> Any:
        return jax.jit(self.model.search, static_argnames=("beam", "normaliser"))

    def beams(self, params: Params, queries: Sequence[str], *, beam: int) -> BeamResult:
        """The beams of up to 64 queries, on the host: arrays [queries, beam, ...]."""
        tokens = self.vocabulary.encode_batch(queries, self.input_length)
        size = next(n for n in BATCH_SIZES if len(queries) <= n)
        tokens = np.pad(tokens, ((0, size - len(queries)), (0, 0)))
        result = self._search(params, tokens, self.device_trie, beam=beam)
        return jax.tree.map(lambda x: np.asarray(x)[: len(queries)], result)

    def rank(
        self, params: Params, queries: Sequence[str], *, k: int, beam: int
    ) -> list[list[Ranked]]:
        """The best k documents of each query; fewer where the beam reached fewer."""
        ranked = []
        for start in range(0, len(queries), BATCH_SIZES[-1]):
            chunk = queries[start : start + BATCH_SIZES[-1]]
            result = self.beams(params, chunk, beam=beam)
            for rows, scores in zip(result.row, result.scores, strict=True):
                ranked.append(self._documents(rows, scores, k))
        return ranked

    def _documents(self, rows: np.ndarray, scores: np.ndarray, k: int) -> list[Ranked]:
        # Rows come best first, so a document with several identifiers keeps its best one.
        best: dict[int, Ranked] = {}
        last = 0.0
        for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
            if row < 0 or (len(best) >= k and score < last):
                break
            last = score
            for position in self.trie.documents(row).tolist():
                best.setdefault(position, Ranked(position, score, row))
        # A stable sort by id and then by score puts equal scores in descending order of id.
        found = sorted(best.values(), key=lambda r: self.document_id(r.position), reverse=True)
        found.sort(key=lambda r: r.score, reverse=True)
        return found[:k]
