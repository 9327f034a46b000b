"""An output matrix that depends on what has been written, in the manner of NCI's decoder.

NCI (Wang et al., NeurIPS 2022, "prefix-aware weight-adaptive decoder") multiplies a decoder state
with output weights that a second, four-layer decoder makes of the prefix: token 3 behind the prefix
(1, 2) is not token 3 behind (2, 1). Here the second decoder is one sum, and the weights are the
common ones but for a map of low rank that the prefix gates:

    logits_t = h_t (I + A diag(g_t) B) W,    g_t = tanh(sum_{j <= t} (e_j C) * p_j)

with e_j the embedding of the decoder's input at step j (the token written before it), p_j a vector
of the place j, so that the order counts, and W the output matrix. What is made here is the state
h_t (I + A diag(g_t) B), so that everything that multiplies states with W has it. B begins as zero:
a fresh adaptor changes nothing.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import partitioning

Array = jax.Array
PLACES = 32  # with a vector of their own; places beyond share the last one


class PrefixAdaptor(nn.Module):
    """See the module's text.

    Attributes:
      embed_dim: of states and embeddings.
      rank: of the map.
      dtype: of activations.
    """

    embed_dim: int
    rank: int
    dtype: str

    def setup(self) -> None:
        fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        into, zeros = ("embed", "mlp"), nn.initializers.zeros
        self.down = self._made("down", fan_in, (self.embed_dim, self.rank), into)
        self.up = self._made("up", zeros, (self.rank, self.embed_dim), ("mlp", "embed"))
        self.gate = self._made("gate", fan_in, (self.embed_dim, self.rank), into)
        # "relpos_buckets" is what T5X calls the one axis of places that is never divided.
        normal, axes = nn.initializers.normal(1.0), ("relpos_buckets", "mlp")
        self.places = self._made("places", normal, (PLACES, self.rank), axes)

    def _made(self, name: str, init: Any, shape: tuple[int, int], axes: tuple[str, str]) -> Array:
        found: Array = partitioning.param_with_axes(name, init, shape, jnp.float32, axes=axes)
        return found.astype(self.dtype)

    def terms(self, embedded: Array, places: Array) -> Array:
        """What tokens add to the sum of their prefix: [..., embed] -> [..., rank].

        Args:
          embedded: of the decoder's inputs.
          places: int32, of each of them; broadcast against all but the last dimension.
        """
        return (embedded @ self.gate) * self.places[jnp.minimum(places, PLACES - 1)]

    def __call__(self, states: Array, prefix: Array) -> Array:
        """States [..., embed] and the sums of their prefixes [..., rank] -> adapted states."""
        return states + ((states @ self.down) * jnp.tanh(prefix)) @ self.up
