"""Look-ahead: the best document under every prefix, and a search that it steers."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from decoding_oracles import (
    BATCH,
    CAPACITY,
    MOST_IDS,
    NESTED,
    PATHS,
    SHARED,
    SINGLE,
    SKEWED,
    assert_same,
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

from genret_jax.look_ahead import best_under_states


def best_under(ids, similarities):
    """prefix -> the greatest similarity of a document whose identifier begins with it."""
    best: dict[tuple[int, ...], float] = {}
    for identifier, documents in ids.items():
        value = max(float(similarities[d]) for d in documents)
        for length in range(len(identifier) + 1):
            prefix = identifier[:length]
            best[prefix] = max(best.get(prefix, -np.inf), value)
    return best


def similarities_of(seed: int, documents: int) -> np.ndarray:
    """float32[batch, documents], of the size of log-probabilities here."""
    rng = np.random.default_rng(seed + 1)
    return rng.normal(scale=4.0, size=(BATCH, documents)).astype(np.float32)


@settings(max_examples=60)
@given(sequences=sequence_sets(), seed=st.integers(0, 10**6))
@example(sequences=SINGLE, seed=0)
@example(sequences=SHARED, seed=0)
@example(sequences=NESTED, seed=1)
def test_the_best_under_every_state_is_that_of_its_rows(sequences, seed):
    trie, ids = make_trie(sequences)
    values = similarities_of(seed, len(sequences))
    states = best_under_states(trie, values, size=CAPACITY)
    assert states.shape == (BATCH, CAPACITY) and states.dtype == np.float32
    assert np.isneginf(states[:, trie.num_states :]).all()
    for query in range(BATCH):
        best = best_under(ids, values[query])
        seen = 0
        for level in range(len(trie.level_start) - 1):
            for state in range(trie.level_start[level], trie.level_start[level + 1]):
                row = trie.rows[trie.row_begin[state]]
                assert states[query, state] == best[tuple(row[:level].tolist())]
                seen += 1
        assert seen == trie.num_states


@settings(max_examples=60)
@given(
    sequences=sequence_sets(),
    seed=st.integers(0, 10**6),
    beam=st.sampled_from([1, 4]),
    path=st.sampled_from(PATHS),
    share=st.sampled_from([0.5, 1.0]),
)
@example(sequences=SKEWED, seed=4, beam=1, path=PATHS[0], share=1.0)
@example(sequences=SKEWED, seed=4, beam=4, path=PATHS[1], share=0.5)
@example(sequences=NESTED, seed=2, beam=1, path=PATHS[1], share=1.0)
def test_a_steered_beam_is_that_of_a_search_in_python(sequences, seed, beam, path, share):
    """With and without a filter, whose documents alone count in what lies ahead."""
    trie, ids = make_trie(sequences)
    table, start = make_model(seed)
    values = similarities_of(seed, len(sequences))
    rows = None
    if share < 1:
        allowed = np.random.default_rng(seed).random(len(sequences)) < share
        rows = trie.rows_with(allowed)
        kept = {i: [d for d in documents if allowed[d]] for i, documents in ids.items()}
        kept = {i: documents for i, documents in kept.items() if documents}
        values = np.where(allowed, values, -np.float32(np.inf))
    else:
        kept = ids
    expected = []
    for query in range(BATCH):
        best = best_under(kept, values[query])
        if kept:
            expected.append(
                plain_search(table, start[query], kept, beam, "vocabulary", ahead=best.__getitem__)
            )
    assume(min((gap for _, gap in expected), default=1) > 1e-3)
    device, tails = path
    ahead = best_under_states(trie, values, size=CAPACITY)
    result = search(table, start, device(trie, rows), beam=beam, tails=tails, look_ahead=ahead)
    for query in range(BATCH):
        assert_same(found(result, trie, ids, query), expected[query][0] if kept else {})


def test_it_steers_and_does_not_score():
    """A document that log p would lose at once is kept, with the log p that it has."""
    trie, ids = make_trie(SKEWED)
    table, start = make_model(5)
    scores = [exhaustive(table, s, ids, "vocabulary") for s in start]
    worst = [min(one, key=one.__getitem__) for one in scores]
    values = np.zeros((BATCH, len(SKEWED)), np.float32)
    for query, identifier in enumerate(worst):
        values[query, ids[identifier]] = 100.0
    ahead = best_under_states(trie, values, size=CAPACITY)
    for beam in (1, 4):
        plain = search(table, start, roomy(trie), beam=beam)
        steered = search(table, start, roomy(trie), beam=beam, look_ahead=ahead)
        for query in range(BATCH):
            assert worst[query] not in found(plain, trie, ids, query)
            now = found(steered, trie, ids, query)
            assert now[worst[query]] == pytest.approx(scores[query][worst[query]], abs=2e-4)
    whole = search(table, start, roomy(trie), beam=MOST_IDS, look_ahead=ahead)
    for query in range(BATCH):
        assert_same(found(whole, trie, ids, query), scores[query])


def test_nothing_ahead_changes_nothing():
    trie, _ = make_trie([*NESTED, *SKEWED[:12]])
    table, start = make_model(7)
    ahead = best_under_states(trie, np.full((BATCH, 16), 3.0, np.float32), size=CAPACITY)
    plain = search(table, start, roomy(trie), beam=4)
    steered = search(table, start, roomy(trie), beam=4, look_ahead=ahead)
    np.testing.assert_array_equal(plain.row, steered.row)
    np.testing.assert_array_equal(plain.scores, steered.scores)
