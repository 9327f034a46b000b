"""The models behind the methods that T5X calls.

T5X's trainer needs the methods and not its base class, so nothing here imports it. What differs
from the native runner is at this border alone: metrics are clu's, beams come worst first, and
tokens are those of the whole vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import clu.metrics
import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from genret_jax.data.contrastive_tasks import ContrastiveFeatureConverter
from genret_jax.data.vocabulary import SeqioVocabulary
from genret_jax.errors import UserError
from genret_jax.indexing import Index
from genret_jax.modeling.model import Batch, Params, RetrievalModel
from genret_jax.modeling.ranking_model import RankingModel
from genret_jax.recipe import configured
from genret_jax.stages import second
from genret_jax.stages.common import retrieval_model
from genret_jax.trie import DeviceTrie

Metrics = dict[str, Any]


class T5XModel:
    """A trainable model as T5X's train, eval and infer take it.

    Args:
      trainable: gives the loss: a RetrievalModel, or a RankingModel over one.
      model: writes the docids.
      index: vocabulary, and the identifiers that exist.
      optimizer_def: a t5x.optimizers.OptimizerDef; None where nothing is trained.
      beam: identifiers that a prediction holds.
    """

    FEATURE_CONVERTER_CLS = ContrastiveFeatureConverter

    def __init__(
        self,
        trainable: RetrievalModel | RankingModel,
        model: RetrievalModel,
        index: Index,
        *,
        optimizer_def: Any = None,
        beam: int = 10,
    ):
        if beam < 1:
            raise UserError(f"beam must be at least 1, found {beam}")
        self.optimizer_def = optimizer_def
        self.trainable, self.model, self.beam = trainable, model, beam
        self._trie = index.trie
        self.input_vocabulary = self.output_vocabulary = SeqioVocabulary(index.vocabulary)

    @functools.cached_property
    def trie(self) -> DeviceTrie:
        """The trie's arrays on the host: a program with many processes puts them where it runs."""
        with jax.ensure_compile_time_eval():
            return jax.tree.map(np.asarray, self._trie.on_device())

    def get_initial_variables(
        self,
        rng: Array,
        input_shapes: Mapping[str, Any],
        input_types: Mapping[str, Any] | None = None,
    ) -> Any:
        """Fresh parameters and their logical axes; no shape of the input decides on them."""
        del input_shapes, input_types
        params, axes = self.trainable.init(rng)
        return flax.core.freeze({"params": params, "params_axes": axes})

    def loss_fn(
        self, params: Params, batch: Batch, dropout_rng: Array | None
    ) -> tuple[Array, Metrics]:
        """The loss, and its parts as means over the steps of a report."""
        loss, parts = self.trainable.loss_fn(params, batch, dropout_rng)
        mean = clu.metrics.Average.from_model_output
        return loss, {name: mean(jnp.atleast_1d(value)) for name, value in parts.items()}

    def eval_fn(self, params: Params, batch: Batch) -> tuple[Array, Metrics]:
        """The same without dropout."""
        return self.loss_fn(params, batch, None)

    def predict_batch(
        self, params: Params, batch: Batch, rng: Array | None = None
    ) -> Int[Array, "batch beam length"]:
        """Identifiers alone; see `predict_batch_with_aux`."""
        return self.predict_batch_with_aux(params, batch, rng)[0]

    def predict_batch_with_aux(
        self,
        params: Params,
        batch: Batch,
        rng: Array | None = None,
        *,
        num_decodes: int | None = None,
        return_all_decodes: bool = True,
        decoder_params: Mapping[str, Any] | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """Constrained beam search, in T5X's order: the best identifier comes last.

        Args:
          batch: with encoder_input_tokens int32[batch, length].
          rng: not used: the search is deterministic.
          num_decodes: size of the beam; the model's own by default.
          return_all_decodes: False for the best identifier alone.
          decoder_params: {"trie": DeviceTrie} searches another one, such as a part of it.

        Returns:
          int32[batch, beam, length], 0-padded tokens of the whole vocabulary, and
          {"scores": float32[batch, beam], log p, ascending; -inf where the beam found no more
          identifiers, "row": int32[batch, beam], the trie's row, -1 there}. Without
          return_all_decodes the beam axis is gone.
        """
        del rng
        trie = jax.tree.map(jnp.asarray, (decoder_params or {}).get("trie", self.trie))
        found = self.model.search(
            params, batch["encoder_input_tokens"], trie, beam=num_decodes or self.beam
        )
        decodes = self.model.docids.to_model(found.tokens)
        flipped = jax.tree.map(lambda x: x[:, ::-1], (decodes, found.scores, found.row))
        if not return_all_decodes:
            flipped = jax.tree.map(lambda x: x[:, -1], flipped)
        decodes, scores, row = flipped
        return decodes, {"scores": scores, "row": row}

    def score_batch(
        self, params: Params, batch: Batch, return_intermediates: bool = False
    ) -> Float[Array, " batch"]:
        """log p of the targets, teacher-forced.

        Raises:
          ValueError: intermediates are wanted; the network keeps none.
        """
        if return_intermediates:
            raise ValueError("the network keeps no intermediates; give return_intermediates=False")
        docids = self.model.docids.to_local(batch["decoder_target_tokens"])
        return self.model.score(params, batch["encoder_input_tokens"], docids)


def docid_model(index: Index, *, optimizer_def: Any = None, beam: int = 10) -> T5XModel:
    """Stage 1 over an index, with the recipe of the gin configuration: for gin files."""
    model = retrieval_model(configured(), index)
    return T5XModel(model, model, index, optimizer_def=optimizer_def, beam=beam)


def ranking_model(
    index: Index, *, prefix_negatives: int, optimizer_def: Any = None, beam: int = 10
) -> T5XModel:
    """Stage 2 likewise.

    Args:
      prefix_negatives: of an example, as the tasks have them (`tasks.recipe.prefix_negatives`).

    Raises:
      UserError: the recipe has no stage 2.
    """
    recipe = configured()
    if not recipe.contrastive.wanted:
        raise UserError(
            "ContrastiveConfig.prefix and ContrastiveConfig.retrieval are 0: there is no stage 2; "
            "include methods/dogr.gin, or give one of them a weight"
        )
    model = retrieval_model(recipe, index)
    ranking = second.ranking_model(recipe.contrastive, model, prefix_negatives=prefix_negatives)
    return T5XModel(ranking, model, index, optimizer_def=optimizer_def, beam=beam)
