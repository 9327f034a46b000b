"""Learning to rank on top of docids: the right document's score above those of wrong ones.

LTRGR (Li et al., AAAI 2024) sums over the n-grams of a document that a beam has found. A document
of one docid has one such term, so its score here is s(q, d) = log p(docid of d | q), in nats.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import random
from jaxtyping import Array, Bool, Float

from genret_jax.modeling.contrastive import usable_columns
from genret_jax.modeling.losses import LossOutput, docid_cross_entropy
from genret_jax.modeling.model import Batch, Params, RetrievalModel, written_log_p


def margin_rank(
    positive: Float[Array, " batch"],
    top: Float[Array, " batch"],
    drawn: Float[Array, " batch"],
    *,
    margin: float,
    drawn_margin: float,
    drawn_positive: Float[Array, " batch"] | None = None,
    top_mask: Bool[Array, " batch"] | None = None,
    drawn_mask: Bool[Array, " batch"] | None = None,
) -> LossOutput:
    """0.5 * mean max(0, s(top) - s(p) + m) + 0.5 * mean max(0, s(drawn) - s(p') + m').

    A row that keeps its margins passes no gradient. Each mean is over the rows that have such a
    negative.

    Args:
      positive: scores of documents that answer: published is the best-ranked one.
      top: of the best-ranked document that does not.
      drawn: of a random one among those ranked that do not.
      margin, drawn_margin: m and m'.
      drawn_positive: s(p'), of a random document that answers; s(p) by default.
      top_mask, drawn_mask: False where there is no such negative.

    Returns:
      LossOutput with parts `rank` (the loss) and `violations`, the share of top negatives that are
      nearer than their margin; `weight` is the number of rows with a top negative.

    Example:
      >>> one = jnp.array([-1.0])
      >>> float(margin_rank(one, one - 2, one - 9, margin=3.0, drawn_margin=4.0).loss)
      0.5
    """
    terms = []
    other = positive if drawn_positive is None else drawn_positive
    pairs = (positive, top, top_mask, margin), (other, drawn, drawn_mask, drawn_margin)
    for right, wrong, mask, by in pairs:
        usable = jnp.ones(right.shape, bool) if mask is None else mask
        lacking = jnp.where(usable, jax.nn.relu(wrong - right + by), 0.0)
        terms.append((lacking, jnp.maximum(usable.sum(), 1), usable.sum()))
    loss = sum(0.5 * lacking.sum() / count for lacking, count, _ in terms)
    violations = (terms[0][0] > 0).sum() / terms[0][1]
    parts = {"rank": jnp.asarray(loss), "violations": violations}
    return LossOutput(loss=jnp.asarray(loss), parts=parts, weight=terms[0][2].astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class MarginModel:
    """A RetrievalModel with docid cross-entropy and the margin rank loss.

    Attributes:
      model: gives the scores.
      generation, rank: weights of the two terms.
      margin, drawn_margin: see `margin_rank`.
    """

    model: RetrievalModel
    generation: float = 1.0
    rank: float = 0.1
    margin: float = 3.0
    drawn_margin: float = 4.0

    def init(self, rng: Array) -> tuple[Params, Any]:
        return self.model.init(rng)

    def parameter_axes(self) -> Any:
        return self.model.parameter_axes()

    def loss_fn(
        self, params: Params, batch: Batch, dropout_rng: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """generation * docid cross-entropy + rank * `margin_rank`.

        Args:
          batch: as for `RankingModel.loss_fn`, of whose documents the docids are read; of two
            negatives a row the first is the top-ranked, the second the drawn one.
          dropout_rng: without it, dropout is off.

        Returns:
          The loss and the parts to log, float32 scalars.
        """
        rngs = (None, None) if dropout_rng is None else tuple(random.split(dropout_rng))
        encoded, decoded = self.model.states(params, batch, rngs[0])
        targets = self.model.docids.to_local(batch["decoder_target_tokens"])
        weights = batch["decoder_loss_weights"]
        logits = self.model.written_logits(params, decoded, batch["decoder_input_tokens"])
        generation = docid_cross_entropy(
            logits,
            targets,
            weights,
            label_smoothing=self.model.label_smoothing,
            z_loss=self.model.z_loss,
        )
        others = self.model.docid_scores(
            params,
            encoded,
            batch["encoder_input_tokens"],
            batch["negative_document_docids"],
            rngs[1],
        )
        _, usable, _ = usable_columns(
            batch["document_index"],
            batch["negative_document_index"],
            batch["relevant_index"],
            batch["document_row"],
            batch["negative_document_row"],
        )
        rank = margin_rank(
            written_log_p(logits, targets, weights > 0),
            others[:, 0],
            others[:, 1],
            margin=self.margin,
            drawn_margin=self.drawn_margin,
            top_mask=usable[:, 0],
            drawn_mask=usable[:, 1],
        )
        loss = self.generation * generation.loss + self.rank * rank.loss
        return loss, {"loss": loss, **generation.parts, **rank.parts}
