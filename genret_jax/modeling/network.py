"""T5 (1.0 and 1.1) in Flax Linen, with T5X's parameter names and logical axes.

Without an adaptor, the parameters of a network made here and of T5X's own `t5.network` have one
tree, the same shapes and logical axis names, so that checkpoints and sharding rules pass between
the two. What differs is the decoding side: the keys and values of the encoder output are projected
once a query and are never copied for each beam, and the cache is a plain pytree that the caller
holds.

Axes used in shapes: batch, length, beam, embed, heads, kv, mlp, vocab.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import partitioning

from genret_jax.modeling.layers import (
    NEGATIVE,
    CrossCache,
    DecoderLayer,
    DecodingCache,
    Embed,
    EncoderLayer,
    KeysValues,
    RelativeBias,
    RMSNorm,
    T5Config,
    of_ancestry,
    of_layer,
)
from genret_jax.modeling.prefix_adaptor import PrefixAdaptor
from genret_jax.modeling.stacking import through_layers

Array = jax.Array


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
        ancestry = cache.ancestry
        if ancestry is not None:
            ancestry = ancestry.at[:, :, position].set(jnp.arange(ancestry.shape[1]))
        if self.config.scan_layers:
            # The whole cache is carried and written at one place a layer: a part for each layer
            # would be copied out and in.
            def stacked(layer: DecoderLayer, carry: Any, each: Any) -> tuple[Any, None]:
                (x, self_kv), (number, cross_kv) = carry, each
                found = layer.step(
                    x, position, self_kv, bias, cross_kv, cross.bias, number, ancestry
                )
                return found, None

            numbers = jnp.arange(self.config.num_decoder_layers)
            (x, self_kv), _ = self._through(
                stacked, (embedded, cache.self_kv), (numbers, cross.cross_kv)
            )
        else:

            def alone(layer: DecoderLayer, x: Array, each: Any) -> tuple[Array, KeysValues]:
                self_kv, cross_kv = each
                return layer.step(
                    x, position, self_kv, bias, cross_kv, cross.bias, ancestry=ancestry
                )

            each = zip(cache.self_kv, cross.cross_kv, strict=True)
            x, self_kv = self._through(alone, embedded, each)
        x, prefix = self.decoder_norm(x), cache.prefix
        if prefix is not None:
            prefix = prefix + self.prefix_adaptor.terms(embedded, position)
            x = self.prefix_adaptor(x, prefix)
        return x, DecodingCache(self_kv, prefix, ancestry)

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
            self_kv = of_layer(cache.self_kv, own) if stacked else own
            self_kv = of_ancestry(self_kv, cache.ancestry)
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


def empty_cache(
    config: T5Config, batch: int, beam: int, max_length: int, *, slots: int | None = None
) -> DecodingCache:
    """A cache for `max_length` steps of `batch` x `beam` hypotheses, all zero.

    Args:
      slots: hypotheses a query that there will be at most, for a cache with an ancestry.
    """
    ancestry = None
    if slots:
        ancestry = jnp.zeros((batch, beam, max_length), jnp.int32)
    layers, own = config.num_decoder_layers, (max_length, config.num_heads, config.head_dim)
    prefix = None
    if config.adaptor_rank:
        prefix = jnp.zeros((batch, beam, config.adaptor_rank), config.dtype)
    if config.scan_layers:
        zero = jnp.zeros((batch, slots or beam, layers, *own), config.dtype)
        return DecodingCache((zero, zero), prefix, ancestry)
    zero = jnp.zeros((batch, slots or beam, *own), config.dtype)
    return DecodingCache(tuple((zero, zero) for _ in range(layers)), prefix, ancestry)
