"""Prefix negatives: documents that constrained decoding cannot part before a certain token."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Int, Int32

from genret_jax.errors import UserError
from genret_jax.trie import Trie

Depth: TypeAlias = int | Literal["deepest", "sampled"]

_CHUNK = 1 << 16  # documents drawn for at once, which bounds memory


def prefix_negatives(
    trie: Trie,
    documents: Int[np.ndarray, " documents"],
    *,
    depth: Depth,
    count: int,
    rng: np.random.Generator,
    rows: Int[np.ndarray, " positions"] | None = None,
) -> Int32[np.ndarray, "documents count"]:
    """Other documents whose docid begins with the same `depth` tokens, drawn without replacement.

    Every document counts with one docid, z(d). Tokens are those of the trie's rows, EOS among
    them; but two different docids never share an EOS (none is a prefix of another), so what they
    share are tokens proper, at most length - 1 of them, and a greater depth has no negatives.
    Documents that have any docid in common with d, z(d) or another, are none of its negatives:
    what is generated for the one is an answer to the other.

    Args:
      trie: the docids of all documents.
      documents: positions of the documents to make negatives for; may repeat.
      depth: tokens to agree on, one of
        an int l >= 1: at least l, all such documents being as likely;
        "deepest": as many as any other document does, then one fewer and so on down to 1 until
          there are `count`; those that agree on more stand first;
        "sampled": at least l, with l drawn for each document from all that give it a negative.
      count: negatives of a document.
      rng: of all draws.
      rows: trie row of z(d) by position, -1 for documents to leave out altogether; by default a
        document's first row in the trie.

    Returns:
      int32[documents, count], -1 where there are no more.

    Raises:
      UserError: a depth or count out of its range, or a document that has no docid.

    Example:
      >>> from genret_jax.docids.table import DocidTable
      >>> from genret_jax.trie import build_trie
      >>> labels = ["<pad>", "</s>", "a", "b", "c"]
      >>> docids = [[2, 3, 4], [2, 3, 3], [2, 4, 4], [3, 3, 3]]
      >>> trie = build_trie(DocidTable.from_sequences(docids, range(4), labels, "test", {}))
      >>> prefix_negatives(
      ...     trie, np.arange(4), depth="deepest", count=2, rng=np.random.default_rng(0)).tolist()
      [[1, 2], [0, 2], [1, 0], [-1, -1]]
    """
    _check_request(depth, count)
    neighbours = _Neighbours(trie, _first_rows(trie) if rows is None else _checked(rows, trie))
    documents = np.asarray(documents, np.int64)
    neighbours.check(documents)
    out = np.full((len(documents), count), -1, np.int32)
    same = neighbours.sharing(trie.max_length)
    levels = range(trie.max_length - 1, 0, -1)  # different docids agree on no more tokens
    if depth == "deepest":
        inner = same
        for level in levels:
            outer = neighbours.sharing(level)
            ring = neighbours.ring(outer, inner)
            neighbours.fill(out, np.arange(len(documents)), documents, ring, rng)
            inner = outer
        return out
    if depth == "sampled":
        deepest = np.zeros(len(documents), np.int64)
        for level in levels:  # a set holds those of all greater depths: counting finds the deepest
            ring = neighbours.ring(neighbours.sharing(level), same)
            deepest += ring.free[documents] > 0
        chosen = rng.integers(1, np.maximum(deepest, 1), endpoint=True)
    else:
        chosen = np.full(len(documents), depth)
    for level in levels:
        which = np.flatnonzero(chosen == level)
        if len(which):
            ring = neighbours.ring(neighbours.sharing(level), same)
            neighbours.fill(out, which, documents[which], ring, rng)
    return out


def _check_request(depth: Depth, count: int) -> None:
    if isinstance(depth, str) and depth not in ("deepest", "sampled"):
        raise UserError(f'negatives: depth {depth!r}; give "deepest", "sampled" or a number')
    if not isinstance(depth, str) and depth < 1:
        raise UserError(f"negatives: depth {depth}; give 1 or more, for all docids share 0 tokens")
    if count < 0:
        raise UserError(f"negatives: count {count}; give 0 or more")


# Where in an order of documents a stretch begins and ends, for every position: int[positions] each.
_Stretch: TypeAlias = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Ring:
    """For every position, the documents of a stretch without those of another one inside it.

    Attributes:
      outer, inner: the two stretches.
      free: int64[positions], documents in the ring that are no kin.
      who: int64[kin], whose kin are in their ring, ascending; gaps: for each, who * positions +
        the number of documents in the ring before it that are no kin; ascending too.
    """

    outer: _Stretch
    inner: _Stretch
    free: np.ndarray
    who: np.ndarray
    gaps: np.ndarray

    def places(self, document: np.ndarray, number: np.ndarray) -> np.ndarray:
        """Where in the order the free ones of these numbers stand; int64[n], int64[n, most]."""
        document = document[:, None]
        before = np.searchsorted(self.gaps, document * len(self.free) + number, side="right")
        place = number + before - np.searchsorted(self.who, document) + self.outer[0][document]
        size = (self.inner[1] - self.inner[0])[document]
        return place + np.where(place >= self.inner[0][document], size, 0)


class _Neighbours:
    """All documents in the order of their docids: those that share a prefix stand side by side."""

    def __init__(self, trie: Trie, rows: np.ndarray):
        self._rows = rows
        there = np.flatnonzero(rows >= 0)
        self._order = there[np.argsort(rows[there], kind="stable")]
        self._starts = np.searchsorted(rows[self._order], np.arange(len(trie.rows) + 1))
        self._agree = (trie.rows[1:] != trie.rows[:-1]).argmax(axis=1)  # of rows i and i + 1
        place = np.full(len(rows), -1)
        place[self._order] = np.arange(len(self._order))
        one, other = _kin(trie, rows)
        kin = np.unique(one * len(rows) + place[other])
        self._kin, self._kin_place = kin // len(rows), kin % len(rows)

    def check(self, documents: np.ndarray) -> None:
        inside = (documents >= 0) & (documents < len(self._rows))
        without = ~inside
        without[inside] = self._rows[documents[inside]] < 0
        if without.any():
            raise UserError(
                f"negatives: {without.sum()} of {len(documents)} documents have no docid in the "
                f"trie (the first is {documents[without][0]}); make the index of all documents"
            )

    def sharing(self, level: int) -> _Stretch:
        """The documents that share `level` tokens; at the trie's length those of the same row."""
        begins = np.flatnonzero(np.concatenate([[True], self._agree < level]))
        group = np.searchsorted(begins, self._rows, side="right") - 1
        bounds = self._starts[np.append(begins, len(self._starts) - 1)]
        return bounds[group], bounds[group + 1]

    def ring(self, outer: _Stretch, inner: _Stretch) -> _Ring:
        who, place = self._kin, self._kin_place
        in_outer = (outer[0][who] <= place) & (place < outer[1][who])
        in_inner = (inner[0][who] <= place) & (place < inner[1][who])
        who, place = who[in_outer & ~in_inner], place[in_outer & ~in_inner]
        size = inner[1] - inner[0]
        total = outer[1] - outer[0] - size
        number = place - outer[0][who] - np.where(place >= inner[1][who], size[who], 0)
        earlier = np.arange(len(who)) - np.searchsorted(who, who)  # kin before it
        return _Ring(
            outer,
            inner,
            free=total - np.bincount(who, minlength=len(total)),
            who=who,
            gaps=who * len(total) + number - earlier,
        )

    def fill(
        self,
        out: np.ndarray,
        which: np.ndarray,
        documents: np.ndarray,
        ring: _Ring,
        rng: np.random.Generator,
    ) -> None:
        """Puts documents of the ring where rows `which` of out have padding."""
        free = ring.free[documents]
        some = np.flatnonzero((free > 0) & (out[which] < 0).any(axis=1))
        for i in range(0, len(some), _CHUNK):
            part = some[i : i + _CHUNK]
            filled = (out[which[part]] >= 0).sum(axis=1)
            number = _sample(free[part], np.minimum(out.shape[1] - filled, free[part]), rng)
            drawn = number >= 0
            column = (filled[:, None] + np.cumsum(drawn, axis=1) - 1)[drawn]
            place = ring.places(documents[part], number)[drawn]
            out[np.repeat(which[part], drawn.sum(axis=1)), column] = self._order[place]


