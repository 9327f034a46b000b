"""From what the beam and the vectors say of a document to one score."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32

from genret_jax.trec import Run

SCORINGS = ("fused", "generation", "semantic")


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates:
    """The documents that the beam of one query reached, each once, in no order.

    Attributes:
      positions: of the documents in the corpus.
      rows: of the trie, through which each was reached (its most probable docid).
      lengths: tokens of that docid, EOS included.
      generation: log p(docid | query), in nats.
      query: semantic vector of the query, of length one where similarity is the cosine.
      text: similarity of the query and the nearest piece of the document's text; None without
        vectors.
      asked: of the query and the document's nearest train query; `text` where it has none.
      unseen: whether no train query names the document; None where that is not told apart.
    """

    positions: Int32[np.ndarray, " n"]
    rows: Int32[np.ndarray, " n"]
    lengths: Int32[np.ndarray, " n"]
    generation: Float32[np.ndarray, " n"]
    query: Float32[np.ndarray, " embed"]
    text: Float32[np.ndarray, " n"] | None = None
    asked: Float32[np.ndarray, " n"] | None = None
    unseen: Bool[np.ndarray, " n"] | None = None


@dataclasses.dataclass(frozen=True)
class Fusion:
    """score = log p(docid | query) / length^alpha + weight * similarity.

    similarity = (1 - query_share) * text + query_share * asked; see `Candidates`. Where documents
    that no train query names are told apart, their score is

        log p / length^alpha + unseen_weight * similarity + unseen_offset

    for the model writes their docids too seldom, and their similarity is that of their text.

    Attributes:
      alpha: 0 takes the probability of the whole docid, 1 its geometric mean a token.
      weight: of the similarity; 0 ranks by generation alone.
      query_share: how much of the similarity is that of the nearest train query.
      unseen_weight: of the similarity of a document that no train query names; None: `weight`, as
        of all others.
      unseen_offset: added to the score of such a document, where it has a weight of its own.
    """

    alpha: float = 0.0
    weight: float = 0.0
    query_share: float = 0.0
    unseen_weight: float | None = None
    unseen_offset: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Its fields, without those of unseen documents where these are not told apart."""
        out = dataclasses.asdict(self)
        if self.unseen_weight is None:
            del out["unseen_weight"], out["unseen_offset"]
        return out

    def semantic(self, found: Candidates) -> Float32[np.ndarray, " n"]:
        """Similarity of the query and each candidate, which has vectors."""
        if found.text is None or found.asked is None:
            raise ValueError("similarities need document vectors, and there are none")
        return self.mixed(found.text, found.asked)

    def mixed(
        self, text: Float32[np.ndarray, "*n"], asked: Float32[np.ndarray, "*n"]
    ) -> Float32[np.ndarray, "*n"]:
        """The similarity, of both its parts."""
        share = np.float32(self.query_share)
        return (1 - share) * text + share * asked

    def score(self, found: Candidates, scoring: str = "fused") -> Float32[np.ndarray, " n"]:
        """One number a candidate.

        Args:
          found: with similarities, unless scoring is "generation".
          scoring: "fused"; "generation", log p alone; or "semantic", the similarity alone.
        """
        if scoring == "generation":
            return found.generation
        if found.text is None:
            raise ValueError(f"scoring {scoring!r} needs document vectors, and there are none")
        semantic = self.semantic(found)
        if scoring == "semantic":
            return semantic
        return self.fused(self.mean(found), semantic, found.unseen)

    def mean(self, found: Candidates) -> Float32[np.ndarray, " n"]:
        """log p / length^alpha."""
        return found.generation / found.lengths.astype(np.float32) ** np.float32(self.alpha)

    def fused(
        self,
        mean: Float32[np.ndarray, " n"],
        semantic: Float32[np.ndarray, " n"],
        unseen: Bool[np.ndarray, " n"] | None,
    ) -> Float32[np.ndarray, " n"]:
        """The fused score from its parts."""
        if self.unseen_weight is None:
            return mean + np.float32(self.weight) * semantic
        if unseen is None:
            raise ValueError("which documents no train query names is not known, and has a weight")
        weight = np.where(unseen, np.float32(self.unseen_weight), np.float32(self.weight))
        offset = np.where(unseen, np.float32(self.unseen_offset), np.float32(0))
        return mean + weight * semantic + offset


def run_of_candidates(
    found: Mapping[str, Candidates],
    fusion: Fusion,
    document_ids: Sequence[str],
    *,
    scoring: str = "fused",
) -> Run:
    """Query id -> document id -> score.

    Args:
      found: query id -> candidates.
      fusion: how to score them.
      document_ids: by position.
      scoring: see `Fusion.score`.
    """
    return {
        query: dict(
            zip(
                (document_ids[position] for position in c.positions.tolist()),
                fusion.score(c, scoring).tolist(),
                strict=True,
            )
        )
        for query, c in found.items()
    }
