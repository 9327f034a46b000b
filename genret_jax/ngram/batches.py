"""Batches that rank: those of a first stage, and beside them queries with documents to tell apart.

A query comes with two right and two wrong documents, and with the token sequences that are needed
for the log p of their n-grams: of several n-grams that begin alike, the longest alone; and of those
of one token none, since the first step of the decoder tells all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Float32, Int, Int32

from genret_jax.data.batches import Arrays, Batches
from genret_jax.ngram.ranked import RankedQueries

_SEED, _ORDER = 41, 42
_Ngram: TypeAlias = tuple[int, tuple[int, ...]]  # view, tokens


class RankedBatches:
    """Batch number n for any n >= 0; see `NgramMarginModel.loss_fn`.

    Args:
      batches: of the first stage.
      ranked: where queries come from, each once before any comes again.
      rows: queries of a batch.
      seed: of the drawing.
    """

    def __init__(self, batches: Batches, ranked: RankedQueries, *, rows: int, seed: int):
        self._batches, self._ranked, self._rows, self._seed = batches, ranked, rows, seed
        self._ngrams = [_ngrams_of(ranked, query) for query in range(len(ranked))]
        needs = [_needs(ranked, query, ngrams) for query, ngrams in enumerate(self._ngrams)]
        self._paths, self._firsts = (
            -(-max(1, *some) // 4) * 4 for some in zip(*needs, strict=True)
        )

    def __getitem__(self, n: int) -> Arrays:
        rng = np.random.default_rng([self._seed, _SEED, n])
        return {**self._batches[n], **self._of(self._queries(n), rng)}

    def shapes(self) -> list[Arrays]:
        """An empty batch of every shape there is: what to compile for."""
        rows = self._of(np.zeros(self._rows, np.int64), np.random.default_rng(0))
        return [{**batch, **rows} for batch in self._batches.shapes()]

    def _queries(self, n: int) -> Int[np.ndarray, " rows"]:
        """Rows of the table, in an order that is drawn anew for every pass."""
        place = np.arange(n * self._rows, (n + 1) * self._rows)
        passes, within = place // len(self._ranked), place % len(self._ranked)
        orders = {
            p: np.random.default_rng([self._seed, _ORDER, p]).permutation(len(self._ranked))
            for p in np.unique(passes).tolist()
        }
        return np.array([orders[p][i] for p, i in zip(passes.tolist(), within, strict=True)])

    def _of(self, queries: Int[np.ndarray, " rows"], rng: np.random.Generator) -> Arrays:
        table = self._ranked
        length = table.ngrams.shape[2]
        parts: list[Arrays] = []
        for query in queries.tolist():
            numbers, factors = self._documents(query, rng)
            ngrams = self._ngrams[query]
            used = [ngrams[n] for n in np.unique(numbers[numbers >= 0]).tolist()]
            paths = longest(ngram for ngram in used if len(ngram[1]) > 1)
            firsts = [ngram for ngram in used if len(ngram[1]) == 1]
            log_p = {ngram: self._paths * length + i for i, ngram in enumerate(firsts)}
            for i, path in enumerate(paths):
                log_p |= {
                    (path[0], path[1][: n + 1]): i * length + n for n in range(1, len(path[1]))
                }
            part = _sequences(paths, self._paths, length, "path")
            part |= _sequences(firsts, self._firsts, 1, "first")
            places = [[log_p[ngrams[n]] if n >= 0 else 0 for n in row] for row in numbers.tolist()]
            part["ranked_places"] = np.array(places, np.int32)
            part["ranked_factors"] = factors
            part["ranked_priors"] = table.priors[query, numbers]
            parts.append(part)
        found = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
        return {"ranked_tokens": table.tokens[queries], **found}

    def _documents(
        self, query: int, rng: np.random.Generator
    ) -> tuple[Int32[np.ndarray, "4 terms"], Float32[np.ndarray, "4 terms"]]:
        """N-grams and factors of the best right and wrong document, and of ones that are drawn."""
        table = self._ranked
        right = int(rng.integers((table.right[query, :, 0] >= 0).sum()))
        wrong = int(rng.integers((table.wrong[query, :, 0] >= 0).sum()))
        chosen = (0, "right"), (0, "wrong"), (right, "right"), (wrong, "wrong")
        numbers = [getattr(table, name)[query, i] for i, name in chosen]
        factors = [getattr(table, f"{name}_factors")[query, i] for i, name in chosen]
        return np.stack(numbers), np.stack(factors)


def _sequences(ngrams: Sequence[_Ngram], count: int, length: int, name: str) -> Arrays:
    """Their tokens and views, padded to `count`."""
    tokens, views = np.zeros((count, length), np.int32), np.zeros(count, np.int32)
    for i, (view, ngram) in enumerate(ngrams):
        tokens[i, : len(ngram)] = ngram
        views[i] = view
    return {f"ranked_{name}s": tokens, f"ranked_{name}_views": views}


def longest(ngrams: Iterable[_Ngram]) -> list[_Ngram]:
    """Those that no other one begins with, sorted.

    Example:
      >>> longest([(0, (3, 4)), (0, (3,)), (1, (3,)), (0, (3, 5, 6))])
      [(0, (3, 4)), (0, (3, 5, 6)), (1, (3,))]
    """
    ordered = sorted(set(ngrams))
    after: list[_Ngram] = [*ordered[1:], (-1, ())]
    # Sorted, what begins with an n-gram follows it at once.
    pairs = zip(ordered, after, strict=False)
    return [one for one, other in pairs if (one[0], one[1]) != (other[0], other[1][: len(one[1])])]


def _ngrams_of(ranked: RankedQueries, query: int) -> list[_Ngram]:
    lengths = (ranked.ngrams[query] > 0).sum(1).tolist()
    rows = zip(
        ranked.ngram_views[query].tolist(), ranked.ngrams[query].tolist(), lengths, strict=True
    )
    return [(view, tuple(tokens[:length])) for view, tokens, length in rows]


def _needs(ranked: RankedQueries, query: int, ngrams: Sequence[_Ngram]) -> tuple[int, int]:
    """Paths and single tokens that four documents of a query need, at most.

    Of either kind these are the first document and one more.
    """
    paths = firsts = 0
    for documents in (ranked.right[query].tolist(), ranked.wrong[query].tolist()):
        needs = []
        for numbers in documents:
            used = {ngrams[n] for n in (*documents[0], *numbers) if n >= 0}
            several = longest(ngram for ngram in used if len(ngram[1]) > 1)
            needs.append((len(several), sum(len(ngram[1]) == 1 for ngram in used)))
        most = [max(some) for some in zip(*needs, strict=True)]
        paths, firsts = paths + most[0], firsts + most[1]
    return paths, firsts
