"""Fusion of rankings against plain loops, and what the formulas promise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genret_jax.errors import UserError
from genret_jax.evaluation import evaluate
from genret_jax.hybrid import fit_weights, reciprocal_ranks, weighted

SCORES = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(-9, 9).map(float), max_size=8)
RUNS = st.dictionaries(st.sampled_from(["q1", "q2"]), SCORES, max_size=2)


def by_hand(runs, constant=60):
    """Reciprocal rank fusion as its definition reads."""
    fused: dict[str, dict[str, float]] = {}
    for run in runs:
        for query, found in run.items():
            fused.setdefault(query, {})
            for document in found:
                better = sum((s, d) > (found[document], document) for d, s in found.items())
                fused[query].setdefault(document, 0.0)
                fused[query][document] += 1 / (constant + better + 1)
    return fused


@given(RUNS, RUNS)
def test_reciprocal_ranks_are_those_of_the_definition(first, second):
    expected = by_hand([first, second])
    found = reciprocal_ranks([first, second])
    assert found.keys() == expected.keys()
    for query in found:
        assert found[query] == pytest.approx(expected[query])


@given(RUNS, RUNS)
def test_scores_alone_do_not_matter_to_ranks(first, second):
    stretched = {q: {d: 3 * s - 100 for d, s in found.items()} for q, found in first.items()}
    assert reciprocal_ranks([first, second]) == reciprocal_ranks([stretched, second])


def test_weighted_by_hand():
    first = {"q": {"a": 10.0, "b": 5.0, "c": 0.0}}
    second = {"q": {"b": -1.0, "d": -3.0}}
    fused = weighted([first, second], [0.75, 0.25])
    assert fused["q"] == pytest.approx({"a": 0.75, "b": 0.75 * 0.5 + 0.25, "c": 0.0, "d": 0.0})
    assert list(weighted([first, second], [0.75, 0.25], k=2)["q"]) == ["a", "b"]
    assert weighted([{"q": {"a": 7.0}}, {}], [0.5, 0.5]) == {"q": {"a": 0.5}}, "one has 1"


@given(RUNS, RUNS)
def test_all_the_weight_on_one_is_its_order(first, second):
    fused = weighted([first, second], [1.0, 0.0])
    for query, found in first.items():
        for better in found:
            for worse in found:
                if found[better] > found[worse]:
                    assert fused[query][better] > fused[query][worse]


def test_weights_are_the_best_on_dev():
    # By hand: a is above b in q1 where the share is above 0.65 / 1.15, in q2 where it is below 5/6.
    first = {"q1": {"a": 1.0, "b": 0.5, "c": 0.0}, "q2": {"b": 1.0, "a": 0.9, "c": 0.0}}
    second = {"q1": {"b": 1.0, "a": 0.35, "c": 0.0}, "q2": {"a": 1.0, "b": 0.5, "c": 0.0}}
    qrels = {"q1": {"a": 1}, "q2": {"a": 1}}
    found = fit_weights(first, second, qrels)
    for share, value in found.dev.items():
        fused = weighted([first, second], [share, 1 - share])
        assert value == evaluate(fused, qrels, ["mrr@10"])["mrr@10"]
    assert found.dev[found.first] == max(found.dev.values()) > max(found.dev[0.0], found.dev[1.0])
    assert found.first == 0.6
    assert {s for s, v in found.dev.items() if v == 1.0} == {0.6, 0.65, 0.7, 0.75, 0.8}


def test_mistakes():
    with pytest.raises(UserError, match="1 runs to fuse"):
        reciprocal_ranks([{}])
    with pytest.raises(UserError, match="give one each"):
        weighted([{}, {}], [1.0])
    with pytest.raises(UserError, match="from 0"):
        weighted([{}, {}], [1.0, -0.1])
