"""What lies ahead of a prefix: the best document under every state of a trie.

A beam search that knows only the probability of what is written loses a document whose identifier
begins improbably. Where similarities of the query and all documents are known, the best one under a
prefix says what may yet come of it (PAG: Zeng et al., "Planning Ahead in Generative Retrieval",
SIGIR 2024, whose similarities are sums over the words of a set-based identifier). The search adds
it wherever it chooses between hypotheses; the scores of identifiers stay log p.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32

from genret_jax.trie import Trie


def best_under_states(
    trie: Trie, documents: Float32[np.ndarray, "queries documents"], *, size: int
) -> Float32[np.ndarray, "queries states"]:
    """The greatest number of any document whose identifier begins with the prefix of a state.

    From the leaves up, a level at a time: the children of the states of a level are consecutive.

    Args:
      trie: which names the documents.
      documents: a number a document, by position; -inf for one that may not be found.
      size: states of the trie on the device; those that it has beyond `trie` are -inf.

    Returns:
      The look-ahead of `constrained_beam_search`.
    """
    rows = documents[:, trie.row_documents]
    if len(trie.rows) < len(trie.row_documents):
        rows = np.maximum.reduceat(rows, trie.row_offsets[:-1], axis=1)
    out = np.full((len(documents), size), -np.inf, np.float32)
    levels = list(zip(trie.level_start[:-1], trie.level_start[1:], strict=True))
    for begin, end in reversed(levels):
        first = trie.first_edge[begin : end + 1]
        branching = first[1:] > first[:-1]
        states = np.arange(begin, end)
        leaves = states[~branching]
        out[:, leaves] = rows[:, trie.row_begin[leaves]]
        if branching.any():
            heads = first[:-1][branching]
            children = out[:, heads[0] + 1 : first[-1] + 1]
            out[:, states[branching]] = np.maximum.reduceat(children, heads - heads[0], axis=1)
    return out
