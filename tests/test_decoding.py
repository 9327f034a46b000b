"""Constrained beam search against exhaustive scoring and against a search in plain Python."""

from __future__ import annotations

import dataclasses
import math

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from decoding_oracles import (
    ATOMIC,
    BATCH,
    MOST_IDS,
    NESTED,
    NORMALISERS,
    PATHS,
    SHARED,
    SINGLE,
    SKEWED,
    assert_same,
    dense,
    exhaustive,
    found,
    make_model,
    make_trie,
    plain_search,
    roomy,
    search,
    sequence_sets,
)
from hypothesis import assume, example, given, settings

from genret_jax import decoding


@settings(max_examples=60)
@given(
    sequences=sequence_sets(),
    seed=st.integers(0, 10**6),
    normaliser=st.sampled_from(NORMALISERS),
    path=st.sampled_from(PATHS),
)
@example(sequences=SINGLE, seed=1, normaliser="vocabulary", path=(roomy, True))
@example(sequences=SINGLE, seed=1, normaliser="vocabulary", path=(roomy, True))
@example(sequences=SINGLE, seed=1, normaliser="children", path=(roomy, True))
@example(sequences=NESTED, seed=2, normaliser="vocabulary", path=(dense, False))
@example(sequences=SHARED, seed=3, normaliser="vocabulary", path=(dense, False))
@example(sequences=SKEWED, seed=4, normaliser="vocabulary", path=(roomy, True))
@example(sequences=SKEWED, seed=4, normaliser="children", path=(roomy, True))
@example(sequences=ATOMIC, seed=5, normaliser="vocabulary", path=(roomy, True))
def test_a_beam_of_all_identifiers_scores_every_one(sequences, seed, normaliser, path):
    trie, ids = make_trie(sequences)
    table, start = make_model(seed)
    device, tails = path
    result = search(table, start, device(trie), beam=MOST_IDS, normaliser=normaliser, tails=tails)
    for query in range(BATCH):
        expected = exhaustive(table, start[query], ids, normaliser)
        assert_same(found(result, trie, ids, query), expected)


@settings(max_examples=80)
@given(
    sequences=sequence_sets(),
    seed=st.integers(0, 10**6),
    beam=st.sampled_from([1, 4]),
    normaliser=st.sampled_from(NORMALISERS),
    path=st.sampled_from(PATHS),
)
@example(sequences=NESTED, seed=2, beam=4, normaliser="vocabulary", path=(roomy, True))
@example(sequences=SKEWED, seed=4, beam=4, normaliser="vocabulary", path=(dense, False))
@example(sequences=SKEWED, seed=4, beam=4, normaliser="children", path=(roomy, True))
@example(sequences=ATOMIC, seed=5, beam=4, normaliser="vocabulary", path=(dense, False))
def test_a_small_beam_finds_what_a_search_in_python_finds(sequences, seed, beam, normaliser, path):
    trie, ids = make_trie(sequences)
    table, start = make_model(seed)
    expected = [plain_search(table, s, ids, beam, normaliser) for s in start]
    assume(min(gap for _, gap in expected) > 1e-3)  # nearly equal ones may go either way
    device, tails = path
    result = search(table, start, device(trie), beam=beam, normaliser=normaliser, tails=tails)
    for query in range(BATCH):
        assert_same(found(result, trie, ids, query), expected[query][0])


@pytest.fixture(params=[0, 10**6], ids=["one row", "rectangle"])
def layout(request, monkeypatch):
    """All children in a row, or in a rectangle, whatever is smaller."""
    monkeypatch.setattr(decoding, "_RECTANGLE", request.param)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("sequences", [SKEWED, NESTED, SHARED], ids=["skewed", "nested", "shared"])
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_children_in_a_row_and_in_a_rectangle_are_the_same(layout, sequences, normaliser):
    trie, ids = make_trie(sequences)
    table, start = make_model(4)
    for beam in (4, MOST_IDS):
        result = search(table, start, roomy(trie), beam=beam, normaliser=normaliser)
        for query in range(BATCH):
            expected, gap = plain_search(table, start[query], ids, beam, normaliser)
            assert gap > 1e-3
            assert_same(found(result, trie, ids, query), expected)


