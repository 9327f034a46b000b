"""From n-grams and their occurrences to scores of documents, as SEAL has it.

    w(n) = max(0, logit(p(n | q)) - logit(f(n)))^alpha,   logit(x) = log x - log(1 - x)
    f(n) = (occurrences + smoothing) / (tokens of the corpus + smoothing)
    score(d) = sum over n of w(n) * (1 - beta + beta * new(n) / distinct(n))

(Bevilacqua et al., NeurIPS 2022, and its released code.) The sum goes through the n-grams that
stand in d in descending order of w. One counts if it has an occurrence that no earlier one of the
sum overlaps, and counts once however often it occurs; all such occurrences of it are then taken.
new(n) are those of its distinct tokens that no earlier n-gram of the sum has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, Int

from genret_jax.ngram.index import NgramIndex


@dataclasses.dataclass(frozen=True)
class Found:
    """The n-grams that were generated for one query.

    Attributes:
      begin, end: int[n], rows of the index that begin with each n-gram.
      length: int[n], tokens, the end of sequence among them where it belongs to an identifier.
      log_p: float[n], by the model, in nats.
    """

    begin: Int[np.ndarray, " n"]
    end: Int[np.ndarray, " n"]
    length: Int[np.ndarray, " n"]
    log_p: Float[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.begin)

    def __getitem__(self, which: np.ndarray) -> Found:
        return Found(self.begin[which], self.end[which], self.length[which], self.log_p[which])


@dataclasses.dataclass(frozen=True)
class Weighting:
    """How n-grams are weighed and summed.

    Attributes:
      alpha, beta, smoothing: see the module's text.
      rare: n-grams that occur more often than this bring no document in by themselves; they count
        for documents that others have brought in.
      candidates: documents, those of the highest plain sum of weights, that are scored in full.
    """

    alpha: float = 2.0
    beta: float = 0.8
    smoothing: float = 5.0
    rare: int = 1500
    candidates: int = 500


def ngram_weights(
    log_p: Float[np.ndarray, " n"],
    counts: Int[np.ndarray, " n"],
    tokens: int,
    *,
    alpha: float = 2.0,
    smoothing: float = 5.0,
) -> Float[np.ndarray, " n"]:
    """w(n) of n-grams, float64; see the module's text.

    Args:
      log_p: by the model.
      counts: occurrences in the corpus.
      tokens: of the corpus.
      alpha, smoothing: of the formula.
    """
    excess = _log_odds(np.asarray(log_p, np.float64)) - prior_log_odds(counts, tokens, smoothing)
    return np.maximum(excess, 0.0) ** alpha


def prior_log_odds(
    counts: Int[np.ndarray, " n"], tokens: int, smoothing: float
) -> Float[np.ndarray, " n"]:
    """logit f(n), float64; see `ngram_weights`."""
    return _log_odds(np.log((np.asarray(counts) + smoothing) / (tokens + smoothing)))


def _log_odds(log_p: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    # Neither a certainty of the model nor a corpus of one word may be infinitely surprising.
    p = np.minimum(log_p, -1e-10)
    return p - np.log(-np.expm1(p))


def document_terms(
    occurrences: Iterable[tuple[int, int]],
    ngrams: Sequence[tuple[int, ...]],
    weights: Sequence[float],
    *,
    beta: float = 0.8,
) -> list[tuple[int, float]]:
    """The sum that is the score of one document: (n-gram, what its weight is multiplied by).

    Args:
      occurrences: (n-gram, position of its first token) for every occurrence in the document.
      ngrams: tokens of each n-gram.
      weights: of each n-gram.
      beta: share of a weight that tokens of earlier n-grams do not bring again.
    """
    taken: set[int] = set()
    seen: set[int] = set()
    last, terms = -1, []
    # Equal weights: the lesser tokens first, so that nothing depends on the order of generation.
    ordered = sorted(occurrences, key=lambda at: (-weights[at[0]], ngrams[at[0]], at[1]))
    for ngram, start in ordered:
        tokens = ngrams[ngram]
        places = range(start, start + len(tokens))
        if not taken.isdisjoint(places):
            continue
        if ngram != last:
            distinct = set(tokens)
            new = len(distinct - seen) / len(distinct)
            terms.append((ngram, 1.0 - beta + beta * new))
            seen |= distinct
            last = ngram
        taken.update(places)
    return terms


@dataclasses.dataclass(frozen=True)
class Sums:
    """Documents that the n-grams of a query identify in one view, and why.

    Attributes:
      documents: int32[n], ascending.
      terms: of each document, see `document_terms`; n-grams by their place in `Found`.
      weights: float64[ngrams], of all that were found; 0 for those that identify nothing.
    """

    documents: Int[np.ndarray, " n"]
    terms: Sequence[Sequence[tuple[int, float]]]
    weights: Float[np.ndarray, " ngrams"]

    @property
    def scores(self) -> Float[np.ndarray, " n"]:
        weights = self.weights.tolist()
        return np.array([sum(weights[n] * c for n, c in terms) for terms in self.terms], float)


def sum_documents(
    found: Found, index: NgramIndex, weighting: Weighting, *, without: Sequence[int] = ()
) -> Sums:
    """Scores the documents that the n-grams of a query identify.

    Args:
      found: n-grams of the index.
      index: of one view.
      weighting: how.
      without: texts of the view that identify nothing; they count in frequencies all the same.
    """
    counts = index.count(found.begin, found.end)
    weights = ngram_weights(
        found.log_p, counts, index.tokens, alpha=weighting.alpha, smoothing=weighting.smoothing
    )
    kept = np.flatnonzero(weights > 0)
    nothing = Sums(np.zeros(0, np.int32), [], weights)
    if not len(kept):
        return nothing
    everything, found, counts, weights = weights, found[kept], counts[kept], weights[kept]
    of, positions = _occurrences(found, index, counts, without)
    documents = index.documents(positions)
    rare = counts[of] <= weighting.rare
    candidates = _candidates(documents[rare], of[rare], weights, weighting.candidates)
    if not len(candidates):
        return nothing
    among = np.isin(documents, candidates)
    order = np.argsort(documents[among], kind="stable")
    documents, of, positions = (x[among][order] for x in (documents, of, positions))
    ngrams = [
        index.ngram(row, length)
        for row, length in zip(found.begin.tolist(), found.length.tolist(), strict=True)
    ]
    bounds = np.searchsorted(documents, np.append(candidates, documents[-1] + 1)).tolist()
    pairs = list(zip(of.tolist(), positions.tolist(), strict=True))
    values, place = weights.tolist(), kept.tolist()
    terms = []
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        some = document_terms(pairs[first:last], ngrams, values, beta=weighting.beta)
        terms.append([(place[ngram], factor) for ngram, factor in some])
    return Sums(candidates, terms, everything)


def _occurrences(
    found: Found, index: NgramIndex, counts: np.ndarray, without: Sequence[int]
) -> tuple[Int[np.ndarray, " occurrences"], Int[np.ndarray, " occurrences"]]:
    """Of each occurrence the n-gram, and its position in the stream."""
    rows = zip(found.begin.tolist(), found.end.tolist(), strict=True)
    positions = np.concatenate([index.positions(begin, end) for begin, end in rows])
    of = np.repeat(np.arange(len(found)), counts)
    if len(without):
        counted = ~np.isin(index.texts(positions), without)
        of, positions = of[counted], positions[counted]
    return of, positions


def _candidates(
    documents: np.ndarray, of: np.ndarray, weights: np.ndarray, most: int
) -> np.ndarray:
    """The documents of the highest sums of weights, each n-gram once a document; ascending."""
    pairs = np.unique(np.stack([documents, of]), axis=1)
    some, place = np.unique(pairs[0], return_inverse=True)
    sums = np.bincount(place, weights[pairs[1]], minlength=len(some))
    if len(some) > most:
        some = some[np.sort(np.argsort(-sums, kind="stable")[:most])]
    return some.astype(np.int32)
