"""A dual encoder: queries and documents through one encoder, and InfoNCE between their vectors."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax import random
from jaxtyping import Array

from genret_jax.modeling.contrastive import info_nce, usable_columns
from genret_jax.modeling.model import Batch, Params
from genret_jax.modeling.ranking_model import RankingModel

_DECODER = "decoder"


@dataclasses.dataclass(frozen=True)
class DenseModel(RankingModel):
    """A RankingModel without docids: it has an encoder alone, whose mean is a text's vector.

    `weights` and `prefix_negatives` say nothing here: there is one term, and all negatives were
    retrieved.
    """

    def __post_init__(self) -> None:
        if self.model.vector != "encoder_mean":
            raise ValueError(f"an encoder alone has no vector {self.model.vector!r}")

    def init(self, rng: Array) -> tuple[Params, Any]:
        params, axes = self.model.init(rng)
        return _encoder_of(params), _encoder_of(axes)

    def parameter_axes(self) -> Any:
        return _encoder_of(self.model.parameter_axes())

    def loss_fn(
        self, params: Params, batch: Batch, dropout_rng: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """InfoNCE over in-batch and retrieved negatives.

        Args:
          batch: as for `RankingModel.loss_fn`; of docids only the row numbers are read, by which
            documents of equal docids would be kept apart.
          dropout_rng: without it, dropout is off.

        Returns:
          The loss and the parts to log, float32 scalars.
        """
        rngs = (None, None) if dropout_rng is None else tuple(random.split(dropout_rng))
        query = self.model.vectors(params, batch["encoder_input_tokens"], None, rngs[0])
        positive, negatives = self._documents(params, batch, rngs[1])
        in_batch, own, shared = usable_columns(
            batch["document_index"],
            batch["negative_document_index"],
            batch["relevant_index"],
            batch["document_row"],
            batch["negative_document_row"],
        )
        some = negatives.shape[1] > 0
        out = info_nce(
            query,
            positive,
            negatives if some else None,
            temperature=self._temperature(params),
            in_batch=True,
            similarity=self.similarity,
            share_negatives=self.share_negatives and some,
            negative_mask=own,
            in_batch_mask=in_batch,
            shared_mask=shared,
        )
        metrics = {"loss": out.loss, **out.parts}
        if self.model.config.learned_temperature:
            metrics["temperature"] = self._temperature(params)
        return out.loss, metrics


def _encoder_of(tree: Any) -> Any:
    return {name: part for name, part in tree.items() if name != _DECODER}
