"""Metrics against trec_eval's own outputs, against ir_measures, and against numbers by hand."""

from __future__ import annotations

import math
import re
from pathlib import Path

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genret_jax.baselines.protocol import Hit, Searcher
from genret_jax.corpus import read_qrels, read_run
from genret_jax.errors import UserError
from genret_jax.evaluation import (
    DEFAULT_METRICS,
    evaluate,
    markdown_table,
    per_query,
    randomisation_test,
    run_of,
)

TREC = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "trec_eval_fixtures"
needs_trec = pytest.mark.skipif(
    not TREC.is_dir(),
    reason=f"NOT CHECKED AGAINST trec_eval: its test files are not at {TREC} "
    "(github.com/usnistgov/trec_eval, folder test)",
)

# ---- by hand


def test_by_hand():
    qrels = {"q": {"a": 1, "b": 3, "c": 0, "z": 2}}
    run = {"q": {"c": 4.0, "b": 3.0, "x": 2.0, "a": 1.0}}
    ideal = 3 / math.log2(2) + 2 / math.log2(3) + 1 / math.log2(4)
    expected = {
        "hits@1": 0.0,
        "hits@2": 1.0,
        "recall@1": 0.0,
        "recall@2": 1 / 3,
        "recall@4": 2 / 3,
        "recall@1000": 2 / 3,
        "mrr@1": 0.0,
        "mrr@2": 0.5,
        "mrr@10": 0.5,
        "ndcg@1": 0.0,
        "ndcg@2": (3 / math.log2(3)) / (3 + 2 / math.log2(3)),
        "ndcg@10": (3 / math.log2(3) + 1 / math.log2(5)) / ideal,
    }
    assert evaluate(run, qrels, list(expected)) == pytest.approx(expected)


def test_equal_scores_are_ordered_by_id_descending():
    assert evaluate({"q": {"a": 1.0, "b": 1.0}}, {"q": {"b": 1}}, ["mrr@10"]) == {"mrr@10": 1.0}
    assert evaluate({"q": {"b": 1.0, "a": 1.0}}, {"q": {"a": 1}}, ["mrr@10"]) == {"mrr@10": 0.5}
    # Scores are compared in double precision, as trec_eval 10 does.
    close = {"q": {"a": 1.0 + 1e-12, "b": 1.0}}
    assert evaluate(close, {"q": {"a": 1}}, ["hits@1"]) == {"hits@1": 1.0}


def test_all_judged_queries_count():
    qrels = {"found": {"a": 1}, "missing": {"a": 1}, "empty": {"a": 1}, "hopeless": {"a": 0}}
    run = {"unjudged": {"a": 1.0}, "hopeless": {"a": 1.0}, "found": {"a": 1.0}, "empty": {}}
    values = per_query(run, qrels)
    assert list(values) == list(DEFAULT_METRICS)
    for array in values.values():
        assert array.dtype == np.float64
        assert array.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert evaluate(run, qrels) == dict.fromkeys(DEFAULT_METRICS, 0.25)


def test_negative_grades_gain_nothing():
    values = evaluate({"q": {"a": 2.0, "b": 1.0}}, {"q": {"a": -2, "b": 1}})
    assert values["ndcg@10"] == pytest.approx(1 / math.log2(3))
    assert values["hits@1"] == 0.0
    assert evaluate({"q": {"a": 2.0}}, {"q": {"a": -2}})["ndcg@10"] == 0.0


def test_relevance_level():
    run, qrels = {"q": {"a": 3.0, "b": 2.0}}, {"q": {"a": 1, "b": 2}}
    assert evaluate(run, qrels, ["mrr@10"], relevance_level=2) == {"mrr@10": 0.5}
    assert evaluate(run, qrels, ["mrr@10"], relevance_level=3) == {"mrr@10": 0.0}


@pytest.mark.parametrize(
    "name", ["ndcg", "map@10", "hits@0", "hits@-1", "hits@1.5", "ndcg@", "", "ndcg@٣", "NDCG@10"]
)
def test_unknown_metric(name):
    with pytest.raises(UserError, match="hits@K, recall@K, mrr@K, ndcg@K"):
        evaluate({}, {"q": {"a": 1}}, [name])


def test_bad_input():
    with pytest.raises(UserError, match="no judgements"):
        evaluate({"q": {"a": 1.0}}, {})
    with pytest.raises(UserError, match="no metrics"):
        evaluate({}, {"q": {"a": 1}}, [])
    with pytest.raises(UserError, match="relevance level 0"):
        evaluate({}, {"q": {"a": 1}}, relevance_level=0)
    with pytest.raises(UserError, match="'b' for query 'q' is not a number"):
        evaluate({"q": {"a": 1.0, "b": math.nan}}, {"q": {"a": 1}})
    with pytest.warns(UserWarning, match="none of the run's 1 queries"):
        evaluate({"x": {"a": 1.0}}, {"q": {"a": 1}})


