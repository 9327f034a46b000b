"""The model: the network and the docid block of its vocabulary, as loss, scores and search.

A text also has a *semantic vector*, by one of three readings of the same network, shared by queries
and documents:

- decoder_first: the state of the first decoder step, which all docid tokens are scored from.
- decoder_mean: the mean of the decoder states along the docid, teacher-forced. A query has no docid
  yet, so its vector is its first state.
- encoder_mean: the mean of the encoder's output over the text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from genret_jax.decoding import NORMALISERS, BeamResult, constrained_beam_search
from genret_jax.device_trie import DeviceTrie
from genret_jax.modeling import losses
from genret_jax.modeling.allowed import allowed_tokens
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.network import T5, empty_cache
from genret_jax.vocabularies import DocidSpace

Batch = Mapping[str, Array]
Params = Any
VECTORS = ("decoder_first", "decoder_mean", "encoder_mean")


@dataclasses.dataclass(frozen=True, eq=False)
class RetrievalModel:
    """A T5 that writes docids.

    Everything takes the parameters explicitly and can be jitted; nothing here holds state. Models
    are equal if they are the same one, since tries cannot be compared.

    Attributes:
      label_smoothing, z_loss: see `losses.docid_cross_entropy`.
      r_drop: weight of `losses.symmetric_divergence` between two passes in stage 1; 0 makes one.
      vector: which semantic vector; one of VECTORS.
      normaliser: what probabilities of tokens sum to one over, in losses and scores alike: the
        docid "vocabulary", or the "children" of the prefix in the trie.
      trie: the identifiers that exist; needed for "children" where docids are teacher-forced.
    """

    config: T5Config
    docids: DocidSpace
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    r_drop: float = 0.0
    vector: str = "decoder_first"
    normaliser: str = "vocabulary"
    trie: DeviceTrie | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.vector not in VECTORS:
            raise ValueError(f"vector must be one of {VECTORS}, found {self.vector!r}")
        if self.normaliser not in NORMALISERS:
            raise ValueError(f"normaliser must be one of {NORMALISERS}, found {self.normaliser!r}")

    @property
    def network(self) -> T5:
        return T5(self.config)

    def init(self, rng: Array) -> tuple[Params, Any]:
        """Fresh parameters and, in the same tree, their logical axis names."""
        tokens = jnp.ones((1, 2), jnp.int32)
        variables = self.network.init(
            {"params": rng, "dropout": rng}, tokens, tokens, method=_init_everything
        )
        return variables["params"], variables["params_axes"]

    def parameter_axes(self) -> Any:
        """The logical axis names alone, without making parameters."""
        found: list[Any] = []

        def init(rng: Array) -> Params:
            params, axes = self.init(rng)
            found.append(axes)
            return params

        jax.eval_shape(init, jax.random.key(0))
        return found[0]

    def docid_logits(
        self, params: Params, states: Float[Array, "... embed"]
    ) -> Float[Array, "... docid_vocab"]:
        """Logits over local docid ids, float32.

        Where these are few of the output matrix's columns, they alone are multiplied. Most of them
        would take longer to be copied out of it than the others take to be multiplied, too.
        """
        start, tokens = self.docids.start, self.docids.size - 2
        few = 2 * tokens < self.config.vocab_size

        def block(columns: Array) -> Array:
            end = jax.lax.slice_in_dim(columns, 0, 2, axis=-1)
            own = jax.lax.slice_in_dim(columns, start, start + tokens, axis=-1)
            return jnp.concatenate([end, own], axis=-1)

        kernel: Any = self.network.apply(
            {"params": params}, block if few else lambda whole: whole, method=T5.output_columns
        )
        logits = jnp.dot(
            states, kernel.astype(self.config.dtype), preferred_element_type=jnp.float32
        )
        logits = logits if few else block(logits)
        return logits.at[..., 0].set(-jnp.inf)  # padding is never written

    def teacher_forced(
        self, params: Params, batch: Batch, dropout_rng: Array | None = None
    ) -> Float[Array, "batch length docid_vocab"]:
        """Logits at every position of `decoder_input_tokens`; with dropout when given a key.

        Those of tokens that do not count in `normaliser` are -inf.
        """
        states = self.states(params, batch, dropout_rng)[1]
        return self.written_logits(params, states, batch["decoder_input_tokens"])

    def written_logits(
        self,
        params: Params,
        states: Float[Array, "*rows length embed"],
        inputs: Int[Array, "*rows length"],
    ) -> Float[Array, "*rows length docid_vocab"]:
        """Logits along docids, of the decoder's states there.

        Args:
          inputs: what the decoder read, in the model's id space: 0, then what was written before
            each place. The model's `normaliser` decides by it which logits become -inf.

        Raises:
          ValueError: the normaliser is "children", and the model has no trie.
        """
        logits = self.docid_logits(params, states)
        if self.normaliser == "vocabulary":
            return logits
        if self.trie is None:
            raise ValueError("normaliser 'children' needs the trie of the identifiers")
        *rows, length, vocab = logits.shape
        local = self.docids.to_local(inputs).reshape(-1, length)
        allowed = allowed_tokens(self.trie, local, vocab)
        return jnp.where(allowed.reshape(*rows, length, vocab), logits, -jnp.inf)

    def states(
        self, params: Params, batch: Batch, dropout_rng: Array | None = None
    ) -> tuple[Float[Array, "batch length embed"], Float[Array, "batch docid_length embed"]]:
        """Encoder output and teacher-forced decoder states of a batch, both normalised."""
        found: Any = self.network.apply(
            {"params": params},
            batch["encoder_input_tokens"],
            batch["decoder_input_tokens"],
            deterministic=dropout_rng is None,
            rngs={} if dropout_rng is None else {"dropout": dropout_rng},
            method=T5.states,
        )
        return found

    def vectors(
        self,
        params: Params,
        tokens: Int[Array, "batch length"],
        docids: Int[Array, "batch docid_length"] | None = None,
        dropout_rng: Array | None = None,
    ) -> Float[Array, "batch embed"]:
        """Semantic vectors of texts, as they come: not of length one.

        Args:
          tokens: int32, text pieces and EOS, 0-padded.
          docids: int32 local ids, 0-padded, of documents; None for queries. Only read by
            decoder_mean.
          dropout_rng: without it, dropout is off.
        """
        if docids is None or self.vector != "decoder_mean":
            docids = jnp.zeros((tokens.shape[0], 1), jnp.int32)
        inputs = self.docids.to_model(jnp.pad(docids, ((0, 0), (1, 0)))[:, :-1])
        batch = {"encoder_input_tokens": tokens, "decoder_input_tokens": inputs}
        if self.vector == "encoder_mean":
            deterministic = dropout_rng is None
            rngs = {} if dropout_rng is None else {"dropout": dropout_rng}
            encoded: Any = self.network.apply(
                {"params": params},
                tokens,
                deterministic=deterministic,
                rngs=rngs,
                method=T5.encode,
            )
            return _mean(encoded, tokens > 0)
        _, decoded = self.states(params, batch, dropout_rng)
        written = (docids > 0).at[:, 0].set(True)
        return _mean(decoded, written)

    def query_vectors(
        self, encoded: Array, decoded: Array, tokens: Int[Array, "batch length"]
    ) -> Float[Array, "batch embed"]:
        """The same for queries, from `states` computed already."""
        if self.vector == "encoder_mean":
            return _mean(encoded, tokens > 0)
        return decoded[:, 0]

    def loss_fn(
        self, params: Params, batch: Batch, dropout_rng: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Stage 1: docid cross-entropy from queries and documents alike.

        With r_drop and dropout every example passes twice: the loss is the mean of both
        cross-entropies, and r_drop times the divergence of the two predictions.

        Args:
          batch: T5X's names: encoder_input_tokens int32[batch, length], decoder_input_tokens,
            decoder_target_tokens int32[batch, docid length] in the model's id space, and
            decoder_loss_weights float32 of the same shape.
          dropout_rng: without it, dropout is off.

        Returns:
          The loss and the parts to log, float32 scalars.
        """
        rngs = [dropout_rng]
        if self.r_drop and dropout_rng is not None:
            rngs = [*jax.random.split(dropout_rng)]
        passes = [self.teacher_forced(params, batch, rng) for rng in rngs]
        weights = batch["decoder_loss_weights"]
        outs = [
            losses.docid_cross_entropy(
                logits,
                self.docids.to_local(batch["decoder_target_tokens"]),
                weights,
                label_smoothing=self.label_smoothing,
                z_loss=self.z_loss,
            )
            for logits in passes
        ]
        mean = jax.tree.map(lambda *x: sum(x) / len(x), *outs)
        if not self.r_drop:
            return mean.loss, {"loss": mean.loss, **mean.parts}
        apart = losses.symmetric_divergence(passes[0], passes[-1], weights > 0)
        loss = mean.loss + self.r_drop * apart
        return loss, {"loss": loss, **mean.parts, "r_drop": apart}

    def score(
        self,
        params: Params,
        encoder_tokens: Int[Array, "batch length"],
        docids: Int[Array, "batch docid_length"],
    ) -> Float[Array, " batch"]:
        """log p of given docids (local ids, 0-padded), teacher-forced; a beam must agree."""
        inputs = jnp.pad(docids, ((0, 0), (1, 0)))[:, :-1]
        logits = self.teacher_forced(
            params,
            {
                "encoder_input_tokens": encoder_tokens,
                "decoder_input_tokens": self.docids.to_model(inputs),
            },
        )
        return written_log_p(logits, docids, docids > 0)

    def docid_scores(
        self,
        params: Params,
        encoded: Float[Array, "batch length embed"],
        encoder_tokens: Int[Array, "batch length"],
        docids: Int[Array, "batch columns docid_length"],
        dropout_rng: Array | None = None,
    ) -> Float[Array, "batch columns"]:
        """log p of several docids a query, from its encoder output; see `score`.

        Args:
          encoded: of `states`.
          encoder_tokens: whose output it is.
          docids: local ids, 0-padded.
          dropout_rng: of the decoder; without it, dropout is off.
        """
        batch, columns, length = docids.shape
        flat = docids.reshape(batch * columns, length)
        inputs = self.docids.to_model(jnp.pad(flat, ((0, 0), (1, 0)))[:, :-1])
        decoded: Any = self.network.apply(
            {"params": params},
            jnp.repeat(encoded, columns, axis=0),
            jnp.repeat(encoder_tokens, columns, axis=0),
            inputs,
            deterministic=dropout_rng is None,
            rngs={} if dropout_rng is None else {"dropout": dropout_rng},
            method=T5.decode,
        )
        scores = written_log_p(self.written_logits(params, decoded, inputs), flat, flat > 0)
        return scores.reshape(batch, columns)

    def search(
        self,
        params: Params,
        encoder_tokens: Int[Array, "batch length"],
        trie: DeviceTrie,
        *,
        beam: int,
        trail: bool = False,
        look_ahead: Float[Array, "batch states"] | None = None,
    ) -> BeamResult:
        """Constrained beam search; the encoder runs once a query. See `constrained_beam_search`."""
        variables = {"params": params}
        batch = encoder_tokens.shape[0]
        cross = self.network.apply(variables, encoder_tokens, method=T5.start)

        def step(tokens: Array, position: Array, cache: Any) -> tuple[Array, Any]:
            states, cache = self.network.apply(
                variables, self.docids.to_model(tokens), position, cache, cross, method=T5.step
            )
            return self.docid_logits(params, states), cache

        def tail(inputs: Array, targets: Array, position: Array, cache: Any) -> Array:
            states: Any = self.network.apply(
                variables, self.docids.to_model(inputs), position, cache, cross, method=T5.tail
            )

            def log_p(place: tuple[Array, Array]) -> Array:
                states, target = place
                logits = self.docid_logits(params, states)
                logit = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
                return logit - jax.nn.logsumexp(logits, axis=-1)

            # Place by place: logits of all of them would be the largest array of the search.
            places = jnp.moveaxis(states, 2, 0), jnp.moveaxis(targets, 2, 0)
            return jnp.moveaxis(jax.lax.map(log_p, places), 0, 2)

        cache = empty_cache(self.config, batch, 1, trie.max_length, slots=beam)
        return constrained_beam_search(
            step,
            cache,
            trie,
            batch=batch,
            beam=beam,
            normaliser=self.normaliser,
            tail_fn=tail,
            trail=trail,
            look_ahead=look_ahead,
        )

    def search_and_embed(
        self,
        params: Params,
        encoder_tokens: Int[Array, "batch length"],
        trie: DeviceTrie,
        *,
        beam: int,
        look_ahead: Float[Array, "batch states"] | None = None,
    ) -> tuple[BeamResult, Float[Array, "batch embed"]]:
        """`search`, and the queries' semantic vectors; one program encodes a query once."""
        found = self.search(params, encoder_tokens, trie, beam=beam, look_ahead=look_ahead)
        return found, self.vectors(params, encoder_tokens)


def written_log_p(
    logits: Float[Array, "*rows length vocab"],
    docids: Int[Array, "*rows length"],
    written: Bool[Array, "*rows length"],
) -> Float[Array, "*rows"]:
    """log p of whole docids, in nats: the sum over the tokens that are written."""
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), docids[..., None], axis=-1)[..., 0]
    return jnp.where(written, log_p, 0.0).sum(-1)


def _mean(states: Array, counts: Array) -> Array:
    """Mean over the length of [batch, length, embed] where bool[batch, length] says so, float32."""
    weights = counts.astype(jnp.float32)[..., None]
    return (states.astype(jnp.float32) * weights).sum(1) / jnp.maximum(weights.sum(1), 1.0)


def _init_everything(network: T5, encoder_tokens: Array, decoder_tokens: Array) -> Array:
    """Touches every parameter, the output matrix included."""
    return network.logits(network(encoder_tokens, decoder_tokens, deterministic=True))
