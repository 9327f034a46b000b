"""What both sides of T5 are made of: matrices, norms, attention, MLPs, and a layer of either side.

Parameter names and logical axes are T5X's; see `network`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.linen import partitioning

Array = jax.Array
NEGATIVE = (
    -1e10
)  # added to attention logits that must vanish; finite, so that bf16 rows stay NaN-free
# What stands between an MLP's first matrices and its last, by the name that T5 checkpoints give it.
FEED_FORWARD: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gated-gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gated-silu": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and switches of the network.

    Attributes:
      vocab_size: rows of the token embedding: text pieces, then docid tokens, then padding.
      tied_embeddings: output logits from the token embedding (T5 1.0) instead of a matrix of
        their own (T5 1.1).
      feed_forward: the MLP, one of FEED_FORWARD: "gated-gelu" (T5 1.1, Flan-T5, mT5), "relu" (T5
        1.0) or "gated-silu" (UL2).
      layer_norm_epsilon: added to the mean square.
      relative_buckets, relative_max_distance: of the position bias; see `relative_buckets`.
      embedding_scale: standard deviation of fresh token embeddings. T5's 1.0 suits Adafactor,
        whose updates follow each parameter's size; with Adam's equal updates a small model learns
        several times faster from small embeddings.
      dtype: of activations, "float32" or "bfloat16"; parameters are always float32.
      learned_temperature: one more parameter, `log_temperature`, a scalar that begins at 0, for
        contrastive losses; T5X's own network has none.
      adaptor_rank: of a `PrefixAdaptor` over the decoder's states; 0 for none, as T5 has it.
      remat: recompute each layer in the backward pass: less memory, about a third more time.
      scan_layers: stack the layers of a side and loop over them: a program of one layer instead of
        one of all, which compiles in a fraction of the time; see `stacking`. What is computed is
        the same, but that dropout draws other numbers.
    """

    vocab_size: int
    embed_dim: int = 512
    num_heads: int = 6
    head_dim: int = 64
    mlp_dim: int = 1024
    num_encoder_layers: int = 8
    num_decoder_layers: int = 8
    dropout_rate: float = 0.1
    tied_embeddings: bool = False
    embedding_scale: float = 1.0
    dtype: str = "float32"
    relative_buckets: int = 32
    relative_max_distance: int = 128
    feed_forward: str = "gated-gelu"
    layer_norm_epsilon: float = 1e-6
    learned_temperature: bool = False
    adaptor_rank: int = 0
    remat: bool = False
    scan_layers: bool = False


KeysValues = tuple[Array, Array]


@struct.dataclass
class DecodingCache:
    """What the decoder remembers between steps.

    In a beam search hypotheses part and end. Without an ancestry, keys and values are copied to
    whoever goes on with them, all of them at every step. With one they stay in the slot in which
    they were written, and a step reads those of a hypothesis where its ancestry says.

    Attributes:
      self_kv: per layer (keys, values), each [batch, slots, max_length, heads, kv]; of stacked
        layers one pair, each [batch, slots, layers, max_length, heads, kv]. Without an ancestry the
        slots are the beam.
      prefix: [batch, beam, rank], of the adaptor; None without one.
      ancestry: int32[batch, beam, max_length], slot of each hypothesis at each place.
    """

    self_kv: tuple[KeysValues, ...] | KeysValues
    prefix: Array | None = None
    ancestry: Array | None = None

    def of_parents(self, parent: Array) -> DecodingCache:
        """The cache of hypotheses that go on with those of int32[batch, beam] numbers."""

        def chosen(leaf: Array) -> Array:
            return jax.vmap(lambda rows, i: rows[i])(leaf, parent)

        if self.ancestry is None:
            return jax.tree.map(chosen, self)
        prefix = None if self.prefix is None else chosen(self.prefix)
        return dataclasses.replace(self, prefix=prefix, ancestry=chosen(self.ancestry))

    @property
    def max_length(self) -> int:
        return int(jax.tree.leaves(self.self_kv)[0].shape[-3])


