"""Documents come and go: a trie with some more or fewer, equal to one built anew.

Nothing is sorted again, and `Trie.on_device(like=...)` keeps the sizes on the device, so that a
compiled search goes on as long as the trie stays within its capacity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from genret_jax.errors import UserError
from genret_jax.trie import Trie, lexicographic_order, token_type, trie_of_sorted

if TYPE_CHECKING:
    from genret_jax.docids.table import DocidTable


def add_documents(trie: Trie, table: DocidTable) -> Trie:
    """The trie with the identifiers of `table` besides its own.

    Args:
      trie: what there is.
      table: identifiers of new documents, or more identifiers of old ones, over the same labels
        and, where lengths vary, ended by EOS.

    Raises:
      UserError: for another vocabulary, longer identifiers than the trie has room for (which would
        be another network cache: build the trie anew), or one that is a prefix of another.
    """
    if table.vocab_size != trie.vocab_size:
        raise UserError(
            f"the new docids are over {table.vocab_size} labels and the trie over "
            f"{trie.vocab_size}; a model writes only the labels that it was made with"
        )
    longest = int(table.lengths.max(initial=0))
    if longest > trie.max_length:
        raise UserError(
            f"a new docid has {longest} tokens and the trie has room for {trie.max_length}; "
            "build the trie anew"
        )
    new = np.zeros((len(table.tokens), trie.max_length), token_type(trie.vocab_size))
    new[:, :longest] = table.tokens[:, :longest]
    documents = np.asarray(table.documents, np.int32)
    order = lexicographic_order(new, trie.vocab_size) if len(new) else None
    if order is not None:
        new, documents = new[order], documents[order]
    places = trie.row_offsets[[_place(trie.rows, row) for row in new]]
    rows = np.insert(_rows_of_documents(trie), places, new, axis=0)
    return trie_of_sorted(rows, np.insert(trie.row_documents, places, documents), trie.vocab_size)


def remove_documents(trie: Trie, documents: np.ndarray) -> Trie:
    """The trie without any identifier of the documents, int[n] positions.

    Raises:
      UserError: for a document that the trie does not have, or when none would be left.
    """
    documents = np.unique(documents)
    unknown = documents[~np.isin(documents, trie.row_documents)]
    if unknown.size:
        raise UserError(f"document {unknown[0]} is not in the trie ({unknown.size} such)")
    stays = ~np.isin(trie.row_documents, documents)
    if not stays.any():
        raise UserError("no document would be left; a trie needs at least one identifier")
    rows = _rows_of_documents(trie)[stays]
    return trie_of_sorted(rows, trie.row_documents[stays], trie.vocab_size)


def _rows_of_documents(trie: Trie) -> np.ndarray:
    """uint[documents in all, length]: the identifier of each entry of `row_documents`."""
    if len(trie.rows) == len(trie.row_documents):
        return trie.rows
    return np.repeat(trie.rows, np.diff(trie.row_offsets), axis=0)


def _place(rows: np.ndarray, row: np.ndarray) -> int:
    """The first of the sorted rows that is not below `row`; found column by column."""
    low, high = 0, len(rows)
    for column, token in enumerate(row):
        among = rows[low:high, column]
        low, high = (low + int(np.searchsorted(among, token, s)) for s in ("left", "right"))
        if low == high:
            break
    return low
