"""A trie cut over eight simulated devices: the same results, and no array put together again."""

from __future__ import annotations

import math
import re

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from decoding_oracles import (
    BATCH,
    CAPACITY,
    NORMALISERS,
    PATHS,
    assert_same,
    found,
    make_model,
    make_trie,
    plain_search,
    roomy,
    search,
    sequence_sets,
)
from hypothesis import assume, given, settings
from jax.sharding import AxisType

from genret_jax.look_ahead import best_under_states
from genret_jax.sharded_trie import shard_trie


@pytest.fixture(scope="module")
def mesh():
    auto = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((2, 4), ("data", "model"), auto, devices=jax.devices()[:8])


def assert_cut(device, parts):
    """Every array lies in so many equal pieces."""
    arrays = [device.first_edge, device.edge_token, device.row_begin, device.rows]
    arrays += [] if device.allowed is None else [device.allowed]
    for array in arrays:
        pieces = {shard.data.nbytes for shard in array.addressable_shards}
        assert pieces == {array.nbytes // parts}


@settings(max_examples=25)
@given(
    sequences=sequence_sets(),
    seed=st.integers(0, 10**6),
    path=st.sampled_from(PATHS),
    share=st.sampled_from([0.5, 1.0]),
    normaliser=st.sampled_from(NORMALISERS),
)
def test_a_sharded_trie_gives_what_a_search_in_python_gives(
    mesh, sequences, seed, path, share, normaliser
):
    trie, ids = make_trie(sequences)
    table, start = make_model(seed)
    rows = np.random.default_rng(seed).random(len(trie.rows)) < share if share < 1 else None
    kept = ids
    if rows is not None:
        allowed = {tuple(r[r > 0].tolist()) for r in trie.rows[rows]}
        kept = {i: documents for i, documents in ids.items() if i in allowed}
    expected = [plain_search(table, s, kept, 4, normaliser, among=ids) for s in start if kept]
    assume(min((gap for _, gap in expected), default=1) > 1e-3)
    make, tails = path
    device = shard_trie(make(trie, rows), mesh, "model")
    assert_cut(device, 4)
    result = search(table, start, device, beam=4, normaliser=normaliser, tails=tails)
    for query in range(BATCH):
        assert_same(found(result, trie, ids, query), expected[query][0] if kept else {})


def test_look_ahead_in_a_sharded_trie_is_that_of_one_device(mesh):
    sequences = [[a, b, c] for a in (2, 3) for b in (2, 3, 4) for c in (5, 6, 7)]
    trie, _ = make_trie(sequences)
    table, start = make_model(3)
    values = np.random.default_rng(0).normal(size=(BATCH, len(sequences))).astype(np.float32)
    ahead = best_under_states(trie, values, size=CAPACITY)
    whole = roomy(trie, np.arange(len(sequences)) % 3 > 0)
    one = search(table, start, whole, beam=4, look_ahead=ahead)
    several = search(table, start, shard_trie(whole, mesh, "model"), beam=4, look_ahead=ahead)
    np.testing.assert_array_equal(one.row, several.row)
    np.testing.assert_allclose(one.scores, several.scores, rtol=1e-5)


def test_no_device_ever_has_a_whole_array(mesh):
    """Neither as an argument of the compiled program nor as the result of a collective in it."""
    rng = np.random.default_rng(0)
    sequences = np.unique(rng.integers(2, 16, (3000, 5)), axis=0).tolist()
    trie, _ = make_trie(sequences)
    table, start = make_model(3)
    plain = trie.on_device()
    device = shard_trie(plain, mesh, "model")
    text = search.lower(table, start, device, beam=4, tails=True).compile().as_text()
    least = min(device.rows.size, device.first_edge.size) // 4
    gathered = [
        math.prod(int(n) for n in shape.split(",") if n)
        for shape in re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", text)
    ]
    assert max(gathered, default=0) < least
    assert "all-reduce" in text, "the devices do work together"
    one, several = (search(table, start, t, beam=4, tails=True) for t in (plain, device))
    np.testing.assert_array_equal(one.row, several.row)
    np.testing.assert_allclose(one.scores, several.scores, rtol=1e-5)