# ---- ir_measures

PEERS = {
    "hits@1": ir_measures.Success @ 1,
    "hits@3": ir_measures.Success @ 3,
    "recall@2": ir_measures.R @ 2,
    "recall@100": ir_measures.R @ 100,
    # With a cutoff RR comes from another peer, whose ties are in another order: asked without one.
    "mrr@1000": ir_measures.RR,
    "ndcg@3": ir_measures.nDCG @ 3,
    "ndcg@10": ir_measures.nDCG @ 10,
}
IDS = st.sampled_from(["d1", "d10", "d2", "D2", "é", "z", "文", "d-3", "d.3", "00", "𝔸", "\ue000"])
QUERY_IDS = st.sampled_from(["q1", "q2", "q3", "q4", "q5"])
# Eighths: ties are frequent, and the single precision of older trec_eval is exact.
SCORES = st.integers(-8, 8).map(lambda eighths: eighths / 8)


@settings(max_examples=150, deadline=None)
@given(
    run=st.dictionaries(QUERY_IDS, st.dictionaries(IDS, SCORES, min_size=1), max_size=5),
    qrels=st.dictionaries(
        QUERY_IDS, st.dictionaries(IDS, st.integers(0, 4), min_size=1), min_size=1, max_size=5
    ),
)
@pytest.mark.filterwarnings("ignore:none of the run's")
def test_against_ir_measures(run, qrels):
    ours = per_query(run, qrels, list(PEERS))
    rows = {query: row for row, query in enumerate(qrels)}
    names = {peer: name for name, peer in PEERS.items()}
    theirs = {name: np.zeros(len(qrels)) for name in PEERS}
    for value in ir_measures.iter_calc(list(PEERS.values()), qrels, run):
        theirs[names[value.measure]][rows[value.query_id]] = value.value
    for name in PEERS:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-12, err_msg=name)
        assert evaluate(run, qrels, [name])[name] == pytest.approx(theirs[name].mean())
    for cutoff in (1, 2, 5):
        cut = np.where(theirs["mrr@1000"] >= 1 / cutoff, theirs["mrr@1000"], 0.0)
        name = f"mrr@{cutoff}"
        np.testing.assert_allclose(per_query(run, qrels, [name])[name], cut, atol=1e-12)


# ---- trec_eval

TREC_NAMES = {"success": "hits", "recall": "recall", "ndcg_cut": "ndcg"}


def trec_output(name: str) -> dict[str, dict[str, float]]:
    """query or "all" -> our metric -> value, of the measures that we have too.

    recip_rank has no cutoff in trec_eval: ours is asked for at a depth beyond every run's.
    """
    values: dict[str, dict[str, float]] = {}
    for line in (TREC / name).read_text().splitlines():
        measure, query, value = line.split()
        match = re.fullmatch(r"(success|recall|ndcg_cut)_(\d+)", measure)
        if match or measure == "recip_rank":
            metric = f"{TREC_NAMES[match[1]]}@{match[2]}" if match else "mrr@100000"
            values.setdefault(query, {})[metric] = float(value)
    return values


def compare(expected: dict[str, dict[str, float]], run, qrels, *, digits: float = 5.1e-5, level=1):
    metrics = list(expected["all"])
    assert len(metrics) > 10
    values = per_query(run, qrels, metrics, relevance_level=level)
    means = evaluate(run, qrels, metrics, relevance_level=level)
    for query, numbers in expected.items():
        for metric, number in numbers.items():
            row = list(qrels).index(query) if query != "all" else None
            ours = means[metric] if row is None else values[metric][row]
            assert abs(ours - number) <= digits, (query, metric, ours, number)


@needs_trec
def test_trec_eval_all_measures():
    run, qrels = read_run(TREC / "results.test"), read_qrels(TREC / "qrels.test")
    assert {query: len(results) for query, results in run.items()} == {
        "301": 500,
        "302": 500,
        "303": 500,
    }
    compare(trec_output("out.test.aq"), run, qrels)
    assert trec_output("out.test.a")["all"] == trec_output("out.test.aq")["all"]


@needs_trec
def test_trec_eval_measure_parameters():
    expected = trec_output("out.test.meas_params")
    run, qrels = read_run(TREC / "results.test"), read_qrels(TREC / "qrels.test")
    for query, numbers in expected.items():
        ours = per_query(run, qrels, list(numbers))
        for metric, number in numbers.items():
            value = ours[metric].mean() if query == "all" else ours[metric][int(query) - 301]
            assert abs(value - number) <= 5.1e-5, (query, metric)


