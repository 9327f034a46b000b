"""Parameters of a pretrained T5, with rows for docid tokens behind its own.

Text pieces, sentinels and padding stay where the pretrained embedding has them. A docid token gets
a new row in the embedding and a new column in the output matrix:

- one that is made of words ("keywords") or pieces ("title") begins as the mean of the rows, and
  columns, of those pieces: what the model knows of the word is where fine-tuning starts from.
- any other begins at random around the mean of all pieces, each dimension with the deviation that
  it has over the pieces. The columns are made smaller where logits of the decoder's normalised
  states would be spread by more than about 1: pretrained columns tell thousands of pieces apart,
  and random ones of their size would begin with confident mistakes.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import traverse_util

from genret_jax.docids.build import KINDS
from genret_jax.docids.collisions import text_of_label
from genret_jax.docids.table import FIRST_ID, DocidTable
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.model import Params
from genret_jax.modeling.stacking import unstack_layers, with_layers
from genret_jax.pretrained.checkpoint import Checkpoint
from genret_jax.vocabularies import UNK, Vocabulary

_EMBEDDING, _OUTPUT = "token_embedder/embedding", "decoder/logits_dense/kernel"


def pretrained_start(
    params: Params,
    checkpoint: Checkpoint,
    config: T5Config,
    vocabulary: Vocabulary,
    table: DocidTable,
    *,
    seed: int = 0,
) -> Params:
    """The parameters of a checkpoint in a network with a larger vocabulary.

    Args:
      params: fresh ones, on the host: a tree of float32 arrays. What no T5 has is kept of them.
      checkpoint: a pretrained T5 of the same sizes.
      config: of the network.
      vocabulary: text pieces of the checkpoint, then docid tokens.
      table: docids, for the texts of their tokens.
      seed: of the random rows.

    Returns:
      A tree of the same shapes; no array is shared with `params`.
    """
    fresh = traverse_util.flatten_dict(unstack_layers(params), sep="/")
    found = traverse_util.flatten_dict(checkpoint.params(), sep="/")
    pieces = token_pieces(table, vocabulary)
    rng = np.random.default_rng([seed, 23])
    rows, gain = config.vocab_size, _gain(found, config)
    size = vocabulary.text_size

    def grown(matrix: np.ndarray, most: float) -> np.ndarray:
        return _grown(matrix, rows, size, vocabulary.docids.start, pieces, most, rng)

    tied = config.tied_embeddings
    found[_EMBEDDING] = grown(found[_EMBEDDING], 1 / gain if tied else np.inf)
    if not tied:
        found[_OUTPUT] = np.ascontiguousarray(grown(found[_OUTPUT].T, 1 / gain).T)
    start = traverse_util.unflatten_dict({**jax.tree.map(np.array, fresh), **found}, sep="/")
    return with_layers(start, stacked=config.scan_layers)


def token_pieces(table: DocidTable, vocabulary: Vocabulary) -> list[list[int]]:
    """Text pieces of each docid token, local ids 2 and up; none where it is a mere name."""
    kind = KINDS[table.kind].labels if table.kind in KINDS else ""
    found: list[list[int]] = []
    for label in table.labels[FIRST_ID:]:
        text = text_of_label(label) if kind else ""
        ids = [vocabulary.piece_id(text)] if kind == "pieces" else vocabulary.encode(text)
        found.append([i for i in ids if i > UNK])
    return found


def _gain(found: dict[str, Any], config: T5Config) -> float:
    """Length of a decoder state behind its norm, times what a tied output is scaled by."""
    length = float(np.linalg.norm(found["decoder/decoder_norm/scale"]))
    return max(length * (config.embed_dim**-0.5 if config.tied_embeddings else 1.0), 1e-6)


def _grown(
    matrix: np.ndarray,
    rows: int,
    text_size: int,
    start: int,
    pieces: list[list[int]],
    most: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """A pretrained matrix with rows for docid tokens.

    Args:
      matrix: float32[pretrained rows, embed].
      rows: in all.
      text_size: rows that are text pieces: what a random row is like.
      start: of the docid tokens, none below the pretrained rows.
      pieces: of each docid token.
      most: deviation of a random row's dimensions, on average, at most.
      rng: of random rows.
    """
    text = matrix[UNK + 1 : text_size]
    mean, deviation = text.mean(0), text.std(0)
    size = float(np.sqrt(np.square(deviation).mean()))
    deviation = deviation * min(1.0, most / max(size, 1e-9))
    out = np.empty((rows, matrix.shape[1]), np.float32)
    out[: len(matrix)] = matrix
    out[len(matrix) :] = mean + deviation * rng.standard_normal((rows - len(matrix), len(mean)))
    for row, ids in enumerate(pieces, start):
        if ids:
            out[row] = matrix[ids].mean(0)
    return out
