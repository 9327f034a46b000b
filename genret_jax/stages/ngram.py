"""Method `ngram`'s first stage: a query, or a piece of a document, is answered by its n-grams."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from genret_jax.corpus import Corpus, Run
from genret_jax.data.batches import Batches, Pool, materialise
from genret_jax.data.examples import Ragged
from genret_jax.data.ngrams import Drawing, ViewTexts, piece_idf, register_ngrams
from genret_jax.data.vocabulary import SeqioVocabulary
from genret_jax.errors import UserError
from genret_jax.indexing import build_index
from genret_jax.modeling.model import Params, RetrievalModel
from genret_jax.ngram.index import NgramIndex
from genret_jax.ngram.scoring import Weighting
from genret_jax.ngram.searcher import NgramRanker
from genret_jax.ngram.settings import VIEWS, NgramSettings
from genret_jax.pretrained.checkpoint import open_checkpoint
from genret_jax.recipe import Recipe
from genret_jax.splitting import Split
from genret_jax.stages.common import Materials, dev_metrics
from genret_jax.training.budget import Clock
from genret_jax.training.pretrained_start import pretrained_start
from genret_jax.training.trainer import Evaluate, TrainResult, train
from genret_jax.training.writer_start import lexical_writer
from genret_jax.vocabularies import DocidSpace

log = logging.getLogger(__name__)
_TASKS = "genret_ngram"
_MOST_EXAMPLES = 400_000  # of a task, read before training begins: two minutes of a CPU
_DEV_DEPTH = 100
_CHUNK = 1024  # texts whose tokens are a Python list at a time
_START_EXAMPLES = 100_000  # that the start is counted from


@dataclasses.dataclass(frozen=True)
class NgramTraining:
    """A corpus made ready for training, and the search that its dev queries are measured with.

    Attributes:
      materials: documents, split, vocabulary; their index has no docids.
      settings: of the method.
    """

    materials: Materials
    settings: NgramSettings

    @classmethod
    def of(
        cls, corpus: Corpus, split: Split, recipe: Recipe, settings: NgramSettings, folder: Path
    ) -> NgramTraining:
        """Makes the vocabulary in `folder`, or opens it there."""
        index = build_index(
            corpus,
            folder,
            docids=None,
            vocabulary=recipe.vocabulary,
            pairs=split.pairs,
            seed=recipe.train.seed,
            marks=[f"<{view}>" for view in VIEWS],
        )
        return cls(Materials(corpus.documents, split, index, recipe), settings)

    @functools.cached_property
    def model(self) -> RetrievalModel:
        """Writes text pieces: they are the docid tokens, with the ids that they have as text."""
        pieces = self.materials.index.vocabulary.text_size
        return dataclasses.replace(self.materials.model, docids=DocidSpace(2, pieces))

    @functools.cached_property
    def input_length(self) -> int:
        """Encoder tokens, the mark of the view among them."""
        return self.materials.input_length + 1

    @functools.cached_property
    def texts(self) -> list[ViewTexts]:
        """The texts of the views that this corpus has.

        Raises:
          UserError: it has none of them.
        """
        examples, vocabulary = self.materials.examples, self.materials.index.vocabulary
        everyone = np.arange(len(self.materials.documents), dtype=np.int32)
        found = []
        for view in self.settings.views:
            if view == "queries":
                # A query of several relevant documents is a text of each, and once of each.
                pairs = dict.fromkeys(self.materials.split.all_pairs)
                ordered = sorted(pairs, key=lambda pair: pair[1])
                texts = Ragged.of_chunks(
                    [vocabulary.encode(query) for query, _ in ordered[i : i + _CHUNK]]
                    for i in range(0, len(ordered), _CHUNK)
                )
                owners = np.array([position for _, position in ordered], np.int32)
            elif view == "title":
                texts, owners = examples.titles, everyone
            else:
                documents = self.materials.documents
                texts = Ragged.of_chunks(
                    [vocabulary.encode(d.whole) for d in documents[i : i + _CHUNK]]
                    for i in range(0, len(documents), _CHUNK)
                )
                owners = everyone
            mark = vocabulary.docids.start + VIEWS.index(view)
            if len(texts.values):
                found.append(ViewTexts(view, mark, texts, owners, whole=view == "title"))
            else:
                log.warning("the documents have no view %r: it is left out", view)
        if not found:
            raise UserError(
                "the documents have none of the views "
                f"{', '.join(map(repr, self.settings.views))}; give other views in "
                "SearcherConfig.settings"
            )
        return found

    @functools.cached_property
    def ranker(self) -> NgramRanker:
        """Over the n-grams of all views."""
        settings = self.settings
        return NgramRanker(
            model=self.model,
            vocabulary=self.materials.index.vocabulary,
            views={
                view.name: NgramIndex.of(
                    view.texts,
                    view.owners,
                    length=settings.length,
                    vocab_size=self.model.docids.size,
                    whole=view.whole,
                )
                for view in self.texts
            },
            weighting=Weighting(
                settings.alpha,
                settings.beta,
                settings.smoothing,
                settings.rare,
                settings.candidates,
            ),
            beam=settings.beam,
            input_length=self.input_length,
            unigrams=settings.unigrams,
        )

    @functools.cached_property
    def pools(self) -> list[Pool]:
        """The tasks of all views, read into memory."""
        materials, examples, vocabulary = (
            self.materials,
            self.materials.examples,
            self.materials.index.vocabulary,
        )
        data, seed = materials.recipe.data, materials.recipe.train.seed
        most = min(_MOST_EXAMPLES, max(materials.draws, _START_EXAMPLES))
        register_ngrams(
            _TASKS,
            examples,
            self.texts,
            SeqioVocabulary(vocabulary),
            drawing=Drawing(
                self.settings.length,
                piece_idf(examples, vocabulary.text_size),
                vocabulary.starts_word,
            ),
            spans=min(self.settings.spans, max(1, most // max(1, len(examples.queries)))),
            pieces=min(data.indexing_passes, max(1, most // len(materials.documents))),
            indexing_share=examples.indexing_share(data.indexing_share),
            title_share=data.title_share,
            word_dropout=data.word_dropout,
            seed=seed,
        )
        lengths = {"inputs": self.input_length, "targets": self.settings.length}
        return materialise(_TASKS, lengths=lengths, passes={}, seed=seed)

    def train(self, folder: Path, clock: Clock) -> TrainResult:
        """Trains, or goes on where the run in `folder` stopped."""
        config = self.materials.recipe.train
        return train(
            self.model,
            self.batches(config.batch_size),
            config=config,
            folder=folder,
            evaluate=self.dev_evaluation(),
            clock=clock,
            start=self._start(),
            measuring=self.materials.measuring,
        )

    def batches(self, size: int) -> Batches:
        """Of all views, so many examples each."""
        # Buckets of lengths are cut by the inputs that there are, marks included.
        return self.materials.batches(self.pools, batch_size=size, longest=self.input_length)

    def _start(self) -> Callable[[Params], Params] | None:
        materials = self.materials
        config, vocabulary = materials.recipe.train, materials.index.vocabulary
        if config.start == "random":
            return None
        if config.start == "pretrained":
            return functools.partial(
                pretrained_start,
                checkpoint=open_checkpoint(config.init),
                config=self.model.config,
                vocabulary=vocabulary,
                table=materials.index.table,
                seed=config.seed,
            )
        drawn = self._drawn(_START_EXAMPLES)
        return functools.partial(
            lexical_writer,
            examples=materials.examples,
            config=self.model.config,
            pieces=vocabulary.text_size,
            inputs=drawn["encoder_input_tokens"],
            targets=drawn["decoder_target_tokens"],
            seed=config.seed,
        )

    def _drawn(self, count: int) -> dict[str, np.ndarray]:
        """About so many training examples, by the rates of the mixture."""
        rng = np.random.default_rng([self.materials.recipe.train.seed, 29])
        total = sum(pool.rate for pool in self.pools)
        parts = []
        for pool in self.pools:
            share = max(1, round(count * pool.rate / total))
            chosen = rng.integers(len(pool), size=share)
            parts.append({name: array[chosen] for name, array in pool.arrays.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def dev_evaluation(self) -> Evaluate | None:
        """Dev metrics of the search; None without dev queries."""
        split, ids = self.materials.split, self.materials.document_ids
        if not split.dev_queries:
            return None
        names, texts = list(split.dev_queries), list(split.dev_queries.values())
        ranker = self.ranker

        def run(params: Params) -> dict[str, float]:
            scores = Run()
            found = ranker.rank(jax.device_put(params), texts)
            for name, (documents, values) in zip(names, found, strict=True):
                best = np.argsort(-values, kind="stable")[:_DEV_DEPTH]
                scores[name] = {ids[documents[i]]: float(values[i]) for i in best}
            return dev_metrics(scores, split, self.materials.metrics)

        return run
