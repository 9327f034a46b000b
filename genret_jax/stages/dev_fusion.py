"""The fused score on dev: while stage 2 trains, and to fit the weights that are kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np

from genret_jax.fusion_fit import FittedFusion, fit_fusion
from genret_jax.judged import Judged
from genret_jax.modeling.model import Params
from genret_jax.ranking import Ranker, with_similarities
from genret_jax.scoring import SCORINGS, Candidates, Fusion
from genret_jax.stages.common import DEV_BEAM, Materials, by_kind, compile_search
from genret_jax.training import processes
from genret_jax.vectors import DocumentVectors

log = logging.getLogger(__name__)
_FUSION_BEAM = 100  # what a search uses when nothing else is asked
_SAMPLE = 64  # dev queries that tell how long all of them take


class Encoder(Protocol):
    """Documents -> vectors, as `genret_jax.stages.second.DocumentEncoder`."""

    def few(self, params: Params, documents: np.ndarray) -> DocumentVectors: ...

    def compile(self, params: Params) -> None: ...


class DevEvaluation:
    """Parameters -> dev metrics of every scoring, with the fusion that is best just now."""

    def __init__(self, materials: Materials, encoder: Encoder, ranker: Ranker):
        self._materials, self._encoder, self._ranker = materials, encoder, ranker

    def __call__(self, params: Params) -> dict[str, float]:
        queries = list(self._materials.split.dev_queries)
        judged = _few_judged(
            self._materials, params, queries, DEV_BEAM, self._encoder, self._ranker
        )
        fusion = _fitted(self._materials, params, judged, queries).fusion
        split, names = self._materials.split, self._materials.metrics
        values: dict[str, float] = {}
        for scoring in SCORINGS:
            scores = _scores(fusion, judged.candidates, scoring)
            found = by_kind(judged.metrics(scores, names), split)
            prefix = "" if scoring == "fused" else f"{scoring}_"
            values |= {f"{prefix}{name}": value for name, value in found.items()}
        return values

    def compile(self, params: Params) -> None:
        """Compiles what a call needs, without most of its work."""
        queries = self._materials.split.dev_queries.values()
        compile_search(self._ranker, params, queries, _beam(self._materials, DEV_BEAM))
        self._encoder.compile(params)


def dev_evaluation(materials: Materials, encoder: Encoder, ranker: Ranker) -> DevEvaluation | None:
    """None without dev queries."""
    return DevEvaluation(materials, encoder, ranker) if materials.split.dev_queries else None


def seconds_to_fit(materials: Materials, params: Params, encoder: Encoder, ranker: Ranker) -> float:
    """What `fit_on_dev` will take with this ranker, by some of the dev queries.

    Its search is compiled here, and not when the time is over.
    """
    names = list(materials.split.dev_queries)
    some = [*names[: _SAMPLE // 2], *names[_SAMPLE // 2 :][-_SAMPLE // 2 :]]  # of both kinds
    if not some:
        return 0.0
    for _ in range(2):  # the first compiles
        begin = time.monotonic()
        judged = _few_judged(materials, params, some, _FUSION_BEAM, encoder, ranker)
        _fitted(materials, params, judged, some)
        taken = time.monotonic() - begin
    return taken * len(names) / len(some)


def fit_on_dev(
    materials: Materials, params: Params, vectors: DocumentVectors, ranker: Ranker
) -> FittedFusion:
    """The weights that are kept, with the beam of a search and all vectors of the documents."""
    if not materials.split.dev_queries:
        log.warning("no dev queries: the similarity gets the weight it had in training")
        return FittedFusion(Fusion(0.0, 1.0 / temperature_of(materials, params), 0.5), {})
    names = list(materials.split.dev_queries)
    reached = _reached(materials, jax.device_put(params), names, ranker, _FUSION_BEAM)
    return _fitted(materials, params, _judged(materials, names, reached, vectors), names)


def temperature_of(materials: Materials, params: Params) -> float:
    """That of the contrastive losses, as it is or as it was learned."""
    config = materials.recipe.contrastive
    if not config.learned_temperature:
        return config.temperature
    return config.temperature * float(np.exp(params["log_temperature"]))


def _beam(materials: Materials, beam: int) -> int:
    return min(beam, len(materials.index.trie.rows))


def _reached(
    materials: Materials, params: Params, names: Sequence[str], ranker: Ranker, beam: int
) -> list[Candidates]:
    """The candidates of dev queries, in their order, each process searching for some."""
    beam = _beam(materials, beam)
    return processes.spread(
        lambda some: ranker.candidates(params, some, beam=beam),
        [materials.split.dev_queries[name] for name in names],
    )


def _few_judged(
    materials: Materials,
    params: Params,
    names: Sequence[str],
    beam: int,
    encoder: Encoder,
    ranker: Ranker,
) -> Judged:
    """Dev queries with the vectors of those documents alone that they reach."""
    reached = _reached(materials, params, names, ranker, beam)
    documents = np.concatenate([one.positions for one in reached])
    return _judged(materials, names, reached, encoder.few(params, documents))


def _judged(
    materials: Materials,
    names: Sequence[str],
    reached: Sequence[Candidates],
    vectors: DocumentVectors,
) -> Judged:
    near = with_similarities(reached, vectors.of_several)
    return Judged.of(
        dict(zip(names, near, strict=True)),
        {name: materials.split.dev_qrels[name] for name in names},
        materials.document_ids,
        materials.order,
    )


def _fitted(
    materials: Materials, params: Params, judged: Judged, names: Sequence[str]
) -> FittedFusion:
    split = materials.split
    return fit_fusion(
        judged,
        temperature=temperature_of(materials, params),
        metric=materials.recipe.train.metric,
        unseen=np.array([name in split.unseen for name in names]),
        unseen_share=split.unseen_share,
    )


def _scores(fusion: Fusion, found: Candidates, scoring: str) -> np.ndarray:
    """Scores in which padding stays last."""
    return np.where(np.isfinite(found.generation), fusion.score(found, scoring), -np.inf)
