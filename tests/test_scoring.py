"""The fused score by hand, and its weights against trying them one by one."""

from __future__ import annotations

import dataclasses
import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from genret_jax.documents import descending
from genret_jax.evaluation import per_query
from genret_jax.fusion_fit import fit_fusion
from genret_jax.judged import Judged
from genret_jax.scoring import SCORINGS, Candidates, Fusion, run_of_candidates

METRIC = "mrr@10"


def _fit(found, qrels, ids, *, temperature, **more):
    """The weights and their curve."""
    judged = Judged.of(found, qrels, ids, descending(ids))
    fitted = fit_fusion(judged, temperature=temperature, metric=METRIC, **more)
    return fitted.fusion, fitted.curve


def _candidates(generation, text=None, lengths=None, positions=None, asked=None, unseen=None):
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
        unseen=None if unseen is None else np.array(unseen, bool),
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
    fusion, curve = _fit(found, qrels, ["a", "b"], temperature=1.0)
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
    fusion, curve = _fit(found, qrels, ids, temperature=temperature)
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
    assert _fit(wrong, qrels, ids, temperature=1.0)[0] == Fusion(0.0, 0.0)
    right = {"q": _candidates([-6.0, -0.5], [1.0, 0.0])}
    assert _fit(right, qrels, ids, temperature=1.0)[0] == Fusion(0.0, 8.0)


def test_docids_of_one_length_need_no_exponent():
    found = {"q": _candidates([-1.0, -4.0], [0.0, 0.1], [3, 3])}
    fusion, _ = _fit(found, {"q": {"b": 1}}, ["a", "b"], temperature=0.05)
    assert fusion.alpha == 0.0


def test_long_docids_can_be_told_to_count_a_token():
    """The long docid is the better one a token, whatever the similarity says."""
    found = {"q": _candidates([-2.0, -4.0], [0.0, 0.0], [1, 8])}
    fusion, _ = _fit(found, {"q": {"b": 1}}, ["a", "b"], temperature=0.05)
    assert fusion == Fusion(0.5, 20.0)


def test_a_query_that_reached_nothing_counts_as_missed():
    found = {"q": _candidates([-1.0], [1.0]), "r": _candidates([], [])}
    qrels = {"q": {"a": 1}, "r": {"a": 1}}
    _, curve = _fit(found, qrels, ["a"], temperature=1.0)
    assert set(curve.values()) == {0.5}


# --- documents that no train query names -------------------------------------------------------


def test_unseen_documents_have_weight_and_offset_of_their_own():
    found = _candidates([-2.0, -3.0, -8.0], [0.5, -0.25, 1.0], [1, 4, 4], unseen=[0, 1, 1])
    fusion = Fusion(0.5, 2.0, 0.0, 4.0, 0.25)
    expected = [-2.0 + 1.0, -1.5 - 1.0 + 0.25, -4.0 + 4.0 + 0.25]
    np.testing.assert_allclose(fusion.score(found), expected, rtol=1e-6)
    assert fusion.score(found).dtype == np.float32
    assert fusion.score(found, "generation") is found.generation
    assert Fusion(0.5, 2.0).score(found).tolist() == Fusion(0.5, 2.0).score(FOUND).tolist()[:1] + [
        -2.0,
        -2.0,
    ]
    with pytest.raises(ValueError, match="no train query names is not known"):
        fusion.score(FOUND)


def test_fields_of_unseen_documents_are_written_where_they_count():
    assert set(Fusion(0.5, 2.0).to_dict()) == {"alpha", "weight", "query_share"}
    two = Fusion(0.5, 2.0, 0.25, 4.0, -1.0)
    assert Fusion(**two.to_dict()) == two and len(two.to_dict()) == 5


