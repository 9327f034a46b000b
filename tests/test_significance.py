"""Paired tests against numbers by hand, plain loops and scipy; and in a comparison of searchers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tiny import tiny_corpus

from genret_jax.baselines.protocol import Hit
from genret_jax.comparison.searchers import compare_searchers
from genret_jax.errors import UserError
from genret_jax.evaluation import per_query, randomisation_test
from genret_jax.harness.measuring import Asked
from genret_jax.significance import TESTED_METRICS, against, holm, paired, t_test


def sign_flips(a, b) -> float:
    """The exact paired randomisation test: every choice of signs, one at a time."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    observed = abs(sum(differences))
    extreme = count = 0
    for signs in itertools.product((1, -1), repeat=len(differences)):
        total = sum(s * d for s, d in zip(signs, differences, strict=True))
        extreme += abs(total) >= observed - 1e-12
        count += 1
    return extreme / count


def test_t_test_by_hand():
    # differences 1, 2, 3, 4: mean 2.5, variance 5/3, t = 2.5 / sqrt(5/3 / 4) = 3.8730, 3 degrees
    # of freedom, whose distribution function has a closed form.
    t = 2.5 / math.sqrt(5 / 3 / 4)
    tail = 0.5 - (math.atan(t / math.sqrt(3)) + math.sqrt(3) * t / (3 + t * t)) / math.pi
    assert t_test([2.0, 4.0, 6.0, 8.0], [1.0, 2.0, 3.0, 4.0]) == pytest.approx(2 * tail)
    assert 2 * tail == pytest.approx(0.0305, abs=1e-4)


@pytest.mark.filterwarnings("error")
def test_t_test_where_nothing_can_be_told():
    assert t_test([1.0], [0.0]) == 1.0
    assert t_test([1.0, 0.0], [1.0, 0.0]) == 1.0
    assert t_test([1.0, 1.0, 1.0], [0.0, 0.0, 0.0]) == pytest.approx(0.0)


def test_tests_against_plain_loops_and_scipy():
    generator = np.random.default_rng(4)
    for _ in range(3):
        a, b = generator.random((2, 10))
        b[:3] = a[:3]  # queries on which both agree
        found = paired(a, b)
        peer = stats.permutation_test(
            (a, b),
            lambda x, y, axis: np.mean(x - y, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=np.inf,
        )
        exact = sign_flips(a, b)
        assert peer.pvalue == pytest.approx(exact)
        assert found.randomisation == pytest.approx(exact, abs=0.015)
        assert found.t_test == pytest.approx(stats.ttest_rel(a, b).pvalue)
        assert found.difference == pytest.approx(a.mean() - b.mean())
        assert (found.t_test_holm, found.randomisation_holm) == (found.t_test, found.randomisation)


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 2.0]), ([], []), ([[1.0]], [[2.0]])])
def test_bad_input(a, b):
    with pytest.raises(UserError, match="t-test: values of shapes"):
        t_test(a, b)
    with pytest.raises(UserError, match="randomisation test"):
        paired(a, b)


def test_holm_by_hand():
    # 0.01 * 4; 0.02 * 3; 0.03 * 2 = 0.06, as the one before; 0.5.
    assert holm([0.5, 0.01, 0.03, 0.02]) == pytest.approx([0.5, 0.04, 0.06, 0.06])
    assert holm([0.03]) == [0.03]
    assert holm([0.4, 0.6, 0.7]) == [1.0, 1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.sampled_from([0.01, 0.05, 0.3]))
def test_holm_rejects_what_the_stepwise_procedure_rejects(values, level):
    # Against rounding at the very edge of a level, which both ways of reckoning may take otherwise.
    m = len(values)
    ordered = sorted(range(m), key=values.__getitem__)
    if any(abs((m - rank) * values[i] - level) < 1e-9 for rank, i in enumerate(ordered)):
        return
    rejected = set()
    for rank, i in enumerate(ordered):
        if values[i] > level / (m - rank):
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(values)) if p <= level} == rejected
    assert all(p >= q for p, q in zip(holm(values), values, strict=True))


def test_many_against_one_are_a_family_a_metric():
    generator = np.random.default_rng(0)
    reference = {m: generator.random(50) for m in TESTED_METRICS}
    others = {
        name: {m: reference[m] + generator.normal(shift, 0.2, 50) for m in TESTED_METRICS}
        for name, shift in (("better", 0.1), ("alike", 0.0), ("worse", -0.08))
    }
    tested = against(reference, others)
    assert list(tested) == list(others)
    for metric in TESTED_METRICS:
        plain = [randomisation_test(o[metric], reference[metric]) for o in others.values()]
        assert [t[metric].randomisation for t in tested.values()] == plain
        assert [t[metric].randomisation_holm for t in tested.values()] == holm(plain)
        raw = [stats.ttest_rel(o[metric], reference[metric]).pvalue for o in others.values()]
        assert [t[metric].t_test_holm for t in tested.values()] == pytest.approx(holm(raw))
    assert tested["better"]["hits@1"].difference > 0 > tested["worse"]["hits@1"].difference


class Fixed:
    """Finds all documents in the order of the corpus, those named in the query first if `right`."""

    def __init__(self, name, right):
        self.name, self._right = name, right

    def search(self, queries, *, k, extra=""):
        names = [document.id for document in tiny_corpus().documents]
        found = []
        for query in queries:
            best = [n for n in names if self._right and n in query.split()]
            order = [*best, *(n for n in names if n not in best)][:k]
            found.append([Hit(n + extra, 1.0 / r, r) for r, n in enumerate(order, start=1)])
        return found


def test_a_comparison_tells_significance(tmp_path):
    corpus = tiny_corpus()
    corpus = type(corpus)(
        corpus.documents,
        {q: f"{text} {q.split('-')[0]}" for q, text in corpus.queries.items()},
        corpus.qrels,
    )
    comparison = compare_searchers(
        {"ours": Fixed("ours", True), "weak": Fixed("weak", False), "same": Fixed("same", True)},
        corpus,
        split="test",
    )
    found = comparison.to_dict()
    assert list(found["significance"]) == ["weak", "same"], "the first against each of the others"
    assert set(found["methods"]["ours"]) >= {"hits@1", "mrr@10", "queries"}
    values = {name: per_query(run, corpus.qrels["test"]) for name, run in comparison.runs.items()}
    for name in ("weak", "same"):
        for metric in TESTED_METRICS:
            p = randomisation_test(values["ours"][metric], values[name][metric])
            assert found["significance"][name][metric] == p
    assert found["significance"]["same"] == {"hits@1": 1.0, "mrr@10": 1.0}
    assert found["significance"]["weak"]["mrr@10"] < 0.05
    assert comparison.text().startswith(comparison.table())
    assert "- ours against same: 1.000 in hits@1, 1.000 in mrr@10" in comparison.text()
    alone = compare_searchers({"ours": Fixed("ours", True)}, corpus, split="test")
    assert alone.to_dict()["significance"] == {} and alone.text() == alone.table()
    paths = comparison.write(tmp_path)
    assert "against weak" in paths[1].read_text()


def test_options_are_passed_on_in_chunks():
    searcher = Asked(Fixed("ours", True), extra="!")
    hits = searcher.search(["who bakes bread"] * 130, k=2)
    assert searcher.name == "ours" and len(hits) == 130
    assert all(one[0].document == "bread!" and len(one) == 2 for one in hits)
