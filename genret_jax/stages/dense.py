"""A dual encoder's one stage: InfoNCE on negatives that it retrieves anew, as ANCE does.

start -> [mine negatives with the parameters of now -> train] ... -> encode the documents

ANCE (Xiong et al. 2021) retrieves with an approximate index that is built anew while training goes
on beside it; here the search is exact, and training waits for it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from genret_jax.corpus import Corpus, Run
from genret_jax.data.contrastive import ContrastiveBatches, DocumentSide, with_documents
from genret_jax.dense import ExactSearch, QueryEncoder
from genret_jax.indexing import build_index
from genret_jax.modeling.contrastive import JointWeights
from genret_jax.modeling.dense_model import DenseModel
from genret_jax.modeling.model import Params
from genret_jax.negatives import Search, known_positives
from genret_jax.recipe import Recipe
from genret_jax.splitting import Split
from genret_jax.stages.common import Materials, dev_metrics
from genret_jax.stages.second import VECTORS, DocumentEncoder, Miner
from genret_jax.training.budget import Clock
from genret_jax.training.lexical_start import lexical_encoder
from genret_jax.training.trainer import Evaluate, TrainResult, train
from genret_jax.vectors import DocumentVectors

_DEV_DEPTH = 100
_MOST_VIEWS = 32_000  # of all documents together, for mining and dev: encoding is what takes time


@dataclasses.dataclass(frozen=True)
class Dense:
    """What the training made.

    Attributes:
      result: of the training.
      vectors: of the documents, with the parameters that were best on dev.
      report: for retriever.json.
    """

    result: TrainResult
    vectors: DocumentVectors
    report: dict[str, Any]


def dense_materials(corpus: Corpus, split: Split, recipe: Recipe, folder: Path) -> Materials:
    """The corpus made ready, without docids.

    Args:
      folder: of the index that is made, or was.
    """
    index = build_index(
        corpus,
        folder,
        docids=None,
        vocabulary=recipe.vocabulary,
        pairs=split.pairs,
        seed=recipe.train.seed,
    )
    return Materials(corpus.documents, split, index, recipe)


def train_dense(materials: Materials, folder: Path, clock: Clock) -> Dense:
    """Trains a dual encoder, or goes on where `folder` stopped.

    Args:
      materials: of `dense_materials`.
      folder: of negatives, checkpoints and metrics.
      clock: of the whole run.
    """
    recipe, config = materials.recipe, materials.recipe.contrastive
    model = dense_model(materials)
    begin = _start(materials, model)
    positives = known_positives(materials.split.all_pairs)
    docids = materials.index.vocabulary.docids
    side = DocumentSide.of(materials.examples, positives, docids, config)
    # All share one docid, which is none: no two documents may be taken for one another.
    side = dataclasses.replace(side, row=np.arange(len(side.row), dtype=np.int32))
    encoder = DocumentEncoder(materials, side)
    nearness = _Nearness(materials, encoder)
    miner = Miner(materials, folder / "negatives", clock, by_model=nearness.search)
    pools = [with_documents(p, materials.examples, positives) for p in materials.pools]
    drawn = materials.batches(pools, batch_size=config.batch_size)
    batches = ContrastiveBatches(
        drawn,
        side,
        miner.questions,
        miner.negatives(0, begin(), drawn),
        prefix=0,
        retrieved=config.retrieved_negatives,
        seed=recipe.train.seed,
    )

    def refresh(step: int, now: Params) -> None:
        batches.negatives = miner.negatives(step, jax.device_get(now), drawn)

    if clock.seconds:
        clock.keep(encoder.seconds(begin()), VECTORS)
    result = train(
        model,
        batches,
        config=config.train_config(recipe.train),
        folder=folder,
        evaluate=_dev_evaluation(materials, nearness),
        clock=clock,
        start=lambda _: begin(),
        refresh=refresh if config.refresh_every else None,
        refresh_every=config.refresh_every,
        measuring=materials.measuring,
    )
    vectors = encoder.all(result.params)
    report = {
        "steps": result.steps,
        "negatives": batches.negatives.report(),
        "vectors": {
            "store": config.store,
            "views": int(vectors.bounds[-1, 0]),
            "bytes": vectors.num_bytes,
        },
    }
    return Dense(result, vectors, report)


def dense_model(materials: Materials) -> DenseModel:
    """The model as the recipe wants it."""
    config = materials.recipe.contrastive
    return DenseModel(
        materials.model,
        JointWeights(0.0, 0.0, 1.0),
        similarity=config.similarity,  # type: ignore[arg-type]
        temperature=config.temperature,
        share_negatives=config.share_negatives,
        chunk=config.chunk,
    )


def _start(materials: Materials, model: DenseModel) -> Callable[[], Params]:
    """Makes the parameters to begin with, on the host; the same ones whenever it is called."""
    config = materials.recipe.train

    @functools.cache
    def begin() -> Params:
        params = jax.device_get(model.init(jax.random.key(config.seed))[0])
        if config.start == "random":
            return params
        docids = materials.index.vocabulary.docids
        return lexical_encoder(
            params, materials.examples, model.model.config, docids.start, seed=config.seed
        )

    return begin


class _Nearness:
    """Exact search with the parameters of the moment, over some views of every document."""

    def __init__(self, materials: Materials, encoder: DocumentEncoder):
        recipe = materials.recipe
        self._encoder = encoder
        self._kept: tuple[bytes, ExactSearch] | None = None
        self._documents = np.arange(len(materials.documents))
        self._queries = QueryEncoder(
            materials.model,
            materials.index.vocabulary,
            materials.input_length,
            recipe.contrastive.similarity,
        )

    def search(self, params: Params) -> Search:
        """(queries, k) -> positions of the best k documents of each, best first."""
        ranked = self.ranked(params)

        def search(queries: list[str], k: int) -> list[np.ndarray]:
            return [documents for documents, _ in ranked(queries, k)]

        return search

    def ranked(
        self, params: Params
    ) -> Callable[[list[str], int], list[tuple[np.ndarray, np.ndarray]]]:
        """The same with their scores; the documents are encoded once, here."""
        exact = self._exact(params)
        on_device = jax.device_put(params)

        def ranked(queries: list[str], k: int) -> list[tuple[np.ndarray, np.ndarray]]:
            found = []
            for documents, scores in exact.nearest(self._queries(on_device, queries), k):
                best = np.argsort(-scores, kind="stable")[:k]
                found.append((documents[best], scores[best]))
            return found

        return ranked

    def _exact(self, params: Params) -> ExactSearch:
        """Over the documents by these parameters; made once for mining and evaluation of a step.

        What was kept is used once: the next evaluation takes the time that evaluations take.
        """
        digest = hashlib.blake2b()
        for leaf in jax.tree.leaves(jax.device_get(params)):
            digest.update(np.asarray(leaf).tobytes())
        kept, self._kept = self._kept, None
        if kept and kept[0] == digest.digest():
            return kept[1]
        few = self._encoder.few(params, self._documents, most=_MOST_VIEWS)
        self._kept = digest.digest(), ExactSearch(few, faiss=False)
        return self._kept[1]


def _dev_evaluation(materials: Materials, nearness: _Nearness) -> Evaluate | None:
    """Dev metrics by exact search."""
    split, ids = materials.split, materials.document_ids
    if not split.dev_queries:
        return None
    names, texts = list(split.dev_queries), list(split.dev_queries.values())

    def run(params: Params) -> dict[str, float]:
        ranked, scores = nearness.ranked(params), Run()
        for start in range(0, len(texts), 64):
            chunk = texts[start : start + 64]
            for name, (documents, values) in zip(
                names[start : start + 64], ranked(chunk, _DEV_DEPTH), strict=True
            ):
                found = zip(documents.tolist(), values.tolist(), strict=True)
                scores[name] = {ids[document]: value for document, value in found}
        return dev_metrics(scores, split, materials.metrics)

    return run
