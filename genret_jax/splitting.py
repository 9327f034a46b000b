"""What is trained on, and what chooses the best parameters."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from genret_jax.configs import DataConfig
from genret_jax.corpus import Corpus, Qrels

log = logging.getLogger(__name__)
_FEWEST = 20  # queries, or documents, below which none is held out
_ENOUGH = 100  # dev queries about unseen documents, above which none is held out for them
_DOCUMENTS = 50  # held out whole, where their share would be fewer
_MOST_DOCUMENTS = 0.05  # of those with train queries
_MOST_PAIRS = 0.05  # of the train pairs


@dataclasses.dataclass(frozen=True)
class Split:
    """Attributes:
    pairs: train (query, position of a relevant document).
    dev_queries: id -> text; dev_qrels: their judgements. Empty where there are none.
    pseudo: like pairs, of generated queries; see `genret_jax.pseudo_queries`.
    unseen: the dev queries none of whose relevant documents is named by a train query, where the
      corpus has such documents and the recipe wants them apart; see `split_corpus`.
    unseen_share: how much these count in a dev metric; the others count the rest.
    """

    pairs: list[tuple[str, int]]
    dev_queries: dict[str, str]
    dev_qrels: Qrels
    pseudo: Sequence[tuple[str, int]] = ()
    unseen: frozenset[str] = frozenset()
    unseen_share: float = 0.5

    @property
    def all_pairs(self) -> list[tuple[str, int]]:
        """Train pairs, then generated ones."""
        return [*self.pairs, *self.pseudo]

    def unseen_documents(self, documents: int) -> Bool[np.ndarray, " documents"] | None:
        """Which documents no train query names; None where they are not told apart.

        A generated query does not make a document seen: what it says is not known to be asked.
        """
        if not self.unseen:
            return None
        out = np.ones(documents, bool)
        out[[position for _, position in self.pairs]] = False
        return out


def split_corpus(corpus: Corpus, config: DataConfig, *, seed: int) -> Split:
    """The train pairs, and a dev set: the corpus's own, or train queries held out of training.

    Where the corpus has documents that no train query names, dev must have queries about such
    documents, too. If it has not, `config.held_out_documents` of the documents lose all their train
    queries, which become dev queries.
    """
    train = corpus.pairs("train") if corpus.qrels.get("train") else []
    if not train:
        log.warning("%s has no train queries: learning from the documents alone", corpus.name)
    apart = _documents_apart(corpus, train, config, seed)
    pairs, about = _without(corpus, train, apart, config, seed)
    rng = np.random.default_rng([seed, 11])
    asked = _dev_about_unseen(corpus, train, config)
    if corpus.qrels.get("dev"):
        queries, qrels = corpus.split_queries("dev"), corpus.qrels["dev"]
        kind = _unseen(corpus, pairs, qrels) if asked else frozenset()
        chosen = _dev_sample(list(queries), kind, config.dev_queries, rng)
        split = Split(pairs, {q: queries[q] for q in chosen}, {q: qrels[q] for q in chosen})
    else:
        split = _held_out(corpus, pairs, about, config, rng)
    if not apart and not asked:
        return split
    texts = corpus.split_queries("train")
    split = dataclasses.replace(
        split,
        dev_queries={**split.dev_queries, **{q: texts[q] for q in about}},
        dev_qrels={**split.dev_qrels, **{q: corpus.qrels["train"][q] for q in about}},
    )
    return dataclasses.replace(
        split,
        unseen=_unseen(corpus, split.pairs, split.dev_qrels),
        unseen_share=config.unseen_share,
    )


def _held_out(
    corpus: Corpus,
    pairs: list[tuple[str, int]],
    about: Sequence[str],
    config: DataConfig,
    rng: np.random.Generator,
) -> Split:
    """Dev queries out of the train queries; `about` are those that are dev queries already."""
    queries = corpus.split_queries("train") if pairs else {}
    if about:
        left = {query for query, _ in pairs}
        queries = {q: text for q, text in queries.items() if text in left}
    if len(queries) < _FEWEST or not config.held_out:
        return Split(pairs, {}, {})
    count = min(config.dev_queries, max(1, int(len(queries) * config.held_out)))
    chosen = _sample(list(queries), count, rng)
    held = {queries[q] for q in chosen}  # by text, so that no copy of a question stays in train
    kept = [(query, position) for query, position in pairs if query not in held]
    log.info("no dev split: %d of %d train queries are held out", len(chosen), len(queries))
    return Split(
        kept,
        {q: queries[q] for q in chosen},
        {q: corpus.qrels["train"][q] for q in chosen},
    )


def _documents_apart(
    corpus: Corpus, train: Sequence[tuple[str, int]], config: DataConfig, seed: int
) -> frozenset[int]:
    """Documents that are to lose their train queries; none where that would not serve.

    As many as there are documents without train queries at most, drawn at random. A document whose
    queries are more than may be missed is passed over.
    """
    counts = np.bincount([position for _, position in train], minlength=len(corpus.documents))
    seen = np.flatnonzero(counts)
    wanted = max(_DOCUMENTS, int(len(seen) * config.held_out_documents))
    wanted = min(wanted, int(len(seen) * _MOST_DOCUMENTS), len(counts) - len(seen))
    # Where nothing else is held out for dev, dev of these alone would tell too little.
    if not config.held_out and not corpus.qrels.get("dev"):
        return frozenset()
    if not config.held_out_documents or wanted < _FEWEST:
        return frozenset()
    if _dev_about_unseen(corpus, train, config):
        return frozenset()
    chosen: list[int] = []
    left = int(len(train) * _MOST_PAIRS)
    for position in np.random.default_rng([seed, 12]).permutation(seen).tolist():
        if len(chosen) < wanted and counts[position] <= left:
            chosen.append(position)
            left -= int(counts[position])
    return frozenset(chosen)


def _without(
    corpus: Corpus,
    train: list[tuple[str, int]],
    apart: frozenset[int],
    config: DataConfig,
    seed: int,
) -> tuple[list[tuple[str, int]], list[str]]:
    """Train pairs that name none of some documents, and the queries that are about these alone."""
    if not apart:
        return train, []
    ids = {corpus.documents[position].id for position in apart}
    queries, qrels = corpus.split_queries("train"), corpus.qrels["train"]
    about = [
        q
        for q in queries
        if q not in corpus.qrels.get("dev", {})
        and all(d in ids for d, grade in qrels[q].items() if grade > 0)
        and any(grade > 0 for grade in qrels[q].values())
    ]
    about = _sample(about, max(1, config.dev_queries // 2), np.random.default_rng([seed, 13]))
    held = {queries[q] for q in about}  # no copy of a question stays in train
    kept = [(text, p) for text, p in train if p not in apart and text not in held]
    log.info(
        "%d of %d documents have no train query: all queries of %d others are held out, %d pairs",
        len(corpus.documents) - len({p for _, p in train}),
        len(corpus.documents),
        len(apart),
        len(train) - len(kept),
    )
    return kept, about


def _dev_about_unseen(corpus: Corpus, train: Sequence[tuple[str, int]], config: DataConfig) -> bool:
    """Whether the dev split has queries enough about documents that no train query names."""
    dev = corpus.qrels.get("dev")
    if not dev or not train or not config.held_out_documents:
        return False
    return len(_unseen(corpus, train, dev)) >= _ENOUGH


def _unseen(corpus: Corpus, pairs: Sequence[tuple[str, int]], qrels: Qrels) -> frozenset[str]:
    """The queries of `qrels` none of whose relevant documents is named in `pairs`."""
    seen = {corpus.documents[position].id for _, position in set(pairs)}
    out = set()
    for query, judged in qrels.items():
        relevant = [d for d, grade in judged.items() if grade > 0]
        if relevant and not any(d in seen for d in relevant):
            out.add(query)
    return frozenset(out)


def _dev_sample(
    names: Sequence[str], unseen: frozenset[str], count: int, rng: np.random.Generator
) -> list[str]:
    """Queries of a dev split; enough of them are `unseen`, or half, where there are some at all."""
    chosen = _sample(names, count, rng)
    wanted = min(_ENOUGH, count // 2, len(unseen))
    if len(unseen.intersection(chosen)) >= wanted:
        return chosen
    of_unseen = _sample([q for q in names if q in unseen], wanted, rng)
    return of_unseen + _sample([q for q in names if q not in unseen], count - wanted, rng)


def _sample(names: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    if len(names) <= count:
        return list(names)
    return [names[i] for i in sorted(rng.choice(len(names), count, replace=False))]
