"""What both stages are given, and what they do alike."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float64, Int

from genret_jax.corpus import Document
from genret_jax.data.batches import Batches, Pool, length_buckets, materialise
from genret_jax.data.examples import TrainingExamples, make_examples
from genret_jax.data.tasks import register
from genret_jax.data.vocabulary import SeqioVocabulary
from genret_jax.documents import descending
from genret_jax.evaluation import per_query
from genret_jax.indexing import Index
from genret_jax.modeling.model import Params, RetrievalModel
from genret_jax.ranking import BATCH_SIZES, Ranker
from genret_jax.recipe import Recipe
from genret_jax.scoring import Fusion
from genret_jax.splitting import Split
from genret_jax.training import partitioning
from genret_jax.training.profiling import Measuring
from genret_jax.trec import Run

log = logging.getLogger(__name__)
DEV_BEAM = 10
_DEV_METRICS = ("hits@1", "hits@10", "mrr@10")
_QUERY_PASSES = 4  # over train queries, each time with other words left out, at most
_MOST_PIECES = 400_000  # of documents, read before training begins: two minutes of a CPU
_TASKS = "genret"


def retrieval_model(recipe: Recipe, index: Index) -> RetrievalModel:
    """The model that a recipe describes, over the vocabulary of an index."""
    second = recipe.contrastive
    config = dataclasses.replace(
        recipe.network.t5(index.vocabulary.size),
        learned_temperature=second.wanted and second.learned_temperature,
    )
    loss = dataclasses.asdict(recipe.loss)
    loss["normaliser"] = index.normaliser(recipe.loss.normaliser)
    with jax.ensure_compile_time_eval():  # a caller may be tracing already
        trie = index.trie.on_device() if loss["normaliser"] == "children" else None
    return RetrievalModel(config, index.vocabulary.docids, vector=second.vector, trie=trie, **loss)


def compile_search(ranker: Ranker, params: Params, queries: Iterable[str], beam: int) -> None:
    """Searches for a few of the queries: those of a batch of every size that all of them need."""
    texts, most = list(queries), BATCH_SIZES[-1]
    for start in {0, len(texts) - len(texts) % most}:  # where they are few, both are one
        ranker.candidates(params, texts[start : start + most], beam=beam)


def dev_metrics(run: Run, split: Split, metrics: Sequence[str]) -> dict[str, float]:
    """Metrics of a run of the dev queries; see `by_kind`."""
    return by_kind(per_query(run, split.dev_qrels, metrics), split)


def by_kind(
    values: Mapping[str, Float64[np.ndarray, " queries"]], split: Split
) -> dict[str, float]:
    """Metrics of the dev queries from those of each.

    Where documents without train queries are told apart, the metric is a mean of that of the
    queries about them ("unseen_...") and that of the others ("seen_..."), by `split.unseen_share`:
    how many queries of a search are of each kind is not known, and dev does not tell it.

    Args:
      values: metric -> one number a query, in the order of `split.dev_qrels`.
      split: whose dev queries they are.
    """
    if not 0 < len(split.unseen) < len(split.dev_qrels):
        return {name: float(value.mean()) for name, value in values.items()}
    unseen = np.array([query in split.unseen for query in split.dev_qrels])
    kinds = {"seen_": ~unseen, "unseen_": unseen}
    parts = {k: {n: float(v[of].mean()) for n, v in values.items()} for k, of in kinds.items()}
    share = split.unseen_share
    means = {n: (1 - share) * parts["seen_"][n] + share * parts["unseen_"][n] for n in values}
    return means | {k + n: value for k, part in parts.items() for n, value in part.items()}


@dataclasses.dataclass(frozen=True)
class Materials:
    """A corpus made ready for training.

    Attributes:
      documents: of the corpus.
      split: train pairs and dev queries.
      index: vocabulary, docids, trie.
      recipe: of the run.
      measuring: what to measure besides the time of steps.
    """

    documents: Sequence[Document]
    split: Split
    index: Index
    recipe: Recipe
    measuring: Measuring = Measuring()

    @functools.cached_property
    def examples(self) -> TrainingExamples:
        index = self.index
        return make_examples(
            self.documents,
            self.split.all_pairs,
            index.vocabulary,
            index.table,
            pseudo=len(self.split.pseudo),
        )

    @functools.cached_property
    def document_ids(self) -> list[str]:
        return [document.id for document in self.documents]

    @functools.cached_property
    def order(self) -> Int[np.ndarray, " documents"]:
        """See `Ranker.order`."""
        return descending(self.document_ids)

    @functools.cached_property
    def unseen(self) -> Bool[np.ndarray, " documents"] | None:
        """See `Split.unseen_documents`."""
        return self.split.unseen_documents(len(self.documents))

    @functools.cached_property
    def input_length(self) -> int:
        return self.recipe.data.input_length or self.examples.input_length()

    @functools.cached_property
    def model(self) -> RetrievalModel:
        return retrieval_model(self.recipe, self.index)

    def ranker(self, fusion: Fusion | None = None) -> Ranker:
        return Ranker(
            model=self.model,
            vocabulary=self.index.vocabulary,
            trie=self.index.trie,
            order=self.order,
            input_length=self.input_length,
            similarity=self.recipe.contrastive.similarity,
            fusion=fusion or Fusion(),
            unseen=self.unseen,
        )

    @functools.cached_property
    def metrics(self) -> tuple[str, ...]:
        """What is measured on dev."""
        return tuple(dict.fromkeys((*_DEV_METRICS, self.recipe.train.metric)))

    @functools.cached_property
    def task_settings(self) -> dict[str, float]:
        """What the recipe says of the tasks that both stages have; see `data.tasks.register`."""
        data = self.recipe.data
        return {
            "indexing_share": self.examples.indexing_share(data.indexing_share),
            "title_share": data.title_share,
            "frame_share": data.frame_share,
            "word_dropout": data.word_dropout,
            "pseudo_share": data.pseudo_share,
        }

    @functools.cached_property
    def pools(self) -> list[Pool]:
        """The tasks of the mixture, read into memory."""
        data, examples, settings = self.recipe.data, self.examples, self.task_settings
        log.info(
            "%d train pairs, %d pseudo-queries; %.0f %% indexing examples",
            examples.real,
            examples.pseudo,
            100 * settings["indexing_share"],
        )
        register(_TASKS, examples, SeqioVocabulary(self.index.vocabulary), **settings)
        indexing = settings["indexing_share"]
        most = min(data.indexing_passes, max(1, _MOST_PIECES // len(self.documents)))
        again = _QUERY_PASSES if data.word_dropout else 1  # without it all passes are alike
        return materialise(
            _TASKS,
            lengths={"inputs": self.input_length, "targets": self.target_length},
            passes={
                "indexing": min(most, self._passes(indexing, len(self.documents))),
                "retrieval": min(again, self._passes(1 - indexing, examples.real)),
            },
            seed=self.recipe.train.seed,
        )

    @property
    def target_length(self) -> int:
        """Docid tokens to learn: what follows the last choice in the trie may cost nothing."""
        trie = self.index.trie
        return trie.choices_end if self.model.normaliser == "children" else trie.max_length

    @property
    def draws(self) -> int:
        """Examples that the recipe's steps draw, of the longer stage."""
        first, second = self.recipe.train, self.recipe.contrastive
        drawn = [first.steps * first.batch_size]
        drawn += [second.steps * second.batch_size] if second.wanted else []
        return max(drawn)

    def _passes(self, share: float, examples: int) -> int:
        """Times that so many examples are drawn, with their share of all; at least once."""
        return max(1, math.ceil(share * self.draws / max(examples, 1)))

    def batches(self, pools: Sequence[Pool], *, batch_size: int, longest: int = 0) -> Batches:
        """Batches of the pools, whose inputs have `longest` tokens (by default input_length)."""
        used = np.concatenate([(p.arrays["encoder_input_tokens"] > 0).sum(1) for p in pools])
        mesh = partitioning.make_mesh(model_parallel=self.recipe.train.model_parallel)
        return Batches(
            pools,
            batch_size=batch_size,
            seed=self.recipe.train.seed,
            buckets=length_buckets(used, longest or self.input_length),
            shard=partitioning.share_of_batch(mesh),
        )
