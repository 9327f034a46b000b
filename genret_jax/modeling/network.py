"""T5 (1.0 and 1.1) in Flax Linen, with T5X's parameter names and logical axes.

Without an adaptor, the parameters of a network made here and of T5X's own `t5.network` have one
tree, the same shapes and logical axis names, so that checkpoints and sharding rules pass between
the two. What differs is the decoding side: the keys and values of the encoder output are projected
once a query and are never copied for each beam, and the cache is a plain pytree that the caller
holds.

Axes used in shapes: batch, length, beam, embed, heads, kv, mlp, vocab.
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

from genret_jax.modeling.prefix_adaptor import PrefixAdaptor
from genret_jax.modeling.stacking import through_layers

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

    Attributes:
      self_kv: per layer (keys, values), each [batch, beam, max_length, heads, kv]; of stacked
        layers one pair, each [batch, beam, layers, max_length, heads, kv].
      prefix: [batch, beam, rank], of the adaptor; None without one.
    """

    self_kv: tuple[KeysValues, ...] | KeysValues
    prefix: Array | None = None

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
    ) -> tuple[Array, KeysValues]:
        """One token for each beam: x [batch, beam, embed] -> (x, updated self_kv).

        The beams are the "queries" of one cross-attention over the shared keys and values. With a
        `number` of the layer, self_kv is the cache of all stacked layers.
        """
        batch, beam, embed = x.shape
        y = self.pre_self_attention_layer_norm(x)
        new = self.self_attention.project_kv(y)  # two of [batch, beam, heads, kv]
        self_kv = jax.tree.map(
            functools.partial(_remember, position=position, number=number), self_kv, new
        )
        own = self_kv if number is None else _of_layer(self_kv, number)
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


class Encoder(nn.Module):
    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.relpos_bias = RelativeBias(c, bidirectional=True)
        self.layers = _layers(EncoderLayer, c, c.num_encoder_layers, deterministic=3)
        self.encoder_norm = RMSNorm(c.dtype, c.layer_norm_epsilon)
        self.dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,))

    def __call__(self, embedded: Array, bias: Array, deterministic: bool) -> Array:
        positions = jnp.arange(embedded.shape[1])
        bias = bias + self.relpos_bias(positions, positions)

        def body(layer: EncoderLayer, x: Array, _: None) -> tuple[Array, None]:
            return layer(x, bias, deterministic), None

        x = self.dropout(embedded, deterministic)
        x, _ = through_layers(self.layers, body, x, length=self.config.num_encoder_layers)
        return self.dropout(self.encoder_norm(x), deterministic)


