"""The largest of many numbers, when few are wanted of very many."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_BLOCK = 64
# Fewer in a row, or in all rows: passes over blocks cost more than one partial sort saves (CPU).
_MANY, _MANY_IN_ALL = 16_384, 65_536


def top_k(
    x: Float[Array, "batch n"], k: int
) -> tuple[Float[Array, "batch k"], Int[Array, "batch k"]]:
    """`jax.lax.top_k` over the last of two axes, faster where n is large beside k.

    The k largest numbers lie in the k blocks of the largest maxima: any number outside them is
    preceded by k maxima that are larger, or as large and further to the left. So maxima are taken
    in one pass, and only the numbers of k blocks are sorted.

    Args:
      x: numbers; not NaN.
      k: at most n.

    Returns:
      As `jax.lax.top_k`: values in descending order and their places, of equal ones the leftmost
      first.
    """
    batch, n = x.shape
    blocks = -(-n // _BLOCK)
    if n < _MANY or batch * n < _MANY_IN_ALL or blocks < 2 * k:
        return jax.lax.top_k(x, k)
    padded = jnp.pad(x, ((0, 0), (0, blocks * _BLOCK - n)), constant_values=-jnp.inf)
    in_blocks = padded.reshape(batch, blocks, _BLOCK)
    _, chosen = jax.lax.top_k(in_blocks.max(-1), k)
    chosen = jnp.sort(chosen, axis=-1)  # so that of equal numbers the leftmost comes first
    candidates = jnp.take_along_axis(in_blocks, chosen[..., None], axis=1).reshape(batch, -1)
    best, place = jax.lax.top_k(candidates, k)
    block = jnp.take_along_axis(chosen, place // _BLOCK, axis=1)
    return best, block * _BLOCK + place % _BLOCK
