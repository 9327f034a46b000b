"""GLEN's second phase: identifiers that are learned, and compared as distributions over tokens.

Lee, Choi and Lee, "GLEN: Generative Retrieval via Lexical Index Learning" (EMNLP 2023). Queries and
documents are decoded alike, M steps, and each step is fed with the state of the one before instead
of a token. A document's identifier is the M tokens that it finds most probable itself.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import random
from jaxtyping import Array, Bool, Float, Int

from genret_jax.decoding import BeamResult, constrained_beam_search
from genret_jax.device_trie import DeviceTrie
from genret_jax.docids.table import EOS_ID
from genret_jax.modeling.contrastive import SHORTEST, in_chunks, info_nce, usable_columns
from genret_jax.modeling.losses import LossOutput, docid_cross_entropy
from genret_jax.modeling.model import Batch, Params, RetrievalModel
from genret_jax.modeling.network import T5

_COLDEST = 1e-5


def temperature(epoch: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """max(1e-5, e^-epoch): the documents' distributions go from soft to one token a step."""
    return jnp.maximum(_COLDEST, jnp.exp(-epoch))


def id_cosine(
    query: Float[Array, "*rows steps"], document: Float[Array, "*rows steps"]
) -> Float[Array, "*rows"]:
    """Cosine of id weights: the logits of two texts at the tokens of one identifier."""
    lengths = jnp.square(query).sum(-1) * jnp.square(document).sum(-1)
    some = lengths > SHORTEST**4
    # The inner `where` keeps 0 ** -1.5 out of the derivative.
    scale = jax.lax.rsqrt(jnp.where(some, lengths, 1.0))
    return jnp.where(some, (query * document).sum(-1) * scale, 0.0)


@dataclasses.dataclass(frozen=True)
class GlenWeights:
    """What each term of `glen_loss` is multiplied by; the defaults are the published ones.

    Attributes:
      pairwise: InfoNCE over documents.
      pointwise: cross-entropy of the document's tokens.
      cosine: 1 - `id_cosine`.
    """

    pairwise: float = 1.0
    pointwise: float = 0.5
    cosine: float = 0.25

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"weight {name} must be a number >= 0, found {value}")


def glen_loss(
    query: Float[Array, "batch steps vocab"],
    positive: Float[Array, "batch steps vocab"],
    negatives: Float[Array, "batch negatives steps vocab"],
    *,
    temperature: float | Float[Array, ""],
    weights: GlenWeights | None = None,
    negative_mask: Bool[Array, "batch negatives"] | None = None,
    in_batch_mask: Bool[Array, "batch batch"] | None = None,
    shared_mask: Bool[Array, "batch batch*negatives"] | None = None,
) -> LossOutput:
    """pairwise * InfoNCE + pointwise * cross-entropy + cosine * (1 - cosine of id weights).

    With h the decoder's states, E the output matrix and q_m . E the query's logits, the published
    s(q, d) = 1/M sum_m q_m . (softmax(h^d_m E / temperature) E) is the query's logits averaged
    under the document's distribution, and that is how it is computed. InfoNCE is over s as it
    is, against the other rows' positives and all rows' negatives. The other two terms are of the
    positive alone: its tokens are those of its highest logits.

    Args:
      query, positive, negatives: logits over local docid ids; -inf for one that is never written,
        in all of them alike.
      temperature: of the documents' distributions.
      weights: of the terms.
      negative_mask, in_batch_mask, shared_mask: see `info_nce`.

    Returns:
      LossOutput with parts `pairwise`, `pairwise_accuracy`, `pointwise` and `cosine` (the mean
      cosine, not 1 - it); `weight` is the number of rows.

    Example:
      >>> logits = jnp.array([[[2.0, 0.0]]])
      >>> out = glen_loss(logits, logits, logits[:, :0, None], temperature=1.0)
      >>> round(float(out.loss), 4)  # log(1 + e^-2) / 2; there is nothing to tell it from
      0.0635
    """
    weights = weights or GlenWeights()
    query, positive, negatives = (x.astype(jnp.float32) for x in (query, positive, negatives))
    batch, steps, _ = query.shape
    finite = jnp.where(jnp.isfinite(query), query, 0.0)  # no document gives these any weight

    def distribution(logits: Array) -> Array:
        return jax.nn.softmax(logits / temperature, axis=-1).reshape(*logits.shape[:-2], -1)

    some = negatives.shape[1] > 0
    pairwise = info_nce(
        finite.reshape(batch, -1),
        distribution(positive),
        distribution(negatives) if some else None,
        temperature=float(steps),  # the mean over steps
        in_batch=True,
        similarity="dot",
        share_negatives=some,
        negative_mask=negative_mask,
        in_batch_mask=in_batch_mask,
        shared_mask=shared_mask,
    )
    tokens = positive.argmax(-1)[..., None]
    log_p = jnp.take_along_axis(jax.nn.log_softmax(query), tokens, axis=-1)
    pointwise = -log_p.mean()
    at_tokens = (jnp.take_along_axis(x, tokens, axis=-1)[..., 0] for x in (query, positive))
    cosine = id_cosine(*at_tokens).mean()
    loss = (
        weights.pairwise * pairwise.loss
        + weights.pointwise * pointwise
        + weights.cosine * (1 - cosine)
    )
    parts = {
        "pairwise": pairwise.loss,
        "pairwise_accuracy": pairwise.parts["accuracy"],
        "pointwise": pointwise,
        "cosine": cosine,
    }
    return LossOutput(loss=loss, parts=parts, weight=jnp.float32(batch))


