"""Queries -> ranked documents, by constrained beam search with given parameters.

The same code ranks dev queries while a model trains and answers a user's query later.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int

from genret_jax.device_trie import DeviceTrie
from genret_jax.docids.features import unit_length
from genret_jax.look_ahead import best_under_states
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.model import Params, RetrievalModel
from genret_jax.precision import restored
from genret_jax.scoring import Candidates, Fusion
from genret_jax.trie import Trie
from genret_jax.vocabularies import DocidSpace, Vocabulary

# Batches are filled up to one of these, so that a handful of programs serves every call.
BATCH_SIZES = (1, 8, 64)
_LOGIT_BYTES = 512 << 20  # of a step's float32 logits of all hypotheses, at most

# For each query, positions of documents and its vector -> similarities with the texts, and with the
# train queries; see `DocumentVectors.of_several`.
Similarities = Callable[
    [Sequence[Int[np.ndarray, " n"]], Sequence[Float32[np.ndarray, " embed"]]],
    list[tuple[Float32[np.ndarray, " n"], Float32[np.ndarray, " n"]]],
]


# Vectors of queries -> similarities with the texts and the train queries of all documents.
AllSimilarities = Callable[
    [Float32[np.ndarray, "queries embed"]],
    tuple[Float32[np.ndarray, "queries documents"], Float32[np.ndarray, "queries documents"]],
]


@dataclasses.dataclass(frozen=True)
class LookAhead:
    """What steers a search besides log p; see `genret_jax.look_ahead`.

    Attributes:
      weight: nats a unit of similarity.
      similarities: see `DocumentVectors.of_all`.
    """

    weight: float
    similarities: AllSimilarities


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A document that the beam reached.

    Attributes:
      position: of the document in the corpus.
      row: of the trie.
      score: what it is ranked by.
      generation: log p of its identifier given the query, in nats.
      semantic, fused: similarity and fused score; None without document vectors.
      unseen: whether no train query names the document; None where that is not told apart.
    """

    position: int
    row: int
    score: float
    generation: float
    semantic: float | None = None
    fused: float | None = None
    unseen: bool | None = None


def batch_sizes(hypotheses: int, docid_tokens: int) -> tuple[int, ...]:
    """Those of BATCH_SIZES whose logits do not take too much memory, or the least.

    Args:
      hypotheses: of a query, that a step has logits of.
      docid_tokens: logits of each.
    """
    fitting = [n for n in BATCH_SIZES if 4 * n * hypotheses * docid_tokens <= _LOGIT_BYTES]
    return tuple(fitting) or BATCH_SIZES[:1]


def batched(
    queries: Sequence[str],
    encode: Callable[[Sequence[str]], Int[np.ndarray, "some length"]],
    sizes: Sequence[int] = BATCH_SIZES,
) -> Iterator[tuple[int, Int[np.ndarray, "size length"]]]:
    """Batches of queries as tokens, each filled up with rows of padding to one of the sizes.

    Args:
      queries: texts.
      encode: makes tokens of some of them.
      sizes: ascending.

    Yields:
      How many queries are in the batch, and its tokens.
    """
    for start in range(0, len(queries), sizes[-1]):
        chunk = queries[start : start + sizes[-1]]
        size = next(n for n in sizes if len(chunk) <= n)
        yield len(chunk), np.pad(encode(chunk), ((0, size - len(chunk)), (0, 0)))


class _Programs(NamedTuple):
    """What is compiled: a search with the queries' vectors, and these vectors alone."""

    search: Any
    embed: Any


@functools.lru_cache(maxsize=8)
def _programs(config: T5Config, docids: DocidSpace, vector: str, normaliser: str) -> _Programs:
    """One set for all rankers whose searches differ in nothing but weights and tries.

    So the retrievers of an ablation, and those of a comparison's seeds, compile once.
    """
    model = RetrievalModel(config, docids, vector=vector, normaliser=normaliser)

    def search(params: Params, *arguments: Any, **options: Any) -> Any:
        return model.search_and_embed(restored(params), *arguments, **options)

    def embed(params: Params, tokens: Any) -> Any:
        return model.vectors(restored(params), tokens)

    return _Programs(jax.jit(search, static_argnames="beam"), jax.jit(embed))


def forget_programs() -> None:
    """So that the next ranker compiles its own."""
    _programs.cache_clear()


