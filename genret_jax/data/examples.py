"""What there is to learn from, as token arrays in memory: plain numpy, made once."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from genret_jax.corpus import Document
from genret_jax.docids.table import DocidTable
from genret_jax.errors import UserError
from genret_jax.vocabularies import Vocabulary


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Token sequences end to end.

    Attributes:
      values: int32[tokens in all].
      offsets: int64[sequences + 1].
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> Ragged:
        lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
        values = np.fromiter((t for s in sequences for t in s), np.int32, int(lengths.sum()))
        return cls(values, np.concatenate([[0], np.cumsum(lengths)]))

    @classmethod
    def of_chunks(cls, chunks: Iterable[Sequence[Sequence[int]]]) -> Ragged:
        """The same from parts, so that Python lists of all tokens never stand at once."""
        parts = [cls.of(chunk) for chunk in chunks] or [cls.of([])]
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(
            np.concatenate([part.values for part in parts]),
            np.concatenate([[0], np.cumsum(lengths)]),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


@dataclasses.dataclass(frozen=True)
class TrainingExamples:
    """Queries, documents and docids as tokens, without EOS on the encoder's side.

    Attributes:
      queries: text pieces of each (query, relevant document) pair's query: those of the train
        split, then generated ones.
      pseudo: how many of these pairs are generated.
      query_documents: int32[pairs], the relevant document's position.
      query_rows: int32[pairs], the docid row to be written.
      frames: the distinct queries with 0 in place of the words that few of them share; see
        `query_frames`.
      titles, bodies: text pieces of each document.
      title_counts: int32[documents], how many documents have a document's title.
      document_rows: int32[documents], a docid row of each document.
      docids: int32[rows, docid length], rows in the model's id space, 0-padded.
    """

    queries: Ragged
    query_documents: np.ndarray
    query_rows: np.ndarray
    frames: Ragged
    titles: Ragged
    bodies: Ragged
    title_counts: np.ndarray
    document_rows: np.ndarray
    docids: np.ndarray
    pseudo: int = 0

    @property
    def real(self) -> int:
        """Pairs of the train split."""
        return len(self.queries) - self.pseudo

    @property
    def query_tasks(self) -> dict[str, range]:
        """The pairs that each task over queries has, by the end of the task's name."""
        return {"retrieval": range(self.real), "pseudo": range(self.real, len(self.queries))}

    def indexing_share(self, asked: float) -> float:
        """`asked`, or where it is below 0 what the number of train pairs a document decides.

        See `DataConfig.indexing_share`; the one place of the rule for every runner.
        """
        if asked >= 0:
            return asked
        pairs = len(self.queries) / len(self.document_rows)
        return min(0.7, max(0.3, 8 / (8 + pairs)))

    def input_length(self, *, share: float = 0.99, multiple: int = 8, most: int = 128) -> int:
        """Encoder tokens that hold `share` of the queries whole, EOS included.

        Without queries, documents are all there is to learn from, and 32 tokens of one are
        about what a question is long.
        """
        if not len(self.queries):
            return min(32, most)
        length = int(np.quantile(self.queries.lengths, share, method="higher")) + 1
        return min(-(-length // multiple) * multiple, most)


def make_examples(
    documents: Sequence[Document],
    pairs: Sequence[tuple[str, int]],
    vocabulary: Vocabulary,
    table: DocidTable,
    *,
    pseudo: int = 0,
) -> TrainingExamples:
    """Tokenises everything once.

    Args:
      documents: the corpus.
      pairs: (query, position of a relevant document), as `Corpus.pairs` gives them.
      vocabulary: text pieces and docid block.
      table: docids; where a document owns several rows, its queries go to each in turn.
      pseudo: how many pairs, the last ones, are generated.

    Raises:
      UserError: when a document has no docid.
    """
    rows_of = _rows_of(table, len(documents))

    def encode(texts: Sequence[str]) -> Ragged:
        return Ragged.of_chunks(
            [vocabulary.encode(t) for t in texts[i : i + 10_000]]
            for i in range(0, len(texts), 10_000)
        )

    turn: dict[int, int] = {}
    query_rows = np.zeros(len(pairs), np.int32)
    for i, (_, position) in enumerate(pairs):
        rows = rows_of[position]
        query_rows[i] = rows[turn.get(position, 0) % len(rows)]
        turn[position] = turn.get(position, 0) + 1
    queries = encode([query for query, _ in pairs])
    titles = collections.Counter(d.title for d in documents)
    asked = Ragged(queries.values, queries.offsets[: len(pairs) - pseudo + 1])
    return TrainingExamples(
        queries=queries,
        query_documents=np.array([position for _, position in pairs], np.int32),
        query_rows=query_rows,
        frames=query_frames(asked, vocabulary.starts_word),
        titles=encode([d.title for d in documents]),
        bodies=encode([d.text for d in documents]),
        title_counts=np.array([titles[d.title] for d in documents], np.int32),
        document_rows=np.array([rows[0] for rows in rows_of], np.int32),
        docids=np.asarray(vocabulary.docids.to_model(np.asarray(table.tokens))),
        pseudo=pseudo,
    )


_SHARED = 0.005  # of the queries hold a word that belongs to how questions are asked


def query_frames(queries: Ragged, starts_word: np.ndarray) -> Ragged:
    """How queries ask, without what they ask about.

    A word (a piece that begins one, and those that go on with it) that fewer than 0.5 % of the
    queries hold is what a query is about; its pieces become 0, places for words of a document.

    Args:
      queries: text pieces.
      starts_word: bool[pieces], whether a piece begins a word.
    """
    # A query of several relevant documents is there several times, but asked once.
    distinct = dict.fromkeys(tuple(queries[i].tolist()) for i in range(len(queries)))
    words = [_words(query, starts_word) for query in distinct]
    held = collections.Counter(word for query in words for word in set(query))
    least = max(2, _SHARED * len(words))
    return Ragged.of(
        [
            [piece if held[word] >= least else 0 for word in query for piece in word]
            for query in words
        ]
    )


def _words(pieces: Sequence[int], starts_word: np.ndarray) -> list[tuple[int, ...]]:
    """The pieces of a text, word by word."""
    words: list[list[int]] = []
    for piece in pieces:
        if not words or starts_word[piece]:
            words.append([])
        words[-1].append(piece)
    return [tuple(word) for word in words]


def _rows_of(table: DocidTable, documents: int) -> list[np.ndarray]:
    order = np.argsort(table.documents, kind="stable")
    bounds = np.searchsorted(table.documents[order], np.arange(documents + 1))
    rows = [order[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    without = [i for i, r in enumerate(rows) if not len(r)]
    if without:
        raise UserError(
            f"{len(without)} of {documents} documents have no docid (the first is at position "
            f"{without[0]}); give every document a row in the docid table"
        )
    return rows