@dataclasses.dataclass(frozen=True)
class GlenModel:
    """A RetrievalModel that decodes without reading tokens, with the loss of GLEN's second phase.

    Attributes:
      model: its network and docid block.
      steps: tokens of an identifier, M.
      weights: of the three terms.
      chunk: documents that are encoded at a time (gradient caching); 0 encodes all at once.
    """

    model: RetrievalModel
    steps: int
    weights: GlenWeights = GlenWeights()
    chunk: int = 0

    def init(self, rng: Array) -> tuple[Params, Any]:
        return self.model.init(rng)

    def parameter_axes(self) -> Any:
        return self.model.parameter_axes()

    def states(
        self, params: Params, tokens: Int[Array, "batch length"], dropout_rng: Array | None = None
    ) -> Float[Array, "batch steps embed"]:
        """Decoder states of texts, queries or documents; with dropout when given a key."""

        def both(network: T5) -> Array:
            deterministic = dropout_rng is None
            encoded = network.encode(tokens, deterministic=deterministic)
            return network.recur(encoded, tokens, self.steps, deterministic=deterministic)

        rngs = {} if dropout_rng is None else {"dropout": dropout_rng}
        found: Any = self.model.network.apply({"params": params}, rngs=rngs, method=both)
        return found

    def logits(
        self, params: Params, states: Float[Array, "*rows steps embed"]
    ) -> Float[Array, "*rows steps docid_vocab"]:
        """Over local docid ids; -inf for padding and EOS, for identifiers are of one length."""
        return self.model.docid_logits(params, states).at[..., EOS_ID].set(-jnp.inf)

    def identify(
        self, params: Params, tokens: Int[Array, "batch length"]
    ) -> tuple[Int[Array, "batch steps"], Float[Array, "batch steps"]]:
        """The identifier that a document gives itself, and its logits there (its id weights)."""
        logits = self.logits(params, self.states(params, tokens))
        return logits.argmax(-1).astype(jnp.int32), logits.max(-1)

    def loss_fn(
        self, params: Params, batch: Batch, dropout_rng: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """`glen_loss` of a batch.

        Args:
          batch: as for `RankingModel.loss_fn`, of which the docids are not read, and `epoch`
            float32[batch], passes over the train queries so far, the same in every row.
          dropout_rng: without it, dropout is off.

        Returns:
          The loss and the parts to log, float32 scalars.
        """
        rngs = (None, None) if dropout_rng is None else tuple(random.split(dropout_rng))
        query = self.logits(params, self.states(params, batch["encoder_input_tokens"], rngs[0]))
        positive, negatives = self._documents(params, batch, rngs[1])
        in_batch, own, shared = usable_columns(
            batch["document_index"],
            batch["negative_document_index"],
            batch["relevant_index"],
            batch["document_row"],
            batch["negative_document_row"],
        )
        heat = temperature(batch["epoch"].mean())
        out = glen_loss(
            query,
            positive,
            negatives,
            temperature=heat,
            weights=self.weights,
            negative_mask=own,
            in_batch_mask=in_batch,
            shared_mask=shared,
        )
        return out.loss, {"loss": out.loss, **out.parts, "temperature": heat}

    def _documents(
        self, params: Params, batch: Batch, rng: Array | None
    ) -> tuple[
        Float[Array, "batch steps docid_vocab"], Float[Array, "batch negatives steps docid_vocab"]
    ]:
        """Logits of every row's document and negatives, all encoded alike."""
        tokens = jnp.concatenate(
            [batch["document_tokens"][:, None], batch["negative_document_tokens"]], axis=1
        )
        rows, columns, length = tokens.shape
        flat = tokens.reshape(rows * columns, length)

        def encode(part: Array, key: Array | None = None) -> Array:
            return self.states(params, part, key).reshape(len(part), -1)

        states = in_chunks(encode, flat, chunk=self.chunk if self.chunk < len(flat) else 0, rng=rng)
        logits = self.logits(params, states.reshape(rows, columns, self.steps, -1))
        return logits[:, 0], logits[:, 1:]

    def search(
        self,
        params: Params,
        tokens: Int[Array, "batch length"],
        trie: DeviceTrie,
        *,
        beam: int,
    ) -> tuple[BeamResult, Float[Array, "batch beam steps"]]:
        """Constrained beam search, and the queries' logits at the tokens of what it finds.

        A step's logits do not hang on the tokens before, so all of them are there at once; a score
        is sum_m log p_m(token m), the softmax being over the docid vocabulary.
        """
        logits = self.logits(params, self.states(params, tokens))

        def step(tokens: Array, position: Array, cache: Any) -> tuple[Array, Any]:
            here = jax.lax.dynamic_index_in_dim(logits, position, axis=1)
            return jnp.broadcast_to(here, (*tokens.shape, logits.shape[-1])), cache

        found = constrained_beam_search(step, (), trie, batch=tokens.shape[0], beam=beam)
        places = jnp.moveaxis(found.tokens, 1, 2)  # [batch, steps, beam]
        return found, jnp.moveaxis(jnp.take_along_axis(logits, places, axis=-1), 1, 2)


@dataclasses.dataclass(frozen=True)
class KeywordModel:
    """GLEN's first phase: docid cross-entropy, with states fed back as the second phase does.

    A step that has learned to read the token before it is at a loss when a state is fed instead,
    and writes one and the same token at every step. So tokens are not read here either.

    Attributes:
      glen: the model of the second phase.
    """

    glen: GlenModel

    def init(self, rng: Array) -> tuple[Params, Any]:
        return self.glen.init(rng)

    def parameter_axes(self) -> Any:
        return self.glen.parameter_axes()

    def loss_fn(
        self, params: Params, batch: Batch, dropout_rng: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """`docid_cross_entropy` of a batch as `RetrievalModel.loss_fn` takes it.

        Returns:
          The loss and the parts to log, float32 scalars.
        """
        model = self.glen.model
        states = self.glen.states(params, batch["encoder_input_tokens"], dropout_rng)
        out = docid_cross_entropy(
            self.glen.logits(params, states),
            model.docids.to_local(batch["decoder_target_tokens"]),
            batch["decoder_loss_weights"],
            label_smoothing=model.label_smoothing,
            z_loss=model.z_loss,
        )
        return out.loss, {"loss": out.loss, **out.parts}
