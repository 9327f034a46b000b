"""What the benchmarks compare is comparable: their problems, and the check before any timing."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import decoding  # noqa: E402
import large_corpus  # noqa: E402
import ngram_index  # noqa: E402
from decoding import RUNS, TOLERANCE, disagreement, overlap, take_turns  # noqa: E402
from problem import Problem  # noqa: E402

from genret_jax.corpus import write_corpus  # noqa: E402
from genret_jax.data.examples import Ragged  # noqa: E402
from genret_jax.ngram.index import NgramIndex  # noqa: E402
from genret_jax.trie import build_trie  # noqa: E402

OURS = {
    "tokens": [[[2, 3], [2, 4], [5, 6], [0, 0]]],
    "scores": [[-1.0, -2.0, -3.0, -np.inf]],
}


def theirs(**changes):
    found = {**copy.deepcopy(OURS), **changes}
    found["scores"] = [[-1.0, -2.0, -3.0, -1e9]]
    return {**found, **{k: v for k, v in changes.items() if k == "scores"}}


def test_equal_results_agree_in_any_order():
    assert disagreement(OURS, theirs()) is None
    turned = {"tokens": [OURS["tokens"][0][::-1]], "scores": [[-1e9, -3.0, -2.0, -1.0]]}
    assert disagreement(OURS, turned) is None
    assert disagreement(OURS, {**turned, "scores": None}) is None


def test_a_lost_identifier_and_another_score_are_found_out():
    lost = theirs(tokens=[[[2, 3], [9, 9], [5, 6], [0, 0]]])
    assert "1 of 3 identifiers are not found" in str(disagreement(OURS, lost))
    last = theirs(tokens=[[[2, 3], [2, 4], [9, 9], [0, 0]]])
    assert disagreement(OURS, last) is None, "the last one may be a tie at the cut"
    off = theirs(scores=[[-1.0, -2.0 - 2 * TOLERANCE, -3.0, -1e9]])
    assert "scores differ by 0.004" in str(disagreement(OURS, off))


def test_the_overlap_is_the_share_of_our_identifiers():
    assert overlap(OURS, theirs()) == 1.0
    assert overlap(OURS, theirs(tokens=[[[2, 3], [9, 9], [5, 6], [0, 0]]])) == 0.75


class Timed:
    """A worker whose runs take so many seconds."""

    def __init__(self, seconds: float):
        self.seconds, self.asked = seconds, []

    def ask(self, **request):
        self.asked.append((request["number"], request["runs"]))
        return {"seconds": self.seconds, "cpu_seconds": self.seconds}


def test_turns_are_equal_in_number_and_long_enough():
    fast, slow = Timed(0.05), Timed(5.0)
    times = take_turns(fast, slow, turns=4, seconds=1e9)
    assert [len(side) for side in times] == [4, 4], "the first turn only warms up"
    assert [runs for _, runs in fast.asked] == [1, 3, 3, 3, 3]
    assert [runs for _, runs in slow.asked] == [1] * 5
    assert [n for n, _ in fast.asked] == [n for n, _ in slow.asked]
    instant = Timed(1e-6)
    take_turns(instant, slow, turns=1, seconds=1e9)
    assert instant.asked[-1][1] == RUNS
    assert len(take_turns(Timed(1.0), slow, turns=9, seconds=0.0)[0]) == 3, "time is over"


def test_a_problem_that_does_not_fit_is_a_row_and_loses_no_other(monkeypatch, capsys):
    class Side:
        def __init__(self, peer, **_):
            self.peer = peer

        def ask(self, **request):
            if request["beam"] == 4:
                raise ValueError("RESOURCE_EXHAUSTED")
            return {}

        def close(self):
            pass

    done = {"peer": "unconstrained", "error": "only pretended"}
    monkeypatch.setattr(decoding, "Worker", Side)
    monkeypatch.setattr(decoding, "line", str)
    monkeypatch.setattr(decoding, "measure", lambda *arguments: done)
    given = ["--peers", "unconstrained", "--ids", "9", "--beams", "2,4,3", "--json"]
    monkeypatch.setattr(sys, "argv", ["decoding.py", *given])
    decoding.main()
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[0] == rows[2] == done and len(rows) == 3
    assert (rows[1]["peer"], rows[1]["beam"], rows[1]["error"]) == ("ours", 4, "RESOURCE_EXHAUSTED")


_WATCHES = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="reads Linux's /proc"
)


@_WATCHES
def test_a_made_corpus_is_answerable_and_the_peaks_are_of_its_methods(tmp_path):
    corpus = large_corpus.made_corpus(40, train=30, test=6)
    texts = {document.id: document.text.split() for document in corpus.documents}
    assert len(texts) == 40 and all(30 < len(text) <= 102 for text in texts.values())
    assert {split: len(qrels) for split, qrels in corpus.qrels.items()} == {
        "train": 30,
        "dev": 6,
        "test": 6,
    }
    for split in corpus.qrels:
        for query, (document,) in corpus.qrels[split].items():
            assert set(corpus.queries[query].split()) <= set(texts[document])
    write_corpus(corpus, tmp_path / "made")
    options = ["--methods", "bm25,tfidf"]
    peaks = large_corpus.compare(tmp_path / "made", tmp_path / "out", options)
    assert list(peaks) == ["start", "bm25", "tfidf"]
    assert all(2e7 < peak < 4e9 for peak in peaks.values())
    again = large_corpus.compare(tmp_path / "made", tmp_path / "out", options)
    assert again["tfidf"] == peaks["tfidf"], "that of the call in which it was measured"
    with pytest.raises(SystemExit, match="ended with 2"):
        large_corpus.compare(tmp_path / "made", tmp_path / "out", ["--methods", "bm52"])


@pytest.mark.parametrize("beam", [1, 5])
def test_a_suffix_array_finds_what_the_trie_finds(beam):
    rng = np.random.default_rng(beam)
    texts = Ragged.of([rng.integers(2, 9, n).tolist() for n in (14, 1, 0, 30, 11, 3)])  # 2: unknown
    index = NgramIndex.of(texts, np.arange(6), length=ngram_index.LENGTH, vocab_size=9)
    table = jnp.asarray(rng.normal(0, 2, (9, 9)), jnp.float32).at[:, 0].set(-jnp.inf)
    first = jnp.array([3, 5, 8])
    trie = ngram_index.by_trie(table, index.trie.on_device(), first, beam=beam)
    array = map(jnp.asarray, (texts.values, ngram_index.ends(texts), index.trie.row_documents))
    found = ngram_index.by_suffix_array(table, *array, first, beam=beam)
    np.testing.assert_allclose(trie, found, atol=1e-4)
    assert np.isfinite(trie).all()


@_WATCHES
def test_each_phase_has_its_own_peak():
    """A process that holds 200 MB for a while, and then none of it."""
    code = (
        "import sys; wait = sys.stdin.readline; wait(); a = bytearray(b'1') * 200_000_000; del a; "
        "print(1, flush=True); wait(); print(2, flush=True); wait()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as child:
        watch = large_corpus.Watch(child.pid)
        for phase in ("much", "little"):
            watch.phase(phase)
            child.stdin.write("\n")
            child.stdin.flush()
            child.stdout.readline()
        watch.phase("end")
        child.stdin.write("\n")
    watch.end()
    assert watch.peaks["much"] > 2e8 > 1e8 > watch.peaks["little"] > 1e6


@pytest.mark.parametrize("kind", ["random", "skewed", "variable"])
def test_problems_are_sorted_distinct_and_the_same_each_time(kind):
    problem = Problem(ids=500, kind=kind, vocab=20, length=4)
    tokens = problem.tokens
    assert tokens.tolist() == sorted(map(list, {tuple(row) for row in tokens.tolist()}))
    np.testing.assert_array_equal(tokens, Problem(ids=500, kind=kind, vocab=20, length=4).tokens)
    trie = build_trie(problem.table)
    np.testing.assert_array_equal(trie.rows, tokens)
    first = np.bincount(tokens[:, 0], minlength=20)[2:]
    assert (first.max() > 4 * np.median(first)) == (kind == "skewed")
    assert ((tokens == 1).any(1).all() and len({(r > 0).sum() for r in tokens}) == 3) == (
        kind == "variable"
    )