IDS = ["a", "b", "c", "d"]
# Of four documents, c and d are named by no train query.
UNSEEN = [False, False, True, True]
# A similar text misleads among the others; without it, no unseen document is found.
WITH_WEIGHTS = {
    "seen": _candidates([-1.0, -2.0, -6.0, -7.0], [0.1, 0.9, 0.2, 0.0], unseen=UNSEEN),
    "unseen": _candidates([-1.0, -3.0, -6.0, -7.0], [0.1, 0.1, 0.9, 0.0], unseen=UNSEEN),
}
# No similarity tells anything; unseen documents are written too seldom.
WITH_OFFSET = {
    "seen": _candidates([-1.0, -9.0, -4.0, -9.0], [0.0] * 4, unseen=UNSEEN),
    "unseen": _candidates([-4.0, -9.0, -6.0, -9.0], [0.0] * 4, unseen=UNSEEN),
}


def _kinds(found, qrels, ids, fusion, unseen):
    run = run_of_candidates(found, fusion, ids)
    values = per_query(run, qrels, [METRIC])[METRIC]
    return {"seen": values[~unseen].mean(), "unseen": values[unseen].mean()}


@pytest.mark.parametrize("found", [WITH_WEIGHTS, WITH_OFFSET], ids=["weights", "offset"])
def test_both_kinds_at_once_need_what_only_unseen_documents_get(found):
    qrels, unseen = {"seen": {"a": 1}, "unseen": {"c": 1}}, np.array([False, True])
    one = [Fusion(0.0, weight) for weight in np.linspace(0, 100, 2001)]
    assert max(sum(_kinds(found, qrels, IDS, f, unseen).values()) for f in one) < 2.0
    judged = Judged.of(found, qrels, IDS, descending(IDS))
    fitted = fit_fusion(judged, temperature=1.0, metric=METRIC, unseen=unseen)
    assert fitted.kinds["two weights"] == {"seen": 1.0, "unseen": 1.0}
    assert sum(fitted.kinds["one weight"].values()) < 2.0
    assert _kinds(found, qrels, IDS, fitted.fusion, unseen) == fitted.kinds["two weights"]
    if found is WITH_OFFSET:
        assert 2.0 < fitted.fusion.unseen_offset < 3.0


def test_a_share_decides_which_kind_is_ranked_right_where_both_cannot_be():
    """One query of each kind, with the same candidates in the same order."""
    found = {q: _candidates([-1.0, -9.0, -2.0, -9.0], [0.0] * 4, unseen=UNSEEN) for q in "su"}
    qrels, unseen = {"s": {"a": 1}, "u": {"c": 1}}, np.array([False, True])
    judged = Judged.of(found, qrels, IDS, descending(IDS))
    for share, right in ((0.3, "seen"), (0.7, "unseen")):
        fitted = fit_fusion(
            judged, temperature=1.0, metric="hits@1", unseen=unseen, unseen_share=share
        )
        both = {"seen": 0.0, "unseen": 0.0, right: 1.0}
        assert fitted.kinds["two weights"] == both
        assert (fitted.fusion.unseen_weight is None) == (right == "seen")


def test_one_weight_stays_where_two_gain_nothing():
    found = {q: _candidates([-1.0, -2.0], [0.5, 0.1], unseen=[q == "r"] * 2) for q in "qr"}
    qrels, unseen = {q: {"a": 1} for q in "qr"}, np.array([False, True])
    fitted = fit_fusion(
        Judged.of(found, qrels, IDS, descending(IDS)),
        temperature=0.5,
        metric=METRIC,
        unseen=unseen,
    )
    assert fitted.fusion == Fusion(0.0, 2.0) and set(fitted.to_dict()["kinds"]) == {
        "one weight",
        "two weights",
    }
    assert fitted.kinds["one weight"] == fitted.kinds["two weights"] == {"seen": 1.0, "unseen": 1.0}


