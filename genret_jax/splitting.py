"""What is trained on, and what chooses the best parameters."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from genret_jax.corpus import Corpus, Qrels
from genret_jax.recipe import DataConfig

log = logging.getLogger(__name__)
_FEWEST = 20  # train queries below which none is held out


@dataclasses.dataclass(frozen=True)
class Split:
    """Attributes:
    pairs: train (query, position of a relevant document).
    dev_queries: id -> text; dev_qrels: their judgements. Empty where there are none.
    pseudo: like pairs, of generated queries; see `genret_jax.pseudo_queries`.
    """

    pairs: list[tuple[str, int]]
    dev_queries: dict[str, str]
    dev_qrels: Qrels
    pseudo: Sequence[tuple[str, int]] = ()

    @property
    def all_pairs(self) -> list[tuple[str, int]]:
        """Train pairs, then generated ones."""
        return [*self.pairs, *self.pseudo]


def split_corpus(corpus: Corpus, config: DataConfig, *, seed: int) -> Split:
    """The train pairs, and a dev set: the corpus's own, or train queries held out of training."""
    train = corpus.pairs("train") if corpus.qrels.get("train") else []
    if not train:
        log.warning("%s has no train queries: learning from the documents alone", corpus.name)
    rng = np.random.default_rng([seed, 11])
    if corpus.qrels.get("dev"):
        queries = corpus.split_queries("dev")
        chosen = _sample(list(queries), config.dev_queries, rng)
        qrels = corpus.qrels["dev"]
        return Split(train, {q: queries[q] for q in chosen}, {q: qrels[q] for q in chosen})
    queries = corpus.split_queries("train") if train else {}
    if len(queries) < _FEWEST or not config.held_out:
        return Split(train, {}, {})
    count = min(config.dev_queries, max(1, int(len(queries) * config.held_out)))
    chosen = _sample(list(queries), count, rng)
    held = {queries[q] for q in chosen}  # by text, so that no copy of a question stays in train
    pairs = [(query, position) for query, position in train if query not in held]
    log.info("no dev split: %d of %d train queries are held out", len(chosen), len(queries))
    return Split(
        pairs,
        {q: queries[q] for q in chosen},
        {q: corpus.qrels["train"][q] for q in chosen},
    )


def _sample(names: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    if len(names) <= count:
        return list(names)
    return [names[i] for i in sorted(rng.choice(len(names), count, replace=False))]
