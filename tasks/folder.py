"""Tasks over any BEIR folder and the run that `genret index` or `genret fit` made of it.

    from tasks.folder import register_folder
    made = register_folder("my_corpus", "runs/mine")
    seqio.get_dataset(made.mixture, made.lengths, seqio.EncDecFeatureConverter(pack=False))

The same tasks that the native trainer reads, for everything that takes a SeqIO mixture by name.
`register_folder_contrastive` has those of the second stage.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import seqio

from genret_jax.corpus import Document, read_corpus
from genret_jax.data.contrastive import DocumentSide, Questions
from genret_jax.data.contrastive_tasks import document_lengths, register_contrastive
from genret_jax.data.examples import TrainingExamples, make_examples
from genret_jax.data.tasks import register
from genret_jax.data.vocabulary import SeqioVocabulary
from genret_jax.errors import UserError
from genret_jax.indexing import Index
from genret_jax.negatives import (
    Negatives,
    bm25_search,
    known_positives,
    mine,
    prefix_negatives,
)
from genret_jax.pseudo_queries import read_pseudo_queries
from genret_jax.recipe import ContrastiveConfig, DataConfig
from genret_jax.splitting import split_corpus

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Registered:
    """Attributes:
    mixture: name of the mixture; NAME_retrieval, NAME_indexing and, with pseudo-queries,
      NAME_pseudo are its tasks.
    lengths: {"inputs", "targets"}: what `task_feature_lengths` should be.
    """

    mixture: str
    lengths: dict[str, int]


def register_folder(
    corpus: str,
    run: str,
    *,
    name: str = "folder",
    data: DataConfig | None = None,
    seed: int = 0,
    pseudo_queries: str | None = None,
) -> Registered:
    """Registers retrieval, indexing and their mixture for a corpus and its index.

    Args:
      corpus: BEIR folder.
      run: folder with the index of that corpus.
      name: of the mixture.
      data: rates and lengths.
      seed: of the held-out queries; the seed of the fit, so that both train on the same.
      pseudo_queries: file of generated queries to learn from, too.
    """
    data = data or DataConfig()
    found = _open(corpus, run, data, seed, pseudo_queries)
    register(
        name,
        found.examples,
        SeqioVocabulary(found.index.vocabulary),
        **_plain(data, found.examples),
    )
    return Registered(name, found.lengths)


def register_folder_contrastive(
    corpus: str,
    run: str,
    *,
    name: str = "folder_contrastive",
    data: DataConfig | None = None,
    contrastive: ContrastiveConfig | None = None,
    step: int = 0,
    seed: int = 0,
    pseudo_queries: str | None = None,
) -> Registered:
    """Registers the tasks of the second stage, to be read with `ContrastiveFeatureConverter`.

    Negatives are those of RUN/ranking/negatives/STEP, which `genret fit` mined with the model of
    its first stage; without that folder they are mined with BM25.

    Args:
      corpus, run, name, data, seed, pseudo_queries: see `register_folder`.
      contrastive: numbers of negatives, number and length of views (give the fit's); the weights
        of the losses are the model's affair and not looked at.
      step: of the second stage at which the negatives were mined.

    Raises:
      UserError: the negatives are of another corpus, or of other train queries.
    """
    data, config = data or DataConfig(), contrastive or ContrastiveConfig()
    found = _open(corpus, run, data, seed, pseudo_queries)
    positives = known_positives(found.pairs)
    questions = Questions.of(positives, found.documents)
    side = DocumentSide.of(found.examples, positives, found.index.vocabulary.docids, config)
    folder = Path(run) / "ranking" / "negatives" / str(step)
    if folder.is_dir():
        negatives = Negatives.load(folder)
    else:
        log.info("%s: no negatives there; they are mined with BM25", folder)
        negatives = _mined(found, questions, config, seed)
    rows = len(negatives.prefix), len(negatives.retrieved)
    if rows != (len(found.documents), len(questions.texts)):
        raise UserError(
            f"{folder}: negatives of {rows[0]} documents and {rows[1]} questions, but here are "
            f"{len(found.documents)} and {len(questions.texts)}; give the corpus and the seed of "
            "the fit"
        )
    register_contrastive(
        name,
        found.examples,
        SeqioVocabulary(found.index.vocabulary),
        side,
        questions,
        positives,
        negatives,
        prefix=config.prefix_negatives,
        retrieved=config.retrieved_negatives,
        **_plain(data, found.examples),
    )
    count = config.prefix_negatives + config.retrieved_negatives
    lengths = document_lengths(side, questions, negatives=count)
    return Registered(name, {**found.lengths, **lengths})


@dataclasses.dataclass(frozen=True)
class _Folder:
    """A corpus and its index, as both registrations read them."""

    documents: Sequence[Document]
    pairs: list[tuple[str, int]]
    index: Index
    examples: TrainingExamples
    lengths: dict[str, int]


def _open(
    corpus: str, run: str, data: DataConfig, seed: int, pseudo_queries: str | None
) -> _Folder:
    read = read_corpus(corpus)
    index = Index.load(Path(run) / "index")
    pairs = split_corpus(read, data, seed=seed).pairs
    pseudo = read_pseudo_queries(pseudo_queries, read) if pseudo_queries else []
    pairs = [*pairs, *pseudo]
    examples = make_examples(
        read.documents, pairs, index.vocabulary, index.table, pseudo=len(pseudo)
    )
    length = data.input_length or examples.input_length()
    lengths = {"inputs": length, "targets": index.trie.max_length}
    return _Folder(read.documents, pairs, index, examples, lengths)


def _plain(data: DataConfig, examples: TrainingExamples) -> dict[str, Any]:
    """How the recipe wants the tasks that both stages have in common."""
    return {
        "indexing_share": examples.indexing_share(data.indexing_share),
        "title_share": data.title_share,
        "frame_share": data.frame_share,
        "word_dropout": data.word_dropout,
        "pseudo_share": data.pseudo_share,
    }


def _mined(found: _Folder, questions: Questions, config: ContrastiveConfig, seed: int) -> Negatives:
    depth: Any = config.prefix_depth
    depth = int(depth) if depth.isdecimal() else depth
    return Negatives(
        prefix=prefix_negatives(
            found.index.trie,
            np.arange(len(found.documents)),
            depth=depth,
            count=max(config.prefix_negatives, config.mined),
            rng=np.random.default_rng(seed),
        ),
        retrieved=mine(
            bm25_search(found.documents),
            questions.texts,
            questions.relevant,
            count=max(config.retrieved_negatives, config.mined),
        ),
        digest="",
        source="bm25",
        depth=depth,
    )


def vocabulary(run: str) -> seqio.Vocabulary:
    """The vocabulary of a run, for gin files."""
    return SeqioVocabulary.load(Path(run) / "index")
