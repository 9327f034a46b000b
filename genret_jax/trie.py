"""DocidTable -> transition table: on the host for keeping, on the device for decoding.

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
from typing import TYPE_CHECKING

import numpy as np
from flax import struct

from genret_jax.errors import UserError
from genret_jax.files import replace_on_success

if TYPE_CHECKING:
    import jax

    from genret_jax.docids.table import DocidTable

_ARRAYS = (
    "first_edge",
    "edge_token",
    "leaf_row",
    "level_start",
    "rows",
    "row_offsets",
    "row_documents",
)


@dataclasses.dataclass(frozen=True)
class Trie:
    """The identifiers that exist, as a transition table on the host.

    Attributes:
      first_edge: int32[states + 1], see the module's text.
      edge_token: int32[states - 1], local docid id that the edge writes.
      leaf_row: int32[states], the row that ends in the state, -1 where none does.
      level_start: int32[levels + 2], first state of each level; level 0 is the root.
      rows: int32[rows, length], the distinct identifiers in lexicographic order, 0-padded.
      row_offsets: int32[rows + 1] and
      row_documents: int32[documents in all]: row r names the documents
        `row_documents[row_offsets[r] : row_offsets[r + 1]]`, in ascending order.
    """

    first_edge: np.ndarray
    edge_token: np.ndarray
    leaf_row: np.ndarray
    level_start: np.ndarray
    rows: np.ndarray
    row_offsets: np.ndarray
    row_documents: np.ndarray

    @property
    def num_states(self) -> int:
        return len(self.leaf_row)

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

    @functools.cached_property
    def children_by_level(self) -> tuple[np.ndarray, ...]:
        """int32 arrays: the number of children of every state, widest first, level by level."""
        counts = np.diff(self.first_edge)
        levels = zip(self.level_start[:-1], self.level_start[1:], strict=True)
        return tuple(np.sort(counts[a:b])[::-1] for a, b in levels)

    @property
    def shares_prefixes(self) -> bool:
        """Whether any two rows begin with the same token."""
        return len(self.rows) > int(self.first_edge[1] - self.first_edge[0])

    def report(self) -> dict[str, object]:
        """States, bytes, and the width of each level that has children."""
        widths = [c for c in self.children_by_level if c.size and c[0] > 0]
        return {
            "states": self.num_states,
            "rows": len(self.rows),
            "bytes": self.num_bytes,
            "width_max": [int(c[0]) for c in widths],
            "width_mean": [round(float(c[c > 0].mean()), 2) for c in widths],
        }

    def on_device(self) -> DeviceTrie:
        """The arrays that decoding reads, padded to capacity buckets."""
        import jax.numpy as jnp

        capacity = bucket(self.num_states)

        def padded(array: np.ndarray, size: int, fill: int) -> jax.Array:
            out = np.full(size, fill, np.int32)
            out[: len(array)] = array
            return jnp.asarray(out)

        return DeviceTrie(
            first_edge=padded(self.first_edge, capacity + 1, int(self.first_edge[-1])),
            edge_token=padded(self.edge_token, capacity, 0),
            leaf_row=padded(self.leaf_row, capacity, -1),
            max_length=self.max_length,
            root_width=bucket(int(self.children_by_level[0][0])),
            widths=self._widths(),
        )

    def _widths(self) -> tuple[int, ...]:
        """Entry i: at most so many children have any 2^i states of one level below the root."""
        deeper = [np.cumsum(c, dtype=np.int64) for c in self.children_by_level[1:] if len(c)]
        most = max((len(c) for c in deeper), default=0)
        widths, beam = [], 1
        while True:
            widest = max((int(c[min(beam, len(c)) - 1]) for c in deeper), default=0)
            # Powers of two: any entry that changes makes a new program, whichever is read.
            widths.append(max(4, 1 << max(0, widest - 1).bit_length()))
            if beam >= most:
                return tuple(widths)
            beam *= 2

    def save(self, folder: str | Path) -> None:
        """Writes one .npy an array; whole or not at all."""
        with replace_on_success(folder) as temporary:
            temporary.mkdir()
            for name in _ARRAYS:
                np.save(temporary / f"{name}.npy", getattr(self, name), allow_pickle=False)
            (temporary / "trie.json").write_text(json.dumps({"format": 1, **self.report()}))

    @classmethod
    def load(cls, folder: str | Path) -> Trie:
        """Opens a saved trie, memory-mapped: nothing is read before it is needed."""
        folder = Path(folder)
        missing = [n for n in _ARRAYS if not (folder / f"{n}.npy").is_file()]
        if missing:
            raise UserError(
                f"{folder}: no whole trie here ({', '.join(missing)} missing); make it again with "
                "`genret index` or `genret fit`"
            )
        return cls(
            *(np.load(folder / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in _ARRAYS)
        )


@struct.dataclass
class DeviceTrie:
    """The trie as constrained decoding reads it: pass it to `jax.jit` as an argument.

    The static fields are bounds rounded up to buckets, so that a trie with some documents more
    or less runs the same compiled program.

    Attributes:
      first_edge: int32[capacity + 1].
      edge_token: int32[capacity].
      leaf_row: int32[capacity].
      max_length: tokens of the longest identifier.
      root_width: at least the number of children of the root.
      widths: entry i bounds the children of any 2^i states of one level below the root.
    """

    first_edge: jax.Array
    edge_token: jax.Array
    leaf_row: jax.Array
    max_length: int = struct.field(pytree_node=False)
    root_width: int = struct.field(pytree_node=False)
    widths: tuple[int, ...] = struct.field(pytree_node=False)

    def candidates(self, beam: int) -> int:
        """How many children `beam` different states of one level can have together, at most."""
        return self.widths[min((beam - 1).bit_length(), len(self.widths) - 1)]


def bucket(size: int) -> int:
    """The smallest m * 2^e >= size with m in 4..7 (at least 4): at most a quarter wasted."""
    if size <= 4:
        return 4
    unit = 1 << ((size - 1).bit_length() - 3)
    return -(-size // unit) * unit


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
    tokens = np.asarray(table.tokens, np.int32)
    order = np.lexsort(tokens.T[::-1])
    tokens, lengths = tokens[order], np.asarray(table.lengths)[order]
    documents = np.asarray(table.documents, np.int32)[order]

    differs = tokens[1:] != tokens[:-1]
    first = np.concatenate([[True], differs.any(axis=1)])
    row_of = np.cumsum(first) - 1
    offsets = np.searchsorted(row_of, np.arange(row_of[-1] + 2)).astype(np.int32)
    documents = documents[np.lexsort([documents, row_of])]
    rows, row_lengths = np.ascontiguousarray(tokens[first]), lengths[first]
    arrays = _number_states(rows, row_lengths)
    return Trie(**arrays, rows=rows, row_offsets=offsets, row_documents=documents)


def _number_states(rows: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
    """The transition table of distinct, sorted rows."""
    num_rows, max_length = rows.shape
    begins = np.zeros(num_rows, bool)  # the row is the first with its prefix of this level
    begins[0] = True
    state = np.zeros(num_rows, np.int32)  # of the row's prefix at this level
    level_start, counts, edge_tokens, leaves = [0], [], [], [np.full(1, -1, np.int32)]
    for level in range(max_length):
        begins[1:] |= rows[1:, level] != rows[:-1, level]
        alive = lengths > level
        new = begins & alive
        num_parents = len(leaves[-1])
        counts.append(np.bincount(state[new], minlength=num_parents).astype(np.int32))
        edge_tokens.append(rows[new, level].astype(np.int32))
        level_start.append(level_start[-1] + num_parents)
        state = (np.cumsum(new) - 1).astype(np.int32)
        ends = np.flatnonzero(alive & (lengths == level + 1))
        leaf = np.full(int(new.sum()), -1, np.int32)
        leaf[state[ends]] = ends
        leaves.append(leaf)
    counts.append(np.zeros(len(leaves[-1]), np.int32))
    level_start.append(level_start[-1] + len(leaves[-1]))
    leaf_row = np.concatenate(leaves)
    children = np.concatenate(counts)
    inner_ends = np.flatnonzero((leaf_row >= 0) & (children > 0))
    if inner_ends.size:
        row = rows[leaf_row[inner_ends[0]]]
        raise UserError(
            f"identifier {row[row > 0].tolist()} is a prefix of another one ({inner_ends.size} "
            "such); end identifiers with EOS, as DocidTable.from_sequences does"
        )
    first_edge = np.zeros(len(children) + 1, np.int32)
    np.cumsum(children, out=first_edge[1:])
    return {
        "first_edge": first_edge,
        "edge_token": np.concatenate(edge_tokens),
        "leaf_row": leaf_row,
        "level_start": np.asarray(level_start, np.int32),
    }