class Decoder(nn.Module):
    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.relpos_bias = RelativeBias(c, bidirectional=False)
        self.layers = _layers(DecoderLayer, c, c.num_decoder_layers, deterministic=5)
        self.decoder_norm = RMSNorm(c.dtype, c.layer_norm_epsilon)
        self.dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,))
        if not c.tied_embeddings:
            self.logits_dense = OutputMatrix(c)
        if c.adaptor_rank:
            self.prefix_adaptor = PrefixAdaptor(c.embed_dim, c.adaptor_rank, c.dtype)

    def _through(self, body: Any, carry: Any, each: Any = None) -> tuple[Any, Any]:
        return through_layers(self.layers, body, carry, each, length=self.config.num_decoder_layers)

    def __call__(
        self, embedded: Array, encoded: Array, cross_bias: Array, deterministic: bool
    ) -> Array:
        positions = jnp.arange(embedded.shape[1])
        causal = jnp.where(positions[:, None] >= positions[None, :], 0.0, NEGATIVE)
        bias = causal + self.relpos_bias(positions, positions)

        def body(layer: DecoderLayer, x: Array, _: None) -> tuple[Array, None]:
            return layer(x, encoded, bias, cross_bias, deterministic), None

        x, _ = self._through(body, self.dropout(embedded, deterministic))
        states = self.dropout(self.decoder_norm(x), deterministic)
        return self._adapted(states, embedded, positions)

    def _adapted(
        self, states: Array, embedded: Array, positions: Array, before: Array | None = None
    ) -> Array:
        """States [..., length, embed] by the prefixes, whose sum was `before` [..., rank]."""
        if not self.config.adaptor_rank:
            return states
        prefix = jnp.cumsum(self.prefix_adaptor.terms(embedded, positions), axis=-2)
        prefix = prefix if before is None else prefix + before[..., None, :]
        return self.prefix_adaptor(states, prefix)

    def cross_kv(self, encoded: Array) -> tuple[KeysValues, ...] | KeysValues:
        _, kv = self._through(lambda layer, _, __: (None, layer.cross_kv(encoded)), None)
        return kv

    def step(
        self, embedded: Array, position: Array, cache: DecodingCache, cross: CrossCache
    ) -> tuple[Array, DecodingCache]:
        keys = jnp.arange(cache.max_length)
        bias = self.relpos_bias(position[None], keys) + jnp.where(keys <= position, 0.0, NEGATIVE)
        if self.config.scan_layers:
            # The whole cache is carried and written at one place a layer: a part for each layer
            # would be copied out and in.
            def stacked(layer: DecoderLayer, carry: Any, each: Any) -> tuple[Any, None]:
                (x, self_kv), (number, cross_kv) = carry, each
                return layer.step(x, position, self_kv, bias, cross_kv, cross.bias, number), None

            numbers = jnp.arange(self.config.num_decoder_layers)
            (x, self_kv), _ = self._through(
                stacked, (embedded, cache.self_kv), (numbers, cross.cross_kv)
            )
        else:

            def alone(layer: DecoderLayer, x: Array, each: Any) -> tuple[Array, KeysValues]:
                self_kv, cross_kv = each
                return layer.step(x, position, self_kv, bias, cross_kv, cross.bias)

            each = zip(cache.self_kv, cross.cross_kv, strict=True)
            x, self_kv = self._through(alone, embedded, each)
        x, prefix = self.decoder_norm(x), cache.prefix
        if prefix is not None:
            prefix = prefix + self.prefix_adaptor.terms(embedded, position)
            x = self.prefix_adaptor(x, prefix)
        return x, DecodingCache(self_kv, prefix)

    def tail(
        self, embedded: Array, position: Array, cache: DecodingCache, cross: CrossCache
    ) -> Array:
        max_length, tail = cache.max_length, embedded.shape[2]
        old, new = jnp.arange(max_length), position + jnp.arange(tail)
        seen = jnp.concatenate(
            [
                jnp.broadcast_to(old < position, (tail, max_length)),
                new[None, :] <= new[:, None],
            ],
            axis=1,
        )
        bias = self.relpos_bias(new, jnp.concatenate([old, new])) + jnp.where(seen, 0.0, NEGATIVE)
        stacked = self.config.scan_layers

        def body(layer: DecoderLayer, x: Array, each: Any) -> tuple[Array, None]:
            own, cross_kv = each
            self_kv = _of_layer(cache.self_kv, own) if stacked else own
            return layer.tail(x, self_kv, bias, cross_kv, cross.bias), None

        each: Any
        if stacked:
            each = jnp.arange(self.config.num_decoder_layers), cross.cross_kv
        else:
            each = zip(cache.self_kv, cross.cross_kv, strict=True)
        x, _ = self._through(body, embedded, each)
        return self._adapted(self.decoder_norm(x), embedded, new, cache.prefix)


def _layers(kind: type[nn.Module], config: T5Config, count: int, *, deterministic: int) -> Any:
    """Layers of a side, or the one of which a scan makes all.

    Args:
      deterministic: which argument of a layer's call is a Python bool; 0 is the layer itself.
    """
    if config.remat:
        # A loop keeps the compiler from merging the second forward pass with the first.
        static, cse = (deterministic,), not config.scan_layers
        kind = nn.remat(kind, static_argnums=static, prevent_cse=cse)
    return kind(config) if config.scan_layers else [kind(config) for _ in range(count)]


def _remember(cache: Array, new: Array, *, position: Array, number: Array | None) -> Array:
    """A cache with `new` [batch, beam, heads, kv] at a position, of a layer where it has several.

    Shape: cache [batch, beam, max_length, heads, kv], or with layers behind beam.
    """
    if number is None:
        return jax.lax.dynamic_update_index_in_dim(cache, new, position, axis=2)
    at = (0, 0, number, position, 0, 0)
    return jax.lax.dynamic_update_slice(cache, new[:, :, None, None], at)


def _of_layer(self_kv: Any, number: Array) -> KeysValues:
    """Keys and values of one of the stacked layers: [batch, beam, max_length, heads, kv] each."""
    keys, values = self_kv
    return (
        jax.lax.dynamic_index_in_dim(keys, number, axis=2, keepdims=False),
        jax.lax.dynamic_index_in_dim(values, number, axis=2, keepdims=False),
    )


class OutputMatrix(nn.Module):
    """T5 1.1's output matrix, [embed, vocab]; read by columns, so that only docids are scored."""

    config: T5Config

    def setup(self) -> None:
        self.kernel = partitioning.param_with_axes(
            "kernel",
            nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal"),
            (self.config.embed_dim, self.config.vocab_size),
            jnp.float32,
            axes=("embed", "vocab"),
        )

    def columns(self, select: Any) -> Array:
        return select(self.kernel)


