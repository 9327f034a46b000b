"""DocidTable -> trie: on the host for keeping, with a form on the device for decoding.

The identifiers lie sorted in one array, and a state of the trie, a prefix, is the range of rows
that begin with it. A state with one row needs no children: what is left of its identifier is read
from that row. Only the states above have arrays, and only there does a search have choices.

States are numbered breadth first, so the children of one state are consecutive states and so are
the children of its right neighbour. One array of offsets is therefore the whole structure: the
children of state s are reached by edges `first_edge[s] .. first_edge[s + 1] - 1`, and edge e
leads to state e + 1 (only the root, state 0, is nobody's child).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genret_jax.device_trie import DeviceTrie, Widths, bucket
from genret_jax.errors import UserError
from genret_jax.files import replace_on_success

if TYPE_CHECKING:
    from genret_jax.docids.table import DocidTable

__all__ = ["DeviceTrie", "Trie", "build_trie"]

_ARRAYS = (
    "first_edge",
    "edge_token",
    "row_begin",
    "level_start",
    "rows",
    "row_offsets",
    "row_documents",
)
_FORMAT = 2
# A level is searched in dense rows where at least one token in so many is allowed: a masked
# logit costs about an eighth of a gathered one.
_DENSE_SHARE = 8
_DENSE_BYTES = 1 << 26
_RARE = 30  # an exponent that stands for any rarer thing


@dataclasses.dataclass(frozen=True)
class Trie:
    """The identifiers that exist, as a transition table on the host.

    Tokens are of the narrowest unsigned type that holds the docid vocabulary.

    Attributes:
      first_edge: int32[states + 1], see the module's text; states with one row have no edges.
      edge_token: uint[states - 1], local docid id that the edge writes.
      row_begin: int32[states], the first row of each state. A state ends where its right sibling
        begins, and the last child of a state where that state ends.
      level_start: int32[levels + 1], first state of each level; level 0 is the root.
      rows: uint[rows, length], the distinct identifiers in lexicographic order, 0-padded.
      row_offsets: int32[rows + 1] and
      row_documents: int32[documents in all]: row r names the documents
        `row_documents[row_offsets[r] : row_offsets[r + 1]]`, in ascending order.
      vocab_size: local docid ids, padding and EOS included.
    """

    first_edge: np.ndarray
    edge_token: np.ndarray
    row_begin: np.ndarray
    level_start: np.ndarray
    rows: np.ndarray
    row_offsets: np.ndarray
    row_documents: np.ndarray
    vocab_size: int

    @property
    def num_states(self) -> int:
        return len(self.row_begin)

    @property
    def max_length(self) -> int:
        return self.rows.shape[1]

    @property
    def num_bytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in _ARRAYS)

    def documents(self, row: int) -> np.ndarray:
        """int32: the documents that row `row` names; empty for -1."""
        if row < 0:
            return np.empty(0, np.int32)
        return self.row_documents[self.row_offsets[row] : self.row_offsets[row + 1]]

    def rows_with(self, documents: np.ndarray) -> np.ndarray:
        """bool[rows]: whether a row names any of the documents where bool[positions] is true."""
        named = np.asarray(documents, bool)[self.row_documents]
        return np.logical_or.reduceat(named, self.row_offsets[:-1])

    @functools.cached_property
    def children_by_level(self) -> tuple[np.ndarray, ...]:
        """int32 arrays: numbers of children of the states that have any, widest first."""
        found = []
        for start, end in zip(self.level_start[:-1], self.level_start[1:], strict=True):
            counts = np.diff(self.first_edge[start : end + 1])
            # Sorted by counting: there are millions of states and few different counts.
            states = np.bincount(counts[counts > 0], minlength=1)[::-1]
            found.append(np.repeat(np.arange(len(states), dtype=np.int32)[::-1], states))
        return tuple(found)

    @property
    def choices_end(self) -> int:
        """Tokens after which no identifier has a choice left; at least 1."""
        return max(1, sum(1 for counts in self.children_by_level if counts.size))

    def report(self) -> dict[str, object]:
        """States, bytes, and the width of each level that has children."""
        widths = [c for c in self.children_by_level if c.size]
        return {
            "states": self.num_states,
            "rows": len(self.rows),
            "bytes": self.num_bytes,
            "width_max": [int(c[0]) for c in widths],
            "width_mean": [round(float(c.mean()), 2) for c in widths],
        }

    def on_device(
        self, rows: np.ndarray | None = None, like: DeviceTrie | None = None
    ) -> DeviceTrie:
        """The arrays that decoding reads, padded to capacity buckets.

        Args:
          rows: bool[rows], the only rows that may be found; by default all. See `restricted`.
          like: another trie on the device. Its sizes and bounds are taken over where they hold, so
            that a trie that has grown or shrunk a little runs the program compiled for it.
        """
        import jax.numpy as jnp

        def padded(array: np.ndarray, size: int, fill: int) -> Any:
            out = np.full((size, *array.shape[1:]), fill, array.dtype)
            out[: len(array)] = array
            return jnp.asarray(out)

        states, capacity = bucket(self.num_states), bucket(len(self.rows))
        widths, choices = self._widths(), self._choices()
        dense = self._dense_sizes()
        if like is not None:
            states = max(states, len(like.edge_token))
            capacity = max(capacity, len(like.rows))
            choices = like.choices
            pairs = list(zip(like.widths, widths, strict=True))
            if all(_bounds(old, new) for old, new in pairs):
                widths = like.widths
            if all(len(d) >= n for d, n in zip(like.dense, self._level_sizes(), strict=False)):
                dense = tuple(len(d) for d in like.dense)
        device = DeviceTrie(
            first_edge=padded(self.first_edge, states + 1, int(self.first_edge[-1])),
            edge_token=padded(self.edge_token, states, 0),
            row_begin=padded(self.row_begin, states + 1, len(self.rows)),
            rows=padded(self.rows, capacity, 0),
            num_rows=jnp.asarray(len(self.rows), jnp.int32),
            dense=self._dense(None, dense),
            allowed=None,
            widths=widths,
            choices=choices,
        )
        return device if rows is None else self.restricted(device, rows)

    def restricted(self, device: DeviceTrie, rows: np.ndarray) -> DeviceTrie:
        """`device` with a filter: a search has places for these rows alone, and the same scores.

        Only the filter's own arrays are made, and another filter runs the same program.

        Args:
          device: of this trie, filtered or not.
          rows: bool[rows], those that may be found; see `rows_with`.
        """
        import jax.numpy as jnp

        rows = np.asarray(rows, bool)
        if rows.shape != (len(self.rows),):
            raise ValueError(f"rows must be bool[{len(self.rows)}], found {list(rows.shape)}")
        below = np.zeros(device.rows.shape[0] + 1, np.int32)
        np.cumsum(rows, out=below[1 : len(rows) + 1])
        below[len(rows) + 1 :] = below[len(rows)]
        dense = self._dense(rows, tuple(len(d) for d in device.dense))
        return dataclasses.replace(device, allowed=jnp.asarray(below), dense=dense)

    def _level_sizes(self) -> np.ndarray:
        """int[2]: states of levels 0 and 1, or of level 0 alone."""
        return np.diff(self.level_start)[:2]

    def _dense_sizes(self) -> tuple[int, ...]:
        """Rows of the arrays of `DeviceTrie.dense`: of level 0, or of levels 0 and 1."""
        found: list[int] = []
        for states, counts in zip(
            self._level_sizes().tolist(), self.children_by_level, strict=False
        ):
            size = bucket(states) if found else 1
            edges = int(counts.sum(dtype=np.int64))
            few = edges * _DENSE_SHARE < states * self.vocab_size
            if few or size * self.vocab_size > _DENSE_BYTES:
                break
            found.append(size)
        return tuple(found)

    def _dense(self, rows: np.ndarray | None, sizes: tuple[int, ...]) -> tuple[Any, ...]:
        """bool[size, vocab] for levels 0 and 1: what the rows, or those of bool[rows], allow."""
        import jax.numpy as jnp

        found: list[Any] = []
        which = slice(None) if rows is None else rows
        for level, size in enumerate(sizes):
            mask = np.zeros((size, self.vocab_size), bool)
            state: Any = 0
            if level:
                roots = int(self.first_edge[1])
                number = np.zeros(self.vocab_size, np.int32)
                number[self.edge_token[:roots]] = np.arange(roots)
                state = number[self.rows[which, 0]]
            if level < self.max_length:
                mask[state, self.rows[which, level]] = True
            found.append(jnp.asarray(mask))
        return tuple(found)

    def _widths(self) -> Widths:
        """See `DeviceTrie.widths`."""
        root, *deeper = (np.cumsum(c, dtype=np.int64) for c in self.children_by_level)
        width = bucket(int(root[0])) if len(root) else 4
        return (width,), _widths(deeper[:1]), _widths(deeper[1:])

    def _choices(self) -> tuple[int, ...]:
        """See `DeviceTrie.choices`."""
        sizes = np.diff(self.level_start).tolist()
        pairs = zip(self.children_by_level, sizes, strict=True)
        return tuple(
            min(_RARE, (size // len(counts)).bit_length() - 1) if len(counts) else _RARE
            for counts, size in pairs
        )

    def save(self, folder: str | Path) -> None:
        """Writes one .npy an array; whole or not at all."""
        about = {"format": _FORMAT, "vocab_size": self.vocab_size, **self.report()}
        with replace_on_success(folder) as temporary:
            temporary.mkdir()
            for name in _ARRAYS:
                np.save(temporary / f"{name}.npy", getattr(self, name), allow_pickle=False)
            (temporary / "trie.json").write_text(json.dumps(about))

    @classmethod
    def load(cls, folder: str | Path) -> Trie:
        """Opens a saved trie, memory-mapped: nothing is read before it is needed.

        Raises:
          UserError: when a file is missing, or the trie is of another version.
        """
        folder = Path(folder)
        names = [*(f"{n}.npy" for n in _ARRAYS), "trie.json"]
        missing = [n.removesuffix(".npy") for n in names if not (folder / n).is_file()]
        if missing:
            raise UserError(
                f"{folder}: no whole trie here ({', '.join(missing)} missing); make it again with "
                "`genret index` or `genret fit`"
            )
        about = json.loads((folder / "trie.json").read_text())
        if about["format"] != _FORMAT:
            raise UserError(
                f"{folder}: a trie of format {about['format']}, but this version reads format "
                f"{_FORMAT}; make it again with `genret index` or `genret fit`"
            )
        arrays = (np.load(folder / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in _ARRAYS)
        return cls(**dict(zip(_ARRAYS, arrays, strict=True)), vocab_size=int(about["vocab_size"]))

    @staticmethod
    def is_older(folder: str | Path) -> bool:
        """Whether an earlier version of the package wrote the trie in this folder."""
        try:
            return int(json.loads((Path(folder) / "trie.json").read_text())["format"]) < _FORMAT
        except (OSError, ValueError, KeyError, TypeError):
            return False


def _widths(cumulated: list[np.ndarray]) -> tuple[int, ...]:
    """Entry i: at most so many children have any 2^i states of one of these levels.

    Args:
      cumulated: for each level, the sums of the widest state, the two widest, and so on.
    """
    most = max((len(c) for c in cumulated), default=0)
    widths, beam = [], 1
    while True:
        widest = max((int(c[min(beam, len(c)) - 1]) for c in cumulated if len(c)), default=0)
        # Powers of two: any entry that changes makes a new program, whichever is read.
        widths.append(max(4, 1 << max(0, widest - 1).bit_length()))
        if beam >= most:
            return tuple(widths)
        beam *= 2


def _bounds(old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Whether the widths `old` hold where `new` do; the last entry holds for all beams beyond."""
    longest = max(len(old), len(new))
    filled = ([*w, *[w[-1]] * (longest - len(w))] for w in (old, new))
    return all(a >= b for a, b in zip(*filled, strict=True))


