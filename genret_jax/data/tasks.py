"""SeqIO tasks over a corpus in memory: retrieval, indexing, and their mixture.

- retrieval: a train query -> the docid of a relevant document.
- pseudo: a query generated from a document -> its docid, where there are some.
- indexing: a piece of a document -> its docid. A piece is the title, the beginning, or a random
  span of the text as in NCI (Wang et al. 2022); spans are as long as queries are, because a model
  that reads only long spans in training has never seen an input of a query's length. Some spans
  are put into the frame of a random train query, in place of the words that it is about: a
  question about this document, in form if not always in sense.

T5X reads these tasks as they are. The native trainer runs them a fixed number of times into memory
(`genret_jax.data.batches`), because a tf.data map costs more a small example than its training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from genret_jax.data.examples import Ragged, TrainingExamples
from genret_jax.data.vocabulary import SeqioVocabulary

_SHUFFLE_BUFFER = 200_000


def register(
    name: str,
    examples: TrainingExamples,
    vocabulary: SeqioVocabulary,
    *,
    indexing_share: float = 0.3,
    title_share: float = 0.3,
    frame_share: float = 0.0,
    word_dropout: float = 0.0,
    pseudo_share: float = 0.5,
) -> str:
    """Registers `NAME_retrieval`, `NAME_indexing` and the mixture `NAME`; replaces earlier ones.

    With generated queries among the examples there is `NAME_pseudo`, too.

    Args:
      name: of the mixture.
      examples: what to learn from.
      vocabulary: for both features.
      indexing_share: share of indexing examples in the mixture; 1 without train queries.
      title_share: share of titles among the indexing examples, where no other document has the
        same title (one of n documents has its title drawn an n-th as often); beginnings (title
        and first words) are a third as many, and the rest are random spans.
      frame_share: share of the spans that are put into the frame of a train query.
      word_dropout: share of text pieces left out of an input at random.
      pseudo_share: share of generated queries among the queries; 1 without train queries.

    Returns:
      The name of the mixture.
    """
    if not 0 <= indexing_share <= 1:
        raise ValueError(f"indexing_share must be in [0, 1], found {indexing_share}")
    features = {
        "inputs": seqio.Feature(vocabulary, add_eos=True, dtype=tf.int32),
        "targets": seqio.Feature(vocabulary, add_eos=False, dtype=tf.int32),
    }
    finish: list[Callable] = [seqio.preprocessors.append_eos_after_trim]
    if word_dropout:
        finish.insert(0, functools.partial(drop_words, rate=word_dropout))
    rates = []
    if len(examples.queries) and indexing_share < 1:
        generated = pseudo_share if examples.pseudo else 0.0
        generated = generated if examples.real else 1.0
        shares = {"retrieval": 1 - generated, "pseudo": generated}
        for kind, pairs in examples.query_tasks.items():
            if pairs and shares[kind]:
                source = retrieval_source(examples, pairs)
                add_task(f"{name}_{kind}", source, finish, features, len(pairs))
                rates.append((f"{name}_{kind}", (1 - indexing_share) * shares[kind]))
    if indexing_share > 0 or not rates:
        pieces = functools.partial(
            document_pieces,
            lengths=span_lengths(examples),
            frames=examples.frames,
            title_share=title_share,
            frame_share=frame_share if len(examples.frames) else 0.0,
        )
        source = indexing_source(examples)
        size = len(examples.document_rows)
        add_task(f"{name}_indexing", source, [pieces, *finish], features, size)
        rates.append((f"{name}_indexing", indexing_share or 1.0))
    seqio.MixtureRegistry.remove(name)
    seqio.MixtureRegistry.add(name, rates)
    return name


def add_task(
    name: str,
    source: seqio.FunctionDataSource,
    preprocessors: list[Callable],
    features: Mapping[str, seqio.Feature],
    size: int,
    **more: Any,
) -> None:
    """Registers a task of so many examples; replaces an earlier one.

    The source is what can be cached (`seqio_cache_tasks`): it is deterministic, while all that
    the preprocessors do is drawn anew in every epoch or depends on the lengths asked for.

    Args:
      name, source, preprocessors, features: of `seqio.TaskRegistry.add`.
      size: examples.
      **more: what else that takes, such as metric_fns.
    """
    online = [p for p in preprocessors if not isinstance(p, seqio.CacheDatasetPlaceholder)]
    seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[seqio.CacheDatasetPlaceholder(), *online],
        output_features=features,
        # SeqIO repeats before it shuffles: a larger buffer would be filled by repetitions.
        shuffle_buffer_size=min(max(size, 1), _SHUFFLE_BUFFER),
        **more,
    )


def retrieval_source(examples: TrainingExamples, pairs: range) -> seqio.FunctionDataSource:
    """{"inputs": query pieces, "targets": docid} for a range of the pairs."""
    read_query = _reader(examples.queries)
    rows = tf.constant(examples.query_rows)
    docids = tf.constant(examples.docids)

    def example(i: tf.Tensor) -> dict[str, tf.Tensor]:
        pair = i + pairs.start
        return {"inputs": read_query(pair), "targets": _docid(docids, rows[pair])}

    return _source(len(pairs), example)


def indexing_source(examples: TrainingExamples) -> seqio.FunctionDataSource:
    """{"title", "body": pieces, "title_count", "targets": docid} for every document."""
    read_title, read_body = _reader(examples.titles), _reader(examples.bodies)
    rows, counts = tf.constant(examples.document_rows), tf.constant(examples.title_counts)
    docids = tf.constant(examples.docids)

    def example(i: tf.Tensor) -> dict[str, tf.Tensor]:
        targets = _docid(docids, rows[i])
        return {
            "title": read_title(i),
            "body": read_body(i),
            "title_count": counts[i],
            "targets": targets,
        }

    return _source(len(examples.document_rows), example)


def _source(size: int, example: Callable[[tf.Tensor], dict]) -> seqio.FunctionDataSource:
    def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del split, shuffle_files, seed  # tasks shuffle with a buffer as large as the data
        return tf.data.Dataset.range(size).map(example)

    return seqio.FunctionDataSource(dataset_fn, splits=("train",))


def _reader(sequences: Ragged) -> Callable[[tf.Tensor], tf.Tensor]:
    values, offsets = tf.constant(sequences.values), tf.constant(sequences.offsets)
    return lambda i: values[offsets[i] : offsets[i + 1]]


def _docid(docids: tf.Tensor, row: tf.Tensor) -> tf.Tensor:
    tokens = docids[row]
    return tokens[: tf.math.count_nonzero(tokens, dtype=tf.int32)]


def span_lengths(examples: TrainingExamples) -> np.ndarray:
    """int32[101]: quantiles of the lengths of queries; 8 to 32 where there are none."""
    if not len(examples.queries):
        return np.linspace(8, 32, 101).astype(np.int32)
    quantiles = np.quantile(examples.queries.lengths, np.linspace(0, 1, 101))
    return np.maximum(quantiles, 3).astype(np.int32)


@seqio.map_over_dataset(num_seeds=5)
def _document_piece(
    example: dict[str, tf.Tensor],
    seeds: tf.Tensor,
    *,
    lengths: np.ndarray,
    frames: Ragged,
    title_share: float,
    frame_share: float,
) -> dict[str, tf.Tensor]:
    title, body = example["title"], example["body"]
    draw = tf.random.stateless_uniform([], seeds[0])
    drawn = tf.random.stateless_uniform([], seeds[1], maxval=len(lengths), dtype=tf.int32)
    length = tf.constant(lengths)[drawn]

    def span(length: tf.Tensor) -> tf.Tensor:
        places = tf.maximum(tf.size(body) - length, 0) + 1
        start = tf.random.stateless_uniform([], seeds[2], maxval=places, dtype=tf.int32)
        return body[start : start + length]

    def plain() -> tf.Tensor:
        return span(length)

    def framed() -> tf.Tensor:
        which = tf.random.stateless_uniform([], seeds[4], maxval=len(frames), dtype=tf.int32)
        frame = _reader(frames)(which)
        # A query of common words alone has no place for the document's: it would be noise.
        return tf.cond(tf.reduce_any(tf.equal(frame, 0)), lambda: _framed(frame, span), plain)

    in_frame = tf.random.stateless_uniform([], seeds[3]) < frame_share
    of_titles = title_share / tf.cast(example["title_count"], tf.float32)
    has_title, has_body = tf.size(title) > 0, tf.size(body) > 0
    piece = tf.case(
        [
            (has_title & ((draw < of_titles) | ~has_body), lambda: title),
            (draw < of_titles + title_share / 3, lambda: tf.concat([title, body], 0)[:length]),
            (in_frame & has_body, framed if frame_share else plain),
        ],
        default=plain,
    )
    others = {k: v for k, v in example.items() if k not in ("title", "body", "title_count")}
    return {**others, "inputs": piece}


def _framed(frame: tf.Tensor, span: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """A query's frame with the pieces of a span in its places, as many as there are of both."""
    place = tf.cast(tf.equal(frame, 0), tf.int32)
    words = span(tf.reduce_sum(place))
    index = tf.cumsum(place) - 1
    filled = (place == 1) & (index < tf.size(words))
    padded = tf.concat([words, [0]], 0)
    pieces = tf.where(filled, tf.gather(padded, tf.clip_by_value(index, 0, tf.size(words))), frame)
    return tf.boolean_mask(pieces, pieces > 0)


