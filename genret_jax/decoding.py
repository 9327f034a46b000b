"""Constrained beam search over any JAX step function.

Nothing here knows the network: a step function reads one token for each hypothesis and gives
logits over the docid vocabulary. The search follows only edges of the trie, and scores them by
log p over the whole docid vocabulary, so that a score is the model's probability of the
identifier and not of a choice among those allowed.

The first step runs one hypothesis a query, since there is one root; the others run in a
`while_loop` that ends when no hypothesis can grow. At each step the children of all hypotheses of
a query stand side by side in one array of a static size (`DeviceTrie.candidates`), each finding
its parent by the prefix sums of the child counts: a node with thousands of children costs its
own children, not thousands for every hypothesis.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from genret_jax.trie import DeviceTrie

NORMALISERS = ("vocabulary", "children")


class StepFn(Protocol):
    """One decoding step.

    Args:
      tokens: int32[batch, beam], the token written last (0 before the first).
      position: int32 scalar, 0 for the first step.
      cache: pytree; every leaf begins with [batch, beam].

    Returns:
      float[batch, beam, vocab] logits over local docid ids (-inf for ids never written), and the
      cache for the next step. `beam` is 1 in the first step.
    """

    def __call__(
        self, tokens: Int[Array, "batch beam"], position: Int[Array, ""], cache: Any
    ) -> tuple[Float[Array, "batch beam vocab"], Any]: ...


@struct.dataclass
class BeamResult:
    """The best identifiers of each query, best first.

    Attributes:
      tokens: int32[batch, beam, length], local docid ids, 0-padded; 0 where not valid.
      scores: float32[batch, beam], log p of the identifier, descending; -inf where not valid.
      row: int32[batch, beam], row of the trie; -1 where not valid.
      valid: bool[batch, beam], whether the hypothesis is an identifier that exists.
    """

    tokens: Int[Array, "batch beam length"]
    scores: Float[Array, "batch beam"]
    row: Int[Array, "batch beam"]
    valid: Bool[Array, "batch beam"]


@struct.dataclass
class _Beams:
    tokens: Array  # int32[batch, beam, length]
    scores: Array  # float32[batch, beam]
    state: Array  # int32[batch, beam], state of the trie
    position: Array  # int32 scalar, tokens written so far
    cache: Any


def constrained_beam_search(
    step_fn: StepFn,
    cache: Any,
    trie: DeviceTrie,
    *,
    batch: int,
    beam: int,
    normaliser: str = "vocabulary",
) -> BeamResult:
    """The `beam` most probable identifiers of each query that a beam search finds.

    With `beam` at least the number of identifiers the search is exhaustive. To be called under
    `jax.jit` with the trie as an argument.

    Args:
      step_fn: see StepFn.
      cache: for `beam` = 1: every leaf begins with [batch, 1].
      trie: the identifiers that exist.
      batch: number of queries.
      beam: hypotheses kept a query; may exceed the number of identifiers.
      normaliser: "vocabulary": scores are log p over the docid vocabulary; "children": each step
        is renormalised over the tokens that the trie allows there, as T5X's search does.

    Returns:
      BeamResult with `beam` entries a query; those beyond the identifiers found are not valid.
    """
    if beam < 1:
        raise ValueError(f"beam must be at least 1, found {beam}")
    if normaliser not in NORMALISERS:
        raise ValueError(f"normaliser must be one of {NORMALISERS}, found {normaliser!r}")

    def grow(beams: _Beams, slots: int) -> _Beams:
        last = jnp.where(
            beams.position > 0, beams.tokens[:, :, jnp.maximum(beams.position - 1, 0)], 0
        )
        logits, cache = step_fn(last, beams.position, beams.cache)
        return _extend(
            dataclasses.replace(beams, cache=cache), logits, trie, beam, slots, normaliser
        )

    beams = grow(_root(cache, batch, trie.max_length), trie.root_width)
    slots = trie.candidates(beam)
    beams = jax.lax.while_loop(
        lambda b: (b.position < trie.max_length) & (_children(b, trie) > 0).any(),
        lambda b: grow(b, slots),
        beams,
    )
    row = jnp.where(jnp.isfinite(beams.scores), trie.leaf_row[beams.state], -1)
    valid = row >= 0
    return BeamResult(
        tokens=jnp.where(valid[..., None], beams.tokens, 0),
        scores=jnp.where(valid, beams.scores, -jnp.inf),
        row=row,
        valid=valid,
    )


def _root(cache: Any, batch: int, max_length: int) -> _Beams:
    return _Beams(
        tokens=jnp.zeros((batch, 1, max_length), jnp.int32),
        scores=jnp.zeros((batch, 1), jnp.float32),
        state=jnp.zeros((batch, 1), jnp.int32),
        position=jnp.zeros((), jnp.int32),
        cache=cache,
    )


def _children(beams: _Beams, trie: DeviceTrie) -> Array:
    """int32[batch, beam]: children of each hypothesis; 0 for dead ones."""
    counts = trie.first_edge[beams.state + 1] - trie.first_edge[beams.state]
    return jnp.where(jnp.isfinite(beams.scores), counts, 0)


def _extend(
    beams: _Beams, logits: Array, trie: DeviceTrie, beam: int, slots: int, normaliser: str
) -> _Beams:
    """Replaces the hypotheses by the best `beam` among their children and the finished ones."""
    counts = _children(beams, trie)
    ends = jnp.cumsum(counts, axis=1)
    slot = jnp.arange(slots)
    parent = jax.vmap(lambda e: jnp.searchsorted(e, slot, side="right"))(ends)
    exists = slot < ends[:, -1:]
    parent = jnp.where(exists, parent, 0)

    def of_parent(x: Array) -> Array:
        return jnp.take_along_axis(x, parent, axis=1)

    edge = of_parent(trie.first_edge[beams.state] + counts - ends) + slot
    edge = jnp.where(exists, edge, 0)
    token = trie.edge_token[edge]
    logits = logits.astype(jnp.float32)
    logit = jax.vmap(lambda x, p, t: x[p, t])(logits, parent, token)
    if normaliser == "vocabulary":
        normal = jax.nn.logsumexp(logits, axis=-1)
    else:
        normal = _logsumexp_of_children(logit, parent, exists, counts.shape[1])
    grown = jnp.where(exists, of_parent(beams.scores) + logit - of_parent(normal), -jnp.inf)

    # A finished hypothesis has no children and stands for itself among the candidates.
    stays = jnp.where(trie.leaf_row[beams.state] >= 0, beams.scores, -jnp.inf)
    here = jnp.broadcast_to(jnp.arange(counts.shape[1]), counts.shape)
    scores, chosen = _top_k(jnp.concatenate([stays, grown], axis=1), beam)

    def choose(stay: Array, grow: Array) -> Array:
        return jnp.take_along_axis(jnp.concatenate([stay, grow], axis=1), chosen, axis=1)

    parent = choose(here, parent)
    tokens = jnp.take_along_axis(beams.tokens, parent[..., None], axis=1)
    written = choose(jnp.zeros_like(here), token)
    return _Beams(
        tokens=tokens.at[:, :, beams.position].set(written),
        scores=scores,
        state=choose(beams.state, edge + 1),
        position=beams.position + 1,
        cache=jax.tree.map(
            lambda x: jax.vmap(lambda rows, index: rows[index])(x, parent), beams.cache
        ),
    )


def _top_k(scores: Array, k: int) -> tuple[Array, Array]:
    """`jax.lax.top_k` that also takes fewer candidates than k: the rest scores -inf."""
    missing = k - scores.shape[1]
    if missing > 0:
        scores = jnp.pad(scores, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    best, index = jax.lax.top_k(scores, k)
    return best, jnp.where(jnp.isfinite(best), index, 0)


def _logsumexp_of_children(logit: Array, parent: Array, exists: Array, num_parents: int) -> Array:
    """float32[batch, num_parents]: log sum exp of the children's logits; 0 for none."""

    def one(logit: Array, parent: Array, exists: Array) -> Array:
        logit = jnp.where(exists, logit, -jnp.inf)
        most = jax.ops.segment_max(logit, parent, num_parents)
        most = jnp.where(jnp.isfinite(most), most, 0.0)
        total = jax.ops.segment_sum(jnp.exp(logit - most[parent]), parent, num_parents)
        return jnp.where(total > 0, jnp.log(jnp.maximum(total, 1e-38)) + most, 0.0)

    return jax.vmap(one)(logit, parent, exists)