def build_trie(table: DocidTable) -> Trie:
    """Sorts the identifiers and numbers their prefixes, level by level.

    Equal rows (documents that share an identifier) become one row with several documents.

    Args:
      table: identifiers; no one may be a proper prefix of another
        (`DocidTable.from_sequences` ends them with EOS where lengths differ).

    Raises:
      UserError: for a table without rows, or an identifier that is a prefix of another.
    """
    if not len(table.tokens):
        raise UserError("the docid table has no rows; a trie needs at least one identifier")
    vocab = table.vocab_size
    rows = np.asarray(table.tokens, token_type(vocab))
    documents = np.asarray(table.documents, np.int32)
    order = lexicographic_order(rows, vocab)
    if order is not None:
        rows, documents = rows[order], documents[order]
    return trie_of_sorted(rows, documents, vocab)


def trie_of_sorted(rows: np.ndarray, documents: np.ndarray, vocab_size: int) -> Trie:
    """The trie of rows uint[n, length] in lexicographic order, one for each of documents int32[n].

    Raises:
      UserError: for an identifier that is a prefix of another.
    """
    first = np.zeros(len(rows), bool)
    first[0] = True
    for column in rows.T:
        first[1:] |= column[1:] != column[:-1]
    offsets = np.append(np.flatnonzero(first), len(rows)).astype(np.int32)
    if len(offsets) <= len(rows):
        row_of = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        documents = documents[np.lexsort([documents, row_of])]
        rows = rows[first]
    return Trie(
        **_number_states(rows),
        rows=rows,
        row_offsets=offsets,
        row_documents=documents,
        vocab_size=vocab_size,
    )


