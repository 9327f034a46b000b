"""(passage of a document, train query) as arrays for the generator."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int32

from genret_jax.configs import GenerationConfig
from genret_jax.corpus import Document
from genret_jax.data.batches import Arrays, Pool
from genret_jax.data.views import padded, passages
from genret_jax.vocabularies import EOS, Vocabulary

Pairs = Sequence[tuple[str, int]]
_FEWEST = 20  # documents with train queries below which none is held out


@dataclasses.dataclass(frozen=True)
class Held:
    """Attributes:
    train: (query, document position) to learn from.
    dev: those of documents held out of training; no query of theirs is in train.
    """

    train: list[tuple[str, int]]
    dev: list[tuple[str, int]]


def hold_out(pairs: Pairs, config: GenerationConfig, *, seed: int) -> Held:
    """Holds out whole documents: what the generator is for is documents without train queries."""
    documents = np.unique([position for _, position in pairs])
    if len(documents) < _FEWEST or not config.held_out:
        return Held(list(pairs), [])
    rng = np.random.default_rng([seed, 29])
    count = max(1, int(len(documents) * config.held_out))
    held = set(rng.choice(documents, count, replace=False).tolist())
    dev = [pair for pair in pairs if pair[1] in held]
    if len(dev) > config.dev_pairs:
        dev = [dev[i] for i in sorted(rng.choice(len(dev), config.dev_pairs, replace=False))]
    asked = {query for query, _ in dev}
    train = [(q, d) for q, d in pairs if d not in held and q not in asked]
    return Held(train, dev) if train else Held(list(pairs), [])


def passages_of(
    document: Document, vocabulary: Vocabulary, config: GenerationConfig
) -> list[np.ndarray]:
    """int32 text pieces of each passage of a document, without EOS."""
    title, body = (
        np.array(vocabulary.encode(text), np.int32) for text in (document.title, document.text)
    )
    return passages(title, body, config.document_length, config.passages)


def make_pool(
    documents: Sequence[Document],
    pairs: Pairs,
    vocabulary: Vocabulary,
    config: GenerationConfig,
) -> Pool:
    """T5X's features of every pair: the passage that answers the query, and the query.

    Which passage that is nobody has judged: it is the one that shares most with the query, by the
    idf of the pieces in common; the first of equals.
    """
    positions = sorted({position for _, position in pairs})
    texts = {p: passages_of(documents[p], vocabulary, config) for p in positions}
    idf = _idf([passage for found in texts.values() for passage in found], vocabulary.text_size)
    queries = [np.array(vocabulary.encode(query), np.int32) for query, _ in pairs]
    inputs = [
        texts[position][nearest(texts[position], query, idf)]
        for query, (_, position) in zip(queries, pairs, strict=True)
    ]
    return Pool({"encoder_input_tokens": padded(inputs), **_decoder(queries, config)}, 1.0, "pairs")


def nearest(
    found: Sequence[np.ndarray], query: np.ndarray, idf: Float[np.ndarray, " pieces"]
) -> int:
    """The passage that shares most with the query."""
    if len(found) == 1:
        return 0
    return int(np.argmax([idf[np.intersect1d(passage, query)].sum() for passage in found]))


def _idf(found: Sequence[np.ndarray], size: int) -> Float[np.ndarray, " pieces"]:
    frequency = np.zeros(size)
    for passage in found:
        frequency[np.unique(passage)] += 1
    return np.log1p((len(found) - frequency + 0.5) / (frequency + 0.5))


def _decoder(queries: Sequence[np.ndarray], config: GenerationConfig) -> Arrays:
    """Decoder features; a query that is cut has no EOS, because it does not end there."""
    longest = max((len(query) for query in queries), default=0) + 1
    targets: Int32[np.ndarray, "pairs length"] = np.zeros(
        (len(queries), min(longest, config.query_length)), np.int32
    )
    for row, query in zip(targets, queries, strict=True):
        whole = np.append(query, EOS)[: len(row)]
        row[: len(whole)] = whole
    return {
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.float32),
    }
