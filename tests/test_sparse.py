"""BM25 against its formula in plain Python, and everything that a query or a folder can be."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter

import numpy as np
import pytest

from genret_jax.baselines.protocol import Searcher
from genret_jax.baselines.sparse import BM25, bm25_for
from genret_jax.corpus import Corpus, Document
from genret_jax.errors import UserError

# Words that stemming leaves alone and that are no stop words, so that the oracle may split at
# blanks; title and text both count.
DOCUMENTS = (
    Document("d1", "torch", "seam gas torch metal"),
    Document("d2", "gas", "gas gas flame"),
    Document("d3", "", "metal bird"),
    Document("d4", "", ""),
    Document("d5", "bird", "bird song tree bird nest tree"),
)


def plain_bm25(texts: list[list[str]], query: list[str], k1: float, b: float) -> list[float]:
    average = sum(map(len, texts)) / len(texts)
    scores = []
    for words in texts:
        counts, score = Counter(words), 0.0
        for word in query:
            holding = sum(word in other for other in texts)
            idf = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
            norm = k1 * (1 - b + b * len(words) / average)
            score += idf * counts[word] / (counts[word] + norm) if counts[word] else 0.0
        scores.append(score)
    return scores


def texts_of(documents) -> list[list[str]]:
    return [f"{document.title} {document.text}".split() for document in documents]


def as_scores(hits) -> dict[str, float]:
    return {hit.document: hit.score for hit in hits}


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.5, 0.75), (1.2, 0.0), (2.0, 1.0)])
def test_scores_of_the_formula(k1, b):
    index = BM25.index(DOCUMENTS, k1=k1, b=b)
    for query in ["gas", "gas metal", "bird tree bird", "gas unknownword", "torch seam flame"]:
        expected = dict(
            zip(
                (document.id for document in DOCUMENTS),
                plain_bm25(texts_of(DOCUMENTS), query.split(), k1, b),
                strict=True,
            )
        )
        (hits,) = index.search([query], k=10)
        assert as_scores(hits) == pytest.approx(
            {document: score for document, score in expected.items() if score > 0}, rel=1e-5
        )
        assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_is_a_searcher_with_a_default_of_the_literature():
    index = BM25.index(DOCUMENTS)
    assert isinstance(index, Searcher)
    assert index.name == "BM25"
    expected = BM25.index(DOCUMENTS, k1=0.9, b=0.4, method="lucene")
    assert index.search(["gas metal"], k=5) == expected.search(["gas metal"], k=5)


def test_stems_stop_words_and_case():
    index = BM25.index([Document("a", "Running", "the SHIPS' crossing"), Document("b", "", "of")])
    for query in ["run", "RUNS", "ship", "crosses the ship"]:
        assert [hit.document for hit in index.search([query], k=3)[0]] == ["a"], query
    assert index.search(["the", "of the", "s"], k=3) == [[], [], []]


def test_queries_without_any_hit():
    index = BM25.index(DOCUMENTS)
    assert index.search([], k=3) == []
    results = index.search(["", "  \n", "xyzzy plugh", "gas", "!?"], k=3)
    assert [len(hits) for hits in results] == [0, 0, 0, 2, 0]


def test_k():
    index = BM25.index(DOCUMENTS)
    (all_hits,) = index.search(["gas metal bird"], k=1000)
    assert len(all_hits) == 4, "d4 is empty and never found"
    for k in range(1, 5):
        assert index.search(["gas metal bird"], k=k) == [all_hits[:k]]
    for k in (0, -1):
        with pytest.raises(UserError, match=f"k = {k}"):
            index.search(["gas"], k=k)


def test_ties_do_not_depend_on_the_order_of_the_corpus():
    documents = [Document(name, "", "gas flame") for name in ("b", "e", "a", "d", "c")]
    for order in (documents, documents[::-1], sorted(documents, key=lambda item: item.id)):
        index = BM25.index([*order, Document("x", "", "gas gas gas flame flame")])
        (hits,) = index.search(["gas"], k=4)
        assert [hit.document for hit in hits] == ["x", "e", "d", "c"]


def test_extra_texts():
    extra = {3: ["weld joint", "joint"], 0: ["gas"]}
    index = BM25.index(DOCUMENTS, extra_texts=extra)
    texts = [
        [*words, *" ".join(extra.get(position, ())).split()]
        for position, words in enumerate(texts_of(DOCUMENTS))
    ]
    expected = plain_bm25(texts, ["joint", "gas"], 0.9, 0.4)
    assert as_scores(index.search(["joint gas"], k=9)[0]) == pytest.approx(
        {
            document.id: score
            for document, score in zip(DOCUMENTS, expected, strict=True)
            if score > 0
        },
        rel=1e-5,
    )
    for position in (-1, 5):
        with pytest.raises(UserError, match=f"position {position}"):
            BM25.index(DOCUMENTS, extra_texts={position: ["x"]})


def test_with_train_queries():
    corpus = Corpus(
        DOCUMENTS,
        {"q1": "weld", "q2": "solder", "q3": "glue"},
        {"train": {"q1": {"d4": 1, "d1": 0}, "q2": {"d4": 2}}, "test": {"q3": {"d4": 1}}},
    )
    without = bm25_for(corpus, with_train_queries=False)
    trained = bm25_for(corpus, with_train_queries=True)
    assert (without.name, trained.name) == ("BM25", "BM25+q")
    queries = ["weld", "solder", "glue"]
    assert without.search(queries, k=5) == [[], [], []]
    found = [[hit.document for hit in hits] for hits in trained.search(queries, k=5)]
    assert found == [["d4"], ["d4"], []], "grade 0 and test queries are not indexed"
    with pytest.raises(UserError, match="no split 'train'"):
        bm25_for(Corpus(DOCUMENTS, {}, {}), with_train_queries=True)


@pytest.mark.parametrize("method", ["lucene", "robertson", "atire", "bm25l", "bm25+"])
def test_every_method_finds_what_shares_a_word_and_survives_a_folder(tmp_path, method):
    rare = [Document(f"x{number}", "", "filler words") for number in range(5)]
    index = BM25.index([*DOCUMENTS, *rare], method=method)
    (hits,) = index.search(["flame gas"], k=20)
    assert {hit.document for hit in hits} == {"d1", "d2"}
    index.save(tmp_path / "index")
    assert BM25.load(tmp_path / "index").search(["flame gas"], k=20) == [hits]


def test_save_and_load(tmp_path):
    documents = [*DOCUMENTS, Document("ü ₂", "Straße", "größer naïve 文字 文字")]
    index = BM25.index(documents, name="mine")
    queries = ["gas metal bird", "Straße", "文字", "", "unknownword"]
    folder = tmp_path / "deep" / "index"
    index.save(folder)
    index.save(folder)  # an earlier one is replaced
    loaded = BM25.load(folder)
    assert loaded.name == "mine"
    assert loaded.search(queries, k=4) == index.search(queries, k=4)
    assert isinstance(loaded._engine.scores["data"], np.memmap)
    loaded.save(tmp_path / "again")
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    assert [entry.name for entry in folder.parent.iterdir()] == ["index"]


def test_equal_documents_give_equal_folders(tmp_path):
    for name in ("a", "b"):
        BM25.index(DOCUMENTS).save(tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_bad_folders(tmp_path):
    index = BM25.index(DOCUMENTS)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="no BM25 index"):
        index.save(tmp_path / "thesis")
    with pytest.raises(UserError, match="cannot be written"):
        index.save(tmp_path / "thesis" / "thesis.tex" / "index")
    for path in (tmp_path / "thesis", tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"no BM25 index \(bm25.json is missing\)"):
            BM25.load(path)
    index.save(tmp_path / "good")
    for name in [file.name for file in (tmp_path / "good").iterdir()]:
        bad = tmp_path / f"bad-{name}"
        shutil.copytree(tmp_path / "good", bad)
        (bad / name).write_bytes(b"\x00")
        with pytest.raises(UserError, match="damaged BM25 index"):
            BM25.load(bad)
    (tmp_path / "good" / "bm25.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        BM25.load(tmp_path / "good")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k1": -1}, "k1"),
        ({"k1": math.nan}, "k1"),
        ({"b": 1.1}, "b = 1.1"),
        ({"method": "bm26"}, "lucene, robertson"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(UserError, match=message):
        BM25.index(DOCUMENTS, **options)


def test_nothing_to_index():
    for documents in ([], [Document("a", "", "the of a")]):
        with pytest.raises(UserError, match="has a word to index"):
            BM25.index(documents)


def test_silent_unless_asked(capsys, caplog):
    BM25.index(DOCUMENTS).search(["gas", ""], k=2)
    assert capsys.readouterr() == ("", "")
    assert not caplog.records
    BM25.index(DOCUMENTS, progress=True).search(["gas"], k=2, progress=True)
    assert "words" in capsys.readouterr().err
