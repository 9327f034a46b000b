"""Queries -> n-grams of the corpus -> documents, with given parameters.

The same code ranks dev queries while a model trains and answers a user's query later.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int32

from genret_jax.baselines.protocol import Hit, best_hits
from genret_jax.device_trie import DeviceTrie
from genret_jax.errors import UserError
from genret_jax.modeling.model import Params, RetrievalModel
from genret_jax.ngram.index import NgramIndex
from genret_jax.ngram.scoring import Found, Sums, Weighting, sum_documents
from genret_jax.ngram.settings import VIEWS
from genret_jax.ranking import batch_sizes, batched
from genret_jax.vocabularies import Vocabulary


@dataclasses.dataclass(frozen=True)
class NgramRanker:
    """A model and the n-grams of its views, ready for any parameters.

    Attributes:
      model: whose docid tokens are the text pieces themselves.
      vocabulary: with a mark for each of `VIEWS` behind the pieces; the encoder reads the mark of
        the view that is wanted, then the query.
      views: index of the n-grams of each view, by name.
      weighting: of n-grams.
      beam: hypotheses of the search of each view.
      unigrams: so many tokens that are likeliest to come first are n-grams, too, beyond those that
        the beam holds; of views that are no whole texts.
      input_length: encoder tokens, mark and EOS among them.
    """

    model: RetrievalModel
    vocabulary: Vocabulary
    views: Mapping[str, NgramIndex]
    weighting: Weighting
    beam: int
    input_length: int
    unigrams: int = 0

    def rank(
        self, params: Params, queries: Sequence[str]
    ) -> list[tuple[Int32[np.ndarray, " n"], Float[np.ndarray, " n"]]]:
        """The documents found for each query, ascending, and the sums of their views' scores."""
        out = []
        for views in self.explain(params, queries):
            parts = [sums for _, sums in views.values()]
            documents, place = np.unique(
                np.concatenate([part.documents for part in parts]), return_inverse=True
            )
            scores = np.concatenate([part.scores for part in parts])
            sums = np.bincount(place, scores, minlength=len(documents))
            out.append((documents.astype(np.int32), sums))
        return out

    def explain(
        self, params: Params, queries: Sequence[str], *, own: Sequence[Sequence[int]] = ()
    ) -> Iterator[dict[str, tuple[Found, Sums]]]:
        """For each query and view the n-grams, and the documents that they identify.

        Args:
          own: for each query the texts of view "queries" that it is itself: of what answers it,
            they say nothing. None by default.
        """
        found = {view: self.ngrams(params, queries, view) for view in self.views}
        for i in range(len(queries)):
            parts = {}
            for view, index in self.views.items():
                without = own[i] if own and view == "queries" else ()
                sums = sum_documents(found[view][i], index, self.weighting, without=without)
                parts[view] = found[view][i], sums
            yield parts

    def ngrams(self, params: Params, queries: Sequence[str], view: str) -> list[Found]:
        """The n-grams of a view that are generated for each query."""
        out: list[Found] = []
        sizes = batch_sizes(self.beam, self.model.docids.size)
        for count, tokens in batched(queries, lambda some: self.encoded(some, view), sizes):
            result = jax.device_get(self._search(params, tokens, self._tries[view]))
            found = [self._found(result, i, self.views[view]) for i in range(count)]
            if self.unigrams and not self.views[view].whole:
                first = np.asarray(self._first(params, tokens))
                found = [self._with_unigrams(f, first[i], view) for i, f in enumerate(found)]
            out += found
        return out

    def encoded(
        self, queries: Sequence[str], view: str
    ) -> Int32[np.ndarray, "queries input_length"]:
        """What the encoder reads to write n-grams of a view."""
        tokens = self.vocabulary.encode_batch(queries, self.input_length - 1)
        mark = self.vocabulary.docids.start + VIEWS.index(view)
        return np.pad(tokens, ((0, 0), (1, 0)), constant_values=mark)

    @functools.cached_property
    def _tries(self) -> dict[str, DeviceTrie]:
        return {view: index.trie.on_device() for view, index in self.views.items()}

    @functools.cached_property
    def _search(self) -> Any:
        return jax.jit(functools.partial(self.model.search, beam=self.beam, trail=True))

    @functools.cached_property
    def _first(self) -> Any:
        """(params, encoder tokens) -> float32[batch, tokens], log p of the first token."""

        def first(params: Params, tokens: jax.Array) -> jax.Array:
            start = jax.numpy.zeros((tokens.shape[0], 1), jax.numpy.int32)
            batch = {"encoder_input_tokens": tokens, "decoder_input_tokens": start}
            return jax.nn.log_softmax(self.model.teacher_forced(params, batch)[:, 0])

        return jax.jit(first)

    def _with_unigrams(self, found: Found, log_p: np.ndarray, view: str) -> Found:
        """With the likeliest first tokens that the beam has not held."""
        tokens, begin, end = self.views[view].unigrams
        held = set(found.begin[found.length == 1].tolist())
        best = np.argsort(-log_p[tokens], kind="stable")[: self.unigrams].tolist()
        more = [i for i in best if int(begin[i]) not in held]
        return Found(
            np.append(found.begin, begin[more]),
            np.append(found.end, end[more]),
            np.append(found.length, np.ones(len(more), np.int64)),
            np.append(found.log_p, log_p[tokens[more]]),
        )

    @staticmethod
    def _found(result: Any, query: int, index: NgramIndex) -> Found:
        """Of a BeamResult on the host."""
        if index.whole:
            valid = result.valid[query]
            row, log_p = result.row[query][valid], result.scores[query][valid]
            length = (index.trie.rows[row] > 0).sum(1)
            return Found(row, row + 1, length, log_p)
        trail = result.trail
        step, place = np.nonzero(np.isfinite(trail.scores[query]))  # in the order of the steps
        begin, end, log_p = (x[query, step, place] for x in (trail.begin, trail.end, trail.scores))
        # Of n-grams with the same occurrences the shortest is the likeliest, and takes the places
        # of the others wherever they stand: they count for nothing. The end of a text adds none.
        _, first = np.unique(np.stack([begin, end]), axis=1, return_index=True)
        first = first[index.trie.rows[begin[first], step[first]] > 1]
        return Found(begin[first], end[first], step[first] + 1, log_p[first])


@dataclasses.dataclass(frozen=True)
class NgramSearcher:
    """A `Searcher` of documents by the n-grams that a model writes.

    Attributes:
      ranker, params: what finds documents.
      ids: document ids by position.
      order: place of each document among all ids in descending order.
    """

    ranker: NgramRanker
    params: Params
    ids: Sequence[str]
    order: np.ndarray
    name: str = "ngram"

    def search(self, queries: Sequence[str], *, k: int) -> list[list[Hit]]:
        """The best `k` documents of each query, of those that its n-grams name.

        Equal scores are ordered by id descending. There may be none, as for a query without words.

        Raises:
          UserError: k below 1.
        """
        if k < 1:
            raise UserError(f"{self.name}: k = {k}; give 1 or more")
        asked = [query for query in queries if query.strip()]
        results = iter(self.ranker.rank(self.params, asked))
        return [self._hits(*next(results), k) if query.strip() else [] for query in queries]

    def _hits(self, documents: np.ndarray, scores: np.ndarray, k: int) -> list[Hit]:
        everyone = np.zeros(len(self.ids))
        everyone[documents] = scores
        return best_hits(everyone, documents, self.ids, self.order, k=k)
