"""The second stage as SeqIO tasks, for T5X: examples with their document and negatives beside them.

The tasks are those of `genret_jax.data.tasks` with more features, named as `RankingModel.loss_fn`
reads them. Negatives are drawn anew in every epoch, with SeqIO's seeds. The native trainer reads
`genret_jax.data.contrastive` instead, whose tables can be mined again while it trains.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import seqio
import tensorflow as tf

from genret_jax.data.contrastive import DocumentSide, Questions, known_documents
from genret_jax.data.examples import TrainingExamples
from genret_jax.data.tasks import add_task, register
from genret_jax.data.views import QUERY_SHARE
from genret_jax.data.vocabulary import SeqioVocabulary
from genret_jax.negatives import Negatives, Positives

_Spec = seqio.FeatureConverter.FeatureSpec

# Feature -> rank in the task. SeqIO gives every feature a length, so what is one number in a batch
# is a sequence of one here.
DOCUMENT_FEATURES = {
    "document_index": 1,
    "document_row": 1,
    "document_tokens": 1,
    "document_docids": 1,
    "relevant_index": 1,
    "negative_document_index": 1,
    "negative_document_row": 1,
    "negative_document_tokens": 2,
    "negative_document_docids": 2,
}
_NUMBERS = ("document_index", "document_row")
# These are padded with -1, for 0 is a document; SeqIO pads with 0.
_POSITIONS = ("document_index", "relevant_index", "negative_document_index")


class _Tables(NamedTuple):
    """What examples are completed from, as tensors; see DocumentSide, Questions and Negatives."""

    tokens: tf.Tensor
    questions: tf.Tensor
    bounds: tf.Tensor
    docids: tf.Tensor
    row: tf.Tensor
    relevant: tf.Tensor
    prefix: tf.Tensor
    retrieved: tf.Tensor


def register_contrastive(
    name: str,
    examples: TrainingExamples,
    vocabulary: SeqioVocabulary,
    side: DocumentSide,
    questions: Questions,
    positives: Positives,
    negatives: Negatives,
    *,
    prefix: int,
    retrieved: int,
    **plain: Any,
) -> str:
    """Registers `NAME_retrieval`, `NAME_indexing` and the mixture `NAME`; replaces earlier ones.

    Args:
      name: of the mixture.
      examples, vocabulary: see `tasks.register`.
      side: the documents.
      questions, positives: of the train queries of `examples`.
      negatives: tables to draw from; a row of `retrieved` for every question.
      prefix, retrieved: how many negatives of each kind an example gets, in this order.
      **plain: what else `tasks.register` takes, such as indexing_share.

    Returns:
      The name of the mixture. `document_lengths` has the lengths of its features.
    """
    mixture = seqio.MixtureRegistry.get(register(f"{name}_plain", examples, vocabulary, **plain))
    tables = _Tables(
        tokens=tf.constant(side.views.tokens),
        questions=tf.constant(side.views.questions),
        bounds=tf.constant(side.views.bounds),
        docids=tf.constant(side.docids),
        row=tf.constant(side.row),
        relevant=tf.constant(questions.relevant),
        prefix=tf.constant(negatives.prefix),
        retrieved=tf.constant(negatives.retrieved),
    )
    beside = functools.partial(documents_beside, tables=tables, prefix=prefix, retrieved=retrieved)
    rates = []
    for task in seqio.get_subtasks(mixture):
        own = f"{name}_{task.name.removeprefix(mixture.name + '_')}"
        document, question = known_documents(task.name, examples, positives)
        known = {"document_index": document, "question_index": question}
        features = {**task.output_features, **_features(side)}
        source = _numbered(task.source, known)
        add_task(own, source, [*task.preprocessors, beside], features, len(document))
        rates.append((own, mixture.get_rate(task)))
        seqio.TaskRegistry.remove(task.name)
    seqio.MixtureRegistry.remove(mixture.name)
    seqio.MixtureRegistry.remove(name)
    seqio.MixtureRegistry.add(name, rates)
    return name


def document_lengths(side: DocumentSide, questions: Questions, *, negatives: int) -> dict[str, int]:
    """Feature -> its length, to go beside those of inputs and targets.

    Args:
      side, questions: as they were registered.
      negatives: of an example, both kinds together.
    """
    return {
        **dict.fromkeys(_NUMBERS, 1),
        "document_tokens": side.views.tokens.shape[1],
        "document_docids": side.docids.shape[1],
        "relevant_index": questions.relevant.shape[1],
        **{feature: negatives for feature in DOCUMENT_FEATURES if feature.startswith("negative")},
    }


def _features(side: DocumentSide) -> dict[str, seqio.Feature]:
    vocabulary = seqio.PassThroughVocabulary(size=len(side.docids))
    return {
        feature: seqio.Feature(vocabulary, add_eos=False, dtype=tf.int32, rank=rank)
        for feature, rank in DOCUMENT_FEATURES.items()
    }


def _numbered(
    source: seqio.FunctionDataSource, known: Mapping[str, Any]
) -> seqio.FunctionDataSource:
    """The source with some numbers beside every example, in its order."""

    def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        plain = source.get_dataset(split, shuffle=shuffle_files, seed=seed)
        numbers = tf.data.Dataset.from_tensor_slices(dict(known))
        return tf.data.Dataset.zip((plain, numbers)).map(lambda a, b: {**a, **b})

    return seqio.FunctionDataSource(dataset_fn, splits=("train",))


@seqio.map_over_dataset(num_seeds=3)
def _documents_beside(
    example: dict[str, tf.Tensor],
    seeds: tf.Tensor,
    *,
    tables: _Tables,
    prefix: int,
    retrieved: int,
) -> dict[str, tf.Tensor]:
    example = dict(example)
    document, question = example.pop("document_index"), example.pop("question_index")
    drawn = [
        _draw(tables.prefix[document], prefix, seeds[0]),
        _draw(tables.retrieved[question], retrieved, seeds[1]),
    ]
    negative = tf.concat(drawn, 0)
    views = _draw_views(tf.concat([[document], negative], 0), question, seeds[2], tables)
    # Padding, -1, reads some document; the loss knows it by its index.
    place = tf.math.floormod(negative, tf.shape(tables.row)[0])
    return {
        **example,
        "relevant_index": tables.relevant[question],
        "document_index": document[None],
        "document_row": tables.row[document][None],
        "document_tokens": tables.tokens[views[0]],
        "document_docids": tables.docids[document],
        "negative_document_index": negative,
        "negative_document_row": tf.gather(tables.row, place),
        "negative_document_tokens": tf.gather(tables.tokens, views[1:]),
        "negative_document_docids": tf.gather(tables.docids, place),
    }


def _draw(row: tf.Tensor, count: int, seed: tf.Tensor) -> tf.Tensor:
    """int32[count]: entries of a row at random without replacement; see `negatives.draw`."""
    keys = tf.where(row >= 0, tf.random.stateless_uniform(tf.shape(row), seed), 2.0)
    chosen = tf.gather(row, tf.argsort(keys)[:count])
    chosen = tf.concat([chosen, tf.fill([tf.maximum(count - tf.size(chosen), 0)], -1)], 0)
    return tf.ensure_shape(chosen, [count])


def _draw_views(
    documents: tf.Tensor, question: tf.Tensor, seed: tf.Tensor, tables: _Tables
) -> tf.Tensor:
    """int64[documents]: a view of each; see `Views.draw`."""
    of = tf.maximum(documents, 0)
    begin = tf.gather(tables.bounds, of)
    pieces, queries, end = begin[:, 0], begin[:, 1], tf.gather(tables.bounds, of + 1)[:, 0]
    place, kind = tf.unstack(tf.random.stateless_uniform([2, tf.size(of)], seed))

    def within(start: tf.Tensor, stop: tf.Tensor) -> tf.Tensor:
        return start + tf.cast(place * tf.cast(stop - start, tf.float32), tf.int64)

    wanted = (end > queries) & (kind < QUERY_SHARE)
    found = tf.where(wanted, within(queries, end), within(pieces, queries))
    # Outside its range only where there is no query, which is not wanted then.
    same = tf.gather(tables.questions, found) == question
    return tf.where(same, within(pieces, queries), found)


def documents_beside(
    dataset: tf.data.Dataset, *, tables: _Tables, prefix: int, retrieved: int
) -> tf.data.Dataset:
    """Puts document and negatives beside examples that know their document and question.

    Args:
      dataset: examples with scalars document_index and question_index.
      tables: what they are completed from.
      prefix, retrieved: how many negatives of each kind are drawn, anew in every epoch.
    """
    return _documents_beside(dataset, tables=tables, prefix=prefix, retrieved=retrieved)


class ContrastiveFeatureConverter(seqio.EncDecFeatureConverter):
    """Encoder-decoder features, and those of documents where they are there.

    Those of DOCUMENT_FEATURES that have a length and stand in the data set pass through, padded;
    the others are left out. So one converter, T5X's `FEATURE_CONVERTER_CLS`, serves both stages and
    inference. Packing would join examples of different documents and is refused.

    Rank-2 features are padded along their first axis alone: their rows must be of one length.
    """

    def __init__(self, pack: bool = False, **others: Any):
        if pack:
            raise ValueError("examples with documents cannot be packed; give pack=False")
        super().__init__(pack=False, **others)

    def __call__(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        there = [f for f in _named(task_feature_lengths) if f in ds.element_spec]
        lengths = {
            feature: length
            for feature, length in task_feature_lengths.items()
            if feature in there or feature not in DOCUMENT_FEATURES
        }
        # SeqIO wants the features of class and data to match one to one: a copy has them so.
        one = copy.copy(self)
        one.TASK_FEATURES = {
            **self.TASK_FEATURES,
            **{f: _Spec(dtype=tf.int32, rank=DOCUMENT_FEATURES[f]) for f in there},
        }
        one.MODEL_FEATURES = {
            **self.MODEL_FEATURES,
            **{f: _Spec(dtype=tf.int32, rank=_model_rank(f)) for f in there},
        }
        return super(ContrastiveFeatureConverter, one).__call__(ds, lengths)

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
        plain = super().get_model_feature_lengths(task_feature_lengths)
        return {**plain, **{f: task_feature_lengths[f] for f in _named(task_feature_lengths)}}

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        def counted_from_one(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            return {k: v + 1 if k in _POSITIONS else v for k, v in example.items()}

        return super()._convert_features(ds.map(counted_from_one), task_feature_lengths)

    def _convert_example(self, features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        out = dict(super()._convert_example(features))
        for feature in _named(features):
            value = features[feature]
            value = value - 1 if feature in _POSITIONS else value
            out[feature] = value[0] if feature in _NUMBERS else value
        return {feature: out[feature] for feature in self.MODEL_FEATURES}


def _named(features: Mapping[str, Any]) -> Sequence[str]:
    return [feature for feature in DOCUMENT_FEATURES if feature in features]


def _model_rank(feature: str) -> int:
    return 0 if feature in _NUMBERS else DOCUMENT_FEATURES[feature]
