"""Stage 2: how near a query is to a document, learned on what stage 1 confuses.

mine negatives -> train with the joint loss -> encode the documents -> fit the weights of fusion
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from genret_jax.configs import ContrastiveConfig
from genret_jax.data.batches import Batches
from genret_jax.data.contrastive import (
    ContrastiveBatches,
    DocumentSide,
    Questions,
    with_documents,
)
from genret_jax.docids.features import unit_length
from genret_jax.errors import UserError
from genret_jax.modeling.contrastive import JointWeights
from genret_jax.modeling.model import Params, RetrievalModel
from genret_jax.modeling.ranking_model import RankingModel
from genret_jax.negatives import (
    Negatives,
    Search,
    bm25_search,
    known_positives,
    mine,
    prefix_negatives,
)
from genret_jax.ranking import Ranker
from genret_jax.scoring import Fusion
from genret_jax.stages.common import Materials
from genret_jax.stages.dev_fusion import dev_evaluation, fit_on_dev, seconds_to_fit
from genret_jax.training import processes
from genret_jax.training.budget import Clock
from genret_jax.training.trainer import TrainResult, train
from genret_jax.vectors import DocumentVectors

log = logging.getLogger(__name__)
VECTORS = (
    "the documents' vectors (less: fewer ContrastiveConfig.pieces or ContrastiveConfig.queries)"
)
_ENCODE = 64  # views encoded at a time
_DEV_VIEWS = 32  # of each kind, of a document, while parameters are compared
_MOST_DEV_VIEWS = 50_000  # of all documents together
_PREFIX_POOL = 16  # prefix negatives kept a document
_MINING_SETTINGS = (
    "source",
    "prefix_depth",
    "prefix_negatives",
    "retrieved_negatives",
    "mined",
    "mining_beam",
)
_MINING_SHARE = 0.2  # of the time that is left of a budget


@dataclasses.dataclass(frozen=True)
class SecondStage:
    """What stage 2 made.

    Attributes:
      result: of its training.
      report: for retriever.json: negatives, fusion and its curve on dev.
      vectors: of the documents, with the parameters that were best on dev; None where documents
        are ranked by generation alone.
      fusion: weights fitted on dev; None where there are no vectors.
    """

    result: TrainResult
    report: dict[str, Any]
    vectors: DocumentVectors | None = None
    fusion: Fusion | None = None


def train_ranking(materials: Materials, params: Params, folder: Path, clock: Clock) -> SecondStage:
    """Trains stage 2 from the parameters of stage 1, or goes on where `folder` stopped.

    Args:
      materials: the corpus, made ready.
      params: of stage 1, on the host.
      folder: of this stage: negatives, checkpoints and metrics.
      clock: of the whole run.
    """
    config = materials.recipe.contrastive
    miner = Miner(materials, folder / "negatives", clock)
    docids = materials.index.vocabulary.docids
    side = DocumentSide.of(materials.examples, miner.positives, docids, config)
    pools = [with_documents(p, materials.examples, miner.positives) for p in materials.pools]
    drawn = materials.batches(pools, batch_size=config.batch_size)
    negatives = miner.negatives(0, params, drawn)
    counts = negatives_an_example(config, bool((np.asarray(negatives.prefix) >= 0).any()))
    batches = ContrastiveBatches(
        drawn,
        side,
        miner.questions,
        negatives,
        prefix=counts[0],
        retrieved=counts[1],
        seed=materials.recipe.train.seed,
    )

    def refresh(step: int, now: Params) -> None:
        batches.negatives = miner.negatives(step, now, drawn)

    encoder, ranker = DocumentEncoder(materials, side), materials.ranker()
    if clock.seconds:
        vectors = encoder.seconds(params)
        vectors += seconds_to_fit(materials, params, encoder, ranker)
        clock.keep(vectors, VECTORS)
    evaluate = dev_evaluation(materials, encoder, ranker)
    result = train(
        ranking_model(config, materials.model, prefix_negatives=counts[0]),
        batches,
        config=config.train_config(materials.recipe.train),
        folder=folder,
        evaluate=evaluate,
        compile_evaluation=evaluate and evaluate.compile,
        clock=clock,
        start=lambda _: params,
        refresh=refresh if config.refresh_every else None,
        refresh_every=config.refresh_every,
        measuring=materials.measuring,
    )
    report = {"negatives": batches.negatives.report()}
    return _finished(materials, encoder, ranker, result, report)


def take_ranking(materials: Materials, params: Params, step: int) -> SecondStage:
    """What `train_ranking` makes, of parameters that were trained elsewhere, at `step`."""
    positives = known_positives(materials.split.all_pairs)
    docids = materials.index.vocabulary.docids
    config = materials.recipe.contrastive
    encoder = DocumentEncoder(
        materials, DocumentSide.of(materials.examples, positives, docids, config)
    )
    ranker = materials.ranker()
    evaluate = dev_evaluation(materials, encoder, ranker)
    result = TrainResult(params, step, evaluate(params) if evaluate else {}, step)
    return _finished(materials, encoder, ranker, result, {})


def _finished(
    materials: Materials,
    encoder: DocumentEncoder,
    ranker: Ranker,
    result: TrainResult,
    report: dict[str, Any],
) -> SecondStage:
    """Vectors and fusion for the parameters that training chose; `report` goes on with them."""
    vectors = encoder.all(result.params)
    fitted = fit_on_dev(materials, result.params, vectors, ranker)
    report |= {
        "fusion": fitted.to_dict(),
        "vectors": {
            "store": materials.recipe.contrastive.store,
            "views": int(vectors.bounds[-1, 0]),
            "bytes": vectors.num_bytes,
        },
    }
    return SecondStage(result, report, vectors, fitted.fusion)


def negatives_an_example(config: ContrastiveConfig, some_share: bool) -> tuple[int, int]:
    """How many of each kind; 0 of a kind that has no weight, or that no document has.

    Args:
      config: of the stage.
      some_share: whether any two docids share a prefix.

    Raises:
      UserError: there is nothing to contrast.
    """
    prefix = config.prefix_negatives if config.prefix else 0
    if prefix and not some_share:
        log.info("no two docids share a prefix: stage 2 goes without prefix negatives")
        prefix = 0
    if not prefix and not config.retrieval:
        raise UserError(
            "no two docids share a prefix, and ContrastiveConfig.retrieval is 0: stage 2 has "
            "nothing to contrast; give it a weight, or choose other --docids"
        )
    return prefix, config.retrieved_negatives if config.retrieval else 0


def ranking_model(
    config: ContrastiveConfig, model: RetrievalModel, *, prefix_negatives: int
) -> RankingModel:
    """The model of stage 2 as the recipe wants it, for so many prefix negatives an example."""
    return RankingModel(
        model,
        JointWeights(config.generation, config.prefix, config.retrieval),
        similarity=config.similarity,  # type: ignore[arg-type]
        temperature=config.temperature,
        share_negatives=config.share_negatives,
        prefix_negatives=prefix_negatives,
        chunk=config.chunk,
    )


def _made(folder: Path, digest: str) -> bool:
    """Whether negatives of this digest are there."""
    about = folder / "negatives.json"
    return about.is_file() and Negatives.load(folder).digest == digest


class Miner:
    """Negatives of this corpus by given parameters, kept in a folder.

    Args:
      materials: the corpus, made ready.
      folder: for them.
      clock: of the whole run; none where there is no budget.
      by_model: parameters -> the search of source "model"; the beam's by default.
      origin: a digest of the parameters that mine, where the recipe alone does not decide them.
    """

    def __init__(
        self,
        materials: Materials,
        folder: Path,
        clock: Clock | None = None,
        *,
        by_model: Callable[[Params], Search] | None = None,
        origin: str = "",
    ):
        self._materials, self._folder, self._clock = materials, folder, clock or Clock(None)
        self._by_model, self._origin = by_model, origin
        self.positives = known_positives(materials.split.all_pairs)
        self.questions = Questions.of(self.positives, materials.documents)

    def negatives(self, step: int, params: Params, drawn: Batches | None = None) -> Negatives:
        """Those of a step, from the folder where they were made before.

        Args:
          step: from which on they serve.
          params: that mine.
          drawn: the batches, whose examples know their questions: what they do not ask until
            negatives are mined again, or the steps end, gets none. None: everything is mined.
        """
        config, seed = self._materials.recipe.contrastive, self._materials.recipe.train.seed
        folder = self._folder / str(step)
        digest = self._digest()
        # One process looks, so that all go the same way.
        if processes.broadcast(_made(folder, digest)):
            return Negatives.load(folder)
        depth: Any = config.prefix_depth
        trie, documents = self._materials.index.trie, len(self._materials.documents)
        made = Negatives(
            prefix=prefix_negatives(
                trie,
                np.arange(documents),
                depth=int(depth) if depth.isdecimal() else depth,
                count=max(config.prefix_negatives, _PREFIX_POOL),
                rng=np.random.default_rng([seed, step]),
            ),
            retrieved=self._retrieved(
                params, self._order(step, np.random.default_rng([seed, step, 1]), drawn)
            ),
            digest=digest,
            source=config.source,
            depth=depth,
        )
        processes.on_first(lambda: made.save(folder))
        processes.see(folder / "negatives.json")
        return Negatives.load(folder)

    def _order(
        self, step: int, rng: np.random.Generator, drawn: Batches | None
    ) -> Int[np.ndarray, " asked"]:
        """Rows of the questions to mine for, those first that are asked first.

        Under a time budget nobody knows how many steps there will be: all questions follow.
        """
        everything = np.arange(len(self.questions.texts))
        if drawn is None:
            return rng.permutation(everything)
        config = self._materials.recipe.contrastive
        end = step + drawn.round_size
        if not self._clock.seconds:
            end = min(config.steps, step + (config.refresh_every or config.steps))
        rows = [drawn.whole(n)["question_index"] for n in range(step, end)]
        found = np.concatenate([everything[:0], *rows])
        _, first = np.unique(found, return_index=True)
        asked = found[np.sort(first)]
        if not self._clock.seconds:
            return asked
        return np.concatenate([asked, rng.permutation(np.setdiff1d(everything, asked))])

    def _retrieved(self, params: Params, order: Int[np.ndarray, " asked"]) -> np.ndarray:
        """int32[questions, mined]; under a time budget, for as many questions as fit into a part.

        Args:
          params: that mine.
          order: rows of questions; what is not among them gets none.
        """
        config, questions, clock = self._materials.recipe.contrastive, self.questions, self._clock
        if not (config.rank or (config.retrieval and config.retrieved_negatives)):
            return np.full((len(questions.texts), 1), -1, np.int32)
        end = clock.elapsed + _MINING_SHARE * ((clock.seconds or 0.0) - clock.elapsed)
        count = max(config.mined, config.retrieved_negatives)
        out = np.full((len(questions.texts), count), -1, np.int32)

        def mined(some: list[int]) -> np.ndarray:
            return mine(
                self._search(params),
                [questions.texts[i] for i in some],
                questions.relevant[some],
                count=out.shape[1],
                keep_going=(lambda: clock.elapsed < end) if clock.seconds else None,
            )

        out[order] = processes.spread(mined, order.tolist())
        return out

    def _digest(self) -> str:
        """Of what the tables are made from.

        A run that goes on has not the parameters that mined; its recipe decides them.
        """
        recipe = self._materials.recipe
        about: list[Any] = [self._materials.index.about["fingerprint"], self._origin]
        if self._origin:
            about += [{name: getattr(recipe.contrastive, name) for name in _MINING_SETTINGS}]
            about += [recipe.train.seed, self.questions.texts, recipe.loss.normaliser]
        else:
            about += [{**recipe.to_dict(), "method": ""}]  # by whatever name
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def _search(self, params: Params) -> Any:
        config = self._materials.recipe.contrastive
        if config.source == "bm25":
            return bm25_search(self._materials.documents)
        if self._by_model:
            return self._by_model(params)
        ranker = self._materials.ranker()
        beam = min(config.mining_beam, len(self._materials.index.trie.rows))
        on_device = jax.device_put(params)

        def search(queries: list[str], k: int) -> list[np.ndarray]:
            found = ranker.rank(on_device, queries, k=k, beam=beam)
            return [np.array([r.position for r in hits], np.int32) for hits in found]

        return search


class DocumentEncoder:
    """Documents -> vectors of their views, of length one where similarity is the cosine."""

    def __init__(self, materials: Materials, side: DocumentSide):
        config = materials.recipe.contrastive
        self._side, self._store = side, config.store
        self._cosine = config.similarity == "cosine"
        self._unseen = materials.unseen
        self._encode = jax.jit(materials.model.vectors)
        self._embed = materials.model.config.embed_dim
        self._used = -(-(side.views.tokens > 0).sum(1) // 8) * 8

    def all(self, params: Params) -> DocumentVectors:
        """Vectors as they are kept with the retriever; each process encodes its share."""
        everything = np.arange(len(self._side.views.tokens))
        made = self._some(params, everything, store=self._store, quiet=False)
        return dataclasses.replace(made, unseen=self._unseen)

    def few(
        self, params: Params, documents: np.ndarray, *, most: int = _MOST_DEV_VIEWS
    ) -> DocumentVectors:
        """Of some views of some documents, to judge parameters by; others have none.

        Args:
          most: views of all documents together, unless one of a kind of each is more.
        """
        count = max(1, min(_DEV_VIEWS, most // (2 * len(np.unique(documents)))))
        rows = self._side.views.at_most(count)
        rows = rows[np.isin(self._side.views.owners[rows], documents)]
        return self._some(params, rows, store="float32", quiet=True)

    def compile(self, params: Params) -> None:
        """Encodes one batch of every width that there is, so that no later one is slow."""
        on_device = jax.device_put(params)
        for width in np.unique(self._used):
            self._batch(on_device, np.flatnonzero(self._used == width)[:1], int(width))

    def seconds(self, params: Params) -> float:
        """What `all` will take at most, by the time of one batch of the longest views."""
        batch = np.arange(min(_ENCODE, len(self._side.views.tokens)))
        on_device = jax.device_put(params)
        times = []
        for _ in range(2):  # the first compiles
            begin = time.monotonic()
            self._batch(on_device, batch, self._side.views.tokens.shape[1])
            times.append(time.monotonic() - begin)
        views, width = self._side.views.tokens.shape
        batches = views / _ENCODE / processes.count()
        return 1.2 * float(times[-1] * self._used.mean() / width * batches)

    def _batch(self, params: Params, rows: np.ndarray, width: int) -> np.ndarray:
        padded = np.resize(rows, _ENCODE)
        docids = self._side.docids[self._side.views.owners[padded]]
        found = self._encode(params, self._side.views.tokens[padded, :width], docids)
        return np.asarray(found, np.float32)[: len(rows)]

    def _some(
        self, params: Params, rows: np.ndarray, *, store: str, quiet: bool
    ) -> DocumentVectors:
        on_device, used = jax.device_put(params), self._used[rows]
        parts = [  # short views do not pay for long ones
            alike[start : start + _ENCODE]
            for width in np.unique(used)
            for alike in [np.flatnonzero(used == width)]
            for start in range(0, len(alike), _ENCODE)
        ]
        bounds = self._side.views.bounds_of(rows)
        nothing = np.zeros((0, self._embed), np.float32)
        made = DocumentVectors.of(nothing, bounds, store=store).empty(len(rows))

        hide = quiet or None  # None: where stderr is no terminal

        def encode(some: list[np.ndarray]) -> None:
            for part in tqdm(some, unit_scale=_ENCODE, unit="view", desc="encoding", disable=hide):
                vectors = self._batch(on_device, rows[part], int(used[part[0]]))
                vectors = unit_length(vectors) if self._cosine else vectors
                made.put(part, DocumentVectors.of(vectors, bounds, store=store))

        processes.fill(encode, parts, read=made.take, write=made.put)
        return made