@needs_trec
def test_trec_eval_missing_queries_count_as_zero():
    run, qrels = read_run(TREC / "results.trunc"), read_qrels(TREC / "qrels.test")
    assert "302" in qrels and "302" not in run
    compare(trec_output("out.test.aqc"), run, qrels)


@needs_trec
def test_trec_eval_only_the_first_hundred():
    run, qrels = read_run(TREC / "results.trunc"), read_qrels(TREC / "qrels.test")
    short = {
        query: dict(sorted(results.items(), key=lambda item: (item[1], item[0]))[-100:])
        for query, results in run.items()
    }
    compare(trec_output("out.test.aqcM"), short, qrels)


@needs_trec
def test_trec_eval_graded_with_a_relevance_level(tmp_path):
    with pytest.raises(UserError, match="'-1' is no whole number from 0"):
        read_qrels(TREC / "qrels.rel_level")
    mended = tmp_path / "qrels"
    mended.write_text((TREC / "qrels.rel_level").read_text().replace(" -1\n", " 0\n"))
    run = read_run(TREC / "results.test")
    compare(trec_output("out.test.aql"), run, read_qrels(mended), level=2)


# ---- significance


def test_randomisation_test_against_all_permutations():
    generator = np.random.default_rng(3)
    a, b = generator.random(10), generator.random(10)
    differences = a - b
    signs = 1 - 2 * ((np.arange(2**10)[:, None] >> np.arange(10)) & 1)
    exact = (np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12).mean()
    assert randomisation_test(a, b, samples=200_000, seed=1) == pytest.approx(exact, abs=0.005)
    assert randomisation_test(a, b, samples=500, seed=1) == randomisation_test(
        b, a, samples=500, seed=1
    ), "two sided"


def test_randomisation_test_extremes():
    ones, zeros = np.ones(40), np.zeros(40)
    assert randomisation_test(ones, ones, samples=99, seed=0) == 1.0
    assert randomisation_test(ones, zeros, samples=99, seed=0) == 1 / 100
    assert randomisation_test([1.0, 0.0], [0.0, 1.0], samples=99, seed=0) == 1.0
    assert randomisation_test([1.0], [0.0], samples=99, seed=0) == 1.0


def test_randomisation_test_is_level_and_seeded():
    generator = np.random.default_rng(0)
    values = [
        randomisation_test(*generator.integers(0, 2, (2, 60)), samples=200, seed=seed)
        for seed in range(400)
    ]
    assert np.mean(np.array(values) <= 0.05) < 0.08
    a, b = generator.random((2, 3000))
    assert randomisation_test(a, b, samples=3000, seed=5) == randomisation_test(
        a, b, samples=3000, seed=5
    )


@pytest.mark.parametrize(
    ("a", "b", "samples"),
    [
        ([1.0], [1.0, 2.0], 9),
        ([], [], 9),
        ([[1.0]], [[2.0]], 9),
        ([1.0], [2.0], 0),
        ([math.nan], [1.0], 9),
    ],
)
def test_randomisation_test_bad_input(a, b, samples):
    with pytest.raises(UserError, match="randomisation test"):
        randomisation_test(a, b, samples=samples, seed=0)


# ---- tables and timing


def test_markdown_table():
    table = markdown_table(
        {
            "BM25": {"hits@1": 0.24, "ndcg@10": 0.33149},
            "a|b": {"hits@1": 0.479, "ndcg@10": 0.3312},
            "none": {"hits@1": 0.1, "recall@9": 1.0},
        }
    )
    assert table.splitlines() == [
        "| method | hits@1 | ndcg@10 | recall@9 |",
        "| --- | ---: | ---: | ---: |",
        "| BM25 | 0.240 | **0.331** | – |",
        "| a\\|b | **0.479** | **0.331** | – |",
        "| none | 0.100 | – | 1.000 |",
    ]
    assert "0.3315" in markdown_table({"x": {"ndcg@10": 0.33149}}, digits=4)
    with pytest.raises(UserError, match="no methods"):
        markdown_table({})


class Echo:
    """Finds documents named like the words of the query, the last word twice."""

    name = "echo"

    def search(self, queries, *, k):
        return [
            [Hit(word, 1.0 / rank, rank) for rank, word in enumerate(query.split()[:k], start=1)]
            for query in queries
        ]


def test_run_of():
    assert isinstance(Echo(), Searcher)
    timed = run_of(Echo(), {"q1": "a b a", "q2": "", "q3": "b c d e"}, 3)
    run, queries_per_second = timed
    assert run == {"q1": {"a": 1.0, "b": 0.5}, "q2": {}, "q3": {"b": 1.0, "c": 0.5, "d": 1 / 3}}
    assert queries_per_second == timed.queries_per_second > 0
    with pytest.raises(UserError, match="no queries to search with echo"):
        run_of(Echo(), {}, 3)