@struct.dataclass
class CrossCache:
    """What every step reads and none writes: one copy a query, whatever the beam.

    Attributes:
      cross_kv: per layer (keys, values), each [batch, length, heads, kv]; of stacked layers one
        pair, each [layers, batch, length, heads, kv].
      bias: [batch, 1, 1, length], 0 where the encoder saw a token, very negative elsewhere.
    """

    cross_kv: tuple[KeysValues, ...] | KeysValues
    bias: Array


class Dense(nn.Module):
    """Matrix product without bias; the kernel is [in, out] with logical axes."""

    features: int
    axes: tuple[str, str]
    dtype: Any
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.variance_scaling(self.init_scale, "fan_in", "truncated_normal")
        kernel = partitioning.param_with_axes(
            "kernel", init, (x.shape[-1], self.features), jnp.float32, axes=self.axes
        )
        return jnp.dot(x, kernel.astype(self.dtype))


class RMSNorm(nn.Module):
    """x / rms(x) * scale, in float32 (Zhang and Sennrich 2019; T5's layer norm)."""

    dtype: Any
    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = partitioning.param_with_axes(
            "scale", nn.initializers.ones, (x.shape[-1],), jnp.float32, axes=("embed",)
        )
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return (x * jax.lax.rsqrt(mean_square + self.epsilon) * scale).astype(self.dtype)


class Embed(nn.Module):
    """Token embedding, [vocab, embed]."""

    config: T5Config

    def setup(self) -> None:
        self.embedding = partitioning.param_with_axes(
            "embedding",
            nn.initializers.normal(self.config.embedding_scale),
            (self.config.vocab_size, self.config.embed_dim),
            jnp.float32,
            axes=("vocab", "embed"),
        )

    def __call__(self, tokens: Array) -> Array:
        return jnp.take(self.embedding, tokens, axis=0).astype(self.config.dtype)


class RelativeBias(nn.Module):
    """T5's relative position bias: one learned number a head and distance bucket."""

    config: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(self, query_positions: Array, key_positions: Array) -> Array:
        """Returns the bias [1, heads, queries, keys] for int32 positions [queries] and [keys]."""
        c = self.config
        table = partitioning.param_with_axes(
            "rel_embedding",
            nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
            (c.num_heads, c.relative_buckets),
            jnp.float32,
            axes=("heads", "relpos_buckets"),
        )
        buckets = relative_buckets(
            key_positions[None, :] - query_positions[:, None],
            bidirectional=self.bidirectional,
            num_buckets=c.relative_buckets,
            max_distance=c.relative_max_distance,
        )
        return jnp.take(table, buckets, axis=1)[None].astype(c.dtype)


