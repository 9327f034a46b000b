"""Which tokens the trie allows after each prefix of docids that are given, for teacher forcing.

A search that renormalises over a state's children ("children", see `decoding`) is trained by the
same distribution: logits of all other tokens are -inf in the loss, too. The model need not learn
then which identifiers exist, and a token that is the only way on is certain and costs nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from genret_jax.device_trie import DeviceTrie

_Place = tuple[Array, Array]


def allowed_tokens(
    trie: DeviceTrie, inputs: Int[Array, "rows length"], vocab: int
) -> Bool[Array, "rows length vocab"]:
    """The children of the states that teacher-forced docids pass through.

    Args:
      trie: the identifiers that exist.
      inputs: int32, local ids: 0, then what was written before each place, as a decoder reads it.
      vocab: local docid ids.

    Returns:
      True where a token may be written. After the end of a docid, and after what is no prefix of
      any, nothing is told: all tokens but padding may.

    Example:
      With the identifiers [2, 3], [2, 4] and [4], after nothing 2 and 4 are allowed, and after 2
      both 3 and 4.
    """
    rows = jnp.arange(len(inputs))
    anything = jnp.ones(vocab, bool).at[0].set(False)

    def children(state: Array, place: Array, known: Array, width: int) -> Array:
        first, end = trie.first_edge[state], trie.first_edge[state + 1]
        edges = first[:, None] + jnp.arange(width)
        exists = edges < end[:, None]
        token = trie.edge_token[jnp.where(exists, edges, 0)].astype(jnp.int32)
        found = jnp.zeros((len(state), vocab), bool)
        # What does not exist is written outside, and dropped.
        token = jnp.where(exists, token, vocab)
        found = found.at[jnp.arange(len(state))[:, None], token].set(True, mode="drop")
        # A state of one row has no children; that row says how it goes on.
        only = trie.rows[trie.row_begin[state], jnp.minimum(place, trie.max_length - 1)]
        only = jnp.where(place < trie.max_length, only, 0).astype(jnp.int32)
        alone = first == end
        found = jnp.where(alone[:, None], jax.nn.one_hot(only, vocab, dtype=bool), found)
        told = known & ~(alone & (only == 0))
        return jnp.where(told[:, None], found, anything)

    def move(carry: _Place, step: _Place) -> tuple[_Place, Array]:
        (state, known), (token, place) = carry, step
        low, high = trie.first_edge[state], trie.first_edge[state + 1]
        alone = low == high
        for _ in range(vocab.bit_length()):  # edges of a state stand in the order of their tokens
            middle = (low + high) // 2
            right = trie.edge_token[middle] <= token
            low, high = jnp.where(right, middle, low), jnp.where(right, high, middle)
        written = trie.rows[trie.row_begin[state], jnp.minimum(place - 1, trie.max_length - 1)]
        there = jnp.where(alone, written, trie.edge_token[low]) == token
        known = known & there
        state = jnp.where(known & ~alone, low + 1, state)
        return (state, known), children(state, place, known, width)

    zero = jnp.zeros(1, jnp.int32)
    begin = children(zero, jnp.zeros((), jnp.int32), jnp.ones(1, bool), trie.candidates(1, 0))
    begin = jnp.broadcast_to(begin, (len(inputs), vocab))
    if inputs.shape[1] == 1:
        return begin[:, None]
    width = max(trie.candidates(1, 1), trie.candidates(1, 2))
    steps = (inputs[:, 1:].T, jnp.arange(1, inputs.shape[1]))
    start = (jnp.zeros_like(rows, jnp.int32), jnp.ones(len(inputs), bool))
    _, later = jax.lax.scan(move, start, steps)
    return jnp.concatenate([begin[:, None], jnp.moveaxis(later, 0, 1)], axis=1)
