"""Document -> query: the same network, writing text pieces instead of docids (doc2query).

Trained on (document text, train query) pairs with teacher forcing, as Nogueira et al. 2019 and
Nogueira and Lin 2019 (docTTTTTquery) do; queries are sampled, not searched for, because a beam
gives many times the same query.

What a query names is mostly in its document, and a small network from scratch cannot write words
that it has seldom seen. So it may copy them: CopyNet's joint softmax (Gu et al. 2016, eq. 4 to 8)
over the vocabulary and the places of the document,

    p(w | h) = (exp g_w + sum_{i: x_i = w} exp c_i) / Z,    c_i = h . e_i / sqrt(embed)

for a decoder state h, vocabulary logits g and encoder outputs e_i at pieces x_i. Both sides of the
product are there already, so the network has no further parameters and T5X's checkpoints fit.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from genret_jax.modeling import losses
from genret_jax.modeling.layers import CrossCache, DecodingCache, T5Config
from genret_jax.modeling.model import Batch, Params, RetrievalModel
from genret_jax.modeling.network import T5, empty_cache, padding_bias
from genret_jax.vocabularies import EOS, UNK, DocidSpace

_LEAST = 1e-30  # of a probability before its logarithm, so that gradients stay finite


@struct.dataclass
class Sampled:
    """Sampled queries.

    Attributes:
      tokens: int32[rows, samples, length], text pieces, EOS included where it was reached, then 0.
      log_p: float32[rows, samples], log p of the query by the model itself (temperature 1, nothing
        cut off), EOS included.
      ended: bool[rows, samples], whether EOS was reached within the length.
    """

    tokens: Array
    log_p: Array
    ended: Array


@struct.dataclass
class _Loop:
    """State of the sampling loop."""

    position: Array
    last: Array
    cache: DecodingCache
    sampled: Sampled


@dataclasses.dataclass(frozen=True)
class QueryGenerator:
    """A T5 that writes queries; `trainer.Trainable`.

    Attributes:
      config: of the network.
      pieces: text pieces of the vocabulary (`Vocabulary.text_size`).
      copying: whether pieces of the document may be copied.
      label_smoothing, z_loss: see `losses.docid_cross_entropy`.
    """

    config: T5Config
    pieces: int
    copying: bool = True
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @property
    def _writer(self) -> RetrievalModel:
        """The model whose "docid tokens" are text pieces: local ids are model ids."""
        return RetrievalModel(self.config, DocidSpace(start=2, size=self.pieces))

    def init(self, rng: Array) -> tuple[Params, Any]:
        """Fresh parameters and, in the same tree, their logical axis names."""
        return self._writer.init(rng)

    def parameter_axes(self) -> Any:
        """The logical axis names alone, without making parameters."""
        return self._writer.parameter_axes()

    def piece_logits(
        self,
        params: Params,
        decoded: Float[Array, "batch states embed"],
        encoded: Float[Array, "batch length embed"],
        document: Int[Array, "batch length"],
    ) -> Float[Array, "batch states pieces"]:
        """Logits of text pieces, up to a constant a state; -inf for padding.

        Args:
          decoded: decoder states, several a document.
          encoded: encoder output of the documents.
          document: their pieces, 0-padded. EOS and unknown pieces are not copied.
        """
        logits = self._writer.docid_logits(params, decoded)
        if not self.copying:
            return logits
        copies = jnp.einsum("bse,ble->bsl", decoded, encoded, preferred_element_type=jnp.float32)
        copies = copies * self.config.embed_dim**-0.5
        copies = jnp.where((document > UNK)[:, None, :], copies, -jnp.inf)
        return _joint(logits, copies, document)

    def loss_fn(
        self, params: Params, batch: Batch, dropout_rng: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Cross-entropy of the query's pieces.

        Args:
          batch: encoder_input_tokens int32[batch, length], a document's pieces;
            decoder_input_tokens and decoder_target_tokens int32[batch, query length], the query's,
            and decoder_loss_weights float32 of the same shape.
          dropout_rng: without it, dropout is off.

        Returns:
          The loss and the parts to log, float32 scalars.
        """
        encoded, decoded = self._writer.states(params, batch, dropout_rng)
        out = losses.docid_cross_entropy(
            self.piece_logits(params, decoded, encoded, batch["encoder_input_tokens"]),
            batch["decoder_target_tokens"],
            batch["decoder_loss_weights"],
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )
        names = ("cross_entropy", "z_loss", "token_accuracy")
        return out.loss, {"loss": out.loss, **{name: out.parts[name] for name in names}}

    def sample(
        self,
        params: Params,
        document: Int[Array, "rows length"],
        keys: PRNGKeyArray,
        *,
        samples: int,
        length: int,
        top_k: int,
        temperature: float,
    ) -> Sampled:
        """Samples queries of documents; jit it with the keyword arguments static.

        At every step one of the `top_k` best pieces is drawn with p proportional to
        p^(1 / temperature) (Fan et al. 2018). Unknown pieces are never drawn, and EOS not as the
        first.

        Args:
          document: text pieces and EOS, 0-padded.
          keys: [rows] random keys; a row's queries depend on its key and document, not on the
            other rows.
          samples: queries of a row.
          length: pieces of a query at most, EOS included.
          top_k: from 1 (the best piece always) up.
          temperature: above 0; below 1 more of the likely, above 1 less.
        """
        if samples < 1 or length < 1 or top_k < 1 or not temperature > 0:
            raise ValueError(
                f"samples {samples}, length {length}, top_k {top_k} must be from 1 up and "
                f"temperature {temperature} above 0"
            )
        start: Any = self.network.apply({"params": params}, document, method=_start)
        encoded, cross = start
        rows = document.shape[0]
        nothing = Sampled(
            tokens=jnp.zeros((rows, samples, length), jnp.int32),
            log_p=jnp.zeros((rows, samples), jnp.float32),
            ended=jnp.zeros((rows, samples), bool),
        )
        cache = empty_cache(self.config, rows, samples, length)
        last = jnp.zeros((rows, samples), jnp.int32)
        loop = _Loop(jnp.zeros((), jnp.int32), last, cache, nothing)

        def once(loop: _Loop) -> _Loop:
            states, cache = self._step(params, loop, cross)
            logits = self.piece_logits(params, states, encoded, document)
            drawn = _draw(logits, keys, loop.position, top_k=top_k, temperature=temperature)
            before = loop.sampled
            drawn = jnp.where(before.ended, 0, drawn)
            log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], -1)[..., 0]
            sampled = Sampled(
                tokens=before.tokens.at[:, :, loop.position].set(drawn),
                log_p=before.log_p + jnp.where(before.ended, 0.0, log_p),
                ended=before.ended | (drawn == EOS),
            )
            return _Loop(loop.position + 1, drawn, cache, sampled)

        def unfinished(loop: _Loop) -> Bool[Array, ""]:
            return (loop.position < length) & ~loop.sampled.ended.all()

        return jax.lax.while_loop(unfinished, once, loop).sampled

    @property
    def network(self) -> T5:
        return self._writer.network

    def _step(self, params: Params, loop: _Loop, cross: CrossCache) -> tuple[Array, DecodingCache]:
        found: Any = self.network.apply(
            {"params": params}, loop.last, loop.position, loop.cache, cross, method=T5.step
        )
        return found


