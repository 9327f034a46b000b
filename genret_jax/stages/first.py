"""Stage 1: the model learns docids, from train queries and from pieces of the documents."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from genret_jax.modeling.model import Params
from genret_jax.pretrained.checkpoint import open_checkpoint
from genret_jax.scoring import run_of_candidates
from genret_jax.stages.common import DEV_BEAM, Materials, compile_search, dev_metrics
from genret_jax.training import processes
from genret_jax.training.budget import Clock
from genret_jax.training.lexical_start import lexical_start
from genret_jax.training.pretrained_start import pretrained_start
from genret_jax.training.trainer import TrainResult, train


def train_docids(materials: Materials, folder: Path, clock: Clock) -> TrainResult:
    """Trains with docid cross-entropy, or goes on where the run in `folder` stopped."""
    config, evaluate = materials.recipe.train, dev_evaluation(materials)
    return train(
        materials.model,
        materials.batches(materials.pools, batch_size=config.batch_size),
        config=config,
        folder=folder,
        evaluate=evaluate,
        compile_evaluation=evaluate and evaluate.compile,
        clock=clock,
        start=starting(materials),
        measuring=materials.measuring,
    )


def take_docids(materials: Materials, params: Params, step: int) -> TrainResult:
    """What `train_docids` makes, of parameters that were trained elsewhere, at `step`."""
    evaluate = dev_evaluation(materials)
    return TrainResult(params, step, evaluate(params) if evaluate else {}, step)


def starting(materials: Materials) -> Callable[[Params], Params] | None:
    """Fresh parameters -> those to begin with; None where the recipe wants the fresh ones."""
    config, model = materials.recipe.train, materials.model
    if config.start == "random":
        return None
    if config.start == "pretrained":
        return functools.partial(
            pretrained_start,
            checkpoint=open_checkpoint(config.init),
            config=model.config,
            vocabulary=materials.index.vocabulary,
            table=materials.index.table,
            seed=config.seed,
        )
    return functools.partial(
        lexical_start,
        examples=materials.examples,
        config=model.config,
        docids=model.docids,
        seed=config.seed,
    )


class DevEvaluation:
    """Parameters -> dev metrics of generation."""

    def __init__(self, materials: Materials):
        self._materials, self._ranker = materials, materials.ranker()

    def __call__(self, params: Params) -> dict[str, float]:
        materials, ranker = self._materials, self._ranker
        queries = materials.split.dev_queries
        reached = processes.spread(
            lambda some: ranker.candidates(params, some, beam=DEV_BEAM), list(queries.values())
        )
        found = dict(zip(queries, reached, strict=True))
        scores = run_of_candidates(
            found, ranker.fusion, materials.document_ids, scoring="generation"
        )
        return dev_metrics(scores, materials.split, materials.metrics)

    def compile(self, params: Params) -> None:
        """Compiles what a call needs, without most of its work."""
        compile_search(self._ranker, params, self._materials.split.dev_queries.values(), DEV_BEAM)


def dev_evaluation(materials: Materials) -> DevEvaluation | None:
    """None without dev queries."""
    return DevEvaluation(materials) if materials.split.dev_queries else None