def relative_buckets(
    relative_position: Array, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Array:
    """T5's buckets: exact for near positions, logarithmic up to `max_distance`, then one.

    Args:
      relative_position: int32, any shape: key position minus query position.
      bidirectional: half the buckets for keys to the right; else those share bucket 0.

    Returns:
      int32 of the same shape, in [0, num_buckets).
    """
    behind = -relative_position
    offset: Array | int = 0
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(behind < 0, num_buckets, 0)
        behind = jnp.abs(behind)
    else:
        behind = jnp.maximum(behind, 0)
    exact = num_buckets // 2
    ratio = jnp.log(jnp.maximum(behind, 1).astype(jnp.float32) / exact + np.finfo(np.float32).eps)
    far = exact + (ratio / np.log(max_distance / exact) * (num_buckets - exact)).astype(jnp.int32)
    return offset + jnp.where(behind < exact, behind, jnp.minimum(far, num_buckets - 1))


class Attention(nn.Module):
    """Multi-head attention, T5's way: no biases, no 1/sqrt(kv) (folded into the query's init)."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        joined = c.num_heads * c.head_dim
        project = functools.partial(
            Dense, features=joined, axes=("embed", "joined_kv"), dtype=c.dtype
        )
        self.query = project(init_scale=1.0 / c.head_dim)
        self.key = project()
        self.value = project()
        self.out = Dense(c.embed_dim, ("joined_kv", "embed"), c.dtype)
        self.dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,))

    def project_kv(self, x: Array) -> KeysValues:
        """Keys and values of x: [..., length, embed] -> two of [..., length, heads, kv]."""
        shape = (*x.shape[:-1], self.config.num_heads, self.config.head_dim)
        return self.key(x).reshape(shape), self.value(x).reshape(shape)

    def attend(self, x: Array, kv: KeysValues, bias: Array, deterministic: bool) -> Array:
        """Attention of x [batch, queries, embed] over `kv`; bias broadcasts to the logits.

        Shape: kv [batch, keys, heads, kv]; bias [batch | 1, heads | 1, queries | 1, keys].
        """
        c = self.config
        q = self.query(x).reshape(*x.shape[:-1], c.num_heads, c.head_dim)
        key, value = kv
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, key).astype(jnp.float32)
        weights = jax.nn.softmax(logits + bias.astype(jnp.float32)).astype(c.dtype)
        weights = self.dropout(weights, deterministic=deterministic)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return self.out(y.reshape(*y.shape[:-2], -1))

    def __call__(self, x: Array, source: Array, bias: Array, deterministic: bool) -> Array:
        return self.attend(x, self.project_kv(source), bias, deterministic)


class Mlp(nn.Module):
    """wo(gelu(wi_0 x) * wi_1 x) (Shazeer 2020), or T5 1.0's wo(relu(wi x))."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        c = self.config
        into = functools.partial(Dense, c.mlp_dim, ("embed", "mlp"), c.dtype)
        activation = FEED_FORWARD[c.feed_forward]
        if c.feed_forward.startswith("gated-"):
            hidden = activation(into(name="wi_0")(x)) * into(name="wi_1")(x)
        else:
            hidden = activation(into(name="wi")(x))
        hidden = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,))(
            hidden, deterministic=deterministic
        )
        return Dense(c.embed_dim, ("mlp", "embed"), c.dtype, name="wo")(hidden)


class EncoderLayer(nn.Module):
    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.pre_attention_layer_norm = RMSNorm(c.dtype, c.layer_norm_epsilon)
        self.attention = Attention(c)
        self.pre_mlp_layer_norm = RMSNorm(c.dtype, c.layer_norm_epsilon)
        self.mlp = Mlp(c)
        self.dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,))

    def __call__(self, x: Array, bias: Array, deterministic: bool) -> Array:
        y = self.pre_attention_layer_norm(x)
        x = x + self.dropout(self.attention(y, y, bias, deterministic), deterministic)
        y = self.pre_mlp_layer_norm(x)
        return x + self.dropout(self.mlp(y, deterministic), deterministic)


