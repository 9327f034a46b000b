"""N-grams as identifiers: index and scores against brute force, generation, and a whole run."""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given
from tiny import FAST, tiny_corpus

from genret_jax.baselines.protocol import Searcher
from genret_jax.cli import main
from genret_jax.comparison.methods import chosen_methods
from genret_jax.data.examples import Ragged
from genret_jax.data.ngrams import Drawing
from genret_jax.errors import UserError
from genret_jax.ngram.index import NgramIndex
from genret_jax.ngram.scoring import (
    Found,
    Weighting,
    document_terms,
    ngram_weights,
    sum_documents,
)
from genret_jax.ngram.settings import NgramSettings
from genret_jax.pseudo_queries import PseudoQuery, write_pseudo_queries
from genret_jax.recipe import load_recipe
from genret_jax.searchers import fit_method, open_searcher
from genret_jax.vocabularies import EOS, UNK

pytestmark = pytest.mark.usefixtures("one_device", "quiet")

VIEWS = ("text", "title", "queries")
SETTINGS = {"views": VIEWS, "length": 4, "beam": 5, "unigrams": 4, "spans": 3, "smoothing": 0.5}
QUERY = "bread from an oven"
SCORE = functools.cache(lambda model: jax.jit(model.score))
SIZE, LENGTH = 7, 3  # of the vocabulary and the n-grams of random streams


# ---- the index


def occurrences(texts, ngram):
    """[(text, place)] of an n-gram, by looking everywhere."""
    n = len(ngram)
    return [
        (i, j)
        for i, text in enumerate(texts)
        for j in range(len(text) - n + 1)
        if tuple(text[j : j + n]) == tuple(ngram)
    ]


def all_ngrams(texts, length):
    found = {
        tuple(text[j : j + n])
        for text in texts
        for n in range(1, length + 1)
        for j in range(len(text) - n + 1)
    }
    return sorted(ngram for ngram in found if UNK not in ngram)


def range_of(index, ngram):
    """The rows that begin with an n-gram, by looking at all."""
    rows = np.flatnonzero((index.trie.rows[:, : len(ngram)] == ngram).all(1))
    assert (np.diff(rows) == 1).all()
    return (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)


TEXTS = st.lists(st.lists(st.integers(UNK, SIZE - 1), max_size=8), min_size=1, max_size=5).filter(
    lambda texts: any(token > UNK for text in texts for token in text)
)


