"""The problems that the benchmarks solve: sets of identifiers, a network, queries.

Everything follows from numbers given on the command line, so that two processes have the same
weights without sending them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from genret_jax.docids.table import EOS_ID, FIRST_ID, DocidTable
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.model import RetrievalModel
from genret_jax.vocabularies import DocidSpace

TEXT = 32_100  # pieces of T5's vocabulary; docid tokens stand behind them
SHAPES = {
    "small": {"num_encoder_layers": 8, "num_decoder_layers": 8},
    "base": {
        "embed_dim": 768,
        "num_heads": 12,
        "mlp_dim": 2048,
        "num_encoder_layers": 12,
        "num_decoder_layers": 12,
    },
    "tiny": {
        "embed_dim": 64,
        "num_heads": 2,
        "head_dim": 32,
        "mlp_dim": 128,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
    },
}
SETS = ("random", "skewed", "variable")


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is searched, by what.

    Attributes:
      ids: how many identifiers are drawn; equal ones count once.
      kind: "random": every token is as likely; "skewed": a token's probability falls with its
        number as 1 / number (Zipf), so that few nodes have most children; "variable": random,
        of length 2 to `length`, ended by EOS.
      length: tokens of an identifier, without EOS.
      vocab: docid tokens and the two reserved ids.
      shape: of the network: T5 1.1's small or base, or tiny for a trial.
      batch: queries at a time.
      query_length: encoder tokens of a query.
      dtype: of weights and activations, "float32" or "bfloat16".
      normaliser: "vocabulary", or "children": of each step's probabilities, as a model was trained;
        see `genret_jax.modeling.allowed`.
      seed: of everything.
    """

    ids: int
    kind: str = "random"
    length: int = 8
    vocab: int = 2048
    shape: str = "small"
    batch: int = 1
    query_length: int = 32
    dtype: str = "float32"
    normaliser: str = "vocabulary"
    seed: int = 0

    @property
    def tokens(self) -> np.ndarray:
        """int32[ids, length], distinct and sorted; 0-padded where lengths vary."""
        return _tokens(self.ids, self.kind, self.length, self.vocab, self.seed)

    @functools.cached_property
    def table(self) -> DocidTable:
        tokens = self.tokens
        return DocidTable(
            tokens=tokens,
            lengths=(tokens > 0).sum(1).astype(np.int32),
            documents=np.arange(len(tokens), dtype=np.int32),
            labels=("<pad>", "</s>", *(f"t{i}" for i in range(FIRST_ID, self.vocab))),
            kind="benchmark",
            settings={},
        )

    @property
    def config(self) -> T5Config:
        size = -(-(TEXT + self.vocab) // 128) * 128
        return T5Config(vocab_size=size, dtype=self.dtype, **SHAPES[self.shape])

    @property
    def docids(self) -> DocidSpace:
        return DocidSpace(start=TEXT, size=self.vocab)

    @property
    def model(self) -> RetrievalModel:
        return RetrievalModel(self.config, self.docids, normaliser=self.normaliser)

    @property
    def normalised_over(self) -> str:
        return "children" if self.normaliser == "children" else "docid tokens and EOS"

    @property
    def params(self) -> Any:
        """float32 numpy arrays: scales of one, and normal weights that keep activations even.

        The docid columns of the output matrix are three times as large as that: the scores of a
        trained network differ more than those of a random one, and a beam then has a winner.
        """
        return _params(self.shape, self.vocab, self.seed)

    def device_params(self) -> Any:
        """The same in `dtype`, where JAX computes."""
        import jax

        return jax.device_put(jax.tree.map(lambda x: x.astype(self.dtype), self.params))

    def queries(self, number: int) -> np.ndarray:
        """int32[batch, query_length]: batch `number` of queries, full to the last token."""
        rng = np.random.default_rng((self.seed, number))
        return rng.integers(3, TEXT, (self.batch, self.query_length)).astype(np.int32)


# The last ones are kept: the next problem of a grid mostly differs in batch or beam alone.
@functools.lru_cache(maxsize=1)
def _tokens(ids: int, kind: str, length: int, vocab: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = (ids, length + (kind == "variable"))
    if kind == "skewed":
        weights = 1.0 / np.arange(1, vocab - FIRST_ID + 1)
        bounds = np.cumsum(weights / weights.sum())
        tokens = FIRST_ID + np.searchsorted(bounds[:-1], rng.random(shape, np.float32))
    else:
        tokens = rng.integers(FIRST_ID, vocab, shape)
    tokens = tokens.astype(np.int32)
    if kind == "variable":
        ends = rng.integers(2, length + 1, (ids, 1))
        place = np.arange(shape[1])
        tokens = np.where(place < ends, tokens, np.where(place == ends, EOS_ID, 0))
    order = np.lexsort(tokens.T[::-1]) if ids <= 10**6 else _order(tokens, vocab)
    tokens = tokens[order].astype(np.int32)
    new = np.append(True, (tokens[1:] != tokens[:-1]).any(axis=1))
    return tokens[new]


@functools.lru_cache(maxsize=1)
def _params(shape: str, vocab: int, seed: int) -> Any:
    import jax

    problem = Problem(ids=1, shape=shape, vocab=vocab)
    shapes, _ = jax.eval_shape(problem.model.init, jax.random.key(0))
    rng = np.random.default_rng(seed + 1)

    def make(path: Any, leaf: Any) -> np.ndarray:
        if path[-1].key == "scale":
            return np.ones(leaf.shape, np.float32)
        scale = 1.0 if path[-1].key == "embedding" else leaf.shape[0] ** -0.5
        if any("query" in str(key) for key in path):
            scale /= problem.config.head_dim**0.5
        if any("logits_dense" in str(key) for key in path):
            scale *= 3.0
        return rng.normal(scale=scale, size=leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(make, shapes)


def _order(tokens: np.ndarray, vocab: int) -> np.ndarray:
    from genret_jax.trie import lexicographic_order

    order = lexicographic_order(tokens.astype(np.uint16), vocab)
    return np.arange(len(tokens)) if order is None else order
