"""The fused score by hand, and its weights against trying them one by one."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from genret_jax.scoring import SCORINGS, Candidates, Fusion, fit_fusion

METRIC = "mrr@10"


def _candidates(generation, text=None, lengths=None, positions=None, asked=None):
    n = len(generation)
    text = None if text is None else np.array(text, np.float32)
    return Candidates(
        positions=np.array(range(n) if positions is None else positions, np.int32),
        rows=np.arange(n, dtype=np.int32),
        lengths=np.array([1] * n if lengths is None else lengths, np.int32),
        generation=np.array(generation, np.float32),
        query=np.array([1.0, 0.0], np.float32),
        text=text,
        asked=text if asked is None else np.array(asked, np.float32),
    )


FOUND = _candidates([-2.0, -3.0, -8.0], [0.5, -0.25, 1.0], [1, 4, 16])


@pytest.mark.parametrize(
    ("alpha", "weight", "expected"),
    [
        (0.0, 0.0, [-2.0, -3.0, -8.0]),
        (0.0, 2.0, [-2.0 + 1.0, -3.0 - 0.5, -8.0 + 2.0]),
        (0.5, 0.0, [-2.0, -1.5, -2.0]),
        (1.0, 4.0, [-2.0 + 2.0, -0.75 - 1.0, -0.5 + 4.0]),
    ],
)
def test_fused_by_hand(alpha, weight, expected):
    score = Fusion(alpha, weight).score(FOUND)
    np.testing.assert_allclose(score, expected, rtol=1e-6)
    assert score.dtype == np.float32


def test_the_other_scorings_are_the_parts():
    fusion = Fusion(1.0, 4.0)
    assert fusion.score(FOUND, "generation") is FOUND.generation
    assert fusion.score(FOUND, "semantic").tolist() == FOUND.text.tolist()
    assert set(SCORINGS) == {"fused", "generation", "semantic"}


@pytest.mark.parametrize("scoring", ["fused", "semantic"])
def test_without_similarities_there_is_generation_alone(scoring):
    found = _candidates([-1.0, -2.0])
    assert Fusion(0.0, 1.0).score(found, "generation").tolist() == [-1.0, -2.0]
    with pytest.raises(ValueError, match=f"'{scoring}' needs document vectors"):
        Fusion(0.0, 1.0).score(found, scoring)


def test_both_similarities_by_hand():
    found = _candidates([-1.0, -2.0], [0.5, 0.0], asked=[0.1, 0.9])
    fusion = Fusion(0.0, 10.0, 0.25)
    np.testing.assert_allclose(fusion.semantic(found), [0.4, 0.225], rtol=1e-6)
    np.testing.assert_allclose(fusion.score(found), [3.0, 0.25], rtol=1e-6)
    np.testing.assert_allclose(fusion.score(found, "semantic"), [0.4, 0.225], rtol=1e-6)


@pytest.mark.parametrize(("good", "share"), [("asked", 1.0), ("text", 0.0)])
def test_the_similarity_that_leads_gets_the_share(good, share):
    """Three queries, whose document is told by one kind of view and mistaken by the other."""
    kinds = {"text": [0.0, 1.0], "asked": [0.0, 1.0], good: [1.0, 0.0]}
    found = {q: _candidates([-1.0, -1.0], kinds["text"], asked=kinds["asked"]) for q in "qrs"}
    qrels = {q: {"a": 1} for q in "qrs"}
    fusion, curve = fit_fusion(found, qrels, ["a", "b"], temperature=1.0, metric=METRIC)
    assert abs(fusion.query_share - share) < 0.5 and max(curve.values()) == 1.0


def test_nothing_reached_has_no_scores():
    assert Fusion(0.5, 2.0).score(_candidates([], [])).shape == (0,)


# --- weights from dev --------------------------------------------------------------------------

WEIGHTS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 16.0, 32.0)


def _mrr(found, qrels, ids, alpha, weight):
    """Mean reciprocal rank at 10, document by document; ties in descending order of id."""
    total = 0.0
    for query, judged in qrels.items():
        c = found.get(query)
        if c is None:
            continue
        scored = []
        for i, position in enumerate(c.positions.tolist()):
            mean = np.float32(c.generation[i]) / np.float32(c.lengths[i]) ** np.float32(alpha)
            score = np.float32(mean + np.float32(weight) * np.float32(c.text[i]))
            scored.append((float(score), ids[position]))
        ranked = [name for _, name in sorted(scored, reverse=True)][:10]
        total += next((1 / r for r, name in enumerate(ranked, 1) if judged.get(name, 0) > 0), 0.0)
    return total / len(qrels)


@st.composite
def collections(draw):
    """A few queries over 12 documents; numbers on a coarse grid, so that ties abound."""
    ids = [f"d{i}" for i in range(12)]
    found, qrels = {}, {}
    for query in range(draw(st.integers(1, 5))):
        positions = draw(st.lists(st.integers(0, 11), min_size=1, max_size=8, unique=True))
        n = len(positions)
        numbers = {"min_size": n, "max_size": n}
        found[f"q{query}"] = _candidates(
            [x / 2 for x in draw(st.lists(st.integers(-12, 0), **numbers))],
            [x / 8 for x in draw(st.lists(st.integers(-8, 8), **numbers))],
            draw(st.lists(st.integers(1, 4), **numbers)),
            positions,
        )
        qrels[f"q{query}"] = {ids[draw(st.integers(0, 11))]: 1}
    return found, qrels, ids


@settings(max_examples=60)
@given(collections(), st.sampled_from([0.05, 0.5, 1.0]))
def test_the_weights_are_the_best_of_all_that_are_tried(made, temperature):
    found, qrels, ids = made
    fusion, curve = fit_fusion(found, qrels, ids, temperature=temperature, metric=METRIC)
    lengths = {int(n) for c in found.values() for n in c.lengths}
    alphas = (0.0, 0.5, 1.0) if len(lengths) > 1 else (0.0,)
    values = {(a, w): _mrr(found, qrels, ids, a, w / temperature) for a in alphas for w in WEIGHTS}
    best = max(values.values())
    chosen = fusion.alpha, fusion.weight * temperature
    assert _mrr(found, qrels, ids, fusion.alpha, fusion.weight) == pytest.approx(best)
    # Among equals: the weight nearest to the one of training, then the whole probability.
    equal = [key for key, value in values.items() if math.isclose(value, best, abs_tol=1e-12)]
    nearest = min(abs(w - 1.0) for _, w in equal)
    assert abs(chosen[1] - 1.0) == pytest.approx(nearest)
    assert chosen[0] == min(a for a, w in equal if abs(w - 1.0) <= nearest + 1e-9)
    expected = {w / temperature: values[fusion.alpha, w] for w in WEIGHTS}
    assert curve == pytest.approx(expected)


def test_a_similarity_that_misleads_gets_no_weight_and_one_that_leads_all():
    ids, qrels = ["a", "b"], {"q": {"a": 1}}
    wrong = {"q": _candidates([-1.0, -1.01], [0.0, 1.0])}
    assert fit_fusion(wrong, qrels, ids, temperature=1.0, metric=METRIC)[0] == Fusion(0.0, 0.0)
    right = {"q": _candidates([-6.0, -0.5], [1.0, 0.0])}
    assert fit_fusion(right, qrels, ids, temperature=1.0, metric=METRIC)[0] == Fusion(0.0, 8.0)


def test_docids_of_one_length_need_no_exponent():
    found = {"q": _candidates([-1.0, -4.0], [0.0, 0.1], [3, 3])}
    fusion, _ = fit_fusion(found, {"q": {"b": 1}}, ["a", "b"], temperature=0.05, metric=METRIC)
    assert fusion.alpha == 0.0


def test_long_docids_can_be_told_to_count_a_token():
    """The long docid is the better one a token, whatever the similarity says."""
    found = {"q": _candidates([-2.0, -4.0], [0.0, 0.0], [1, 8])}
    fusion, _ = fit_fusion(found, {"q": {"b": 1}}, ["a", "b"], temperature=0.05, metric=METRIC)
    assert fusion == Fusion(0.5, 20.0)


def test_a_query_that_reached_nothing_counts_as_missed():
    found = {"q": _candidates([-1.0], [1.0]), "r": _candidates([], [])}
    qrels = {"q": {"a": 1}, "r": {"a": 1}}
    _, curve = fit_fusion(found, qrels, ["a"], temperature=1.0, metric=METRIC)
    assert set(curve.values()) == {0.5}
