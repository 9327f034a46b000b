"""Training the generator of queries, in a folder of its own, and sampling from it."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from genret_jax.configs import GenerationConfig
from genret_jax.corpus import Document
from genret_jax.data.batches import Batches, Pool, length_buckets
from genret_jax.data.views import padded
from genret_jax.modeling.model import Params
from genret_jax.modeling.query_generator import QueryGenerator
from genret_jax.pseudo_queries.examples import Pairs, hold_out, make_pool, passages_of
from genret_jax.pseudo_queries.files import PseudoQuery
from genret_jax.recipe import GeneratorRecipe
from genret_jax.training.budget import Clock
from genret_jax.training.trainer import Evaluate, TrainResult, train
from genret_jax.vocabularies import Vocabulary

log = logging.getLogger(__name__)
METRIC = "token_probability"
_SAMPLES = 3  # queries sampled from a passage at a time
_CHUNK = 512  # documents sampled together, shortest passages first


def make_model(recipe: GeneratorRecipe, vocabulary: Vocabulary) -> QueryGenerator:
    return QueryGenerator(
        recipe.network.t5(vocabulary.size),
        vocabulary.text_size,
        copying=recipe.generation.copying,
        label_smoothing=recipe.loss.label_smoothing,
        z_loss=recipe.loss.z_loss,
    )


def train_generator(
    model: QueryGenerator,
    documents: Sequence[Document],
    pairs: Pairs,
    vocabulary: Vocabulary,
    *,
    recipe: GeneratorRecipe,
    folder: Path,
    clock: Clock,
) -> TrainResult:
    """Trains on (document, query) pairs, or goes on where the run in `folder` stopped.

    The best parameters are those that give the queries of held-out documents the highest geometric
    mean probability of a piece (the inverse of perplexity).
    """
    config = dataclasses.replace(recipe.train, metric=METRIC)
    split = hold_out(pairs, recipe.generation, seed=config.seed)
    pool = make_pool(documents, split.train, vocabulary, recipe.generation)
    log.info("%d pairs to learn from, %d of held-out documents", len(split.train), len(split.dev))
    tokens = pool.arrays["encoder_input_tokens"]
    batches = Batches(
        [pool],
        batch_size=config.batch_size,
        seed=config.seed,
        buckets=length_buckets((tokens > 0).sum(1), tokens.shape[1], multiple=8),
    )
    dev = None
    if split.dev:
        held = make_pool(documents, split.dev, vocabulary, recipe.generation)
        dev = _dev_evaluation(model, held, config.batch_size)
    return train(model, batches, config=config, folder=folder, evaluate=dev, clock=clock)


def _dev_evaluation(model: QueryGenerator, pool: Pool, size: int) -> Evaluate:
    cross_entropy = jax.jit(lambda params, batch: model.loss_fn(params, batch)[1]["cross_entropy"])
    weights = pool.arrays["decoder_loss_weights"]

    def run(params: Params) -> dict[str, float]:
        total = 0.0
        for start in range(0, len(pool), size):
            rows = np.arange(start, start + size)
            batch = {name: array[rows % len(pool)] for name, array in pool.arrays.items()}
            batch["decoder_loss_weights"] = np.where(
                (rows < len(pool))[:, None], batch["decoder_loss_weights"], 0.0
            ).astype(np.float32)
            total += float(cross_entropy(params, batch)) * batch["decoder_loss_weights"].sum()
        mean = float(total / weights.sum())
        return {METRIC: float(np.exp(-mean)), "perplexity": float(np.exp(mean))}

    return run


@dataclasses.dataclass
class Counts:
    """What became of the queries that were sampled.

    Attributes:
      sampled: in all.
      unfinished: had no end within the length, and were left out.
      repeated: were there already for their document (or empty), and were left out.
    """

    sampled: int = 0
    unfinished: int = 0
    repeated: int = 0


class Sampler:
    """Documents -> pseudo-queries.

    Args:
      model: the generator.
      vocabulary: of its text pieces.
      config: how to sample.
      per_document: queries sampled of a document.
      seed: a document's queries depend on it, on the document, and on its position.

    Attributes:
      counts: of everything sampled so far.
    """

    def __init__(
        self,
        model: QueryGenerator,
        vocabulary: Vocabulary,
        config: GenerationConfig,
        *,
        per_document: int,
        seed: int,
    ):
        self._vocabulary, self._config = vocabulary, config
        self._per_document = per_document
        self._samples = min(per_document, _SAMPLES)
        self._rows = -(-per_document // self._samples)
        self.counts = Counts()
        self._sample = jax.jit(
            lambda params, document, rows: model.sample(
                params,
                document,
                jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(rows),
                samples=self._samples,
                length=config.query_length,
                top_k=config.top_k,
                temperature=config.temperature,
            )
        )

    def seconds(self, params: Params, documents: int) -> float:
        """What sampling of so many documents will take at most, by the time of one batch.

        Parameters that know nothing yet write queries of full length, in the longest passages.
        """
        size = self._config.batch_size
        batch = np.full((size, self._width), 3, np.int32)
        times = []
        for _ in range(2):  # the first compiles
            begin = time.monotonic()
            jax.block_until_ready(self._sample(params, batch, np.arange(size)))
            times.append(time.monotonic() - begin)
        return times[-1] * -(-documents * self._rows // size)

    @property
    def _width(self) -> int:
        return -(-self._config.document_length // 8) * 8

    def __call__(self, params: Params, documents: Sequence[Document]) -> Iterator[PseudoQuery]:
        """The queries of all documents, document by document."""
        on_device = jax.device_put(params)
        with tqdm(total=len(documents), unit="document", desc="sampling", disable=None) as bar:
            for start in range(0, len(documents), _CHUNK):
                chunk = documents[start : start + _CHUNK]
                yield from self._chunk(on_device, chunk, start)
                bar.update(len(chunk))

    def _chunk(
        self, params: Params, documents: Sequence[Document], first: int
    ) -> Iterator[PseudoQuery]:
        texts = []
        for document in documents:
            found = passages_of(document, self._vocabulary, self._config)
            # Passages spread evenly over the document where there are more than rows.
            spread = max(len(found), self._rows)
            texts += [found[(row * spread // self._rows) % len(found)] for row in range(self._rows)]
        tokens, numbers = padded(texts), first * self._rows + np.arange(len(texts))
        used = -(-(tokens > 0).sum(1) // 8) * 8
        shape = (len(texts), self._samples, self._config.query_length)
        drawn, log_p = np.zeros(shape, np.int32), np.zeros(shape[:2], np.float32)
        ended = np.zeros(shape[:2], bool)
        for width in np.unique(used).tolist():  # short passages do not pay for long ones
            alike = np.flatnonzero(used == width)
            for start in range(0, len(alike), self._config.batch_size):
                rows = alike[start : start + self._config.batch_size]
                full = np.resize(rows, self._config.batch_size)
                found = self._sample(params, tokens[full, :width], numbers[full])
                drawn[rows] = np.asarray(found.tokens)[: len(rows)]
                log_p[rows] = np.asarray(found.log_p)[: len(rows)]
                ended[rows] = np.asarray(found.ended)[: len(rows)]
        for i, document in enumerate(documents):
            here = slice(i * self._rows, (i + 1) * self._rows)
            parts = (part[here].reshape(-1, *part.shape[2:]) for part in (drawn, log_p, ended))
            yield from self._queries(document, *parts)

    def _queries(
        self, document: Document, drawn: np.ndarray, log_p: np.ndarray, ended: np.ndarray
    ) -> Iterator[PseudoQuery]:
        """Those of one document that are worth keeping."""
        seen = {""}
        for tokens, score, whole in list(zip(drawn, log_p, ended, strict=True))[
            : self._per_document
        ]:
            self.counts.sampled += 1
            text = self._vocabulary.decode(tokens)
            key = " ".join(text.casefold().split())
            if not whole:
                self.counts.unfinished += 1
            elif key in seen:
                self.counts.repeated += 1
            else:
                seen.add(key)
                yield PseudoQuery(document.id, text, float(score))
