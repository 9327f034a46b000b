"""Constrained beam search against exhaustive scoring and against a search in plain Python.

The step functions here are no T5: a table of logits looked up by a hash of the prefix, which the
cache carries along, and a tiny recurrent network. A cache that followed the wrong hypothesis
would look up the wrong row of the table.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings

from genret_jax.decoding import constrained_beam_search
from genret_jax.device_trie import DeviceTrie
from genret_jax.docids.table import DocidTable
from genret_jax.trie import Trie, build_trie

VOCAB, BATCH, LENGTH, MOST_IDS = 16, 2, 5, 24
HASHES = 509
CAPACITY = 1 + MOST_IDS * LENGTH
LABELS = ["<pad>", "</s>", *(f"t{i}" for i in range(2, VOCAB))]
NORMALISERS = ("vocabulary", "children")

Ids = dict[tuple[int, ...], list[int]]


# --- tries -------------------------------------------------------------------------------------


def make_trie(sequences) -> tuple[Trie, Ids]:
    """The trie, and identifier -> documents worked out without it."""
    table = DocidTable.from_sequences(sequences, range(len(sequences)), LABELS, "test", {})
    ids: Ids = {}
    for document, (row, length) in enumerate(zip(table.tokens, table.lengths, strict=True)):
        ids.setdefault(tuple(row[:length].tolist()), []).append(document)
    return build_trie(table), ids


def roomy(trie: Trie, rows: np.ndarray | None = None) -> DeviceTrie:
    """Bounds that hold for every trie made here, so that all of them share a compiled search.

    Every level is searched ragged; the tail is any length up to the longest.
    """

    def padded(array: np.ndarray, size: int, fill: int) -> np.ndarray:
        pad = [(0, size - len(array)), *((0, 0) for _ in array.shape[1:])]
        return np.pad(array, pad, constant_values=fill)

    below = None
    if rows is not None:
        below = padded(np.cumsum([0, *rows], dtype=np.int32), MOST_IDS + 1, rows.sum())
    wide = np.pad(trie.rows, ((0, 0), (0, LENGTH - trie.max_length)))
    return DeviceTrie(
        first_edge=padded(trie.first_edge, CAPACITY + 1, trie.first_edge[-1]),
        edge_token=padded(trie.edge_token, CAPACITY, 0),
        row_begin=padded(trie.row_begin, CAPACITY + 1, len(trie.rows)),
        rows=padded(wide, MOST_IDS, 0),
        num_rows=np.int32(len(trie.rows)),
        dense=(),
        allowed=below,
        widths=((VOCAB,), (VOCAB, MOST_IDS), (VOCAB, MOST_IDS)),
        choices=(0, 0, 30),  # a tail begins at level 2
    )


def dense(trie: Trie, rows: np.ndarray | None = None) -> DeviceTrie:
    """The same with levels 0 and 1 dense."""
    allowed = trie.rows if rows is None else trie.rows[rows]
    first = np.zeros((1, VOCAB), bool)
    first[0, allowed[:, 0]] = True
    second = np.zeros((VOCAB, VOCAB), bool)
    if trie.max_length > 1:
        roots = trie.edge_token[: trie.first_edge[1]].tolist()
        for row in allowed.tolist():
            second[roots.index(row[0]) if roots else 0, row[1]] = True
    return dataclasses.replace(roomy(trie, rows), dense=(first, second))


# The ways through the search, tested alike: how a level is read, and whether tails are one pass.
PATHS = [(roomy, True), (dense, False)]


@st.composite
def sequence_sets(draw) -> list[list[int]]:
    """Variable lengths, prefixes of one another, equal ones, and sometimes one wide node."""
    few = st.integers(2, 4)
    sequences = draw(st.lists(st.lists(few, min_size=1, max_size=4), min_size=1, max_size=10))
    if draw(st.booleans()):
        stem = draw(st.sampled_from([[], [2], [3, 2], [4, 4, 4]]))
        fan = draw(st.lists(st.integers(2, VOCAB - 1), min_size=3, max_size=14, unique=True))
        sequences += [[*stem, token] for token in fan]
    return sequences


SINGLE = [[3, 2]]
NESTED = [[2], [2, 3], [2, 3, 4], [4]]  # one inside another, until EOS is appended
SHARED = [[2, 3], [2, 3], [4, 4], [2, 3]]
SKEWED = [[2, t] for t in range(2, VOCAB)] + [[t, 2] for t in range(3, 10)]
ATOMIC = [[t] for t in range(2, VOCAB)]


# --- the model of most tests: logits by the hash of the prefix ---------------------------------


def mix(state, token, position):
    """Depends on every token, on its place, and on the query that `state` began with."""
    return (state * 31 + token * 7 + position * 3) % HASHES


def table_step(table):
    def step(tokens, position, cache):
        state = jnp.where(position > 0, mix(cache["state"], tokens, position), cache["state"])
        return table[state], {"state": state}

    return step


def table_tail(table):
    """The same for several tokens: one lookup for each, along the hash of what went before."""
    step = table_step(table)

    def tail(inputs, targets, position, cache):
        out = []
        for place in range(inputs.shape[-1]):
            logits, cache = step(inputs[..., place], position + place, cache)
            log_p = jax.nn.log_softmax(logits)
            out.append(jnp.take_along_axis(log_p, targets[..., place, None], axis=-1)[..., 0])
        return jnp.stack(out, axis=-1)

    return tail


@functools.partial(jax.jit, static_argnames=("beam", "normaliser", "tails", "trail"))
def search(table, start, trie, *, beam, normaliser="vocabulary", tails=False, trail=False):
    return constrained_beam_search(
        table_step(table),
        {"state": start[:, None]},
        trie,
        batch=BATCH,
        beam=beam,
        normaliser=normaliser,
        tail_fn=table_tail(table) if tails else None,
        trail=trail,
    )


def make_model(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """float32[hashes, vocab] logits and int32[batch] the queries' first states."""
    rng = np.random.default_rng(seed)
    table = rng.normal(scale=2.0, size=(HASHES, VOCAB)).astype(np.float32)
    table[:, 0] = -np.inf
    return table, rng.integers(0, HASHES, BATCH).astype(np.int32)