def test_queries_about_unseen_documents_need_candidates_that_tell_them():
    found = {q: _candidates([-1.0, -2.0], [0.5, 0.1]) for q in "qr"}
    judged = Judged.of(found, {q: {"b": 1} for q in "qr"}, IDS, descending(IDS))
    with pytest.raises(ValueError, match="do not tell them"):
        fit_fusion(judged, temperature=1.0, metric=METRIC, unseen=np.array([False, True]))


@settings(max_examples=25)
@given(collections(), st.data())
def test_two_weights_are_no_worse_than_any_pair_that_is_tried(made, data):
    found, qrels, ids = made
    whose = np.array(data.draw(st.lists(st.booleans(), min_size=12, max_size=12)))
    found = {q: dataclasses.replace(c, unseen=whose[c.positions]) for q, c in found.items()}
    unseen = np.array(data.draw(st.lists(st.booleans(), min_size=len(qrels), max_size=len(qrels))))
    judged = Judged.of(found, qrels, ids, descending(ids))
    fitted = fit_fusion(judged, temperature=1.0, metric=METRIC, unseen=unseen)
    if not 0 < unseen.sum() < len(unseen):
        assert fitted == fit_fusion(judged, temperature=1.0, metric=METRIC) and not fitted.kinds
        return
    reached = sum(_kinds(found, qrels, ids, fitted.fusion, unseen).values())
    assert reached == pytest.approx(sum(fitted.kinds["two weights"].values()))
    tried = [fitted.fusion] + [
        dataclasses.replace(fitted.fusion, weight=a, unseen_weight=b, unseen_offset=0.0)
        for a in WEIGHTS[::3]
        for b in WEIGHTS[::3]
    ]
    best = max(sum(_kinds(found, qrels, ids, fusion, unseen).values()) for fusion in tried)
    assert reached >= best - 1e-9
    # The others' queries alone choose exponent and share.
    others = {q: j for (q, j), kind in zip(qrels.items(), unseen, strict=True) if not kind}
    alone, curve = _fit(found, others, ids, temperature=1.0)
    assert (alone.alpha, alone.query_share) == (fitted.fusion.alpha, fitted.fusion.query_share)
    assert curve == fitted.curve


# --- many queries at once ----------------------------------------------------------------------


@st.composite
def judged_runs(draw):
    """Graded judgements, some of documents that were not reached, some queries without a run."""
    found, _, ids = draw(collections())
    grades = st.dictionaries(st.sampled_from([*ids, "elsewhere"]), st.integers(-1, 3), max_size=5)
    qrels = {q: draw(grades) for q in [*found, "unanswered"]}
    return found, qrels, ids


@settings(max_examples=100)
@given(judged_runs(), st.integers(1, 5))
def test_metrics_of_arrays_are_those_of_runs(made, cutoff):
    found, qrels, ids = made
    names = [f"{measure}@{cutoff}" for measure in ("hits", "mrr", "recall", "ndcg")]
    fusion = Fusion(0.5, 2.0)
    judged = Judged.of(found, qrels, ids, descending(ids))
    values = judged.metrics(fusion.score(judged.candidates), names)
    expected = per_query(run_of_candidates(found, fusion, ids), qrels, names)
    for name in names:
        np.testing.assert_allclose(values[name], expected[name], rtol=1e-12, err_msg=name)
    some = np.arange(len(qrels)) % 2 == 0
    part = judged.some(some)
    for name, of_part in part.metrics(fusion.score(part.candidates), names).items():
        np.testing.assert_allclose(of_part, expected[name][some], rtol=1e-12, err_msg=name)


def test_nothing_reached_by_any_query_is_measured_too():
    judged = Judged.of({"q": _candidates([], [])}, {"q": {"a": 1}}, IDS, descending(IDS))
    values = judged.metrics(Fusion().score(judged.candidates), ["mrr@10", "ndcg@3"])
    assert {name: value.tolist() for name, value in values.items()} == {
        "mrr@10": [0.0],
        "ndcg@3": [0.0],
    }
