"""What an n-gram model ranks for train queries, so that it can learn to rank better (LTRGR).

A document's score is a sum over the n-grams of a query that stand in it; see
`genret_jax.ngram.scoring`. Which n-grams these are, and what each one's weight is multiplied by, is
noted once, as the model ranked; the weights are computed anew in every step from the model's log p.
So a table keeps for each query its n-grams and, for some of the documents ranked, the terms of
their sums.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import Float32, Int32

from genret_jax.errors import UserError
from genret_jax.files import replace_on_success
from genret_jax.ngram.index import NgramIndex
from genret_jax.ngram.scoring import Found, Sums, prior_log_odds

_Key: TypeAlias = tuple[str, int]  # view, place in its `Found`
Explained: TypeAlias = Mapping[str, tuple[Found, Sums]]  # of `NgramRanker.explain`, one query
RIGHT = 4  # right documents kept a query, at most
_ABOUT, _ARRAYS = "ranked.json", "ranked.npz"


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Documents of one query to tell apart.

    Attributes:
      ngrams: tokens of each n-gram that their sums have, the end of sequence among them where it
        belongs to an identifier.
      views: the number of each one's view.
      priors: logit f(n) of each.
      right, wrong: of documents that answer, and of ones that do not, the best-ranked first: the
        terms of its sum, (n-gram, factor), what adds most first.
    """

    ngrams: list[tuple[int, ...]]
    views: list[int]
    priors: list[float]
    right: list[list[tuple[int, float]]]
    wrong: list[list[tuple[int, float]]]


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The best documents of one query.

    Attributes:
      documents: positions, the best first.
      scores: of each document.
      terms: of each document, (what it adds, view and n-gram, factor), what adds most first.
    """

    documents: list[int]
    scores: list[float]
    terms: list[list[tuple[float, _Key, float]]]

    @classmethod
    def of(cls, explained: Explained, *, ranks: int) -> Ranking:
        """The best `ranks` documents of all views together."""
        sums: dict[int, list[tuple[float, _Key, float]]] = {}
        for view, (_, part) in explained.items():
            weights = part.weights.tolist()
            for document, terms in zip(part.documents.tolist(), part.terms, strict=True):
                found = [(weights[n] * factor, (view, n), factor) for n, factor in terms]
                sums.setdefault(document, []).extend(found)
        scores = {document: sum(term[0] for term in terms) for document, terms in sums.items()}
        best = sorted(scores, key=lambda document: (-scores[document], document))[:ranks]
        ordered = [sorted(sums[d], key=lambda term: (-term[0], term[1])) for d in best]
        return cls(best, [scores[document] for document in best], ordered)

    def may_violate(self, relevant: frozenset[int], *, margin: float, drawn_margin: float) -> bool:
        """Whether some right document of the ranking is not above all wrong ones by the margins."""
        places = list(zip(self.documents, self.scores, strict=True))
        right = [score for document, score in places if document in relevant]
        wrong = [score for document, score in places if document not in relevant]
        if not right or not wrong:
            return False
        return wrong[0] + margin > right[0] or wrong[0] + drawn_margin > right[-1]

    def choose(
        self,
        relevant: frozenset[int],
        explained: Explained,
        views: Mapping[str, NgramIndex],
        *,
        smoothing: float,
        wrong: int,
        terms: int,
        rng: np.random.Generator,
    ) -> Chosen:
        """Documents to tell apart: the best-ranked of either kind, and random ones of the rest.

        Args:
          relevant: the right ones.
          explained: what the ranking was made of.
          views: the index of each.
          smoothing: of f(n).
          wrong: documents that do not answer, at most; of the others `RIGHT`.
          terms: of a sum, at most.
          rng: of the draw.
        """
        places: tuple[list[int], list[int]] = [], []
        for place, document in enumerate(self.documents):
            places[document not in relevant].append(place)
        number: dict[_Key, int] = {}
        parts = [
            [
                [(number.setdefault(key, len(number)), f) for _, key, f in self.terms[i][:terms]]
                for i in _first_and_drawn(kind, most, rng)
            ]
            for kind, most in zip(places, (RIGHT, wrong), strict=True)
        ]
        ngrams, priors = [], []
        for view, n in number:
            found, index = explained[view][0], views[view]
            begin, end = found.begin[n : n + 1], found.end[n : n + 1]
            tokens = index.trie.rows[begin[0], : found.length[n]].tolist()
            ngrams.append(tuple(token for token in tokens if token))
            count = index.count(begin, end)
            priors.append(float(prior_log_odds(count, index.tokens, smoothing)[0]))
        names = list(views)
        return Chosen(ngrams, [names.index(view) for view, _ in number], priors, *parts)


@dataclasses.dataclass(frozen=True, eq=False)
class RankedQueries:
    """A table of `Chosen`, padded; a row a query.

    Attributes:
      tokens: int32[queries, views, length], what the encoder reads for each view.
      ngrams: int32[queries, ngrams, tokens], 0-padded.
      ngram_views: int32[queries, ngrams].
      priors: float32[queries, ngrams].
      right, wrong: int32[queries, documents, terms], n-grams of the sums of documents that answer,
        and of ones that do not; each time the best-ranked document first. -1 is padding, and a
        document without terms is none.
      right_factors, wrong_factors: float32 of the same shapes.
      digest: of all that this was made from, as the caller makes it.
      asked: queries that were ranked for it.
    """

    tokens: Int32[np.ndarray, "queries views length"]
    ngrams: Int32[np.ndarray, "queries ngrams tokens"]
    ngram_views: Int32[np.ndarray, "queries ngrams"]
    priors: Float32[np.ndarray, "queries ngrams"]
    right: Int32[np.ndarray, "queries documents terms"]
    wrong: Int32[np.ndarray, "queries documents terms"]
    right_factors: Float32[np.ndarray, "queries documents terms"]
    wrong_factors: Float32[np.ndarray, "queries documents terms"]
    digest: str
    asked: int

    @classmethod
    def of(
        cls,
        chosen: Sequence[Chosen],
        tokens: Int32[np.ndarray, "queries views length"],
        *,
        length: int,
        digest: str = "",
        asked: int = 0,
    ) -> RankedQueries:
        """Puts what was chosen into a table.

        Args:
          chosen: of each query.
          tokens: what the encoder reads of each.
          length: tokens of an n-gram, at most.
          digest, asked: see the class.
        """
        count, most = len(chosen), max((len(one.ngrams) for one in chosen), default=1)
        ngrams = np.zeros((count, most, length), np.int32)
        views, priors = np.zeros((count, most), np.int32), np.zeros((count, most), np.float32)
        for row, one in enumerate(chosen):
            for i, ngram in enumerate(one.ngrams):
                ngrams[row, i, : len(ngram)] = ngram
            views[row, : len(one.views)] = one.views
            priors[row, : len(one.priors)] = one.priors
        terms = max((len(t) for one in chosen for t in (*one.right, *one.wrong)), default=1)
        right, right_factors = _padded([one.right for one in chosen], terms)
        wrong, wrong_factors = _padded([one.wrong for one in chosen], terms)
        return cls(
            tokens=tokens.astype(np.int32),
            ngrams=ngrams,
            ngram_views=views,
            priors=priors,
            right=right,
            wrong=wrong,
            right_factors=right_factors,
            wrong_factors=wrong_factors,
            digest=digest,
            asked=asked,
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def report(self) -> dict[str, int | float]:
        """How many queries were asked, and how many are learned from."""
        wrong = (self.wrong[:, :, 0] >= 0).sum(1)
        mean = round(float(wrong.mean()), 2) if len(self) else 0.0
        return {"queries": self.asked, "violating": len(self), "wrong_documents": mean}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a folder, whole or not at all; an earlier one there is replaced."""
        with replace_on_success(folder) as temporary:
            temporary.mkdir()
            np.savez(temporary / _ARRAYS, **self._arrays())  # type: ignore[arg-type]
            about = {"digest": self.digest, **self.report()}
            (temporary / _ABOUT).write_text(json.dumps(about), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> RankedQueries:
        """Opens what `save` wrote.

        Raises:
          UserError: it is not whole.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
            with np.load(folder / _ARRAYS, allow_pickle=False) as arrays:
                return cls(**arrays, digest=about["digest"], asked=about["queries"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{folder}: no whole table of ranked queries here ({error}); delete the folder "
                "and make it again"
            ) from None

    def _arrays(self) -> dict[str, np.ndarray]:
        names = [field.name for field in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names if name not in ("digest", "asked")}


def _padded(
    sums: Sequence[Sequence[Sequence[tuple[int, float]]]], terms: int
) -> tuple[
    Int32[np.ndarray, "queries documents terms"], Float32[np.ndarray, "queries documents terms"]
]:
    """N-grams of terms, -1-padded, and their factors."""
    shape = len(sums), max(map(len, sums), default=1), terms
    numbers, factors = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    for row, documents in enumerate(sums):
        for column, some in enumerate(documents):
            for i, (number, factor) in enumerate(some):
                numbers[row, column, i], factors[row, column, i] = number, factor
    return numbers, factors


def _first_and_drawn(places: list[int], count: int, rng: np.random.Generator) -> list[int]:
    """The first of them, and a random draw of the others."""
    others = places[1:]
    if len(others) > count - 1:
        others = [others[i] for i in rng.choice(len(others), count - 1, replace=False).tolist()]
    return [*places[:1], *others]
