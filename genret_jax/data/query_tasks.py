"""Queries of a split as a SeqIO task: for T5X's evaluation during training, and its inference.

An example has the query as input, and as target the docid of one of its relevant documents, since
SeqIO wants one; the metrics know all of them. A prediction is a beam of identifiers, the best one
last, as T5X orders it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from genret_jax.data.examples import Ragged
from genret_jax.data.tasks import add_task
from genret_jax.data.vocabulary import SeqioVocabulary
from genret_jax.documents import descending
from genret_jax.evaluation import evaluate
from genret_jax.indexing import Index
from genret_jax.trec import Qrels

METRICS = ("hits@1", "hits@10", "mrr@10")


def register_queries(
    name: str,
    texts: Mapping[str, str],
    qrels: Qrels,
    index: Index,
    document_ids: Sequence[str],
    *,
    split: str,
) -> str:
    """Registers the queries of a split; replaces an earlier task of that name.

    Args:
      name: of the task.
      texts: query id -> text.
      qrels: judgements, of documents of the index.
      index: vocabulary and docids.
      document_ids: by position.
      split: name of the task's split.

    Returns:
      `name`. Examples carry "inputs_pretokenized", the query, and "query_id_pretokenized": T5X
      writes both beside every prediction.
    """
    vocabulary = SeqioVocabulary(index.vocabulary)
    features = {
        "inputs": seqio.Feature(vocabulary, add_eos=True, dtype=tf.int32),
        "targets": seqio.Feature(vocabulary, add_eos=False, dtype=tf.int32),
    }
    read = _Beams(index, document_ids)
    add_task(
        name,
        _source(texts, qrels, index, document_ids, split),
        [seqio.preprocessors.append_eos_after_trim],
        features,
        len(texts),
        postprocess_fn=functools.partial(_ranking, read=read),
        metric_fns=[functools.partial(_metrics, qrels=qrels)],
    )
    return name


def _source(
    texts: Mapping[str, str],
    qrels: Qrels,
    index: Index,
    document_ids: Sequence[str],
    split: str,
) -> seqio.FunctionDataSource:
    names = list(texts)
    queries = Ragged.of([index.vocabulary.encode(text) for text in texts.values()])
    position = {name: i for i, name in enumerate(document_ids)}
    rows = index.table.documents.tolist()
    row_of = dict(zip(reversed(rows), reversed(range(len(rows))), strict=True))  # the first of each
    best = [max(sorted(qrels[name]), key=qrels[name].__getitem__) for name in names]
    docids = index.vocabulary.docids.to_model(
        index.table.tokens[[row_of[position[document]] for document in best]]
    )

    def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del split, shuffle_files, seed
        ragged = tf.RaggedTensor.from_row_splits(queries.values, queries.offsets)
        data = {
            "inputs": ragged,
            "targets": docids,
            "inputs_pretokenized": list(texts.values()),
            "query_id_pretokenized": names,
        }

        def example(e: dict[str, Any]) -> dict[str, Any]:
            targets = tf.boolean_mask(e["targets"], e["targets"] > 0)
            return {**e, "inputs": tf.ensure_shape(e["inputs"], [None]), "targets": targets}

        return tf.data.Dataset.from_tensor_slices(data).map(example)

    return seqio.FunctionDataSource(dataset_fn, splits=(split,))


class _Beams:
    """Docids as text, the way predictions come, -> documents."""

    def __init__(self, index: Index, document_ids: Sequence[str]):
        self._index, self._ids = index, document_ids
        self._order = descending(document_ids)

    @functools.cached_property
    def _row_of(self) -> dict[str, int]:
        vocabulary = SeqioVocabulary(self._index.vocabulary)
        rows = vocabulary.vocabulary.docids.to_model(np.asarray(self._index.trie.rows))
        return {vocabulary.decode(row[row > 0].tolist()): i for i, row in enumerate(rows)}

    def documents(self, beam: Sequence[str]) -> list[str]:
        """Ids of the documents that a beam names, the best first; those of one docid by id."""
        found: dict[str, None] = {}
        for text in reversed(beam):
            if (row := self._row_of.get(text)) is not None:
                several = self._index.trie.documents(row)
                for position in sorted(several.tolist(), key=self._order.__getitem__):
                    found[self._ids[position]] = None
        return list(found)


def _ranking(
    output: Any, *, read: _Beams, example: Mapping[str, Any], is_target: bool = False
) -> tuple[str, list[str]]:
    """The query's id, and the documents of a beam."""
    name = example["query_id_pretokenized"]
    name = name.decode() if isinstance(name, bytes) else str(name)
    return name, [] if is_target else read.documents(
        [output] if isinstance(output, str) else output
    )


def _metrics(
    targets: Sequence[tuple[str, list[str]]],
    predictions: Sequence[tuple[str, list[str]]],
    *,
    qrels: Qrels,
) -> dict[str, float]:
    """Of documents, not of identifiers."""
    del targets
    run = {
        name: {document: -float(rank) for rank, document in enumerate(documents)}
        for name, documents in predictions
    }
    return evaluate(run, qrels, METRICS)
