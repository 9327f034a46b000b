"""The second stage of n-grams, LTRGR's: n-grams go on being learned, and documents are told apart.

rank train queries -> train with cross-entropy and the margin rank loss over sums of n-grams
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from genret_jax.errors import UserError
from genret_jax.modeling.model import Params
from genret_jax.modeling.ngram_margin import NgramMarginModel
from genret_jax.negatives import Positives, known_positives
from genret_jax.ngram.batches import RankedBatches
from genret_jax.ngram.ranked import Chosen, RankedQueries, Ranking
from genret_jax.ranking import BATCH_SIZES
from genret_jax.stages.ngram import NgramTraining
from genret_jax.training import partitioning
from genret_jax.training.budget import Clock
from genret_jax.training.trainer import TrainResult, train

log = logging.getLogger(__name__)
_RANKED_SHARE = 0.3  # of the time that is left of a budget, for ranking
_CHUNK = BATCH_SIZES[-1]  # queries ranked at a time: a batch that is not full takes as long
_SEED = 43


def learn_to_rank(
    training: NgramTraining, params: Params, folder: Path, clock: Clock
) -> tuple[TrainResult, dict[str, Any]]:
    """Trains with the margin rank loss, or goes on where the run in `folder` stopped.

    Args:
      training: of the first stage.
      params: that it has found, on the host.
      folder: of this stage: what was ranked, checkpoints and metrics.
      clock: of the whole run.

    Returns:
      What the training made, and what is to be said of it.

    Raises:
      UserError: there is no train query whose ranking is to change.
    """
    recipe, config = training.materials.recipe, training.materials.recipe.contrastive
    ranked = _ranked(training, params, folder / "ranked", clock)
    batches = RankedBatches(
        training.batches(config.batch_size),
        ranked,
        rows=training.settings.ranked,
        seed=recipe.train.seed,
    )
    result = train(
        NgramMarginModel(
            dataclasses.replace(training.model, r_drop=0.0),  # of the first stage alone
            alpha=training.settings.alpha,
            generation=config.generation,
            rank=config.rank,
            margin=config.margin,
            drawn_margin=config.drawn_margin,
        ),
        batches,
        config=config.train_config(recipe.train),
        folder=folder,
        evaluate=training.dev_evaluation(),
        clock=clock,
        start=lambda _: params,
        measuring=training.materials.measuring,
    )
    return result, {"steps": result.steps, "best_step": result.best_step, **ranked.report()}


def check_ranking(training: NgramTraining) -> None:
    """What can be known before the first stage is trained.

    Raises:
      UserError: there are no train queries to rank, or devices cannot share those of a step.
    """
    materials = training.materials
    if not materials.split.all_pairs:
        raise UserError(
            f"method {materials.recipe.method} learns to rank train queries, and the corpus has "
            "none; take another method, such as minder, or give --pseudo-queries"
        )
    mesh = partitioning.make_mesh(model_parallel=materials.recipe.train.model_parallel)
    examples = materials.recipe.contrastive.batch_size
    partitioning.check_rows(mesh, training.settings.ranked, "SearcherConfig.settings: ranked")
    partitioning.check_rows(mesh, examples, "ContrastiveConfig.batch_size")


def _ranked(training: NgramTraining, params: Params, folder: Path, clock: Clock) -> RankedQueries:
    """What the parameters of the first stage rank for train queries; made once, then opened."""
    materials, settings = training.materials, training.settings
    digest = _digest(training)
    if (folder / "ranked.json").is_file():
        found = RankedQueries.load(folder)
        if found.digest == digest:
            return found
    positives = known_positives(materials.split.all_pairs)
    chosen, rows, asked = _violating(training, positives, params, clock)
    if not chosen:
        raise UserError(
            f"{folder.parent}: of {asked} train queries, none has a right document among the "
            f"{settings.ranks} best that is too near to a wrong one; give larger "
            "SearcherConfig.settings 'ranks', or leave ContrastiveConfig.rank at 0"
        )
    texts = [positives.queries[row] for row in rows]
    views = [training.ranker.encoded(texts, view) for view in training.ranker.views]
    tokens = np.stack(views, axis=1)
    made = RankedQueries.of(chosen, tokens, length=settings.length, digest=digest, asked=asked)
    made.save(folder)
    return RankedQueries.load(folder)


def _violating(
    training: NgramTraining, positives: Positives, params: Params, clock: Clock
) -> tuple[list[Chosen], list[int], int]:
    """Ranks train queries in random order, and chooses where some margin is not kept.

    Returns:
      What was chosen, the row of each query among the positives, and how many were ranked.
    """
    config, settings = training.materials.recipe.contrastive, training.settings
    rng = np.random.default_rng([training.materials.recipe.train.seed, _SEED])
    order = rng.permutation(len(positives.queries))
    wanted = len(order) if clock.seconds else min(len(order), config.steps * settings.ranked)
    end = clock.elapsed + _RANKED_SHARE * ((clock.seconds or 0.0) - clock.elapsed)
    ranker, on_device, own = training.ranker, jax.device_put(params), _OwnTexts(training)
    found: list[Chosen] = []
    rows: list[int] = []
    asked = 0
    with tqdm(total=wanted, unit="query", desc="ranking train queries", disable=None) as bar:
        while asked < len(order) and len(found) < wanted:
            if clock.seconds and asked and clock.elapsed > end:
                break
            some = order[asked : asked + _CHUNK].tolist()
            asked += len(some)
            queries = [positives.queries[row] for row in some]
            explaining = ranker.explain(on_device, queries, own=[own(query) for query in queries])
            for row, explained in zip(some, explaining, strict=True):
                known = frozenset(positives.relevant[row].tolist())  # -1 is no document
                one = Ranking.of(explained, ranks=settings.ranks)
                if one.may_violate(known, margin=config.margin, drawn_margin=config.drawn_margin):
                    chosen = one.choose(
                        known,
                        explained,
                        ranker.views,
                        smoothing=settings.smoothing,
                        wrong=config.mined,
                        terms=settings.terms,
                        rng=rng,
                    )
                    found.append(chosen)
                    rows.append(row)
                    bar.update()
    log.info("ranked %d train queries: %d do not keep the margins", asked, len(found))
    return found, rows, asked


class _OwnTexts:
    """A train query -> its own texts in view "queries", one for each document that it is asked of.

    What answers a query that the index has not seen will not have its very words.
    """

    def __init__(self, training: NgramTraining):
        self._encode = training.materials.index.vocabulary.encode
        self._texts: dict[tuple[int, ...], list[int]] = {}
        for view in training.texts:
            for i in range(len(view.texts)) if view.name == "queries" else ():
                self._texts.setdefault(tuple(view.texts[i].tolist()), []).append(i)

    def __call__(self, query: str) -> list[int]:
        return self._texts.get(tuple(self._encode(query)), [])


def _digest(training: NgramTraining) -> str:
    """Of what the table is made from; the recipe decides the parameters that rank."""
    recipe = {**training.materials.recipe.to_dict(), "method": ""}
    about = [recipe, training.materials.index.about["fingerprint"]]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