def document_pieces(
    dataset: tf.data.Dataset,
    *,
    lengths: np.ndarray,
    frames: Ragged,
    title_share: float,
    frame_share: float,
) -> tf.data.Dataset:
    """Draws one piece of each document as the input, anew in every epoch.

    Args:
      dataset: examples of `indexing_source`.
      lengths: int32[any], span lengths to draw from, evenly.
      frames: of train queries; may be empty where frame_share is 0.
      title_share, frame_share: see `register`.
    """
    return _document_piece(
        dataset, lengths=lengths, frames=frames, title_share=title_share, frame_share=frame_share
    )


@seqio.map_over_dataset(num_seeds=1)
def _drop_words(
    example: dict[str, tf.Tensor], seed: tf.Tensor, *, rate: float
) -> dict[str, tf.Tensor]:
    inputs = example["inputs"]
    kept = tf.boolean_mask(inputs, tf.random.stateless_uniform(tf.shape(inputs), seed) >= rate)
    return {**example, "inputs": tf.cond(tf.size(kept) > 0, lambda: kept, lambda: inputs)}


def drop_words(dataset: tf.data.Dataset, *, rate: float) -> tf.data.Dataset:
    """Leaves out each text piece with probability `rate`; an input is never emptied."""
    return _drop_words(dataset, rate=rate)