class DecoderLayer(nn.Module):
    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.pre_self_attention_layer_norm = RMSNorm(c.dtype, c.layer_norm_epsilon)
        self.self_attention = Attention(c)
        self.pre_cross_attention_layer_norm = RMSNorm(c.dtype, c.layer_norm_epsilon)
        self.encoder_decoder_attention = Attention(c)
        self.pre_mlp_layer_norm = RMSNorm(c.dtype, c.layer_norm_epsilon)
        self.mlp = Mlp(c)
        self.dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,))

    def __call__(
        self, x: Array, encoded: Array, bias: Array, cross_bias: Array, deterministic: bool
    ) -> Array:
        y = self.pre_self_attention_layer_norm(x)
        x = x + self.dropout(self.self_attention(y, y, bias, deterministic), deterministic)
        y = self.pre_cross_attention_layer_norm(x)
        cross = self.encoder_decoder_attention(y, encoded, cross_bias, deterministic)
        x = x + self.dropout(cross, deterministic)
        y = self.pre_mlp_layer_norm(x)
        return x + self.dropout(self.mlp(y, deterministic), deterministic)

    def cross_kv(self, encoded: Array) -> KeysValues:
        return self.encoder_decoder_attention.project_kv(encoded)

    def step(
        self,
        x: Array,
        position: Array,
        self_kv: KeysValues,
        bias: Array,
        cross_kv: KeysValues,
        cross_bias: Array,
        number: Array | None = None,
        ancestry: Array | None = None,
    ) -> tuple[Array, KeysValues]:
        """One token for each beam: x [batch, beam, embed] -> (x, updated self_kv).

        The beams are the "queries" of one cross-attention over the shared keys and values. With a
        `number` of the layer, self_kv is the cache of all stacked layers; ancestry: see
        `DecodingCache`, this step's slots included.
        """
        batch, beam, embed = x.shape
        y = self.pre_self_attention_layer_norm(x)
        new = self.self_attention.project_kv(y)  # two of [batch, beam, heads, kv]
        self_kv = jax.tree.map(
            functools.partial(_remember, position=position, number=number), self_kv, new
        )
        own = self_kv if number is None else of_layer(self_kv, number)
        own = of_ancestry(own, ancestry)
        flat_kv = jax.tree.map(lambda a: a.reshape(batch * beam, *a.shape[2:]), own)
        y = self.self_attention.attend(y.reshape(batch * beam, 1, embed), flat_kv, bias, True)
        x = x + y.reshape(batch, beam, embed)
        y = self.pre_cross_attention_layer_norm(x)
        x = x + self.encoder_decoder_attention.attend(y, cross_kv, cross_bias, True)
        y = self.pre_mlp_layer_norm(x)
        return x + self.mlp(y, True), self_kv

    def tail(
        self,
        x: Array,
        self_kv: KeysValues,
        bias: Array,
        cross_kv: KeysValues,
        cross_bias: Array,
    ) -> Array:
        """Several tokens for each beam at once: x [batch, beam, tail, embed] -> the same.

        Shape: bias [1, heads, tail, max_length + tail], over the cache and then the tokens of x.
        """
        batch, beam, tail, embed = x.shape
        y = self.pre_self_attention_layer_norm(x)
        new = self.self_attention.project_kv(y)
        kv = jax.tree.map(
            lambda old, now: jnp.concatenate([old, now], axis=2).reshape(
                batch * beam, -1, *old.shape[3:]
            ),
            self_kv,
            new,
        )
        y = self.self_attention.attend(y.reshape(batch * beam, tail, embed), kv, bias, True)
        x = (x + y.reshape(x.shape)).reshape(batch, beam * tail, embed)
        y = self.pre_cross_attention_layer_norm(x)
        x = x + self.encoder_decoder_attention.attend(y, cross_kv, cross_bias, True)
        y = self.pre_mlp_layer_norm(x)
        return (x + self.mlp(y, True)).reshape(batch, beam, tail, embed)


def _remember(cache: Array, new: Array, *, position: Array, number: Array | None) -> Array:
    """A cache with `new` [batch, beam, heads, kv] at a position, of a layer where it has several.

    Shape: cache [batch, slots, max_length, heads, kv], or with layers behind slots.
    """
    if number is None:
        return jax.lax.dynamic_update_slice(cache, new[:, :, None], (0, 0, position, 0, 0))
    at = (0, 0, number, position, 0, 0)
    return jax.lax.dynamic_update_slice(cache, new[:, :, None, None], at)


def of_layer(self_kv: Any, number: Array) -> KeysValues:
    """Keys and values of one of the stacked layers: [batch, beam, max_length, heads, kv] each."""
    keys, values = self_kv
    return (
        jax.lax.dynamic_index_in_dim(keys, number, axis=2, keepdims=False),
        jax.lax.dynamic_index_in_dim(values, number, axis=2, keepdims=False),
    )


def of_ancestry(self_kv: KeysValues, ancestry: Array | None) -> KeysValues:
    """Keys and values [batch, slots, max_length, heads, kv] as each hypothesis has them."""
    if ancestry is None:
        return self_kv
    batch, beam, length = ancestry.shape
    places = (ancestry * length + jnp.arange(length)).reshape(batch, beam * length)

    def read(cache: Array) -> Array:
        flat = cache.reshape(batch, -1, *cache.shape[3:])
        return jax.vmap(lambda rows, i: rows[i])(flat, places).reshape(
            batch, beam, length, *cache.shape[3:]
        )

    keys, values = self_kv
    return read(keys), read(values)