@settings(max_examples=40)
@given(
    sequences=sequence_sets(),
    seed=st.integers(0, 10**6),
    beam=st.sampled_from([1, 4]),
    path=st.sampled_from(PATHS),
)
@example(sequences=SKEWED, seed=4, beam=4, path=(roomy, True))
@example(sequences=NESTED, seed=2, beam=4, path=(dense, False))
def test_the_trail_is_every_beam_of_a_search_in_python(sequences, seed, beam, path):
    trie, ids = make_trie(sequences)
    table, start = make_model(seed)
    device, tails = path
    result = search(table, start, device(trie), beam=beam, tails=tails, trail=True)
    plain = search(table, start, device(trie), beam=beam, tails=tails)
    assert plain.trail is None and (plain.row == result.row).all()
    begin, end, scores = (np.asarray(x) for x in dataclasses.astuple(result.trail))
    for query in range(BATCH):
        expected: list[dict] = []
        _, gap = plain_search(table, start[query], ids, beam, "vocabulary", expected)
        assume(gap > 1e-3)
        taken = 0
        for step, beams in enumerate(expected):
            held = np.flatnonzero(np.isfinite(scores[query, step]))
            ours = {}
            for b, e, score in zip(
                *(x[query, step, held] for x in (begin, end, scores)), strict=True
            ):
                prefix = tuple(t for t in trie.rows[b, : step + 1].tolist() if t)
                starting = (trie.rows[:, : len(prefix)] == prefix).all(1)
                assert np.flatnonzero(starting).tolist() == list(range(b, e))
                ours[prefix] = float(score)
            if ours or not tails:  # the tails are no steps
                assert_same(ours, beams)
                taken += 1
        choice = [any((begin + 1 < end)[query, step]) for step in range(len(expected))]
        assert taken > max((step for step, some in enumerate(choice) if some), default=-1)


@settings(max_examples=80)
@given(
    sequences=sequence_sets(),
    seed=st.integers(0, 10**6),
    beam=st.sampled_from([4, MOST_IDS]),
    normaliser=st.sampled_from(NORMALISERS),
    path=st.sampled_from(PATHS),
    share=st.sampled_from([0.2, 0.5, 0.9]),
)
@example(sequences=SKEWED, seed=4, beam=4, normaliser="vocabulary", path=(dense, False), share=0.2)
@example(sequences=NESTED, seed=4, beam=4, normaliser="children", path=(roomy, True), share=0.5)
def test_a_filter_leaves_its_places_to_the_allowed_ones_and_their_scores_as_they_are(
    sequences, seed, beam, normaliser, path, share
):
    """Not what is left of a search without it: others take the places of those that may not be.

    Scores are those of a search without it.
    """
    trie, ids = make_trie(sequences)
    table, start = make_model(seed)
    rows = np.random.default_rng(seed).random(len(trie.rows)) < share
    kept = {tuple(r[r > 0].tolist()) for r in trie.rows[rows]}
    some = {i: documents for i, documents in ids.items() if i in kept}
    expected = [plain_search(table, s, some, beam, normaliser, among=ids) for s in start if some]
    assume(min((gap for _, gap in expected), default=1) > 1e-3)
    device, tails = path
    device = device(trie, rows)
    result = search(table, start, device, beam=beam, normaliser=normaliser, tails=tails)
    for query in range(BATCH):
        best = expected[query][0] if some else {}
        assert_same(found(result, trie, ids, query), best)


