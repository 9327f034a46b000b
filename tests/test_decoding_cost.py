"""What a search may cost: compilations, steps of the network, and what a batch shares."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_oracles import (
    BATCH,
    MOST_IDS,
    NESTED,
    SKEWED,
    VOCAB,
    assert_same,
    exhaustive,
    found,
    make_model,
    make_trie,
    roomy,
    search,
)

from genret_jax.decoding import constrained_beam_search


def test_other_values_in_the_same_buckets_do_not_recompile():
    """Documents added, removed or filtered: one program, and the right answers from it."""
    traces = []

    @jax.jit
    def counted(table, start, trie):
        traces.append(trie.rows.shape)
        return search(table, start, trie, beam=MOST_IDS)

    table, start = make_model(8)
    base = [[a, b, 2] for a in (2, 3, 4, 5) for b in (2, 3, 4, 5)]
    like = None
    for change in (base, base[:-1], [*base[:-1], [5, 6, 2]], [*base[:-1], [2, 2, 7]]):
        trie, ids = make_trie(change)
        like = trie.on_device(like=like)
        result = counted(table, start, like)
        for query in range(BATCH):
            expected = exhaustive(table, start[query], ids, "vocabulary")
            assert_same(found(result, trie, ids, query), expected)
    assert len(traces) == 1
    for seed in range(3):
        kept = np.random.default_rng(seed).random(len(change)) < 0.5
        result = counted(table, start, trie.restricted(like, trie.rows_with(kept)))
        for query in range(BATCH):
            some = {i: d for i, d in ids.items() if kept[d].any()}
            expected = exhaustive(table, start[query], some, "vocabulary")
            assert_same(found(result, trie, ids, query), expected)
    assert len(traces) == 2, "one program for all, and one for all filters"
    trie, _ = make_trie([[2, 2]])
    counted(table, start, trie.on_device())
    assert len(traces) == 3, "the counter counts"


def test_the_trie_is_an_argument_and_no_constant():
    trie, _ = make_trie(SKEWED)
    table, start = make_model(8)
    device = trie.on_device()
    search_3 = functools.partial(search, beam=3)
    traced = jax.make_jaxpr(search_3)(table, start, device)
    assert len(traced.jaxpr.invars) == 2 + len(jax.tree.leaves(device))
    constants = [c for c in traced.consts if np.size(c) > 1]
    assert not constants
    assert len(jax.tree.leaves(device)) == 5 + len(device.dense) == 6
    filtered = trie.on_device(np.arange(len(trie.rows)) % 2 == 0)
    assert len(jax.tree.leaves(filtered)) == 7


def test_the_rows_of_a_batch_are_independent():
    """Row 0 is the same to the last bit whatever else the batch holds, wherever it stands."""
    trie, _ = make_trie([*NESTED, *SKEWED[:12]])
    table, start = make_model(21)
    device = roomy(trie)
    alone = search(table, np.full_like(start, start[0]), device, beam=4)
    for other in range(5, 50, 9):
        mixed = search(table, np.array([start[0], other], np.int32), device, beam=4)
        turned = search(table, np.array([other, start[0]], np.int32), device, beam=4)
        for a, b, c in zip(*map(jax.tree.leaves, (alone, mixed, turned)), strict=True):
            np.testing.assert_array_equal(a[0], b[0])
            np.testing.assert_array_equal(a[0], c[1])
            np.testing.assert_array_equal(b[1], c[0])


def counting(calls, name):
    """A step or a tail of a model that knows nothing, and how often it ran."""

    def note(position, shape):
        jax.debug.callback(lambda p: calls.append((name, int(p), shape)), position)

    def step(tokens, position, cache):
        note(position, tokens.shape)
        return jnp.zeros((*tokens.shape, VOCAB)).at[..., 0].set(-jnp.inf), cache

    def tail(inputs, targets, position, cache):
        note(position, inputs.shape)
        return jnp.full(inputs.shape, -math.log(VOCAB - 1))

    return step if name == "step" else tail


@pytest.mark.parametrize(
    ("tails", "expected"),
    [
        (False, [("step", p, (BATCH, 4 if p else 1)) for p in range(4)]),
        (True, [("step", 0, (BATCH, 1)), ("tail", 1, (BATCH, 4, 3))]),
    ],
)
def test_known_tokens_are_scored_in_one_pass(tails, expected):
    """The identifiers part at their first token; three more follow, in one pass or in three."""
    calls = []
    step, tail = counting(calls, "step"), counting(calls, "tail") if tails else None
    trie, ids = make_trie([[2, 3, 3, 3], [3, 4, 4, 4], [5, 6, 7, 8]])
    device = trie.on_device()
    assert device.tail(BATCH * 4) == 3
    result = jax.jit(
        lambda t: constrained_beam_search(step, {}, t, batch=BATCH, beam=4, tail_fn=tail)
    )(device)
    jax.block_until_ready(result)
    jax.effects_barrier()
    assert set(found(result, trie, ids, 0)) == set(ids)
    np.testing.assert_allclose(result.scores[:, :3], -4 * math.log(VOCAB - 1), rtol=1e-6)
    assert sorted(calls) == expected


def test_the_loop_ends_when_nothing_can_grow():
    """Identifiers of two tokens need two steps, however long the longest one may be."""
    calls = []
    trie, ids = make_trie([[2, 3], [2, 4], [5, 6]])
    step = counting(calls, "step")
    result = jax.jit(lambda t: constrained_beam_search(step, {}, t, batch=BATCH, beam=4))(
        roomy(trie)
    )
    jax.block_until_ready(result)
    jax.effects_barrier()
    assert set(found(result, trie, ids, 0)) == set(ids)
    assert sorted(calls) == [("step", 0, (BATCH, 1)), ("step", 1, (BATCH, 4))]
