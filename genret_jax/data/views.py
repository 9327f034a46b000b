"""What a document can be recognised by: pieces of its text, and the train queries that it answers.

One vector for a whole document must average over all that it says, while a question is about one
thing. So a document has several vectors, one for each view, and is as near to a query as its
nearest view is (MaxP of Dai and Callan 2019; multi-vector encoders of Luan et al. 2021). A train
query is a view because people ask alike: a new question is often nearer to an old one than to any
sentence of the text.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jaxtyping import Int, Int32

from genret_jax.data.examples import TrainingExamples
from genret_jax.docids.table import EOS_ID

_TITLE_SHARE = 1 / 3  # of a view's tokens, unless there is room; the rest begins the text
QUERY_SHARE = 0.5  # of the views drawn in training, where a document has train queries


@dataclasses.dataclass(frozen=True)
class Views:
    """Views of all documents, document by document: its pieces of text, then its train queries.

    Attributes:
      tokens: int32[views, length], EOS included, 0-padded.
      questions: int32[views], the row of `Questions` of a train query; -1 for a piece of text.
      bounds: int64[documents + 1, 2], where the pieces and the queries of each document begin; it
        has at least one piece. The last row holds the number of views twice.
    """

    tokens: np.ndarray
    questions: np.ndarray
    bounds: np.ndarray

    @functools.cached_property
    def owners(self) -> Int[np.ndarray, " views"]:
        """The document of every view."""
        return np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds[:, 0]))

    def draw(
        self,
        documents: Int[np.ndarray, "batch columns"],
        question: Int[np.ndarray, "batch 1"],
        rng: np.random.Generator,
    ) -> Int[np.ndarray, "batch columns"]:
        """A view of each document: a query half the time where it has some, a piece otherwise.

        Args:
          documents: positions; what stands at padding, -1, is a view of the first document.
          question: the row of `Questions` that is asked, which is never the view drawn.
          rng: of the drawing.
        """
        of = np.maximum(documents, 0)
        pieces, queries, end = self.bounds[of, 0], self.bounds[of, 1], self.bounds[of + 1, 0]
        place, kind = rng.random(of.shape), rng.random(of.shape)
        piece = pieces + (place * (queries - pieces)).astype(np.int64)
        query = queries + (place * (end - queries)).astype(np.int64)
        wanted = (end > queries) & (kind < QUERY_SHARE)
        found = np.where(wanted, query, piece)
        return np.where(self.questions[found] == question, piece, found)

    def at_most(self, count: int) -> Int[np.ndarray, " some"]:
        """Rows of at most so many views of each kind of every document, evenly spread."""
        flat = np.append(self.bounds[:-1].reshape(-1), self.bounds[-1, 0])
        return np.concatenate(
            [a + _spread(b - a, count) for a, b in zip(flat[:-1], flat[1:], strict=True)]
        )

    def bounds_of(self, rows: Int[np.ndarray, " some"]) -> Int[np.ndarray, "documents+1 2"]:
        """Bounds among ascending rows; a document without any has similarity with nothing."""
        return np.searchsorted(rows, self.bounds)


def make_views(
    examples: TrainingExamples,
    query_of: Int[np.ndarray, " pairs"],
    *,
    length: int,
    pieces: int,
    queries: int,
) -> Views:
    """Views of every document.

    Args:
      examples: tokens of titles, bodies and train queries.
      query_of: the question of every pair, as `known_positives` numbers them.
      length: tokens of a view, EOS included, at most.
      pieces: of a document's text, at most, each with the beginning of its title. They overlap
        by half where they can, and leave gaps where the text is too long.
      queries: train queries of a document, at most, evenly spread; equal ones count once.
    """
    documents = len(examples.document_rows)
    order = np.argsort(examples.query_documents, kind="stable")
    first = np.searchsorted(examples.query_documents[order], np.arange(documents + 1))
    rows: list[np.ndarray] = []
    questions: list[int] = []
    bounds = np.zeros((documents + 1, 2), np.int64)
    for i in range(documents):
        bounds[i, 0] = len(rows)
        rows += passages(examples.titles[i], examples.bodies[i], length, pieces)
        bounds[i, 1] = len(rows)
        questions += [-1] * int(bounds[i, 1] - bounds[i, 0])
        asked = {int(query_of[pair]): pair for pair in order[first[i] : first[i + 1]].tolist()}
        kept = np.array(list(asked.items()), np.int64).reshape(-1, 2)[_spread(len(asked), queries)]
        rows += [examples.queries[pair][: length - 1] for _, pair in kept.tolist()]
        questions += [question for question, _ in kept.tolist()]
    bounds[documents] = len(rows)
    return Views(padded(rows), np.array(questions, np.int32), bounds)


def passages(title: np.ndarray, body: np.ndarray, length: int, count: int) -> list[np.ndarray]:
    """Pieces of a document: windows over its text, each behind the beginning of its title.

    They overlap by half where `count` allows, and leave gaps where the text is too long.

    Args:
      title, body: int32[any], text pieces.
      length: tokens of one, EOS included, at most; EOS itself is not there yet.
      count: at most; there is at least one, empty for a document without text.
    """
    if len(title) + len(body) < length:
        return [np.concatenate([title, body])]
    room = max(1, int(length * _TITLE_SHARE))
    title, body = title[:room], np.concatenate([title[room:], body])
    window = max(1, length - 1 - len(title))
    last = max(0, len(body) - window)
    number = min(count, -(-2 * last // window) + 1)
    starts = np.linspace(0, last, number).astype(np.int64)
    return [np.concatenate([title, body[s : s + window]])[: length - 1] for s in starts]


def _spread(available: int, count: int) -> Int[np.ndarray, " some"]:
    """At most `count` of range(available), evenly spread."""
    return (
        np.arange(min(available, count), dtype=np.int64)
        * available
        // max(1, min(available, count))
    )


def padded(rows: list[np.ndarray]) -> Int32[np.ndarray, "rows length"]:
    """Rows with EOS, 0-padded to the longest, which is made a multiple of 8."""
    lengths = np.array([len(row) + 1 for row in rows])
    out = np.zeros((len(rows), -(-int(lengths.max(initial=1)) // 8) * 8), np.int32)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    out[np.arange(len(rows)), lengths - 1] = EOS_ID
    return out