def log_p(table, start, prefix, allowed=None) -> np.ndarray:
    """float64[vocab]: log p of the next token, over all tokens or over the allowed ones."""
    state = int(start)
    for position, token in enumerate(prefix, 1):
        state = mix(state, token, position)
    logits = table[state].astype(np.float64)
    among = logits if allowed is None else logits[sorted(allowed)]
    return logits - math.log(np.exp(among).sum())


def children_of(ids) -> dict[tuple[int, ...], set[int]]:
    children: dict[tuple[int, ...], set[int]] = {}
    for i in ids:
        for n, token in enumerate(i):
            children.setdefault(i[:n], set()).add(token)
    return children


def exhaustive(table, start, ids, normaliser) -> dict[tuple[int, ...], float]:
    children = children_of(ids)

    def score(i: tuple[int, ...]) -> float:
        total = 0.0
        for n, token in enumerate(i):
            allowed = children[i[:n]] if normaliser == "children" else None
            total += log_p(table, start, i[:n], allowed)[token]
        return total

    return {i: score(i) for i in ids}


def plain_search(table, start, ids, beam, normaliser, trail=None):
    """A beam search as one writes it in Python, and the smallest gap at which it cut.

    The beam after each step is appended to `trail`.
    """
    children = children_of(ids)
    beams, gap = [(0.0, ())], math.inf
    while any(prefix not in ids for _, prefix in beams):
        grown = []
        for score, prefix in beams:
            if prefix in ids:
                grown.append((score, prefix))
                continue
            allowed = children[prefix]
            step = log_p(table, start, prefix, allowed if normaliser == "children" else None)
            grown += [(score + step[t], (*prefix, t)) for t in allowed]
        grown.sort(reverse=True)
        if len(grown) > beam:
            gap = min(gap, grown[beam - 1][0] - grown[beam][0])
        beams = grown[:beam]
        if trail is not None:
            trail.append({prefix: score for score, prefix in beams})
    return {prefix: score for score, prefix in beams}, gap


