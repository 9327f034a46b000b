"""GLEN: docids made of pieces are learned first; then the model's own take their place.

docids -> stage 1 -> mine negatives -> train with `glen_loss` -> the documents' own identifiers
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from genret_jax.corpus import Corpus, Run
from genret_jax.data.batches import Arrays
from genret_jax.data.contrastive import ContrastiveBatches, DocumentSide, with_documents
from genret_jax.device_trie import DeviceTrie
from genret_jax.docids.collisions import row_groups
from genret_jax.docids.table import EOS_ID
from genret_jax.documents import descending
from genret_jax.errors import UserError
from genret_jax.glen import GlenRanker, Learned
from genret_jax.indexing import build_index
from genret_jax.modeling.glen import GlenModel, GlenWeights, KeywordModel
from genret_jax.modeling.model import Params
from genret_jax.negatives import Search
from genret_jax.recipe import Recipe
from genret_jax.splitting import Split
from genret_jax.stages.common import DEV_BEAM, Materials, dev_metrics
from genret_jax.stages.first import starting
from genret_jax.stages.second import Miner
from genret_jax.training.budget import Clock
from genret_jax.training.trainer import Evaluate, Numbered, TrainResult, train

_ENCODE = 64  # documents at a time


@dataclasses.dataclass(frozen=True)
class GlenSettings:
    """What the method has besides a recipe.

    Attributes:
      pairwise, pointwise, cosine: see `GlenWeights`.
      epoch_steps: steps that count as an epoch, by which the temperature falls; 0 for what a pass
        over the train queries takes.
    """

    pairwise: float = 1.0
    pointwise: float = 0.5
    cosine: float = 0.25
    epoch_steps: int = 0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            wanted = int if name == "epoch_steps" else (int, float)
            if isinstance(value, bool) or not isinstance(value, wanted):
                raise UserError(f"SearcherConfig.settings: {name} is {value!r}; give a number")
            if not 0 <= value < float("inf"):
                raise UserError(f"SearcherConfig.settings: {name} is {value}; give at least 0")

    @property
    def weights(self) -> GlenWeights:
        return GlenWeights(self.pairwise, self.pointwise, self.cosine)


@dataclasses.dataclass(frozen=True)
class Glen:
    """What the training made.

    Attributes:
      model: of phase 2.
      first, result: of stage 1, and of phase 2.
      learned: identifiers by the parameters that were best on dev.
      input_length: encoder tokens of a query.
      docids: kind and settings of the docids of stage 1.
      report: for retriever.json.
    """

    model: GlenModel
    first: TrainResult
    result: TrainResult
    learned: Learned
    input_length: int
    docids: dict[str, Any]
    report: dict[str, Any]


def check_recipe(recipe: Recipe) -> None:
    """UserError for what the recipe says and phase 2 would not do."""
    config = recipe.contrastive
    for name, found, wanted in (
        ("retrieval", config.retrieval, 1),
        ("prefix", config.prefix, 0),
        ("rank", config.rank, 0),
        ("pieces", config.pieces, 1),
        ("queries", config.queries, 0),
        ("refresh_every", config.refresh_every, 0),
        ("learned_temperature", config.learned_temperature, False),
    ):
        if found != wanted:
            raise UserError(
                f"method {recipe.method} has a loss of its own, its weights are in "
                f"SearcherConfig.settings: ContrastiveConfig.{name} is {found!r}, but must be "
                f"{wanted!r}; leave out what sets it"
            )


def train_glen(
    corpus: Corpus, split: Split, recipe: Recipe, run: Path, clock: Clock, settings: GlenSettings
) -> Glen:
    """Trains both phases, or goes on where `run` stopped.

    Args:
      corpus, split, recipe: what to learn.
      run: folder of the index, and of both phases' checkpoints and metrics.
      clock: of the whole run.
      settings: of the method.
    """
    index = build_index(
        corpus,
        run / "index",
        docids=recipe.docids,
        vocabulary=recipe.vocabulary,
        pairs=split.pairs,
        seed=recipe.train.seed,
    )
    materials = Materials(corpus.documents, split, index, recipe)
    model = GlenModel(
        materials.model, _steps(materials), settings.weights, chunk=recipe.contrastive.chunk
    )
    with clock.without(recipe.contrastive.share):
        first = _first_phase(materials, model, run / "training", clock)
    clock.check_left("phase 2")
    return _second_phase(materials, model, first, run / "ranking", clock, settings)


def _steps(materials: Materials) -> int:
    """Tokens of every identifier.

    Raises:
      UserError: they are of several lengths.
    """
    table = materials.index.table
    if (table.tokens == EOS_ID).any():
        raise UserError(
            f"method {materials.recipe.method} needs docids of one length, and those of kind "
            f"{table.kind} are of several; take --docids subwords"
        )
    return int(table.tokens.shape[1])


def _first_phase(materials: Materials, model: GlenModel, folder: Path, clock: Clock) -> TrainResult:
    """Trains with cross-entropy of the docids that were made, or goes on doing so."""
    config, split = materials.recipe.train, materials.split
    search = _search_for(materials, model, _keywords(materials))
    names, ids = list(split.dev_queries), materials.document_ids

    def dev(params: Params) -> dict[str, float]:
        scores = Run()
        found = search(params)(list(split.dev_queries.values()), DEV_BEAM)
        for name, positions in zip(names, found, strict=True):
            scores[name] = {ids[p]: -float(rank) for rank, p in enumerate(positions.tolist())}
        return dev_metrics(scores, split, materials.metrics)

    return train(
        KeywordModel(model),
        materials.batches(materials.pools, batch_size=config.batch_size),
        config=config,
        folder=folder,
        evaluate=dev if names else None,
        clock=clock,
        start=starting(materials),
        measuring=materials.measuring,
    )


def _keywords(materials: Materials) -> Learned:
    """The docids that were made, as identifiers; those of one docid have nothing to tell them."""
    index, rows = materials.index, materials.examples.document_rows
    tokens = np.asarray(index.table.tokens)[rows]
    return Learned.of(tokens, np.zeros(tokens.shape, np.float32), index.table.labels)


def _search_for(
    materials: Materials, model: GlenModel, identifiers: Learned
) -> Callable[[Params], Search]:
    """Parameters -> (queries, k) -> positions of the best k documents, by these identifiers."""
    ranker = GlenRanker(
        model,
        materials.index.vocabulary,
        materials.input_length,
        descending(materials.document_ids),
    )

    def by(params: Params) -> Search:
        on_device = jax.device_put(params)

        def search(queries: list[str], k: int) -> list[np.ndarray]:
            beam = max(k, materials.recipe.contrastive.mining_beam)
            found = ranker.rank(on_device, identifiers, queries, k=k, beam=beam)
            return [positions for positions, _ in found]

        return search

    return by


def _second_phase(
    materials: Materials,
    model: GlenModel,
    first: TrainResult,
    folder: Path,
    clock: Clock,
    settings: GlenSettings,
) -> Glen:
    recipe, config = materials.recipe, materials.recipe.contrastive
    search = _search_for(materials, model, _keywords(materials))
    miner = Miner(materials, folder / "negatives", clock, by_model=search)
    docids = materials.index.vocabulary.docids
    side = DocumentSide.of(materials.examples, miner.positives, docids, config)
    # Documents of one docid are to be told apart from now on.
    side = dataclasses.replace(side, row=np.arange(len(side.row), dtype=np.int32))
    pools = [with_documents(p, materials.examples, miner.positives) for p in materials.pools]
    drawn = materials.batches(pools, batch_size=config.batch_size)
    batches = ContrastiveBatches(
        drawn,
        side,
        miner.questions,
        miner.negatives(0, first.params, drawn),
        prefix=0,
        retrieved=config.retrieved_negatives,
        seed=recipe.train.seed,
    )
    asked = len(materials.examples.queries) or len(materials.documents)
    epoch = settings.epoch_steps or max(1.0, asked / config.batch_size)
    identifier = Identifier(model, side.views.tokens, materials.index.table.labels)
    if clock.seconds:
        clock.keep(
            1.2 * identifier.seconds(first.params),
            "the documents' identifiers (less: shorter ContrastiveConfig.document_length)",
        )
    result = train(
        model,
        EpochBatches(batches, steps=epoch),
        config=config.train_config(recipe.train),
        folder=folder,
        evaluate=_dev_evaluation(materials, model, identifier),
        clock=clock,
        start=lambda _: first.params,
        measuring=materials.measuring,
    )
    learned = identifier(result.params)
    report = {
        "steps": result.steps,
        "epochs": round(result.steps / epoch, 3),
        "negatives": batches.negatives.report(),
        "docids": learned.table.report(),
        "changed": changed(learned.table.tokens, materials.index.table.tokens),
    }
    return Glen(
        model,
        first,
        result,
        learned,
        materials.input_length,
        materials.index.about["docids"],
        report,
    )


def changed(now: np.ndarray, before: np.ndarray) -> float:
    """The share of documents whose identifier is another than before."""
    both = row_groups(np.concatenate([now, before]))
    return round(float((both[: len(now)] != both[len(now) :]).mean()), 4)


class EpochBatches:
    """Batches that know how many epochs have gone.

    Args:
      batches: of phase 2.
      steps: of an epoch.
    """

    def __init__(self, batches: Numbered, *, steps: float):
        self._batches, self._steps = batches, steps

    def __getitem__(self, n: int) -> Arrays:
        return self._dated(self._batches[n], n)

    def shapes(self) -> list[Arrays]:
        return [self._dated(batch, 0) for batch in self._batches.shapes()]

    def _dated(self, batch: Arrays, n: int) -> Arrays:
        rows = len(batch["document_index"])
        return {**batch, "epoch": np.full(rows, n / self._steps, np.float32)}


class Identifier:
    """Documents -> the identifiers that the model gives them.

    Args:
      model: decodes them.
      tokens: int32[documents, length], the text of each.
      labels: of the docid tokens.
    """

    def __init__(self, model: GlenModel, tokens: np.ndarray, labels: tuple[str, ...]):
        self._tokens, self._labels = tokens, labels
        self._identify = jax.jit(model.identify)

    def __call__(self, params: Params, *, quiet: bool = False) -> Learned:
        on_device = jax.device_put(params)
        starts = tqdm(
            range(0, len(self._tokens), _ENCODE),
            unit_scale=_ENCODE,
            unit="document",
            desc="identifying",
            disable=quiet or None,
        )
        found = [self._batch(on_device, start) for start in starts]
        tokens, weights = (np.concatenate(part) for part in zip(*found, strict=True))
        return Learned.of(tokens, weights, self._labels)

    def seconds(self, params: Params) -> float:
        """What identifying all documents will take, by the time of one batch."""
        on_device, times = jax.device_put(params), []
        for _ in range(2):  # the first compiles
            begin = time.monotonic()
            self._batch(on_device, 0)
            times.append(time.monotonic() - begin)
        return times[-1] * len(self._tokens) / _ENCODE

    def _batch(self, params: Params, start: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self._tokens[start : start + _ENCODE]
        padded = np.pad(rows, ((0, _ENCODE - len(rows)), (0, 0)))
        tokens, weights = self._identify(params, padded)
        return np.asarray(tokens)[: len(rows)], np.asarray(weights, np.float32)[: len(rows)]


def _dev_evaluation(
    materials: Materials, model: GlenModel, identifier: Identifier
) -> Evaluate | None:
    """Dev metrics with the identifiers that the documents have just now."""
    split, ids = materials.split, materials.document_ids
    if not split.dev_queries:
        return None
    ranker = GlenRanker(model, materials.index.vocabulary, materials.input_length, descending(ids))

    texts = list(split.dev_queries.values())
    before: list[DeviceTrie] = []  # so that its program is kept where the next one fits

    def run(params: Params) -> dict[str, float]:
        learned = identifier(params, quiet=True)
        before[:] = [learned.trie.on_device(like=before[0] if before else None)]
        found = ranker.rank(params, learned, texts, k=DEV_BEAM, beam=DEV_BEAM, trie=before[0])
        scores = Run()
        for name, (positions, values) in zip(split.dev_queries, found, strict=True):
            pairs = zip(positions.tolist(), values.tolist(), strict=True)
            scores[name] = {ids[position]: value for position, value in pairs}
        metrics = dev_metrics(scores, split, materials.metrics)
        distinct = len(learned.trie.rows) / len(learned.weights)
        return {**metrics, "distinct_docids": distinct}

    return run
