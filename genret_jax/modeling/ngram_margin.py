"""Learning to rank on top of n-grams, as LTRGR does it: sums over n-grams are told apart.

Li et al., "Learning to Rank in Generative Retrieval" (AAAI 2024), and its released code. A
document's score is SEAL's,

    s(q, d) = sum over the n-grams n of d of c(n, d) * max(0, logit p(n | q) - logit f(n))^alpha,

where the sum's n-grams and the factors c are those with which the model ranked before, and p is its
own of this moment, so that s has a gradient.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import random
from jaxtyping import Array, Float, Int

from genret_jax.modeling.margin import margin_rank
from genret_jax.modeling.model import Batch, Params, RetrievalModel
from genret_jax.modeling.network import T5

# A certainty is not infinitely surprising. The nearest to 0 that float32 can work with; the search,
# in float64, has 1e-10, and tells certainties apart that are equal here.
_MOST_LOG_P = -1e-6


def ngram_sums(
    log_p: Float[Array, "*rows terms"],
    priors: Float[Array, "*rows terms"],
    factors: Float[Array, "*rows terms"],
    *,
    alpha: float,
) -> Float[Array, "*rows"]:
    """s(q, d) of documents; see the module's text.

    Args:
      log_p: log p(n | q) of each term's n-gram, in nats.
      priors: logit f(n).
      factors: c(n, d), 0 where there is no term.
      alpha: above 0.
    """
    p = jnp.minimum(log_p, _MOST_LOG_P)
    excess = p - jnp.log(-jnp.expm1(p)) - priors
    some = (excess > 0) & (factors > 0)
    # The inner `where` keeps 0 ** (alpha - 1) out of the derivative, where 0 * inf would be NaN.
    weights = jnp.where(some, jnp.where(some, excess, 1.0) ** alpha, 0.0)
    return (factors * weights).sum(-1)


@dataclasses.dataclass(frozen=True)
class NgramMarginModel:
    """A RetrievalModel of n-grams with cross-entropy and the margin rank loss.

    Attributes:
      model: gives log p of n-grams.
      alpha: see `ngram_sums`.
      generation, rank: weights of the two terms.
      margin, drawn_margin: see `margin_rank`.
    """

    model: RetrievalModel
    alpha: float = 2.0
    generation: float = 1.0
    rank: float = 1e-2
    margin: float = 300.0
    drawn_margin: float = 400.0

    def init(self, rng: Array) -> tuple[Params, Any]:
        return self.model.init(rng)

    def parameter_axes(self) -> Any:
        return self.model.parameter_axes()

    def loss_fn(
        self, params: Params, batch: Batch, dropout_rng: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """generation * cross-entropy of n-grams + rank * `margin_rank`.

        Args:
          batch: as for `RetrievalModel.loss_fn`, and, for as many rows as queries are ranked,
            ranked_tokens int32[rows, views, length], what the encoder reads for each view;
            ranked_paths int32[rows, paths, tokens] local ids, 0-padded, ranked_path_views
            int32[rows, paths]; ranked_firsts int32[rows, firsts, 1] and ranked_first_views
            int32[rows, firsts]; ranked_places int32[rows, 4, terms], where a term's log p stands:
            path * tokens + (tokens of the n-gram - 1), or paths * tokens + its number among the
            firsts; ranked_factors, ranked_priors float32 of that shape: see `ngram_sums`. Of the
            four documents the first two are the best-ranked right and wrong one, the others drawn
            ones.
          dropout_rng: without it, dropout is off.

        Returns:
          The loss and the parts to log, float32 scalars.
        """
        rngs = (None, None) if dropout_rng is None else tuple(random.split(dropout_rng))
        generation, parts = self.model.loss_fn(params, batch, rngs[0])
        scores = self.scores(params, batch, rngs[1])
        rank = margin_rank(
            scores[:, 0],
            scores[:, 1],
            scores[:, 3],
            margin=self.margin,
            drawn_margin=self.drawn_margin,
            drawn_positive=scores[:, 2],
        )
        loss = self.generation * generation + self.rank * rank.loss
        return loss, {**parts, **rank.parts, "loss": loss}

    def scores(
        self, params: Params, batch: Batch, dropout_rng: Array | None = None
    ) -> Float[Array, "rows 4"]:
        """s(q, d) of the documents of each row; arguments as for `loss_fn`."""
        keys = (None, None, None) if dropout_rng is None else tuple(random.split(dropout_rng, 3))
        tokens = batch["ranked_tokens"]
        rows, views, length = tokens.shape
        flat = tokens.reshape(rows * views, length)
        encoded = self._apply(params, flat, method=T5.encode, key=keys[0])
        nothing = jnp.zeros((rows * views, 1), jnp.int32)
        state = self._apply(params, encoded, flat, nothing, method=T5.decode, key=keys[1])[:, 0]
        first = jax.nn.log_softmax(self.model.docid_logits(params, state))
        place = batch["ranked_first_views"] * first.shape[-1] + batch["ranked_firsts"][..., 0]
        firsts = jnp.take_along_axis(first.reshape(rows, -1), place, axis=1)
        # By row, so that devices that share the rows need nothing of one another's.
        of_view = jax.vmap(lambda array, view: array[view])
        view = batch["ranked_path_views"]
        paths = self._path_log_p(
            params,
            of_view(encoded.reshape(rows, views, length, -1), view),
            of_view(tokens, view),
            batch["ranked_paths"],
            keys[2],
        )
        log_p = jnp.concatenate([paths.reshape(rows, -1), firsts], axis=1)
        places = batch["ranked_places"]
        found = jnp.take_along_axis(log_p, places.reshape(rows, -1), axis=1).reshape(places.shape)
        return ngram_sums(found, batch["ranked_priors"], batch["ranked_factors"], alpha=self.alpha)

    def _path_log_p(
        self,
        params: Params,
        encoded: Float[Array, "rows paths length embed"],
        encoder_tokens: Int[Array, "rows paths length"],
        paths: Int[Array, "rows paths tokens"],
        key: Array | None,
    ) -> Float[Array, "rows paths tokens"]:
        """log p of every n-gram that a path begins with, by its length."""
        rows, count, size = paths.shape
        flat = paths.reshape(rows * count, size)
        states = self._apply(
            params,
            encoded.reshape(rows * count, *encoded.shape[2:]),
            encoder_tokens.reshape(rows * count, -1),
            self.model.docids.to_model(jnp.pad(flat, ((0, 0), (1, 0)))[:, :-1]),
            method=T5.decode,
            key=key,
        )
        log_p = jax.nn.log_softmax(self.model.docid_logits(params, states))
        tokens = jnp.take_along_axis(log_p, flat[..., None], axis=-1)[..., 0]
        return jnp.cumsum(jnp.where(flat > 0, tokens, 0.0), axis=1).reshape(paths.shape)

    def _apply(self, params: Params, *arguments: Array, method: Any, key: Array | None) -> Any:
        return self.model.network.apply(
            {"params": params},
            *arguments,
            deterministic=key is None,
            rngs={} if key is None else {"dropout": key},
            method=method,
        )
