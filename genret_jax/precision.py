"""Weights in fewer bytes than float32, for searching.

"bfloat16": matrices of two bytes a number, and activations of that type; norms and softmax stay
float32. "int8": one byte a number and a float32 scale for each output (absmax, symmetric: the
vector-wise form of LLM.int8(), Dettmers et al. 2022, without its outliers); activations stay as
they are. A search takes such weights back to floats once, before its first step: what is small is
what lies on the device between searches.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int8

Params = Any
PRECISIONS = ("float32", "bfloat16", "int8")
# Position biases and norms are few numbers, and everything hangs on them.
_MATRICES = ("kernel", "embedding")


@struct.dataclass
class QuantisedMatrix:
    """values * scale.

    Attributes:
      values: int8[..., in, out].
      scale: float32, 1 in place of the axis that it was taken over.
    """

    values: Int8[Array, "*layers rows columns"]
    scale: Float[Array, "*layers rows_or_1 columns_or_1"]


def reduced(params: Params, precision: str) -> Params:
    """Parameters in another precision; one of PRECISIONS.

    Returns:
      A tree for `restored`: the same, with matrices in bfloat16, or as `QuantisedMatrix`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, found {precision!r}")

    def one(path: Any, leaf: Array) -> Any:
        if precision == "float32" or path[-1].key not in _MATRICES:
            return leaf
        if precision == "bfloat16":
            return leaf.astype(jnp.bfloat16)
        # A row of an embedding is one token's; a column of a matrix is one output's.
        axis = -1 if path[-1].key == "embedding" else -2
        most = jnp.abs(leaf).max(axis=axis, keepdims=True)
        scale = jnp.maximum(most, 1e-12).astype(jnp.float32) / 127
        return QuantisedMatrix(jnp.round(leaf / scale).astype(jnp.int8), scale)

    return jax.tree_util.tree_map_with_path(one, params)


def restored(params: Params) -> Params:
    """The parameters as the network reads them; those of full precision as they are."""

    def one(leaf: Any) -> Array:
        if isinstance(leaf, QuantisedMatrix):
            return leaf.values.astype(jnp.float32) * leaf.scale
        return leaf

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, QuantisedMatrix))
