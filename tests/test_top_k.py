"""The largest of many numbers, against `jax.lax.top_k`."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genret_jax.top_k import top_k

SIZES = (16_384, 20_480, 20_501)  # whole blocks, and a last one that is not full
ours = jax.jit(top_k, static_argnums=1)
theirs = jax.jit(jax.lax.top_k, static_argnums=1)


@settings(max_examples=40)
@given(
    n=st.sampled_from(SIZES),
    k=st.sampled_from((1, 10, 100)),
    levels=st.sampled_from((1, 2, 50, 10**6)),
    seed=st.integers(0, 2**16),
    dead=st.sampled_from((0.0, 0.5, 0.9999)),
)
def test_values_and_places_are_those_of_a_sort(n, k, levels, seed, dead):
    """Few levels: nearly all numbers are equal, and the leftmost of them come first."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, levels, (4, n)).astype(np.float32)
    x[rng.random((4, n)) < dead] = -np.inf
    for mine, expected in zip(ours(x, k), theirs(x, k), strict=True):
        np.testing.assert_array_equal(mine, expected)


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 3, 3), (1, 20_480, 9), (4, 16_384, 129)])
def test_where_numbers_or_blocks_are_few_it_is_one_sort(rows, n, k):
    x = np.random.default_rng(0).normal(size=(rows, n)).astype(np.float32)
    for mine, expected in zip(ours(x, k), theirs(x, k), strict=True):
        np.testing.assert_array_equal(mine, expected)


def test_a_large_beam_is_chosen_by_blocks():
    """100 hypotheses over 2,048 tokens: the second sort sees a thirtieth of them."""
    x = np.zeros((1, 204_800), np.float32)
    program = str(jax.make_jaxpr(lambda x: top_k(x, 100))(x))
    assert program.count("top_k[") == 2 and "f32[1,6400]" in program
