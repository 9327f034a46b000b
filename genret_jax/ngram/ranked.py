"""What an n-gram model ranks for train queries, so that it can learn to rank better (LTRGR).

A document's score is a sum over the n-grams of a query that stand in it; see
`genret_jax.ngram.scoring`. Which n-grams these are, and what each one's weight is multiplied by, is
noted once, as the model ranked; the weights are computed anew in every step from the model's log p.
So a table keeps for each query its n-grams and, for some of the documents ranked, the terms of
their sums.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import Float32, Int32

from genret_jax.errors import UserError
from genret_jax.files import replace_on_success
from genret_jax.ngram.scoring import Found, Sums, prior_log_odds
from genret_jax.ngram.searcher import NgramRanker

_Key: TypeAlias = tuple[str, int]  # view, place in its `Found`
RIGHT = 4  # right documents kept a query, at most
_ABOUT, _ARRAYS = "ranked.json", "ranked.npz"


@dataclasses.dataclass(frozen=True)
class Ranked:
    """The documents that were ranked for one query.

    Attributes:
      ngrams: tokens of each n-gram that some document's sum has, the end of sequence among them
        where it belongs to an identifier.
      views: the number of each one's view.
      priors: logit f(n) of each.
      documents: positions, the best first.
      scores: of each document.
      terms: of each document, (n-gram, factor), what adds most first.
    """

    ngrams: list[tuple[int, ...]]
    views: list[int]
    priors: list[float]
    documents: list[int]
    scores: list[float]
    terms: list[list[tuple[int, float]]]

    @classmethod
    def of(
        cls, ranker: NgramRanker, explained: dict[str, tuple[Found, Sums]], *, ranks: int
    ) -> Ranked:
        """The best `ranks` documents of a query, from what `NgramRanker.explain` says of it."""
        sums: dict[int, list[tuple[float, _Key, float]]] = {}
        for view, (_, part) in explained.items():
            weights = part.weights.tolist()
            for document, terms in zip(part.documents.tolist(), part.terms, strict=True):
                found = [(weights[n] * factor, (view, n), factor) for n, factor in terms]
                sums.setdefault(document, []).extend(found)
        scores = {document: sum(term[0] for term in terms) for document, terms in sums.items()}
        best = sorted(scores, key=lambda document: (-scores[document], document))[:ranks]
        ordered = [sorted(sums[d], key=lambda term: (-term[0], term[1])) for d in best]
        number: dict[_Key, int] = {}
        for _, key, _ in itertools.chain(*ordered):
            number.setdefault(key, len(number))
        ngrams, priors = [], []
        for view, n in number:
            found_in, index = explained[view][0], ranker.views[view]
            row = found_in.begin[n : n + 1], found_in.end[n : n + 1]
            tokens = index.trie.rows[int(row[0][0]), : int(found_in.length[n])].tolist()
            ngrams.append(tuple(token for token in tokens if token))
            smoothing = ranker.weighting.smoothing
            priors.append(float(prior_log_odds(index.count(*row), index.tokens, smoothing)[0]))
        place = {view: i for i, view in enumerate(explained)}
        return cls(
            ngrams=ngrams,
            views=[place[view] for view, _ in number],
            priors=priors,
            documents=best,
            scores=[scores[document] for document in best],
            terms=[[(number[key], factor) for _, key, factor in terms] for terms in ordered],
        )

    def may_violate(self, relevant: frozenset[int], *, margin: float, drawn_margin: float) -> bool:
        """Whether some right document of the ranking is not above all wrong ones by the margins."""
        places = list(zip(self.documents, self.scores, strict=True))
        right = [score for document, score in places if document in relevant]
        wrong = [score for document, score in places if document not in relevant]
        if not right or not wrong:
            return False
        return wrong[0] + margin > right[0] or wrong[0] + drawn_margin > right[-1]


@dataclasses.dataclass(frozen=True, eq=False)
class RankedQueries:
    """A table of `Ranked`, padded; a row a query.

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
        ranked: Sequence[Ranked],
        relevant: Sequence[frozenset[int]],
        tokens: Int32[np.ndarray, "queries views length"],
        *,
        terms: int,
        wrong: int,
        length: int,
        rng: np.random.Generator,
        digest: str = "",
        asked: int = 0,
    ) -> RankedQueries:
        """Puts rankings into a table.

        Args:
          ranked: of each query; each has right and wrong documents among those ranked.
          relevant: the right documents of each.
          tokens: what the encoder reads of each.
          terms: of a sum, at most: those that add most.
          wrong: documents kept of a query, at most: the best-ranked and a random draw of the rest.
          length: tokens of an n-gram, at most.
          rng: of that draw, and of one of right documents where there are more than `RIGHT`.
          digest, asked: see the class.
        """
        most = max((len(one.ngrams) for one in ranked), default=1)
        count = len(ranked)
        ngrams = np.zeros((count, most, length), np.int32)
        views = np.zeros((count, most), np.int32)
        priors = np.zeros((count, most), np.float32)
        kept = {"right": RIGHT, "wrong": wrong}
        number = {name: np.full((count, k, terms), -1, np.int32) for name, k in kept.items()}
        factors = {name: np.zeros((count, k, terms), np.float32) for name, k in kept.items()}
        for row, (one, known) in enumerate(zip(ranked, relevant, strict=True)):
            for i, ngram in enumerate(one.ngrams):
                ngrams[row, i, : len(ngram)] = ngram
            views[row, : len(one.views)] = one.views
            priors[row, : len(one.priors)] = one.priors
            places: dict[str, list[int]] = {name: [] for name in kept}
            for place, document in enumerate(one.documents):
                places["right" if document in known else "wrong"].append(place)
            for name, k in kept.items():
                for column, place in enumerate(_first_and_drawn(places[name], k, rng)):
                    for i, (ngram_number, factor) in enumerate(one.terms[place][:terms]):
                        number[name][row, column, i] = ngram_number
                        factors[name][row, column, i] = factor
        return cls(
            tokens.astype(np.int32),
            ngrams,
            views,
            priors,
            number["right"],
            number["wrong"],
            factors["right"],
            factors["wrong"],
            digest,
            asked,
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
            np.savez(temporary / _ARRAYS, allow_pickle=False, **self._arrays())
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


def _first_and_drawn(places: list[int], count: int, rng: np.random.Generator) -> list[int]:
    """The first of them, and a random draw of the others."""
    others = places[1:]
    if len(others) > count - 1:
        others = [others[i] for i in rng.choice(len(others), count - 1, replace=False).tolist()]
    return [*places[:1], *others]
