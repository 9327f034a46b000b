"""The weights of the fused score, from dev queries."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

from genret_jax.judged import Judged
from genret_jax.scoring import Fusion

_ALPHAS = (0.0, 0.5, 1.0)
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
# In units of 1 / temperature: at 1 the similarity counts as it did in training.
_WEIGHTS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 16.0, 32.0)
_OFFSETS = 15  # tried for each pair of weights, and none
_KINDS = ("seen", "unseen")


@dataclasses.dataclass(frozen=True)
class FittedFusion:
    """Attributes:
    fusion: the weights.
    curve: the metric over the weight of the similarity, at the chosen alpha and share; of the
      queries about documents with train queries, where both kinds are told apart.
    kinds: where they are, the metric of either kind under "one weight" and under "two weights".
    """

    fusion: Fusion
    curve: dict[float, float]
    kinds: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For retriever.json."""
        kinds = {"kinds": self.kinds} if self.kinds else {}
        return {**self.fusion.to_dict(), "dev": self.curve, **kinds}


def fit_fusion(
    judged: Judged,
    *,
    temperature: float,
    metric: str,
    unseen: Bool[np.ndarray, " queries"] | None = None,
    unseen_share: float = 0.5,
) -> FittedFusion:
    """The weights with the best dev metric; among equals, those nearest to training's.

    The share of train queries is chosen with the whole log p, the length exponent for that share.

    Where some queries are about documents that no train query names, this is done on the others.
    Then the weights of both kinds of documents are chosen together, with the offset between them,
    by a mean of the metric of both kinds of queries, each among candidates of both kinds. Where no
    pair of weights is better than one weight for all, there is one.

    Args:
      judged: the candidates of dev queries, with similarities.
      temperature: of the contrastive loss, which sets the unit of the weight.
      metric: for example "mrr@10".
      unseen: which queries are about documents without train queries; by default none is.
      unseen_share: how much these count in the mean; the others count the rest.
    """
    if unseen is None or not 0 < unseen.sum() < len(unseen):
        return FittedFusion(*_one_weight(judged, temperature, metric))
    fusion, curve = _one_weight(judged.some(~unseen), temperature, metric)

    def values(scores: Float32[np.ndarray, "queries most"]) -> tuple[float, float]:
        value = judged.metrics(scores, (metric,))[metric]
        return float(value[~unseen].mean()), float(value[unseen].mean())

    one = values(fusion.score(judged.candidates))
    both, two = _two_weights(judged, fusion, temperature, values, unseen_share, one)
    kinds = {"one weight": one, "two weights": two or one}
    return FittedFusion(
        both, curve, {name: dict(zip(_KINDS, pair, strict=True)) for name, pair in kinds.items()}
    )


def _one_weight(
    judged: Judged, temperature: float, metric: str
) -> tuple[Fusion, dict[float, float]]:
    """One weight for all documents, and the metric over the weight."""
    found = judged.candidates
    lengths = np.unique(found.lengths[np.isfinite(found.generation)])
    alphas = _ALPHAS if len(lengths) > 1 else (0.0,)
    values: dict[Fusion, float] = {}

    def preference(fusion: Fusion) -> tuple[float, ...]:
        far = abs(fusion.weight * temperature - 1.0)
        return values[fusion], -far, -abs(fusion.query_share - 0.5), -fusion.alpha

    def best(alphas: Sequence[float], shares: Sequence[float]) -> Fusion:
        for alpha, share in itertools.product(alphas, shares):
            parts = Fusion(alpha, 0.0, share)
            mean, semantic = parts.mean(found), parts.semantic(found)
            for weight in _WEIGHTS:
                fusion = dataclasses.replace(parts, weight=weight / temperature)
                if fusion not in values:
                    scores = fusion.fused(mean, semantic, None)
                    values[fusion] = float(judged.metrics(scores, (metric,))[metric].mean())
        return max(values, key=preference)

    two = found.text is not None and bool((found.text != found.asked).any())
    chosen = best(alphas[:1], _SHARES if two else (0.0,))
    if len(alphas) > 1:
        chosen = best(alphas, (chosen.query_share,))
    curve = {
        fusion.weight: value
        for fusion, value in values.items()
        if (fusion.alpha, fusion.query_share) == (chosen.alpha, chosen.query_share)
    }
    return chosen, curve


def _two_weights(
    judged: Judged,
    one: Fusion,
    temperature: float,
    values: Callable[[np.ndarray], tuple[float, float]],
    share: float,
    of_one: tuple[float, float],
) -> tuple[Fusion, tuple[float, float] | None]:
    """A weight for either kind of document, at the alpha and the share of `one`.

    Args:
      one: weights that do not tell them apart.
      values: scores -> the metric of the queries of either kind.
      share: of the queries about unseen documents in the mean of both.
      of_one: the metrics of `one`, whose mean is to be bettered.

    Returns:
      The weights and their metrics; `one` and None where none are better.
    """
    found = judged.candidates
    if found.unseen is None:
        raise ValueError("queries about unseen documents, and candidates that do not tell them")
    mean, semantic = one.mean(found), one.semantic(found)
    # As `Fusion.fused` has them, to the last bit, each of them once.
    alone = [
        dataclasses.replace(one, weight=weight / temperature).fused(mean, semantic, None)
        for weight in _WEIGHTS
    ]
    one_of_unseen = found.unseen.astype(np.float32)

    def mean_of(kinds: tuple[float, float]) -> float:
        """Rounded: means that are equal may differ in their last bits."""
        return round((1 - share) * kinds[0] + share * kinds[1], 9)

    least = mean_of(of_one)
    best: tuple[float, ...] = (least,)
    chosen, of_chosen = one, None
    for (i, weight), (j, other) in itertools.product(enumerate(_WEIGHTS), repeat=2):
        scores = np.where(found.unseen, alone[j], alone[i])
        for offset in _offsets(scores, found.unseen):
            of_kinds = values(scores + np.float32(offset) * one_of_unseen)
            key = (mean_of(of_kinds), -abs(weight - 1), -abs(other - weight), -abs(offset))
            if key[0] > least and key > best:
                best, of_chosen = key, of_kinds
                chosen = dataclasses.replace(
                    one,
                    weight=weight / temperature,
                    unseen_weight=other / temperature,
                    unseen_offset=offset,
                )
    return chosen, of_chosen


def _offsets(
    scores: Float32[np.ndarray, "queries most"], unseen: Bool[np.ndarray, "queries most"]
) -> Iterator[float]:
    """Offsets that make a difference: quantiles of how far one kind's best lies above the other's.

    With an offset between two of them, the best candidate is of another kind in a part of the
    queries.
    """
    yield 0.0
    best_seen = np.where(unseen, -np.inf, scores).max(axis=1, initial=-np.inf)
    best_unseen = np.where(unseen, scores, -np.inf).max(axis=1, initial=-np.inf)
    apart = (best_seen - best_unseen)[np.isfinite(best_seen) & np.isfinite(best_unseen)]
    if len(apart):
        quantiles = np.quantile(apart, np.linspace(0, 1, _OFFSETS + 2)[1:-1])
        yield from dict.fromkeys(np.round(quantiles.astype(np.float64), 3).tolist())
