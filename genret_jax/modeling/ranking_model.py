"""Stage 2: the model that writes docids also learns how near a query is to a document."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import random
from jaxtyping import Array, Float

from genret_jax.modeling.contrastive import (
    JointWeights,
    Similarity,
    in_chunks,
    joint_loss,
    usable_columns,
)
from genret_jax.modeling.model import Batch, Params, RetrievalModel


@dataclasses.dataclass(frozen=True)
class RankingModel:
    """A RetrievalModel with the loss of DOGR's second stage.

    Attributes:
      model: gives the docid loss and the semantic vectors.
      weights: of the three terms.
      similarity, temperature, share_negatives: see `contrastive.info_nce`. With learned
        temperature (`T5Config.learned_temperature`) the number given is where it begins.
      prefix_negatives: how many of a row's negatives, the first ones, share a docid prefix with
        its document; the others were retrieved.
      chunk: rows that are encoded at a time (gradient caching); 0 encodes all at once.
    """

    model: RetrievalModel
    weights: JointWeights
    similarity: Similarity = "cosine"
    temperature: float = 0.05
    share_negatives: bool = True
    prefix_negatives: int = 0
    chunk: int = 0

    def init(self, rng: Array) -> tuple[Params, Any]:
        return self.model.init(rng)

    def parameter_axes(self) -> Any:
        return self.model.parameter_axes()

    def loss_fn(
        self, params: Params, batch: Batch, dropout_rng: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """The joint loss of `contrastive.joint_loss`.

        Args:
          batch: what stage 1 reads, and: document_tokens int32[batch, length] and
            document_docids int32[batch, docid length] (local ids) of the row's document,
            negative_document_tokens int32[batch, negatives, length], negative_document_docids,
            and for the masks document_index int32[batch], negative_document_index
            int32[batch, negatives], relevant_index int32[batch, relevant] (-1 = none) and
            document_row, negative_document_row: one number for equal docids.
          dropout_rng: without it, dropout is off.

        Returns:
          The loss and the parts to log, float32 scalars.
        """
        rngs = (None, None) if dropout_rng is None else tuple(random.split(dropout_rng))
        logits, query = self._queries(params, batch, rngs[0])
        positive, negatives = self._documents(params, batch, rngs[1])
        split = self.prefix_negatives
        index, row = batch["negative_document_index"], batch["negative_document_row"]
        known = (batch["document_index"], batch["relevant_index"], batch["document_row"])

        def masks(columns: slice) -> tuple[Array, Array, Array]:
            return usable_columns(known[0], index[:, columns], known[1], known[2], row[:, columns])

        _, prefix_mask, _ = masks(slice(None, split))
        in_batch, retrieved_mask, shared = masks(slice(split, None))
        out = joint_loss(
            logits,
            self.model.docids.to_local(batch["decoder_target_tokens"]),
            batch["decoder_loss_weights"],
            query,
            positive,
            negatives[:, :split],
            negatives[:, split:],
            temperature=self._temperature(params),
            weights=self.weights,
            similarity=self.similarity,
            share_negatives=self.share_negatives,
            prefix_mask=prefix_mask,
            retrieved_mask=retrieved_mask,
            in_batch_mask=in_batch,
            shared_mask=shared,
            label_smoothing=self.model.label_smoothing,
            z_loss=self.model.z_loss,
        )
        metrics = {"loss": out.loss, **out.parts}
        if self.model.config.learned_temperature:
            metrics["temperature"] = self._temperature(params)
        return out.loss, metrics

    def _temperature(self, params: Params) -> Any:
        if not self.model.config.learned_temperature:
            return self.temperature
        return self.temperature * jnp.exp(params["log_temperature"])

    def _queries(
        self, params: Params, batch: Batch, rng: Array | None
    ) -> tuple[Float[Array, "batch docid_length docid_vocab"], Float[Array, "batch embed"]]:
        tokens = batch["encoder_input_tokens"]
        encoded, decoded = self.model.states(params, batch, rng)
        query = self.model.query_vectors(encoded, decoded, tokens)
        logits = self.model.written_logits(params, decoded, batch["decoder_input_tokens"])
        return logits, query

    def _documents(
        self, params: Params, batch: Batch, rng: Array | None
    ) -> tuple[Float[Array, "batch embed"], Float[Array, "batch negatives embed"]]:
        """Vectors of every row's document and negatives, all encoded alike."""
        tokens, docids = (
            jnp.concatenate([batch[f"document_{x}"][:, None], batch[f"negative_document_{x}"]], 1)
            for x in ("tokens", "docids")
        )
        rows, columns = tokens.shape[:2]
        flat = {
            "tokens": tokens.reshape(rows * columns, -1),
            "docids": docids.reshape(rows * columns, -1),
        }

        def encode(part: dict[str, Array], key: Array | None = None) -> Array:
            return self.model.vectors(params, part["tokens"], part["docids"], key)

        chunk = self.chunk if self.chunk < len(flat["tokens"]) else 0
        vectors = in_chunks(encode, flat, chunk=chunk, rng=rng)
        vectors = vectors.reshape(rows, columns, -1)
        return vectors[:, 0], vectors[:, 1:]