def found(result, trie: Trie, ids: Ids, query: int) -> dict[tuple[int, ...], float]:
    """The identifiers of one query, after checking all that a BeamResult promises."""
    tokens, scores, rows, valid = (
        np.asarray(x)[query] for x in (result.tokens, result.scores, result.row, result.valid)
    )
    assert tokens.dtype == rows.dtype == np.int32 and scores.dtype == np.float32
    assert not np.isnan(scores).any()
    assert (scores[:-1] >= scores[1:]).all()
    assert (np.isfinite(scores) == valid).all()
    assert (rows[~valid] == -1).all() and not tokens[~valid].any()
    out = {}
    for written, score, row in zip(tokens[valid], scores[valid], rows[valid], strict=True):
        end = int((written > 0).sum())
        identifier = tuple(written[:end].tolist())
        assert not written[end:].any()
        assert identifier in ids, "an identifier that does not exist"
        assert trie.rows[row][trie.rows[row] > 0].tolist() == list(identifier)
        assert trie.documents(row).tolist() == ids[identifier]
        assert identifier not in out, "an identifier comes twice"
        out[identifier] = float(score)
    return out


def assert_same(ours: dict, expected: dict) -> None:
    assert set(ours) == set(expected)
    for identifier, score in expected.items():
        assert ours[identifier] == pytest.approx(score, abs=2e-4)


# --- against the oracles -----------------------------------------------------------------------


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
def test_a_filter_gives_what_a_trie_of_the_allowed_ones_gives(
    sequences, seed, beam, normaliser, path, share
):
    """Not what is left of a search without it: others take the places of those that may not be."""
    trie, ids = make_trie(sequences)
    table, start = make_model(seed)
    rows = np.random.default_rng(seed).random(len(trie.rows)) < share
    kept = {tuple(r[r > 0].tolist()) for r in trie.rows[rows]}
    some = {i: documents for i, documents in ids.items() if i in kept}
    expected = [plain_search(table, s, some, beam, normaliser) for s in start if some]
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


# --- a cache with several leaves ---------------------------------------------------------------


def rnn_weights(seed: int, width: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"embed": (VOCAB, width), "recur": (width, width), "out": (width, VOCAB)}
    return {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}


@functools.partial(jax.jit, static_argnames="beam")
def rnn_search(weights, first, trie, *, beam):
    def step(tokens, position, cache):
        new = jnp.tanh(cache["state"] @ weights["recur"] + weights["embed"][tokens])
        past = cache["past"].at[:, :, position].set(new)
        # The logits see the mean of all states so far, so that every slot of the past matters.
        return past.sum(2) / (position + 1) @ weights["out"], {"state": new, "past": past}

    past = jnp.zeros((BATCH, 1, LENGTH, first.shape[-1]))
    return constrained_beam_search(
        step, {"state": first[:, None], "past": past}, trie, batch=BATCH, beam=beam
    )


def rnn_score(weights, state, identifier) -> float:
    total, past = 0.0, []
    for before, token in zip((0, *identifier), identifier, strict=False):
        state = np.tanh(state @ weights["recur"] + weights["embed"][before])
        past.append(state)
        logits = np.mean(past, axis=0) @ weights["out"]
        total += float(logits[token] - np.log(np.exp(logits).sum()))
    return total


@settings(max_examples=30)
@given(sequences=sequence_sets(), seed=st.integers(0, 10**6), beam=st.sampled_from([3, MOST_IDS]))
def test_the_cache_follows_its_hypothesis(sequences, seed, beam):
    trie, ids = make_trie(sequences)
    weights = rnn_weights(seed)
    first = np.random.default_rng(seed + 1).normal(size=(BATCH, 5)).astype(np.float32)
    result = rnn_search(weights, first, roomy(trie), beam=beam)
    for query in range(BATCH):
        ours = found(result, trie, ids, query)
        assert ours
        expected = {i: rnn_score(weights, first[query], i) for i in ids}
        assert_same(ours, {i: expected[i] for i in ours})
        if beam >= len(ids):
            assert set(ours) == set(ids)


# --- compilation, and what rows and steps may cost ---------------------------------------------


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
