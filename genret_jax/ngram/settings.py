"""What `SearcherConfig.settings` of method `ngram` may say."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from genret_jax.errors import UserError

RANKING = ("ranked", "ranks", "terms")  # of the margin rank loss alone
VIEWS = ("text", "title", "queries")  # in the order of their marks in the vocabulary


@dataclasses.dataclass(frozen=True)
class NgramSettings:
    """Attributes:
    views: of a document, at most; of a corpus that has none of a view (no titles, no train
      queries) there is none. "text": n-grams of title and text; "title": whole titles; "queries":
      n-grams of its train queries and pseudo-queries. With all three it is MINDER's.
    length: tokens of an n-gram, at most; titles are cut to it.
    beam: hypotheses of the search of each view.
    unigrams: so many of the likeliest first tokens are n-grams, too; 0 for those of the beam alone.
    spans: n-grams drawn of a relevant document for each train query.
    alpha, beta, smoothing, rare, candidates: see `genret_jax.ngram.scoring`.
    ranked: train queries of a step that the margin rank loss is over, where there is one.
    ranks: documents ranked for such a query, of which the loss tells some apart.
    terms: n-grams of a document's sum in that loss, at most.
    """

    views: Sequence[str] = ("text", "title")
    length: int = 10
    beam: int = 15
    unigrams: int = 30
    spans: int = 10
    alpha: float = 2.0
    beta: float = 0.8
    smoothing: float = 5.0
    rare: int = 1500
    candidates: int = 500
    ranked: int = 16
    ranks: int = 100
    terms: int = 40

    def __post_init__(self) -> None:
        views = list(self.views) if isinstance(self.views, list | tuple) else []
        if not views or len(set(views)) < len(views) or not set(views) <= set(VIEWS):
            raise _wrong("views", self.views, f"some of {', '.join(map(repr, VIEWS))}, once each")
        counts = ("length", "beam", "unigrams", "spans", "rare", "candidates")
        for name in (*counts, *RANKING):
            value, least = getattr(self, name), int(name != "unigrams")
            if type(value) is not int or value < least:
                raise _wrong(name, value, f"a whole number from {least} up")
        for name, most in (("alpha", float("inf")), ("smoothing", float("inf")), ("beta", 1.0)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= most:
                bound = "" if most > 1 else " and at most 1"
                raise _wrong(name, value, f"a number from 0 up{bound}")


def _wrong(name: str, value: object, wanted: str) -> UserError:
    return UserError(f"SearcherConfig.settings: {name} is {value!r}, but must be {wanted}")
