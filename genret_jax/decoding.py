"""Constrained beam search over any JAX step function.

Nothing here knows the network: a step function reads one token for each hypothesis and gives
logits over the docid vocabulary. The search follows only edges of the trie, and scores them by
log p over the whole docid vocabulary or over the edges of a state, as the model was trained.

The first step runs one hypothesis a query, since there is one root; the others run in a
`while_loop` that ends when no hypothesis has a choice left. What then remains of the identifiers is
known, and is scored in one pass over all its tokens (`TailFn`), not token by token. As no
hypothesis can push out another there, the result is that of the search to the end.

How a step reads the children of the hypotheses depends on the level: where most tokens are allowed,
logits are masked; elsewhere the children of all hypotheses of a query stand side by side in one
array of a static size (`DeviceTrie.candidates`), each finding its parent by the prefix sums of the
child counts: a node with thousands of children costs its own children, not thousands for every
hypothesis.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from genret_jax.device_trie import DeviceTrie
from genret_jax.top_k import top_k

NORMALISERS = ("vocabulary", "children")
# A place in a rectangle of hypotheses times the widest one's children costs about a quarter of one
# in a row where the children of all stand side by side, each asking which its parent is.
_RECTANGLE = 4


class StepFn(Protocol):
    """One decoding step.

    Args:
      tokens: int32[batch, beam], the token written last (0 before the first).
      position: int32 scalar, 0 for the first step.
      cache: pytree; every leaf begins with [batch, beam]. One with a method `of_parents(parent)`,
        int32[batch, beam], is asked instead for that of hypotheses which grew from those.

    Returns:
      float[batch, beam, vocab] logits over local docid ids (-inf for ids never written), and the
      cache for the next step. `beam` is 1 in the first step.
    """

    def __call__(
        self, tokens: Int[Array, "batch beam"], position: Int[Array, ""], cache: Any
    ) -> tuple[Float[Array, "batch beam vocab"], Any]: ...


class TailFn(Protocol):
    """Several decoding steps at once, the tokens of which are known.

    Args:
      inputs: int32[batch, beam, tail], the token written last and those after it.
      targets: int32[batch, beam, tail], the token that follows each; 0 where the identifier has
        ended, and there the result is not read.
      position: int32 scalar, of the first of the steps.
      cache: as the last step returned it, each hypothesis with its own.

    Returns:
      float[batch, beam, tail]: log p of the targets over the docid vocabulary.
    """

    def __call__(
        self,
        inputs: Int[Array, "batch beam tail"],
        targets: Int[Array, "batch beam tail"],
        position: Int[Array, ""],
        cache: Any,
    ) -> Float[Array, "batch beam tail"]: ...


@struct.dataclass
class Trail:
    """Every hypothesis that the beam has held, step by step.

    After step n a hypothesis is a prefix of n + 1 tokens, or an identifier that has ended before.
    The rows of the trie that begin with it are `begin .. end - 1`. Steps that the search did not
    take one by one (the tails) have none.

    Attributes:
      begin, end: int32[batch, length, beam]; both 0 where there is no hypothesis.
      scores: float32[batch, length, beam], log p of the prefix; -inf where there is none.
    """

    begin: Int[Array, "batch length beam"]
    end: Int[Array, "batch length beam"]
    scores: Float[Array, "batch length beam"]

    @classmethod
    def empty(cls, batch: int, length: int, beam: int) -> Trail:
        none = jnp.zeros((batch, length, beam), jnp.int32)
        return cls(none, none, jnp.full(none.shape, -jnp.inf, jnp.float32))

    def after(self, front: _Front, step: Array) -> Trail:
        """With the hypotheses after one more step."""
        return Trail(
            self.begin.at[:, step].set(front.begin),
            self.end.at[:, step].set(front.end),
            self.scores.at[:, step].set(front.scores),
        )


@struct.dataclass
class BeamResult:
    """The best identifiers of each query, best first.

    Attributes:
      tokens: int32[batch, beam, length], local docid ids, 0-padded; 0 where not valid.
      scores: float32[batch, beam], log p of the identifier, descending; -inf where not valid.
      row: int32[batch, beam], row of the trie; -1 where not valid.
      valid: bool[batch, beam], whether the hypothesis is an identifier that exists.
      trail: of the search, where it was asked for.
    """

    tokens: Int[Array, "batch beam length"]
    scores: Float[Array, "batch beam"]
    row: Int[Array, "batch beam"]
    valid: Bool[Array, "batch beam"]
    trail: Trail | None = None


@struct.dataclass
class _Front:
    """The hypotheses of every query: int32[batch, beam], but for the scores.

    A hypothesis is a state of the trie: the rows `begin` .. `end - 1`. One without rows is dead.
    """

    last: Array  # the token written last
    scores: Array  # float32
    state: Array  # number of the state; read only where it has several rows
    begin: Array
    end: Array

    @property
    def size(self) -> Array:
        return jnp.where(jnp.isfinite(self.scores), self.end - self.begin, 0)


@struct.dataclass
class _Beams:
    front: _Front
    position: Array  # int32 scalar, tokens written so far
    cache: Any
    trail: Trail | None


def constrained_beam_search(
    step_fn: StepFn,
    cache: Any,
    trie: DeviceTrie,
    *,
    batch: int,
    beam: int,
    normaliser: str = "vocabulary",
    tail_fn: TailFn | None = None,
    trail: bool = False,
    look_ahead: Float[Array, "batch states"] | None = None,
) -> BeamResult:
    """The `beam` most probable identifiers of each query that a beam search finds.

    With `beam` at least the number of identifiers the search is exhaustive. To be called under
    `jax.jit` with the trie as an argument.

    Args:
      step_fn: see StepFn.
      cache: for `beam` = 1: every leaf begins with [batch, 1].
      trie: the identifiers that exist, or those of them that a filter allows.
      batch: number of queries.
      beam: hypotheses kept a query; may exceed the number of identifiers.
      normaliser: "vocabulary": scores are log p over the docid vocabulary; "children": each step
        is renormalised over the tokens that the trie allows there, as T5X's search does, so that
        the rest of an identifier is certain when it is the only one. A filter changes no score.
      tail_fn: scores in one pass what step_fn would in several; without it, all is done by steps.
      trail: whether to keep all hypotheses of all steps, too.
      look_ahead: added to a hypothesis' log p wherever the search chooses between hypotheses, by
        state of the trie; see `look_ahead.best_under_states`. It steers alone: scores are log p,
        and their order is that of the result.

    Returns:
      BeamResult with `beam` entries a query; those beyond the identifiers found are not valid.
    """
    if beam < 1:
        raise ValueError(f"beam must be at least 1, found {beam}")
    if normaliser not in NORMALISERS:
        raise ValueError(f"normaliser must be one of {NORMALISERS}, found {normaliser!r}")
    tail = trie.tail(batch * beam) if tail_fn else 0
    if normaliser == "children":
        tail = trie.max_length  # a tail costs nothing there

    def grow(beams: _Beams, levels: tuple[int, ...]) -> _Beams:
        logits, cache = step_fn(beams.front.last, beams.position, beams.cache)
        ways = [
            functools.partial(
                _advance,
                trie=trie,
                beam=beam,
                level=level,
                normaliser=normaliser,
                look_ahead=look_ahead,
            )
            for level in levels
        ]
        which = jnp.minimum(beams.position - levels[0], len(levels) - 1)
        front, parent = jax.lax.switch(
            which, ways, beams.front, logits.astype(jnp.float32), beams.position
        )
        kept = beams.trail and beams.trail.after(front, beams.position)
        return _Beams(front, beams.position + 1, _cache_of_parents(cache, parent), kept)

    kept = Trail.empty(batch, trie.max_length, beam) if trail else None
    beams = _Beams(_root(batch, trie), jnp.zeros((), jnp.int32), cache, kept)
    beams = grow(beams, (0,))
    if trie.max_length > 1:  # else room would be taken for logits that no step computes
        beams = jax.lax.while_loop(
            lambda b: (b.front.size > 1).any() | (_remaining(b, trie) > tail),
            lambda b: grow(b, (1, 2)),
            beams,
        )
    scores = beams.front.scores
    if tail_fn and tail and normaliser == "vocabulary":
        scores = _with_tails(beams, trie, tail_fn, tail)
    scores, order = jax.lax.top_k(scores, beam)
    valid = jnp.isfinite(scores)
    row = jnp.take_along_axis(beams.front.begin, order, axis=1)
    return BeamResult(
        tokens=jnp.where(valid[..., None], trie.rows[row].astype(jnp.int32), 0),
        scores=scores,
        row=jnp.where(valid, row, -1),
        valid=valid,
        trail=beams.trail,
    )


def _root(batch: int, trie: DeviceTrie) -> _Front:
    zero = jnp.zeros((batch, 1), jnp.int32)
    scores = jnp.zeros((batch, 1), jnp.float32)
    if trie.allowed is not None:
        scores = jnp.where(trie.allowed[-1] > 0, scores, -jnp.inf)
    return _Front(last=zero, scores=scores, state=zero, begin=zero, end=zero + trie.num_rows)


def _of_parents(x: Any, parent: Array) -> Any:
    """What each new hypothesis has from the one that it grew from: [batch, beam, ...] leaves."""
    return jax.tree.map(lambda leaf: jax.vmap(lambda rows, i: rows[i])(leaf, parent), x)


def _cache_of_parents(cache: Any, parent: Array) -> Any:
    own_way = getattr(cache, "of_parents", None)
    return own_way(parent) if own_way else _of_parents(cache, parent)


def _remaining(beams: _Beams, trie: DeviceTrie) -> Array:
    """int32 scalar: tokens that hypotheses of one row have yet to write, at most."""
    lengths = (trie.rows[beams.front.begin] > 0).sum(-1)
    return jnp.where(beams.front.size == 1, lengths - beams.position, 0).max()


def _with_tails(beams: _Beams, trie: DeviceTrie, tail_fn: TailFn, tail: int) -> Array:
    """float32[batch, beam]: scores of whole identifiers, where every hypothesis has one row."""
    front = beams.front
    places = beams.position + jnp.arange(tail)
    targets = trie.rows[front.begin][..., jnp.minimum(places, trie.max_length - 1)]
    targets = jnp.where(places < trie.max_length, targets.astype(jnp.int32), 0)
    inputs = jnp.concatenate([front.last[..., None], targets[..., :-1]], axis=-1)

    def score() -> Array:
        log_p = tail_fn(inputs, targets, beams.position, beams.cache)
        return front.scores + jnp.where(targets > 0, log_p, 0.0).sum(-1)

    some = _remaining(beams, trie) > 0
    return jax.lax.cond(some, score, lambda: front.scores)


def _advance(
    front: _Front,
    logits: Array,
    position: Array,
    trie: DeviceTrie,
    beam: int,
    level: int,
    normaliser: str,
    look_ahead: Array | None,
) -> tuple[_Front, Array]:
    """The best `beam` among what the hypotheses may become, and the parent of each.

    A hypothesis with several rows becomes its children. One with one row follows that row, or has
    written it and stays as it is.

    Args:
      front: hypotheses at `level` of the trie; 2 stands for all levels from 2 on.
      logits: float32[batch, beam, vocab].
      position: tokens written, `level` or more.
      look_ahead: float32[batch, states], or None.
    """
    token = trie.rows[front.begin, jnp.minimum(position, trie.max_length - 1)].astype(jnp.int32)
    token = jnp.where(position < trie.max_length, token, 0)
    normal = jax.nn.logsumexp(logits, axis=-1) if normaliser == "vocabulary" else None
    alone = front.scores
    if normal is not None:
        logit = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
        alone = jnp.where(token > 0, front.scores + logit - normal, front.scores)
    alone = jnp.where(front.size == 1, alone, -jnp.inf)

    # With a filter the dense rows have lost what a normaliser over all children counts.
    whole = normal is not None or trie.allowed is None
    if level < len(trie.dense) and look_ahead is None and whole:
        scores, parent, edge, written = _dense_children(front, logits, normal, trie, beam, level)
    else:
        scores, parent, edge, written = _children(
            front, logits, normal, trie, beam, level, look_ahead
        )

    here = jnp.broadcast_to(jnp.arange(alone.shape[1]), alone.shape)
    states = jnp.concatenate([front.state, edge + 1], axis=1)
    ahead = _ahead(look_ahead, states)
    scores, chosen = _top_k(jnp.concatenate([alone, scores], axis=1), beam, ahead)

    def choose(stays: Array, grows: Array) -> Array:
        return jnp.take_along_axis(jnp.concatenate([stays, grows], axis=1), chosen, axis=1)

    parent = choose(here, parent)
    grows = chosen >= alone.shape[1]
    child = choose(front.state, edge + 1)
    old = _of_parents(front, parent)
    # The last child of a state ends where that state ends.
    end = jnp.where(child == trie.first_edge[old.state + 1], old.end, trie.row_begin[child + 1])
    dead = jnp.isneginf(scores)
    return _Front(
        last=choose(token, written),
        scores=scores,
        state=jnp.where(dead, 0, child),
        begin=jnp.where(dead, 0, jnp.where(grows, trie.row_begin[child], old.begin)),
        end=jnp.where(dead, 0, jnp.where(grows, end, old.end)),
    ), parent


_Best = tuple[Array, Array, Array, Array]  # [batch, beam] each: scores, parent, edge, token


def _dense_children(
    front: _Front, logits: Array, normal: Array | None, trie: DeviceTrie, beam: int, level: int
) -> _Best:
    """The best children of hypotheses at a level where most tokens are allowed; see `_children`."""
    vocab = logits.shape[-1]
    mask = trie.dense[level][jnp.clip(front.state - level, 0, len(trie.dense[level]) - 1)]
    if normal is None:
        normal = jax.nn.logsumexp(logits, axis=-1, where=mask)
    before = jnp.where(front.size > 1, front.scores - normal, -jnp.inf)
    scores = jnp.where(mask, logits + before[..., None], -jnp.inf)
    scores, chosen = _top_k(scores.reshape(scores.shape[0], -1), beam)
    parent, token = chosen // vocab, chosen % vocab
    state = jnp.take_along_axis(front.state, parent, axis=1)
    low, high = trie.first_edge[state], trie.first_edge[state + 1]
    for _ in range(vocab.bit_length()):  # edges of a state stand in the order of their tokens
        middle = (low + high) // 2
        right = trie.edge_token[middle] <= token
        low, high = jnp.where(right, middle, low), jnp.where(right, high, middle)
    return scores, parent, low, token


def _ahead(look_ahead: Array | None, states: Array) -> Array | None:
    """float32[batch, n]: the look-ahead of states int32[batch, n]."""
    return None if look_ahead is None else jnp.take_along_axis(look_ahead, states, axis=1)


def _children(
    front: _Front,
    logits: Array,
    normal: Array | None,
    trie: DeviceTrie,
    beam: int,
    level: int,
    look_ahead: Array | None = None,
) -> _Best:
    """The best children, which stand side by side.

    Args:
      normal: log of the sum over the vocabulary; None: over the allowed tokens.
      look_ahead: float32[batch, states], or None.
    """
    parent, edge, exists, of_parent = _side_by_side(front, trie, level)
    token = trie.edge_token[edge].astype(jnp.int32)
    logit = jax.vmap(lambda x, p, t: x[p, t])(logits, parent, token)
    if normal is None:
        normal = _logsumexp_of_children(logit, parent, exists, logits.shape[1])
    if trie.allowed is not None:
        last = edge + 1 == of_parent(trie.first_edge[front.state + 1])
        end = jnp.where(last, of_parent(front.end), trie.row_begin[edge + 2])
        exists &= trie.allowed[end] > trie.allowed[trie.row_begin[edge + 1]]
    grown = jnp.where(exists, logit + of_parent(front.scores - normal), -jnp.inf)
    scores, chosen = _top_k(grown, beam, _ahead(look_ahead, edge + 1))
    parent, edge, token = (jnp.take_along_axis(x, chosen, axis=1) for x in (parent, edge, token))
    return scores, parent, edge, token


def _side_by_side(
    front: _Front, trie: DeviceTrie, level: int
) -> tuple[Array, Array, Array, Callable[[Array], Array]]:
    """Places for the children of all hypotheses, in the order of parents and tokens.

    Returns:
      parent, edge (0 where there is no such child), whether there is: [batch, places] each; and
      what maps an array of the parents, [batch, beam], to their children.
    """
    first = trie.first_edge[front.state]
    counts = jnp.where(front.size > 1, trie.first_edge[front.state + 1] - first, 0)
    batch, beam = counts.shape
    slots, width = trie.candidates(beam, level), trie.candidates(1, level)
    if beam * width <= _RECTANGLE * slots:

        def of_parent(x: Array) -> Array:
            return jnp.broadcast_to(x[..., None], (batch, beam, width)).reshape(batch, -1)

        place = jnp.arange(width)
        exists = (place < counts[..., None]).reshape(batch, -1)
        edge = (first[..., None] + place).reshape(batch, -1)
        parent = of_parent(jnp.broadcast_to(jnp.arange(beam), counts.shape))
    else:
        ends = jnp.cumsum(counts, axis=1)
        slot = jnp.arange(slots)
        parent = jax.vmap(
            lambda e: jnp.searchsorted(e, slot, side="right", method="scan_unrolled")
        )(ends)
        exists = slot < ends[:, -1:]
        parent = jnp.where(exists, parent, 0)  # searched beyond the last one

        def of_parent(x: Array) -> Array:
            return jnp.take_along_axis(x, parent, axis=1)

        edge = of_parent(first + counts - ends) + slot
    return parent, jnp.where(exists, edge, 0), exists, of_parent


def _top_k(scores: Array, k: int, ahead: Array | None = None) -> tuple[Array, Array]:
    """`top_k` that also takes fewer candidates than k: the rest scores -inf.

    With `ahead`, the k best by the sum of both, and their scores.
    """
    by = scores if ahead is None else scores + ahead
    missing = k - by.shape[1]
    if missing > 0:
        by = jnp.pad(by, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    best, index = top_k(by, k)
    index = jnp.where(jnp.isfinite(best), index, 0)
    if ahead is not None:
        chosen = jnp.take_along_axis(scores, index, axis=1)
        best = jnp.where(jnp.isfinite(best), chosen, -jnp.inf)
    return best, index


def _logsumexp_of_children(logit: Array, parent: Array, exists: Array, num_parents: int) -> Array:
    """float32[batch, num_parents]: log sum exp of the children's logits; 0 for none."""

    def one(logit: Array, parent: Array, exists: Array) -> Array:
        logit = jnp.where(exists, logit, -jnp.inf)
        most = jax.ops.segment_max(logit, parent, num_parents)
        most = jnp.where(jnp.isfinite(most), most, 0.0)
        total = jax.ops.segment_sum(jnp.exp(logit - most[parent]), parent, num_parents)
        return jnp.where(total > 0, jnp.log(jnp.maximum(total, 1e-38)) + most, 0.0)

    return jax.vmap(one)(logit, parent, exists)