def token_type(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The narrowest type of tokens 0 .. vocab_size - 1."""
    return np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.uint32


def lexicographic_order(rows: np.ndarray, vocab_size: int) -> np.ndarray | None:
    """Where each row of uint[n, length] stands in order; None where they are in order already.

    As many columns as fit are packed into one 64-bit key. Most rows differ in the first key, so
    one sort does nearly all, and only rows with an equal first key are sorted by the others.
    """
    bits = max(1, (vocab_size - 1).bit_length())
    fit = 64 // bits
    keys = []
    for begin in range(0, rows.shape[1], fit):
        key = np.zeros(len(rows), np.uint64)
        for column in rows.T[begin : begin + fit]:
            key <<= np.uint64(bits)
            key |= column
        keys.append(key)
    if _in_order(keys):
        return None
    order = np.argsort(keys[0], kind="stable" if len(keys) == 1 else None)
    if len(keys) > 1:
        first = keys[0][order]
        same = first[1:] == first[:-1]
        tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
        members = order[tied]
        among = np.lexsort([key[members] for key in reversed(keys)])
        order[tied] = members[among]
    return order


def _in_order(keys: list[np.ndarray]) -> bool:
    same: Any = True  # in all keys so far
    for key in keys:
        if (same & (key[1:] < key[:-1])).any():
            return False
        same = same & (key[1:] == key[:-1])
    return True


def _number_states(rows: np.ndarray) -> dict[str, Any]:
    """The transition table of distinct, sorted rows."""
    alive: Any = np.arange(len(rows), dtype=np.int32)  # the rows of states with several rows
    first = np.zeros(len(rows), bool)  # whether a row is the first one of its state
    first[0] = True
    branching = np.array([len(rows) > 1])  # the states of this level
    begins, tokens, counts, sizes = [alive[:1]], [], [], [1]
    alive, first = (alive, first) if len(rows) > 1 else (alive[:0], first[:0])
    for level in range(rows.shape[1]):
        if not len(alive):
            break
        column = rows[alive, level]
        ended = np.flatnonzero(column == 0)
        if ended.size:
            _refuse(rows[alive[ended[0]]], ended.size)
        new = first.copy()
        new[1:] |= column[1:] != column[:-1]
        heads = np.flatnonzero(new)
        width = np.diff(np.append(heads, len(alive)))
        children = np.zeros(len(branching), np.int32)
        parents = np.cumsum(first[heads]) - 1
        children[branching] = np.bincount(parents, minlength=int(branching.sum()))
        counts.append(children)
        begins.append(alive[heads])
        tokens.append(column[heads])
        sizes.append(len(heads))
        branching = width > 1
        keep = np.repeat(branching, width)
        alive, first = alive[keep], new[keep]
    if len(alive):
        _refuse(rows[alive[0]], len(alive))
    counts.append(np.zeros(sizes[-1], np.int32))
    first_edge = np.zeros(sum(sizes) + 1, np.int32)
    np.cumsum(np.concatenate(counts), out=first_edge[1:])
    return {
        "first_edge": first_edge,
        "edge_token": np.concatenate([*tokens, np.empty(0, rows.dtype)]),
        "row_begin": np.concatenate(begins),
        "level_start": np.cumsum([0, *sizes], dtype=np.int32),
    }


def _refuse(row: np.ndarray, number: int) -> None:
    raise UserError(
        f"identifier {row[row > 0].tolist()} is a prefix of another one ({number} "
        "such); end identifiers with EOS, as DocidTable.from_sequences does"
    )