@given(TEXTS)
def test_every_ngram_is_counted_and_located(texts):
    owners = [i // 2 for i in range(len(texts))]
    index = NgramIndex.of(Ragged.of(texts), np.array(owners), length=LENGTH, vocab_size=SIZE)
    starts = np.concatenate([[0], np.cumsum([len(t) for t in texts])])
    for ngram in all_ngrams(texts, LENGTH):
        begin, end = range_of(index, ngram)
        assert index.ngram(begin, len(ngram)) == ngram
        expected = [int(starts[i]) + j for i, j in occurrences(texts, ngram)]
        positions = index.positions(begin, end)
        assert sorted(positions.tolist()) == expected
        assert index.count(np.array([begin]), np.array([end])).tolist() == [len(expected)]
        documents = index.documents(np.sort(positions)).tolist()
        assert documents == [owners[i] for i, _ in occurrences(texts, ngram)]
    rows = {index.ngram(row, LENGTH) for row in range(len(index.trie.rows))}
    assert rows <= set(all_ngrams(texts, LENGTH)), "no n-gram goes over the end of a text"


def test_a_whole_text_is_found_by_all_of_it(tmp_path):
    texts = [[3, 4], [3, 4], [3, 4, 5, 6], [], [3, 4, 5]]
    index = NgramIndex.of(Ragged.of(texts), np.arange(5), length=3, vocab_size=SIZE, whole=True)
    index.save(tmp_path)
    index = NgramIndex.load(tmp_path)
    rows = {tuple(row): index.trie.documents(i).tolist() for i, row in enumerate(index.trie.rows)}
    assert rows == {(3, 4, EOS): [0, 2], (3, 4, 5): [4, 8]}
    assert index.whole and index.documents(np.array([0, 2, 4, 8])).tolist() == [0, 1, 2, 4]
    (tmp_path / "owners.npy").unlink()
    with pytest.raises(UserError, match="no whole index"):
        NgramIndex.load(tmp_path)


def test_texts_without_a_token_are_refused():
    with pytest.raises(UserError, match="no n-gram"):
        NgramIndex.of(Ragged.of([[], [UNK, UNK]]), np.arange(2), length=2, vocab_size=SIZE)


# ---- scores


def test_a_weight_by_hand():
    # p = 1/4 against f = (3 + 5) / (75 + 5) = 1/10: odds 1/3 and 1/9, so log 3, squared.
    weights = ngram_weights(np.log([0.25, 0.1, 0.01]), np.array([3, 3, 3]), 75)
    assert weights == pytest.approx([math.log(3) ** 2, 0.0, 0.0])
    (plain,) = ngram_weights(np.log([0.25]), np.array([3]), 75, alpha=1.0, smoothing=0.0)
    assert plain == pytest.approx(math.log((1 / 3) / (3 / 72)))
    extremes = ngram_weights(np.array([0.0, 0.0]), np.array([1, 9]), 9)
    assert np.isfinite(extremes).all() and extremes[0] > 0 == extremes[1]


def document_score(found, ngrams, weights, beta=0.8):
    terms = document_terms(found, ngrams, weights, beta=beta)
    return sum(weights[ngram] * factor for ngram, factor in terms)


def test_a_score_by_hand():
    ngrams, weights = [(3, 4), (4, 5), (5, 3), (6,)], [8.0, 4.0, 2.0, 1.0]
    # 3 4 5 6 5 3: (4, 5) overlaps (3, 4); (5, 3) at the end does not, and has one new token.
    found = [(0, 10), (1, 11), (3, 13), (2, 14)]
    assert document_score(found, ngrams, weights) == pytest.approx(8 + 2 * (0.2 + 0.8 / 2) + 1)
    assert document_score(found[1:2], ngrams, weights) == 4.0
    # 3 4 3 4 5: it counts once, but takes all its places.
    found = [(1, 13), (0, 10), (0, 12)]
    assert document_score(found, ngrams, weights) == 8.0
    # 3 4 4 5: side by side is no overlap; one of two tokens is new.
    assert document_score([(0, 10), (1, 12)], ngrams, weights, beta=0.5) == 8 + 4 * 0.75
    # With no discount, and with nothing left where nothing is new.
    assert document_score([(0, 10), (2, 14)], ngrams, weights, beta=0.0) == 10.0
    assert document_score([(0, 1), (2, 3)], [(3,), (), (3, 3)], [2.0, 0, 1.0], beta=1.0) == 2.0


def brute_scores(texts, owners, ngrams, log_p, weighting, without=()):
    """Scores of documents in plain loops over their tokens."""
    tokens = sum(map(len, texts))
    weights = {}
    for ngram, value in zip(ngrams, log_p, strict=True):
        f = (len(occurrences(texts, ngram)) + weighting.smoothing) / (tokens + weighting.smoothing)
        p = math.exp(value)
        excess = math.log(p / (1 - p)) - math.log(f / (1 - f)) if f < 1 else 0.0
        if excess > 0:
            weights[ngram] = excess**weighting.alpha
    scores = {}
    for document in set(owners):
        own = [
            text
            for i, (text, owner) in enumerate(zip(texts, owners, strict=True))
            if owner == document and i not in without
        ]
        free = [[True] * len(text) for text in own]
        seen, score, brought = set(), 0.0, False
        for ngram in sorted(weights, key=lambda g: (-weights[g], g)):
            here = occurrences(own, ngram)
            brought |= bool(here) and len(occurrences(texts, ngram)) <= weighting.rare
            counted = False
            for i, j in here:
                places = range(j, j + len(ngram))
                if all(free[i][p] for p in places):
                    if not counted:
                        new = len(set(ngram) - seen) / len(set(ngram))
                        score += weights[ngram] * (1 - weighting.beta + weighting.beta * new)
                    counted = True
                    for p in places:
                        free[i][p] = False
            seen |= set(ngram) if counted else set()
        if brought:
            scores[document] = score
    return scores


@given(TEXTS, st.integers(0, 10**6), st.sampled_from([1, 2, 1500]))
def test_scores_of_documents_are_those_of_plain_loops(texts, seed, rare):
    rng = np.random.default_rng(seed)
    owners = [i // 2 for i in range(len(texts))]
    index = NgramIndex.of(Ragged.of(texts), np.array(owners), length=LENGTH, vocab_size=SIZE)
    everything = all_ngrams(texts, LENGTH)
    chosen = rng.permutation(len(everything))[: rng.integers(1, 9)]
    ngrams = [everything[i] for i in chosen]
    log_p = np.log(rng.uniform(0.01, 0.99, len(ngrams)))
    begin, end = np.array([range_of(index, ngram) for ngram in ngrams]).T
    found = Found(begin, end, np.array([len(ngram) for ngram in ngrams]), log_p)
    weighting = Weighting(alpha=1.5, beta=0.7, smoothing=1.0, rare=rare)
    sums = sum_documents(found, index, weighting)
    documents, scores = sums.documents, sums.scores
    expected = brute_scores(texts, owners, ngrams, log_p.tolist(), weighting)
    assert dict(zip(documents.tolist(), scores.tolist(), strict=True)) == pytest.approx(expected)
    assert documents.tolist() == sorted(expected)
    # Of fewer candidates there are those of the highest sums.
    sums = sum_documents(found, index, dataclasses.replace(weighting, candidates=1))
    few, best = sums.documents, sums.scores
    assert len(few) == min(1, len(expected))
    if len(few):
        assert best[0] == pytest.approx(expected[int(few[0])])
    without = [int(rng.integers(len(texts)))]  # a text that is counted, but identifies nothing
    sums = sum_documents(found, index, weighting, without=without)
    expected = brute_scores(texts, owners, ngrams, log_p.tolist(), weighting, without)
    assert dict(zip(sums.documents, sums.scores, strict=True)) == pytest.approx(expected)


# ---- targets


def test_targets_are_windows_that_share_words_with_the_input():
    starts = np.array([False, False, False, True, True, True, True, False])
    idf = np.full(8, 4.0)
    drawing = Drawing(2, idf, starts)
    text = np.array([3, 7, 4, 7, UNK, 5, 7, 6, 7])
    rng = np.random.default_rng(0)
    drawn = [tuple(w) for w in drawing.windows(text, np.array([5]), 200, rng)]
    assert set(drawn) <= {(3, 7), (4, 7), (5, 7), (6, 7)}, "from the beginning of a word, known"
    # e^(4 / 2) against three times 1
    assert drawn.count((5, 7)) / 200 == pytest.approx(math.e**2 / (math.e**2 + 3), abs=0.1)
    assert len(set(drawn)) > 1
    assert [w.tolist() for w in drawing.windows(np.array([7]), text, 2, rng)] == [[7], [7]]
    assert drawing.windows(np.array([UNK]), text, 2, rng) == []
    assert drawing.windows(np.array([], int), text, 2, rng) == []


# ---- a whole run


def _recipe(settings=None, *more):
    bindings = [*FAST, f"SearcherConfig.settings = {SETTINGS | (settings or {})!r}", *more]
    return load_recipe("ngram", bindings=bindings)


@pytest.fixture(scope="module")
def run(collection, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "ngram"
    file = out.parent / "pseudo.jsonl"
    write_pseudo_queries([PseudoQuery("bees", "sweet things from insects", -3.0)], file)
    fit_method(collection, recipe=_recipe(), out=out, pseudo_queries=file)
    return out


def test_other_pseudo_queries_are_another_run(run, collection):
    with pytest.raises(UserError, match="a run of another"):
        fit_method(collection, recipe=_recipe(), out=run)
    file = run.parent / "others.jsonl"
    write_pseudo_queries([PseudoQuery("bees", "stings", -3.0)], file)
    with pytest.raises(UserError, match="a run of another"):
        fit_method(collection, recipe=_recipe(), out=run, pseudo_queries=file)
    fit_method(collection, recipe=_recipe(), out=run, pseudo_queries=run.parent / "pseudo.jsonl")


@pytest.fixture(scope="module")
def fitted(run):
    return open_searcher(run)


def _stream(fitted, view):
    """The token sequences of each document in a view, from the texts."""
    encode, corpus = fitted.searcher.ranker.vocabulary.encode, tiny_corpus()
    if view == "queries":
        pairs = [*corpus.pairs("train"), ("sweet things from insects", corpus.index["bees"])]
        return [encode(query) for query, _ in pairs], [position for _, position in pairs]
    texts = [d.title if view == "title" else d.whole for d in corpus.documents]
    return [encode(text) for text in texts], list(range(len(texts)))


def test_the_folder_is_whole(run, fitted):
    names = {p.name for p in (run / "retriever").iterdir()}
    assert names >= {*VIEWS, "ngram.json", "ids.json", "model.safetensors", "spiece.model"}
    about = json.loads((run / "retriever" / "retriever.json").read_text())
    assert about["training"]["steps"] == 30 and about["training"]["pseudo_queries"] == 1
    assert set(about["dev"]) == {"hits@1", "hits@10", "mrr@10"}
    for view in VIEWS:
        texts, _ = _stream(fitted, view)
        assert about["ngrams"][view]["tokens"] == sum(map(len, texts))
        assert about["ngrams"][view]["bytes"] > about["ngrams"][view]["suffix_array_bytes"] > 0
    assert (run / "curves.png").stat().st_size > 1000
    assert fitted.name == "ngram" and isinstance(fitted.searcher, Searcher)


@pytest.mark.parametrize("view", VIEWS)
def test_what_is_generated_occurs_and_has_the_models_probability(fitted, view):
    searcher = fitted.searcher
    ranker, index = searcher.ranker, searcher.ranker.views[view]
    (found,) = ranker.ngrams(searcher.params, [QUERY], view)
    assert len(found) > 0 and found.length.max() <= 4
    texts, owners = _stream(fitted, view)
    rows, ngrams = [], []
    for i in range(len(found)):
        ngram = index.ngram(found.begin[i], found.length[i])
        if view == "title":
            documents = {d for d, text in enumerate(texts) if tuple(text[:4]) == ngram}
            assert len(ngram) in (found.length[i], found.length[i] - 1)
        else:
            where = occurrences(texts, ngram)
            documents = {owners[text] for text, _ in where}
            count = index.count(found.begin[i : i + 1], found.end[i : i + 1])
            assert count.tolist() == [len(where)] and len(ngram) == found.length[i]
        positions = index.positions(found.begin[i], found.end[i])
        assert set(index.documents(positions).tolist()) == documents != set()
        ngrams.append(ngram)
        rows.append(np.pad(index.trie.rows[found.begin[i], : found.length[i]], (0, 4))[:4])
    assert len(set(ngrams)) == len(ngrams)
    if view != "title":  # the likeliest first tokens are there, though the beam is one of five
        alone = np.unique([token for text in texts for token in text])
        queries = np.repeat(ranker.encoded([QUERY], view), len(alone), axis=0)
        log_p = np.asarray(SCORE(ranker.model)(searcher.params, queries, alone[:, None]))
        likeliest = {(int(token),) for token in alone[np.argsort(-log_p)][:4]}
        assert likeliest <= set(ngrams)
        without = dataclasses.replace(ranker, unigrams=0).ngrams(searcher.params, [QUERY], view)
        assert len(without[0]) <= len(found)
    tokens = np.repeat(ranker.encoded([QUERY], view), len(rows), axis=0)
    expected = SCORE(ranker.model)(searcher.params, tokens, np.array(rows, np.int32))
    np.testing.assert_allclose(found.log_p, expected, atol=1e-4)


def test_a_wide_beam_writes_every_ngram(fitted):
    searcher = fitted.searcher
    wide = dataclasses.replace(searcher.ranker, beam=512)
    (found,) = wide.ngrams(searcher.params, [QUERY], "text")
    index = wide.views["text"]
    ngrams = {index.ngram(b, n) for b, n in zip(found.begin, found.length, strict=True)}
    texts, _ = _stream(fitted, "text")
    expected: dict[tuple, tuple] = {}
    for ngram in all_ngrams(texts, 4):  # the shortest of those that stand at the same places
        same = tuple(occurrences(texts, ngram))
        expected[same] = min(ngram, expected.get(same, ngram), key=len)
    assert len(expected) < 512 and ngrams == set(expected.values())


def test_a_hit_is_the_sum_of_its_views_by_hand(fitted):
    searcher, corpus = fitted.searcher, tiny_corpus()
    ranker = searcher.ranker
    totals: dict[int, float] = {}
    for view in VIEWS:
        (found,) = ranker.ngrams(searcher.params, [QUERY], view)
        index, (texts, owners) = ranker.views[view], _stream(fitted, view)
        ngrams = [index.ngram(b, n) for b, n in zip(found.begin, found.length, strict=True)]
        if view == "title":  # of whole titles alone
            texts = [text[:4] for text in texts]
            weights = ngram_weights(
                found.log_p,
                np.array([sum(tuple(t) == g for t in texts) for g in ngrams]),
                sum(len(text) for text in _stream(fitted, view)[0]),
                smoothing=0.5,
            )
            for ngram, weight in zip(ngrams, weights.tolist(), strict=True):
                for d, text in enumerate(texts):
                    if tuple(text) == ngram and weight:
                        totals[d] = totals.get(d, 0.0) + weight
            continue
        scores = brute_scores(texts, owners, ngrams, found.log_p.tolist(), ranker.weighting)
        for document, score in scores.items():
            totals[document] = totals.get(document, 0.0) + score
    (hits,) = fitted.search([QUERY], k=8)
    assert {corpus.index[h.document]: h.score for h in hits} == pytest.approx(totals, rel=1e-4)
    assert [h.rank for h in hits] == list(range(1, len(hits) + 1)) and hits
    assert fitted.search(QUERY, k=3) == hits[:3] and fitted.search([" ", QUERY], k=3)[0] == []
    with pytest.raises(UserError, match="k = 0"):
        searcher.search([QUERY], k=0)


def test_queries_do_not_depend_on_their_neighbours(fitted):
    queries = [QUERY, *(f"somebody for {w}" for w in ("roofs", "teeth", "maps"))]
    together = fitted.search(queries, k=8)
    for query, hits in zip(queries, together, strict=True):
        alone = fitted.search(query, k=8)
        assert [h.document for h in alone] == [h.document for h in hits]
        np.testing.assert_allclose([h.score for h in alone], [h.score for h in hits], rtol=1e-4)


def test_the_command_line_and_what_is_refused(run, collection, tmp_path, capsys):
    assert main(["search", str(run), QUERY, "-k", "2", "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    assert 0 < len(hits) <= 2 and {"document", "title", "score"} <= set(hits[0])
    assert main(["evaluate", str(run), "--split", "test", "--baseline", "bm25", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["methods"]) == ["ngram", "bm25"]
    start = ["fit", str(collection), "--method", "ngram", "--out", str(tmp_path / "run")]
    for more, message in (
        ("DocidConfig.kind = 'rq'", "DocidConfig.kind is 'rq', but must be 'none'"),
        ("DataConfig.frame_share = 0.5", "DataConfig.frame_share is 0.5"),
        ("ContrastiveConfig.prefix = 0.5", "ContrastiveConfig.prefix is 0.5"),
        ("SearcherConfig.settings = {'views': ('body',)}", "views is ('body',), but must be some"),
        ("SearcherConfig.settings = {'beam': 0}", "beam is 0, but must be a whole number from 1"),
        ("SearcherConfig.settings = {'beta': 1.5}", "beta is 1.5, but must be a number from 0 up"),
        ("SearcherConfig.settings = {'lenght': 3}", "unexpected keyword argument 'lenght'"),
    ):
        assert main([*start, "--gin", more]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_it_is_a_generative_method_in_a_comparison():
    row, dense, bm25 = chosen_methods(
        ["ngram", "dense", "bm25"], lambda name: load_recipe(name, bindings=FAST)
    )
    assert (row.group, row.docids, row.trained) == ("generative", "ngram", True)
    assert (dense.group, bm25.group, dense.docids) == ("dense", "lexical", "")


def test_the_defaults_are_the_gin_files():
    settings = NgramSettings(**load_recipe("ngram").searcher.settings)
    assert settings == NgramSettings()
    minder = NgramSettings(**load_recipe("minder").searcher.settings)
    assert minder == NgramSettings(views=VIEWS)
