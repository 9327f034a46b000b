"""The cache of a search, which has several leaves here, follows its hypothesis."""

from __future__ import annotations

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from decoding_oracles import (
    BATCH,
    LENGTH,
    MOST_IDS,
    VOCAB,
    assert_same,
    found,
    make_trie,
    roomy,
    sequence_sets,
)
from hypothesis import given, settings

from genret_jax.decoding import constrained_beam_search


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