@pytest.mark.parametrize(
    ("sequences", "beam"),
    [(SINGLE, 2), (NESTED, 2), (SKEWED, 3), (SKEWED, 40), (ATOMIC, 40)],
    ids=["single-2", "nested-2", "skewed-3", "skewed-40", "atomic-40"],
)
def test_with_the_bounds_that_on_device_works_out(sequences, beam):
    """The tests above give the search more room than it needs; here it has its own."""
    trie, ids = make_trie(sequences)
    for seed in range(3):
        table, start = make_model(seed)
        result = search(table, start, trie.on_device(), beam=beam)
        assert result.tokens.shape == (BATCH, beam, trie.max_length)
        for query in range(BATCH):
            expected, _ = plain_search(table, start[query], ids, beam, "vocabulary")
            assert_same(found(result, trie, ids, query), expected)


@settings(max_examples=4)
@given(sequences=sequence_sets(), seed=st.integers(0, 10**6))
def test_with_the_bounds_of_random_tries(sequences, seed):
    trie, ids = make_trie(sequences)
    table, start = make_model(seed)
    expected = [plain_search(table, s, ids, 4, "vocabulary") for s in start]
    assume(min(gap for _, gap in expected) > 1e-3)
    result = search(table, start, trie.on_device(), beam=4)
    for query in range(BATCH):
        assert_same(found(result, trie, ids, query), expected[query][0])


def test_one_identifier_by_hand():
    """Uniform logits over 15 tokens: each token costs log 15, or nothing among one child."""
    trie, ids = make_trie(SINGLE)
    table, start = make_model(0)
    table[:, 1:] = 0.5
    result = search(table, start, roomy(trie), beam=4)
    assert result.valid.tolist() == [[True, False, False, False]] * BATCH
    assert result.row.tolist() == [[0, -1, -1, -1]] * BATCH
    assert result.tokens[:, 0].tolist() == [[3, 2, 0, 0, 0]] * BATCH
    np.testing.assert_allclose(result.scores[:, 0], -2 * math.log(15), rtol=1e-6)
    assert np.isneginf(result.scores[:, 1:]).all()
    local = search(table, start, roomy(trie), beam=4, normaliser="children")
    np.testing.assert_allclose(local.scores[:, 0], 0.0, atol=1e-6)


def test_scores_over_children_sum_to_one_and_over_the_vocabulary_to_less():
    trie, _ = make_trie(SKEWED)
    table, start = make_model(11)
    sums = {
        normaliser: np.exp(
            search(table, start, roomy(trie), beam=MOST_IDS, normaliser=normaliser).scores
        ).sum(axis=1)
        for normaliser in NORMALISERS
    }
    np.testing.assert_allclose(sums["children"], 1.0, atol=1e-4)
    assert (sums["vocabulary"] < 1.0).all()


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_an_identifier_of_probability_zero_is_not_returned(normaliser):
    """The trie allows the token 4 at the root, the model never writes it."""
    trie, ids = make_trie(NESTED)
    table, start = make_model(3)
    table[:, 4] = -np.inf
    result = search(table, start, roomy(trie), beam=4, normaliser=normaliser)
    for query in range(BATCH):
        assert set(found(result, trie, ids, query)) == {(2, 1), (2, 3, 1)}


def test_a_model_that_allows_nothing_gives_nothing():
    trie, ids = make_trie(NESTED)
    table, start = make_model(3)
    table[:, [2, 4]] = -np.inf  # both children of the root
    for beam in (1, 4):
        result = search(table, start, roomy(trie), beam=beam)
        assert all(found(result, trie, ids, query) == {} for query in range(BATCH))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beam": 0}, "beam must be at least 1, found 0"),
        ({"beam": 2, "normaliser": "all"}, "normaliser must be one of .*'all'"),
    ],
)
def test_wrong_arguments(arguments, message):
    trie, _ = make_trie(SINGLE)
    table, start = make_model(0)
    with pytest.raises(ValueError, match=message):
        search(table, start, roomy(trie), **arguments)
