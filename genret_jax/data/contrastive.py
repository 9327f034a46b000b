"""Batches of the second stage: those of the first, with documents and negatives beside the queries.

Every example of a mixture belongs to a document, its positive: the relevant one of a train query,
or the one that a piece was taken from. Negatives are drawn anew for every batch, as a function of
(seed, batch number), from tables that stand in memory; so resuming needs no iterator state here
either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from genret_jax.configs import ContrastiveConfig
from genret_jax.corpus import Document
from genret_jax.data.batches import Arrays, Batches, Pool
from genret_jax.data.examples import TrainingExamples
from genret_jax.data.views import Views, make_views
from genret_jax.negatives import Negatives, Positives, draw
from genret_jax.vocabularies import DocidSpace

_SEED = 23  # of negatives, so that they do not follow the order of the examples


@dataclasses.dataclass(frozen=True)
class DocumentSide:
    """What the model reads of every document.

    Attributes:
      views: texts of every document.
      docids: int32[documents, docid length], local docid ids, 0-padded.
      row: int32[documents], one number for documents of equal docids.
    """

    views: Views
    docids: np.ndarray
    row: np.ndarray

    @classmethod
    def of(
        cls,
        examples: TrainingExamples,
        positives: Positives,
        docids: DocidSpace,
        config: ContrastiveConfig,
    ) -> DocumentSide:
        """What `config` wants of the documents; `positives` are the train queries of `examples`."""
        written = docids.to_local(examples.docids[examples.document_rows])
        _, row = np.unique(written, axis=0, return_inverse=True)
        views = make_views(
            examples,
            positives.query_of,
            length=config.document_length,
            pieces=config.pieces,
            queries=config.queries,
        )
        return cls(views, written.astype(np.int32), row.reshape(-1).astype(np.int32))


@dataclasses.dataclass(frozen=True)
class Questions:
    """What negatives are retrieved for: the train queries, then the beginning of every document.

    Attributes:
      texts: one a row.
      relevant: int32[rows, most], known to answer it, -1-padded.
    """

    texts: list[str]
    relevant: np.ndarray

    @classmethod
    def of(
        cls, positives: Positives, documents: Sequence[Document], *, characters: int = 200
    ) -> Questions:
        texts = [*positives.queries, *(d.whole[:characters] for d in documents)]
        most = max(1, positives.relevant.shape[1])
        relevant = np.full((len(texts), most), -1, np.int32)
        queries = len(positives.queries)
        relevant[:queries, : positives.relevant.shape[1]] = positives.relevant
        relevant[queries:, 0] = np.arange(len(documents))
        return cls(texts, relevant)


def with_documents(pool: Pool, examples: TrainingExamples, positives: Positives) -> Pool:
    """A pool whose examples know their document and their row of Questions."""
    document, question = known_documents(pool.name, examples, positives)
    turn = np.arange(len(pool)) % len(document)  # a task run several times holds them in turn
    known = {"document_index": document[turn], "question_index": question[turn]}
    return dataclasses.replace(pool, arrays={**pool.arrays, **known})


def known_documents(
    task: str, examples: TrainingExamples, positives: Positives
) -> tuple[Int32[np.ndarray, " examples"], Int32[np.ndarray, " examples"]]:
    """The document and the row of Questions of every example of a task, in its order.

    Args:
      task: its name, which ends in "retrieval", "pseudo" or "indexing".
      examples, positives: of the same train pairs.
    """
    if pairs := examples.query_tasks.get(task.rpartition("_")[2]):
        here = slice(pairs.start, pairs.stop)
        document, question = examples.query_documents[here], positives.query_of[here]
    else:
        document = np.arange(len(examples.document_rows))
        question = len(positives.queries) + document
    return np.asarray(document, np.int32), np.asarray(question, np.int32)


class ContrastiveBatches:
    """Batch number n of the second stage, for any n >= 0; see `RankingModel.loss_fn`.

    Args:
      batches: of pools made by `with_documents`.
      side: the documents.
      questions: for the positives of every example.
      negatives: tables to draw from; a row of `retrieved` for every question.
      prefix, retrieved: how many negatives of each kind an example gets.
      seed: of the drawing.
      top_first: whether the first retrieved one is the best-ranked, and the others drawn from the
        rest.
    """

    def __init__(
        self,
        batches: Batches,
        side: DocumentSide,
        questions: Questions,
        negatives: Negatives,
        *,
        prefix: int,
        retrieved: int,
        seed: int,
        top_first: bool = False,
    ):
        self._batches, self._side, self._questions = batches, side, questions
        self.negatives = negatives
        self._counts = (prefix, retrieved)
        self._seed = seed
        self._top_first = top_first

    def __getitem__(self, n: int) -> Arrays:
        rng = np.random.default_rng([self._seed, _SEED, n])
        return self._complete(self._batches.whole(n), rng, self._batches.rows)

    def shapes(self) -> list[Arrays]:
        """An empty batch of every shape there is: what to compile for."""
        rng, everything = np.random.default_rng(0), slice(None)
        return [self._complete(batch, rng, everything) for batch in self._batches.shapes()]

    def _retrieved(self, ranked: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """int32[batch, retrieved] of what stands in rows of the table, best first."""
        if not self._top_first:
            return draw(ranked, self._counts[1], rng)
        return np.concatenate(
            [ranked[:, :1], draw(ranked[:, 1:], self._counts[1] - 1, rng)], axis=1
        )

    def _complete(self, batch: Arrays, rng: np.random.Generator, rows: slice) -> Arrays:
        """Draws for all rows, as any number of processes does alike, and gives some of them."""
        question, document = batch["question_index"], batch["document_index"]
        prefix = draw(self.negatives.prefix[document], self._counts[0], rng)
        retrieved = self._retrieved(self.negatives.retrieved[question], rng)
        negative = np.concatenate([prefix, retrieved], axis=1).astype(np.int32)
        views = self._side.views
        everyone = np.concatenate([document[:, None], negative], axis=1)
        drawn = views.draw(everyone, question[:, None], rng)
        batch = {name: array[rows] for name, array in batch.items()}
        question, document, negative = batch.pop("question_index"), document[rows], negative[rows]
        tokens = views.tokens[drawn[rows]]
        return {
            **batch,
            "relevant_index": self._questions.relevant[question],
            "document_row": self._side.row[document],
            "document_tokens": tokens[:, 0],
            "document_docids": self._side.docids[document],
            "negative_document_index": negative,
            "negative_document_row": self._side.row[negative],
            "negative_document_tokens": tokens[:, 1:],
            "negative_document_docids": self._side.docids[negative],
        }