@dataclasses.dataclass(frozen=True)
class Ranker:
    """A model and its identifiers, ready for any parameters.

    Attributes:
      order: int[documents], place of each document among all ids in descending order: documents
        of equal score stand in it, which is trec_eval's rule, so that a written run is scored as
        it was ranked.
      input_length: encoder tokens a query is cut and padded to.
      similarity: "cosine" or "dot", of semantic vectors.
      fusion: of the fused score.
      unseen: bool[documents], those that no train query names; None where that makes no difference.
    """

    model: RetrievalModel
    vocabulary: Vocabulary
    trie: Trie
    order: np.ndarray
    input_length: int
    similarity: str = "cosine"
    fusion: Fusion = Fusion()
    unseen: np.ndarray | None = None

    @functools.cached_property
    def device_trie(self) -> DeviceTrie:
        return self.trie.on_device()

    @property
    def scoring_model(self) -> RetrievalModel:
        """The model with this trie, which its teacher-forced scores may need."""
        return dataclasses.replace(self.model, trie=self.device_trie)

    @functools.cached_property
    def _programs(self) -> _Programs:
        model = self.model
        return _programs(model.config, model.docids, model.vector, model.normaliser)

    def rank(
        self,
        params: Params,
        queries: Sequence[str],
        *,
        k: int,
        beam: int,
        similarities: Similarities | None = None,
        scoring: str = "generation",
        allowed: Bool[np.ndarray, " documents"] | None = None,
        look_ahead: LookAhead | None = None,
    ) -> list[list[Ranked]]:
        """The best k documents of each query; fewer where the beam reached fewer.

        Args:
          params: weights.
          queries: any number of texts.
          k, beam: documents a query, and hypotheses that the search keeps.
          similarities: of query and documents; needed unless scoring is "generation".
          scoring: "generation", "semantic" or "fused".
          allowed: by position, the documents that may be found; by default all.
          look_ahead: steers the beam; by default log p alone does.
        """
        found = self.candidates(params, queries, beam=beam, allowed=allowed, look_ahead=look_ahead)
        if similarities is not None:
            found = with_similarities(found, similarities)
        return [self._ranked(one, k, scoring) for one in found]

    def candidates(
        self,
        params: Params,
        queries: Sequence[str],
        *,
        beam: int,
        allowed: Bool[np.ndarray, " documents"] | None = None,
        look_ahead: LookAhead | None = None,
    ) -> list[Candidates]:
        """What the beam reaches for each query, without similarities.

        The beam runs on the trie of the allowed documents: none of its places goes to others.
        """
        out: list[Candidates] = []
        trie = self.device_trie
        if allowed is not None:
            trie = self.trie.restricted(trie, self.trie.rows_with(allowed))
        # Identifiers of one token are written by the root alone, whatever the beam.
        sizes = batch_sizes(beam if self.trie.max_length > 1 else 1, self.model.docids.size)
        encode = functools.partial(self.vocabulary.encode_batch, length=self.input_length)
        for count, tokens in batched(queries, encode, sizes):
            ahead = None
            if look_ahead is not None:
                query = self._compared(self._programs.embed(params, tokens))
                ahead = self._ahead(look_ahead, query, allowed, size=len(trie.edge_token))
            result, query = self._programs.search(params, tokens, trie, beam=beam, look_ahead=ahead)
            rows, scores = np.asarray(result.row), np.asarray(result.scores)
            query = self._compared(query)
            out += [self._reached(rows[i], scores[i], query[i], allowed) for i in range(count)]
        return out

    def _compared(self, vectors: Any) -> Float32[np.ndarray, "queries embed"]:
        """Vectors of queries from the device, as similarity takes them."""
        found = np.asarray(vectors, np.float32)
        return unit_length(found) if self.similarity == "cosine" else found

    def _ahead(
        self, look_ahead: LookAhead, queries: np.ndarray, allowed: np.ndarray | None, *, size: int
    ) -> Float32[np.ndarray, "queries states"]:
        similarity = self.fusion.mixed(*look_ahead.similarities(queries))
        scores = np.float32(look_ahead.weight) * similarity
        if allowed is not None:
            scores = np.where(allowed, scores, -np.float32(np.inf))
        return best_under_states(self.trie, scores, size=size)

    def _reached(
        self,
        rows: np.ndarray,
        scores: np.ndarray,
        query: np.ndarray,
        allowed: np.ndarray | None = None,
    ) -> Candidates:
        """Rows of the trie, best first -> the documents they name, each by its best row."""
        valid = rows >= 0
        rows, scores = rows[valid], scores[valid]
        starts, ends = self.trie.row_offsets[rows], self.trie.row_offsets[rows + 1]
        counts = ends - starts
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        positions = self.trie.row_documents[np.repeat(starts, counts) + within]
        of = np.repeat(np.arange(len(rows)), counts)
        if allowed is not None:  # a row may name others besides
            positions, of = positions[allowed[positions]], of[allowed[positions]]
        _, first = np.unique(positions, return_index=True)  # rows come best first
        return Candidates(
            positions=positions[first],
            rows=rows[of][first],
            lengths=(self.trie.rows[rows[of][first]] > 0).sum(1).astype(np.int32),
            generation=scores[of][first],
            query=query,
            unseen=None if self.unseen is None else self.unseen[positions[first]],
        )

    def _ranked(self, found: Candidates, k: int, scoring: str) -> list[Ranked]:
        score = self.fusion.score(found, scoring)
        best = np.lexsort((self.order[found.positions], -score))[:k]
        semantic = None if found.text is None else self.fusion.semantic(found)
        fused = None if found.text is None else self.fusion.score(found)

        def value(array: np.ndarray | None, i: int) -> float | None:
            return None if array is None else float(array[i])

        return [
            Ranked(
                position=int(found.positions[i]),
                row=int(found.rows[i]),
                score=float(score[i]),
                generation=float(found.generation[i]),
                semantic=value(semantic, i),
                fused=value(fused, i),
                unseen=None if found.unseen is None else bool(found.unseen[i]),
            )
            for i in best.tolist()
        ]


def with_similarities(found: Sequence[Candidates], similarities: Similarities) -> list[Candidates]:
    """The candidates of several queries with the similarities of each query and their views."""
    parts = similarities([one.positions for one in found], [one.query for one in found])
    return [
        dataclasses.replace(one, text=text, asked=asked)
        for one, (text, asked) in zip(found, parts, strict=True)
    ]
