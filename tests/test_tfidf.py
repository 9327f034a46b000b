"""TF-IDF against its formula in plain Python, and its folder."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from genret_jax.baselines.protocol import Searcher
from genret_jax.baselines.tfidf import TfIdf, tfidf_for
from genret_jax.corpus import Corpus, Document
from genret_jax.errors import UserError

# Words that stemming leaves alone and that are no stop words.
DOCUMENTS = (
    Document("d1", "torch", "seam gas torch metal"),
    Document("d2", "gas", "gas gas flame"),
    Document("d3", "", "metal bird"),
    Document("d4", "", ""),
    Document("d5", "bird", "bird song tree bird nest tree"),
)


def weights(words, texts):
    found = {}
    for word, count in Counter(words).items():
        holding = sum(word in text for text in texts)
        if holding:
            idf = 1 + math.log((1 + len(texts)) / (1 + holding))
            found[word] = (1 + math.log(count)) * idf
    length = math.sqrt(sum(value**2 for value in found.values())) or 1.0
    return {word: value / length for word, value in found.items()}


@pytest.mark.parametrize("query", ["gas", "gas metal", "bird tree bird", "gas unknownword torch"])
def test_scores_of_the_formula(query):
    texts = [f"{d.title} {d.text}".split() for d in DOCUMENTS]
    asked = weights(query.split(), texts)
    expected = {}
    for document, text in zip(DOCUMENTS, texts, strict=True):
        of = weights(text, texts)
        if shared := asked.keys() & of.keys():
            expected[document.id] = sum(asked[word] * of[word] for word in shared)
    (hits,) = TfIdf.index(DOCUMENTS).search([query], k=10)
    assert {hit.document: hit.score for hit in hits} == pytest.approx(expected, abs=1e-6)
    order = sorted(expected, key=lambda d: (round(expected[d], 6), d), reverse=True)
    assert [hit.document for hit in hits] == order and [h.rank for h in hits] == [
        *range(1, len(order) + 1)
    ]


def test_a_saved_index_is_the_same(tmp_path):
    index = TfIdf.index(DOCUMENTS, name="mine")
    index.save(tmp_path / "index")
    loaded = TfIdf.load(tmp_path / "index")
    queries = ["gas metal", "bird", "nothing known", ""]
    assert loaded.name == "mine" and isinstance(loaded, Searcher)
    assert loaded.search(queries, k=2) == index.search(queries, k=2)
    assert [len(hits) for hits in loaded.search(queries, k=2)] == [2, 2, 0, 0]
    (tmp_path / "index" / "order.npy").unlink()
    with pytest.raises(UserError, match="no whole TF-IDF index"):
        TfIdf.load(tmp_path / "index")


def test_train_queries_count_as_text():
    corpus = Corpus(DOCUMENTS, {"q": "welder"}, {"train": {"q": {"d3": 1}}})
    assert tfidf_for(corpus, with_train_queries=False).search(["welder"], k=5) == [[]]
    (hits,) = tfidf_for(corpus, with_train_queries=True).search(["welder"], k=5)
    assert [hit.document for hit in hits] == ["d3"]


def test_mistakes():
    with pytest.raises(UserError, match="has a word to index"):
        TfIdf.index([Document("d", "", "the")])
    with pytest.raises(UserError, match="k = 0"):
        TfIdf.index(DOCUMENTS).search(["gas"], k=0)