def _start(network: T5, document: Array) -> tuple[Array, CrossCache]:
    """Encoder output, and the decoder's view of it, from one pass of the encoder."""
    encoded = network.encode(document)
    return encoded, CrossCache(network.decoder.cross_kv(encoded), padding_bias(document))


def _joint(
    logits: Float[Array, "batch states pieces"],
    copies: Float[Array, "batch states length"],
    document: Int[Array, "batch length"],
) -> Float[Array, "batch states pieces"]:
    """log(exp logits + exp copies, summed by piece), as logits."""
    most = jnp.maximum(logits.max(-1), copies.max(-1))[..., None]
    most = jax.lax.stop_gradient(most)
    written, copied = jnp.exp(logits - most), jnp.exp(copies - most)
    add = jax.vmap(lambda p, c, pieces: p.at[:, pieces].add(c))
    joint = jnp.log(jnp.maximum(add(written, copied, document), _LEAST)) + most
    return joint.at[..., 0].set(-jnp.inf)


def _draw(
    logits: Float[Array, "rows samples pieces"],
    keys: PRNGKeyArray,
    position: Int[Array, ""],
    *,
    top_k: int,
    temperature: float,
) -> Int[Array, "rows samples"]:
    """One of the best pieces each."""
    ids = jnp.arange(logits.shape[-1])
    never = (ids == UNK) | ((ids == EOS) & (position == 0))
    logits = jnp.where(never, -jnp.inf, logits)
    best, pieces = jax.lax.top_k(logits / temperature, min(top_k, logits.shape[-1]))
    here = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
    chosen = jax.vmap(jax.random.categorical)(here, best)
    return jnp.take_along_axis(pieces, chosen[..., None], -1)[..., 0].astype(jnp.int32)
