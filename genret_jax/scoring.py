"""From what the beam and the vectors say of a document to one score, and its weights from dev."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32, Int32

from genret_jax.evaluation import evaluate
from genret_jax.trec import Qrels, Run

SCORINGS = ("fused", "generation", "semantic")
_ALPHAS = (0.0, 0.5, 1.0)
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
# In units of 1 / temperature: at 1 the similarity counts as it did in training.
_WEIGHTS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 16.0, 32.0)


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
    """

    positions: Int32[np.ndarray, " n"]
    rows: Int32[np.ndarray, " n"]
    lengths: Int32[np.ndarray, " n"]
    generation: Float32[np.ndarray, " n"]
    query: Float32[np.ndarray, " embed"]
    text: Float32[np.ndarray, " n"] | None = None
    asked: Float32[np.ndarray, " n"] | None = None


@dataclasses.dataclass(frozen=True)
class Fusion:
    """score = log p(docid | query) / length^alpha + weight * similarity.

    similarity = (1 - query_share) * text + query_share * asked; see `Candidates`.

    Attributes:
      alpha: 0 takes the probability of the whole docid, 1 its geometric mean a token.
      weight: of the similarity; 0 ranks by generation alone.
      query_share: how much of the similarity is that of the nearest train query.
    """

    alpha: float = 0.0
    weight: float = 0.0
    query_share: float = 0.0

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
        mean = found.generation / found.lengths.astype(np.float32) ** np.float32(self.alpha)
        return mean + np.float32(self.weight) * semantic


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


def fit_fusion(
    found: Mapping[str, Candidates],
    qrels: Qrels,
    document_ids: Sequence[str],
    *,
    temperature: float,
    metric: str,
) -> tuple[Fusion, dict[float, float]]:
    """The weights with the best dev metric; among equals, those nearest to training's.

    The share of train queries is chosen with the whole log p, the length exponent for that share.

    Args:
      found: dev query id -> candidates with similarities.
      qrels: judgements of the dev queries.
      document_ids: by position.
      temperature: of the contrastive loss, which sets the unit of the weight.
      metric: for example "mrr@10".

    Returns:
      The weights, and the metric over the weight of the similarity at the chosen alpha and share.
    """
    lengths = {int(n) for c in found.values() for n in np.unique(c.lengths)}
    alphas = _ALPHAS if len(lengths) > 1 else (0.0,)
    values: dict[Fusion, float] = {}

    def preference(fusion: Fusion) -> tuple[float, ...]:
        far = abs(fusion.weight * temperature - 1.0)
        return values[fusion], -far, -abs(fusion.query_share - 0.5), -fusion.alpha

    def best(alphas: Sequence[float], shares: Sequence[float]) -> Fusion:
        for alpha, share, weight in itertools.product(alphas, shares, _WEIGHTS):
            fusion = Fusion(alpha, weight / temperature, share)
            if fusion not in values:
                run = run_of_candidates(found, fusion, document_ids)
                values[fusion] = evaluate(run, qrels, (metric,))[metric]
        return max(values, key=preference)

    two = any(c.text is not None and (c.text != c.asked).any() for c in found.values())
    chosen = best(alphas[:1], _SHARES if two else (0.0,))
    if len(alphas) > 1:
        chosen = best(alphas, (chosen.query_share,))
    curve = {
        fusion.weight: value
        for fusion, value in values.items()
        if (fusion.alpha, fusion.query_share) == (chosen.alpha, chosen.query_share)
    }
    return chosen, curve
