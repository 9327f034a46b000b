"""`genret pseudo-queries`: corpus -> generator -> queries of every document -> one file.

FILE             the pseudo-queries
FILE.generator/  vocabulary, checkpoints and metrics of the generator; sampling anew begins there
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from genret_jax.corpus import Corpus, Document, read_corpus
from genret_jax.errors import UserError
from genret_jax.files import held, replace_on_success
from genret_jax.indexing import documents_digest
from genret_jax.negatives import bm25_search
from genret_jax.pseudo_queries.examples import Pairs
from genret_jax.pseudo_queries.files import PseudoQuery, write_pseudo_queries
from genret_jax.pseudo_queries.generator import METRIC, Sampler, make_model, train_generator
from genret_jax.recipe import GeneratorRecipe
from genret_jax.splitting import split_corpus
from genret_jax.training.budget import Clock, check_minutes
from genret_jax.vocabularies import Vocabulary, read_text_model, train_text_model

log = logging.getLogger(__name__)
_LEAST_TRAINING = 0.3  # of a time budget
_TRIED = 100  # queries searched to learn how long a search takes


def generate(
    corpus: str | Path | Corpus,
    *,
    recipe: GeneratorRecipe,
    out: str | Path,
    per_document: int = 15,
    round_trip: int = 0,
    minutes: float | None = None,
    started: float | None = None,
) -> dict[str, Any]:
    """Trains a generator on the train queries and writes pseudo-queries of every document.

    Args:
      corpus: a BEIR folder, or a Corpus, with train queries. Those that `fit` would hold out as
        dev, with the same seed, are not looked at.
      recipe: of the generator, from `load_generator_recipe`.
      out: the file to write; OUT.generator stands beside it.
      per_document: queries sampled of a document; fewer are left where some are equal.
      round_trip: with K above 0, a query is kept only where BM25 over the documents finds its
        document among the K best (round-trip filtering; Alberti et al. 2019).
      minutes: everything ends within this; the recipe's steps without it.
      started: `time.monotonic()` when the budget began; now by default.

    Returns:
      A report: documents, what became of the queries, dev metrics, seconds.

    Raises:
      UserError: no train queries, a number out of its range, a budget that does not hold the
        sampling, or a generator of another corpus or recipe at OUT.generator.
      Interrupted: after SIGTERM or Ctrl-C, once a checkpoint is written.
    """
    _check(per_document, round_trip, minutes)
    clock = Clock(minutes * 60 if minutes else None, started=started)
    corpus = corpus if isinstance(corpus, Corpus) else _read(corpus)
    documents, seed = corpus.documents, recipe.train.seed
    pairs = split_corpus(corpus, recipe.data, seed=seed).pairs
    if not pairs:
        raise UserError(
            f"{corpus.name}: no train queries to learn from how documents are asked for; add "
            "queries.jsonl and qrels/train.tsv"
        )
    folder = Path(f"{out}.generator")
    _claim(folder, recipe, documents, pairs)
    vocabulary = _vocabulary(folder, recipe, documents, pairs)
    model = make_model(recipe, vocabulary)
    sampler = Sampler(model, vocabulary, recipe.generation, per_document=per_document, seed=seed)
    search = _RoundTrip(documents, round_trip) if round_trip else None
    if clock.seconds:
        fresh = jax.jit(lambda rng: model.init(rng)[0])(jax.random.key(0))
        clock.reserve = 2 + 1.1 * sampler.seconds(fresh, len(documents))
        if search:
            a_query = search.seconds([query for query, _ in pairs[:_TRIED]])
            clock.reserve += a_query * per_document * len(documents)
        _check_budget(clock, per_document)
    with held(folder):
        result = train_generator(
            model, documents, pairs, vocabulary, recipe=recipe, folder=folder, clock=clock
        )
    queries: Iterable[PseudoQuery] = sampler(result.params, documents)
    counted = _Documents(search(queries) if search else queries)
    kept = write_pseudo_queries(counted, out)
    if not kept:
        raise UserError(f"{out}: no pseudo-query was left; train longer, or filter less")
    return {
        "documents": len(documents),
        "pairs": len(pairs),
        **dataclasses.asdict(sampler.counts),
        "not_found_again": search.dropped if search else 0,
        "kept": kept,
        "documents_without": len(documents) - len(counted.seen),
        "steps": result.steps,
        "best_step": result.best_step,
        METRIC: result.dev.get(METRIC),
        "seconds": round(clock.elapsed, 1),
    }


class _Documents:
    """Passes queries on and remembers whose they were."""

    def __init__(self, queries: Iterable[PseudoQuery]):
        self._queries = queries
        self.seen: set[str] = set()

    def __iter__(self) -> Iterator[PseudoQuery]:
        for query in self._queries:
            self.seen.add(query.document)
            yield query


class _RoundTrip:
    """Keeps the queries by which BM25 finds their document among the k best.

    Attributes:
      dropped: queries that were not kept so far.
    """

    def __init__(self, documents: Iterable[Document], k: int):
        documents = list(documents)
        self._search, self._k, self.dropped = bm25_search(documents), k, 0
        self._position = {document.id: i for i, document in enumerate(documents)}

    def seconds(self, queries: list[str]) -> float:
        """Of the search of one query, by the time of these."""
        begin = time.monotonic()
        self._search(queries, self._k)
        return (time.monotonic() - begin) / len(queries)

    def __call__(self, queries: Iterable[PseudoQuery]) -> Iterator[PseudoQuery]:
        for query in queries:
            (found,) = self._search([query.text], self._k)
            if self._position[query.document] in found:
                yield query
            else:
                self.dropped += 1


def _check(per_document: int, round_trip: int, minutes: float | None) -> None:
    if per_document < 1:
        raise UserError(f"per_document must be 1 or more, found {per_document}")
    if round_trip < 0:
        raise UserError(f"round_trip must be 0 (no filter) or more, found {round_trip}")
    check_minutes(minutes)


def _check_budget(clock: Clock, per_document: int) -> None:
    assert clock.seconds is not None
    left = clock.seconds - clock.elapsed - clock.reserve
    if left < _LEAST_TRAINING * clock.seconds:
        raise UserError(
            f"sampling {per_document} queries a document takes up to {clock.reserve / 60:.1f} of "
            f"{clock.seconds / 60:g} minutes, which leaves too little for training; raise "
            "--minutes or lower --per-document"
        )


def _read(path: str | Path) -> Corpus:
    corpus = read_corpus(path)
    for warning in corpus.warnings:
        log.warning("%s", warning)
    return corpus


def _claim(folder: Path, recipe: GeneratorRecipe, documents: Any, pairs: Pairs) -> None:
    """Marks the folder as this generator's, or finds that it is.

    How queries are sampled is no part of it: that may change without training again.
    """
    about = recipe.to_dict()
    for name in ("top_k", "temperature", "batch_size"):
        del about["generation"][name]
    content = json.dumps([about, documents_digest(documents), pairs], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()
    mark = folder / "run.json"
    if mark.is_file():
        if json.loads(mark.read_text(encoding="utf-8")).get("generator") != digest:
            raise UserError(
                f"{folder}: holds a generator of another recipe or corpus; choose another --out, "
                "or delete the folder"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: exists and is no generator's; choose another --out")
    with replace_on_success(mark) as temporary:
        temporary.write_text(json.dumps({"generator": digest, "recipe": about}, indent=1))


def _vocabulary(folder: Path, recipe: GeneratorRecipe, documents: Any, pairs: Pairs) -> Vocabulary:
    place = folder / "vocabulary"
    if place.is_dir():
        return Vocabulary.load(place)
    config = recipe.vocabulary
    if config.model:
        model = read_text_model(config.model)
    else:
        texts = [*(query for query, _ in pairs), *(document.whole for document in documents)]
        model = train_text_model(texts, size=config.size, casefold=config.casefold)
    with replace_on_success(place) as temporary:
        temporary.mkdir()
        Vocabulary(model, docid_size=2).save(temporary)
    return Vocabulary.load(place)