class T5(nn.Module):
    """Encoder and decoder. Methods are called with `network.apply(..., method=...)`."""

    config: T5Config

    def setup(self) -> None:
        self.token_embedder = Embed(self.config)
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        if self.config.learned_temperature:
            self.log_temperature = partitioning.param_with_axes(
                "log_temperature", nn.initializers.zeros, (), jnp.float32, axes=()
            )

    def encode(self, tokens: Array, *, deterministic: bool = True) -> Array:
        """int32 [batch, length], 0 = padding -> [batch, length, embed]."""
        return self.encoder(self.token_embedder(tokens), padding_bias(tokens), deterministic)

    def decode(
        self, encoded: Array, encoder_tokens: Array, tokens: Array, *, deterministic: bool = True
    ) -> Array:
        """Teacher-forced states [batch, docid length, embed] for decoder inputs `tokens`."""
        bias = padding_bias(encoder_tokens)
        return self.decoder(self.token_embedder(tokens), encoded, bias, deterministic)

    def __call__(
        self, encoder_tokens: Array, decoder_tokens: Array, *, deterministic: bool = True
    ) -> Array:
        return self.states(encoder_tokens, decoder_tokens, deterministic=deterministic)[1]

    def states(
        self, encoder_tokens: Array, decoder_tokens: Array, *, deterministic: bool = True
    ) -> tuple[Array, Array]:
        """Encoder output [batch, length, embed] and decoder states [batch, docid length, embed]."""
        encoded = self.encode(encoder_tokens, deterministic=deterministic)
        decoded = self.decode(encoded, encoder_tokens, decoder_tokens, deterministic=deterministic)
        return encoded, decoded

    def recur(
        self, encoded: Array, encoder_tokens: Array, steps: int, *, deterministic: bool = True
    ) -> Array:
        """Decoder states [batch, steps, embed], each fed with the state before it.

        No token is read but the first, 0: what the decoder says does not hang on what is written.
        With dropout, the layers over the states before are computed anew for every step, and draw
        anew.
        """
        bias = padding_bias(encoder_tokens)
        fed = self.token_embedder(jnp.zeros((encoded.shape[0], 1), jnp.int32))
        states: list[Array] = []
        for _ in range(steps):
            states.append(self.decoder(fed, encoded, bias, deterministic)[:, -1:])
            fed = jnp.concatenate([fed, states[-1]], axis=1)
        return fed[:, 1:]

    def output_columns(self, select: Any) -> Array:
        """The output matrix after `select`, a function of [embed, vocab] -> [embed, chosen]."""
        if self.config.tied_embeddings:
            # T5 scales the states by embed^-1/2 when input and output share the embedding.
            return select(self.token_embedder.embedding.T) * self.config.embed_dim**-0.5
        return self.decoder.logits_dense.columns(select)

    def logits(self, states: Array) -> Array:
        """Logits over the whole vocabulary, float32 [..., vocab]."""
        kernel = self.output_columns(lambda kernel: kernel)
        kernel = kernel.astype(self.config.dtype)
        return jnp.dot(states, kernel, preferred_element_type=jnp.float32)

    def start(self, encoder_tokens: Array) -> CrossCache:
        """Encodes the queries once and projects the decoder's view of them, layer by layer."""
        encoded = self.encode(encoder_tokens)
        return CrossCache(self.decoder.cross_kv(encoded), padding_bias(encoder_tokens))

    def step(
        self, tokens: Array, position: Array, cache: DecodingCache, cross: CrossCache
    ) -> tuple[Array, DecodingCache]:
        """Decoder states [batch, beam, embed] after int32 `tokens` [batch, beam] at `position`."""
        return self.decoder.step(self.token_embedder(tokens), position, cache, cross)

    def tail(
        self, tokens: Array, position: Array, cache: DecodingCache, cross: CrossCache
    ) -> Array:
        """What `step` would give for int32 `tokens` [batch, beam, tail] from `position` on.

        Returns decoder states [batch, beam, tail, embed]; the cache is read, not written.
        """
        return self.decoder.tail(self.token_embedder(tokens), position, cache, cross)


def padding_bias(tokens: Array) -> Array:
    """float32 [batch, 1, 1, length]: 0 at tokens, very negative at padding (id 0)."""
    return jnp.where(tokens > 0, 0.0, NEGATIVE)[:, None, None, :]


def empty_cache(config: T5Config, batch: int, beam: int, max_length: int) -> DecodingCache:
    """A cache for `max_length` steps of `batch` x `beam` hypotheses, all zero."""
    layers, own = config.num_decoder_layers, (max_length, config.num_heads, config.head_dim)
    prefix = None
    if config.adaptor_rank:
        prefix = jnp.zeros((batch, beam, config.adaptor_rank), config.dtype)
    if config.scan_layers:
        zero = jnp.zeros((batch, beam, layers, *own), config.dtype)
        return DecodingCache((zero, zero), prefix)
    zero = jnp.zeros((batch, beam, *own), config.dtype)
    return DecodingCache(tuple((zero, zero) for _ in range(layers)), prefix)
