"""The trie as constrained decoding reads it, as arrays that `jax.jit` takes for an argument."""

from __future__ import annotations

from typing import TypeAlias

import jax
from flax import struct
from jaxtyping import Array, Bool, Int, UInt

# Of the root, of the states of level 1, of those of all deeper levels.
Widths: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@struct.dataclass
class DeviceTrie:
    """The trie as constrained decoding reads it: pass it to `jax.jit` as an argument.

    A state is a range of rows. Sizes are rounded up to buckets and the static fields are bounds,
    so that a trie with some documents more or less runs the same compiled program.

    Attributes:
      first_edge: int32[states + 1], edges `first_edge[s] .. first_edge[s + 1] - 1` leave state s.
      edge_token: uint[states], what edge e writes; it leads to state e + 1.
      row_begin: int32[states + 1], first row of each state; the last child of a state ends where
        that state ends, and any other child where the next one begins.
      rows: uint[rows, length], the identifiers in lexicographic order, 0-padded.
      num_rows: int32 scalar, rows without padding.
      dense: bool[states of the level, vocab]: allowed tokens of every state of level 0, or of
        levels 0 and 1, where most tokens are allowed; empty where not.
      allowed: int32[rows + 1], number of allowed rows before each row; None: all are allowed.
      widths: for the root, level 1 and all deeper levels; entry i bounds the number of children
        that any 2^i states of one level have together. States with one row have none.
      choices: entry l: about one in 2^choices[l] states of level l has more than one row; which
        only says where one pass over the rest of all identifiers pays.
    """

    first_edge: Int[Array, " states"]
    edge_token: UInt[Array, " states"]
    row_begin: Int[Array, " states"]
    rows: UInt[Array, "rows length"]
    num_rows: Int[Array, ""]
    dense: tuple[Bool[Array, "states vocab"], ...]
    allowed: Int[Array, " rows"] | None
    widths: Widths = struct.field(pytree_node=False)
    choices: tuple[int, ...] = struct.field(pytree_node=False)

    @property
    def max_length(self) -> int:
        """Tokens of the longest identifier."""
        return self.rows.shape[1]

    @property
    def num_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def candidates(self, beam: int, level: int) -> int:
        """How many children `beam` different states of a level can have together, at most."""
        widths = self.widths[min(level, 2)]
        return widths[min((beam - 1).bit_length(), len(widths) - 1)]

    def tail(self, hypotheses: int) -> int:
        """Tokens to score in one pass, after the level where hardly one of so many has a choice.

        The pass is as long whenever it begins, so one that is too long does work twice; 0: no pass.
        """
        level = next(
            (n for n, rare in enumerate(self.choices) if n and 1 << rare >= 4 * hypotheses),
            len(self.choices),
        )
        tail = self.max_length - level
        return tail if tail > 1 else 0  # one token is one step


def bucket(size: int) -> int:
    """The smallest m * 2^e >= size with m in 4..7 (at least 4): at most a quarter wasted."""
    if size <= 4:
        return 4
    unit = 1 << ((size - 1).bit_length() - 3)
    return -(-size // unit) * unit
