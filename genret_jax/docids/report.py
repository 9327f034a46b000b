"""What a set of docids looks like: sizes, collisions, and how wide its trie is at every level."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int32


def docid_report(
    tokens: Int32[np.ndarray, "rows length"],
    lengths: Int32[np.ndarray, " rows"],
    documents: Int32[np.ndarray, " rows"],
    *,
    vocab_size: int,
) -> dict[str, Any]:
    """Describes docids in numbers that print as JSON.

    Args:
      tokens: int32[rows, length], padded with 0.
      lengths: int32[rows].
      documents: int32[rows], the document position of each row.
      vocab_size: number of local ids.

    Returns:
      documents: distinct documents that own a row.
      rows: token sequences.
      unique_ids: distinct token sequences.
      collisions: {"documents": those that share a sequence with another document,
        "largest_group": most documents behind one sequence}.
      length: {"min", "mean", "max"} in tokens, the end of sequence included.
      vocab_size: as given.
      bytes: memory of the three arrays.
      trie: a list with one entry a level: {"level" (1 for the first token), "nodes" (states that
        have children), "max_children", "mean_children"}.
    """
    rows = len(lengths)
    order = np.lexsort(tokens.T[::-1]) if rows else np.zeros(0, np.int64)
    ordered = np.asarray(tokens)[order]
    first_of_id = np.ones(rows, bool)
    if rows:
        first_of_id[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    unique = ordered[first_of_id]
    sharing, largest = _collisions(np.cumsum(first_of_id) - 1, documents[order])
    return {
        "documents": len(np.unique(documents)),
        "rows": rows,
        "unique_ids": len(unique),
        "collisions": {"documents": sharing, "largest_group": largest},
        "length": {
            "min": int(lengths.min()) if rows else 0,
            "mean": round(float(lengths.mean()), 3) if rows else 0.0,
            "max": int(lengths.max()) if rows else 0,
        },
        "vocab_size": vocab_size,
        "bytes": int(tokens.nbytes + lengths.nbytes + documents.nbytes),
        "trie": trie_widths(unique),
    }


def _collisions(groups: np.ndarray, documents: np.ndarray) -> tuple[int, int]:
    """Documents that share an id with another document, and the most documents behind one id.

    A document that owns one id twice does not collide with itself, so pairs are made distinct.
    """
    if not len(groups):
        return 0, 0
    keys = groups.astype(np.int64) * (int(documents.max()) + 1) + documents
    pairs = np.unique(keys)
    pair_groups, pair_documents = np.divmod(pairs, int(documents.max()) + 1)
    sizes = np.bincount(pair_groups)
    sharing = np.unique(pair_documents[sizes[pair_groups] > 1])
    return len(sharing), int(sizes.max())


def trie_widths(unique: Int32[np.ndarray, "rows length"]) -> list[dict[str, Any]]:
    """Children a trie node has, level by level.

    Args:
      unique: int32[rows, length], distinct rows in lexicographic order, padded with 0.

    Returns:
      For every level the nodes that branch from it (prefixes that go on), and the largest and mean
      number of children; see `docid_report`.
    """
    widths = []
    rows, length = unique.shape
    parent = np.zeros(rows, np.int64)  # the trie node that each row has reached, 0 = root
    for level in range(length):
        column = unique[:, level]
        opens = np.ones(rows, bool)  # rows that are the first to enter their child
        opens[1:] = (column[1:] != column[:-1]) | (parent[1:] != parent[:-1])
        children = np.bincount(parent[opens & (column != 0)])
        children = children[children > 0]
        if not len(children):
            break
        widths.append(
            {
                "level": level + 1,
                "nodes": len(children),
                "max_children": int(children.max()),
                "mean_children": round(float(children.mean()), 3),
            }
        )
        parent = np.cumsum(opens) - 1
    return widths