def _first_rows(trie: Trie) -> np.ndarray:
    """int64[positions]: the first row of each document, -1 where it has none."""
    documents, first = np.unique(trie.row_documents, return_index=True)
    rows = np.full(documents[-1] + 1, -1)
    rows[documents] = _row_of(trie)[first]
    return rows


def _checked(rows: np.ndarray, trie: Trie) -> np.ndarray:
    """int64[positions]; rows of the docid table, which is in another order, are found out here."""
    rows = np.asarray(rows, np.int64)
    there = np.flatnonzero(rows >= 0)
    most = max(len(rows), int(trie.row_documents.max()) + 1)
    owned = np.isin(rows[there] * most + there, _row_of(trie) * most + trie.row_documents)
    if not owned.all():
        wrong = there[~owned][0]
        raise UserError(
            f"negatives: row {rows[wrong]} of the trie is no docid of document {wrong}; give rows "
            "of the trie, not of the docid table"
        )
    return rows


def _row_of(trie: Trie) -> np.ndarray:
    """int64: the row of each entry of `row_documents`."""
    return np.repeat(np.arange(len(trie.rows)), np.diff(trie.row_offsets))


def _kin(trie: Trie, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64[pairs] twice: documents that share a docid, but not the one that they count with.

    (Those that count with the same one stand together in the order and need no list.)
    """
    members, row_of = trie.row_documents.astype(np.int64), _row_of(trie)
    known = np.flatnonzero(members < len(rows))
    guests = known[rows[members[known]] != row_of[known]]
    sizes = np.diff(trie.row_offsets)[row_of[guests]]
    offset = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    one = np.repeat(members[guests], sizes)
    other = members[np.repeat(trie.row_offsets[row_of[guests]], sizes) + offset]
    one, other = one[other < len(rows)], other[other < len(rows)]
    apart = (rows[one] != rows[other]) & (rows[one] >= 0) & (rows[other] >= 0)
    one, other = one[apart], other[apart]
    return np.concatenate([one, other]), np.concatenate([other, one])


def _sample(sizes: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """int64[n, most]: counts[i] different numbers below sizes[i], with -1 between, in any order.

    Floyd's method (Bentley and Floyd 1987): needs no list of what it draws from.
    """
    out = np.full((int(counts.max(initial=0)), len(sizes)), -1)
    for step in range(len(out)):
        last = sizes - counts + step
        drawn = rng.integers(0, last, endpoint=True)
        drawn = np.where((out[:step] == drawn).any(axis=0), last, drawn)
        out[step] = np.where(step < counts, drawn, -1)
    return rng.permuted(out.T, axis=1)  # a set of Floyd's is even, its order is not
