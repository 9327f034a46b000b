"""What the tests of the search share: small tries, a model, and oracles that know no trie.

The model is no T5: a table of logits looked up by a hash of the prefix, which the cache carries
along. A cache that followed the wrong hypothesis would look up the wrong row of the table.
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
def search(
    table,
    start,
    trie,
    *,
    beam,
    normaliser="vocabulary",
    tails=False,
    trail=False,
    look_ahead=None,
):
    return constrained_beam_search(
        table_step(table),
        {"state": start[:, None]},
        trie,
        batch=BATCH,
        beam=beam,
        normaliser=normaliser,
        tail_fn=table_tail(table) if tails else None,
        trail=trail,
        look_ahead=look_ahead,
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


def plain_search(table, start, ids, beam, normaliser, trail=None, ahead=None, among=None):
    """A beam search as one writes it in Python, and the smallest gap at which it cut.

    The beam after each step is appended to `trail`. With `ahead`, prefix -> number, the best by the
    sum of both are kept. "children" are those of `among`, of which a filter leaves `ids`.
    """
    ahead = ahead or (lambda prefix: 0.0)
    children, counted = children_of(ids), children_of(among or ids)
    beams, gap = [(0.0, ())], math.inf
    while any(prefix not in ids for _, prefix in beams):
        grown = []
        for score, prefix in beams:
            if prefix in ids:
                grown.append((score, prefix))
                continue
            over = counted[prefix] if normaliser == "children" else None
            step = log_p(table, start, prefix, over)
            grown += [(score + step[t], (*prefix, t)) for t in children[prefix]]
        ranked = sorted(((score + ahead(prefix), score, prefix) for score, prefix in grown))[::-1]
        if len(ranked) > beam:
            gap = min(gap, ranked[beam - 1][0] - ranked[beam][0])
        beams = [(score, prefix) for _, score, prefix in ranked[:beam]]
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
