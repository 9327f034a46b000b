"""Reading and writing collections: every mistake has a line, everything odd is counted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from genret_jax.corpus import (
    Corpus,
    Document,
    read_corpus,
    read_qrels,
    read_run,
    write_corpus,
    write_qrels,
    write_run,
)
from genret_jax.errors import UserError

DOCUMENTS = [
    {"_id": "d1", "title": "Seam", "text": "where two sheets meet"},
    {"_id": "d 2", "title": "", "text": "brennt Gas – heiß\u2028und laut"},
    {"_id": "d3", "title": "Torch", "text": "", "metadata": {"year": 1}},
]
QUERIES = [{"_id": "q1", "text": "join sheets"}, {"_id": "q2", "text": "burn gas"}]
HEADER = "query-id\tcorpus-id\tscore\n"


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "welding"
    put(root / "corpus.jsonl", jsonl(DOCUMENTS))
    put(root / "queries.jsonl", jsonl(QUERIES))
    put(root / "qrels" / "test.tsv", HEADER + "q2\td3\t2\nq2\td 2\t0\n")
    put(root / "qrels" / "train.tsv", HEADER + "q1\td1\t1\nq1\td 2\t1\n")
    return root


def fails(path: Path, *parts: str, reader=read_corpus, **options) -> str:
    """The message of the UserError: one line with all `parts` in it."""
    with pytest.raises(UserError) as caught:
        reader(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


def test_a_good_folder(folder):
    corpus = read_corpus(folder)
    assert corpus.name == "welding"
    assert corpus.warnings == ()
    assert corpus.documents[1] == Document("d 2", "", "brennt Gas – heiß\u2028und laut")
    assert corpus.index == {"d1": 0, "d 2": 1, "d3": 2}
    assert corpus.queries == {"q1": "join sheets", "q2": "burn gas"}
    assert corpus.splits == ("test", "train")
    assert corpus.qrels["test"] == {"q2": {"d3": 2, "d 2": 0}}
    assert corpus.split_queries("test") == {"q2": "burn gas"}
    assert corpus.pairs("train") == [("join sheets", 0), ("join sheets", 1)]
    assert corpus.pairs("test") == [("burn gas", 2)], "grade 0 is not relevant"


def test_split_queries_stand_in_the_order_of_the_qrels(folder):
    put(folder / "qrels" / "test.tsv", HEADER + "q2\td1\t1\nq1\td1\t1\n")
    corpus = read_corpus(folder)
    assert list(corpus.split_queries("test")) == list(corpus.qrels["test"]) == ["q2", "q1"]


def test_index_built_by_hand_is_that_of_the_reader(folder):
    corpus = read_corpus(folder)
    by_hand = Corpus(corpus.documents, corpus.queries, corpus.qrels)
    assert by_hand.index == corpus.index


def test_chosen_splits(folder):
    corpus = read_corpus(folder, splits=["train"])
    assert corpus.splits == ("train",)
    assert corpus.warnings == (), "q2 is unjudged by the caller's wish"
    assert read_corpus(folder, splits=["train", "test"]).splits == ("train", "test")
    assert read_corpus(folder, splits="train").splits == ("train",)
    fails(folder, "qrels", "'dev'", "'test', 'train'", splits=["dev"])


def test_without_train_split_the_later_stage_complains(folder):
    (folder / "qrels" / "train.tsv").unlink()
    corpus = read_corpus(folder)
    for stage in (corpus.pairs, corpus.split_queries):
        with pytest.raises(
            UserError, match=r"no split 'train'; name one of 'test', or add qrels/train\.tsv"
        ):
            stage("train")


def test_lone_file(folder, tmp_path):
    corpus = read_corpus(folder / "corpus.jsonl")
    assert len(corpus.documents) == 3
    assert (corpus.queries, corpus.qrels, corpus.name) == ({}, {}, "welding")
    other = put(tmp_path / "tools.jsonl.gz", gzip.compress(jsonl(DOCUMENTS).encode()))
    assert read_corpus(other).documents == corpus.documents
    assert read_corpus(other).name == "tools"
    with pytest.raises(UserError, match=r"no split 'train'; add qrels/train\.tsv"):
        corpus.pairs("train")
    fails(other, "no splits", splits=["train"])


def test_gzip_everywhere(folder):
    plain = read_corpus(folder)
    for file in list(folder.rglob("*.*")):
        file.with_name(file.name + ".gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    assert read_corpus(folder) == plain


def test_only_documents_in_a_folder(folder):
    for file in [*(folder / "qrels").iterdir(), folder / "queries.jsonl"]:
        file.unlink()
    assert read_corpus(folder).splits == ()


BAD_DOCUMENTS = {
    "duplicate": (jsonl(DOCUMENTS) + "\n" + jsonl(DOCUMENTS[:1]), ":5:", "'d1'", "line 1"),
    "broken": (jsonl(DOCUMENTS) + '{"_id": "x", "text": \n', ":4:", "broken JSON"),
    "deep": ("[" * 100_000 + "\n", ":1:", "broken JSON"),
    "array": ('["d1"]\n', ":1:", "no object"),
    "latin 1": (jsonl(DOCUMENTS).encode() + b'{"_id": "x", "text": "\xe9"}', ":4:", "0xe9"),
    "utf 16": ('{"_id": "x"}'.encode("utf-16"), ":1:", "UTF-8"),
    "no text": ('{"_id": "d1", "contents": "x"}\n', ":1:", "no field 'text'", "contents"),
    "no id": ('{"id": "d1", "text": "x"}\n', ":1:", "no field '_id'"),
    "number id": ('{"_id": 7, "text": "x"}\n', ":1:", "'_id'", "7", "double quotes"),
    "null title": ('{"_id": "7", "text": "x", "title": null}\n', ":1:", "'title'", "null"),
    "list text": ('{"_id": "7", "text": ["x"]}\n', ":1:", "'text'"),
    "empty id": ('{"_id": " ", "text": "x"}\n', ":1:", "blank"),
    "tab in id": ('{"_id": "a\\tb", "text": "x"}\n', ":1:", "tab"),
    "surrogate": ('{"_id": "a", "text": "x\\ud83d"}\n', ":1:", "surrogate", "ud83d"),
    "empty": ("", "no documents"),
    "blank": ("\n \n", "no documents"),
    "damaged gzip": (gzip.compress(b"x" * 999)[:-9], "gzip"),
}


@pytest.mark.parametrize("case", BAD_DOCUMENTS)
def test_bad_documents(folder, case):
    content, *parts = BAD_DOCUMENTS[case]
    put(folder / "corpus.jsonl", content)
    fails(folder, "corpus.jsonl", *parts)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (jsonl([*QUERIES, QUERIES[1]]), (":3:", "'q2'", "line 2")),
        ('{"_id": "q1"}\n', (":1:", "'text'")),
        ('{"_id": "q1", "text": 3}\n', (":1:", "'text'")),
    ],
)
def test_bad_queries(folder, content, parts):
    put(folder / "queries.jsonl", content)
    fails(folder, "queries.jsonl", *parts)


BAD_QRELS = {
    "unknown query": (HEADER + "q1\td1\t1\nq9\td1\t1\n", ":3:", "'q9'", "queries"),
    "unknown document": (HEADER + "q1\td1\t1\nq1\td9\t1\n", ":3:", "'d9'", "1 of 2"),
    "negative": (HEADER + "q1\td1\t-1\n", ":2:", "'-1'", "0 for not"),
    "fraction": (HEADER + "q1\td1\t0.5\n", ":2:", "'0.5'"),
    "word": ("q1\td1\tyes\n", ":1:", "'yes'"),
    "infinite": (HEADER + "q1\td1\tinf\n", ":2:", "'inf'"),
    "contradiction": (HEADER + "q1\td1\t1\nq1\td1\t2\n", ":3:", "'d1'", "2 here and 1 above"),
    "two columns": (HEADER + "q1\td1\n", ":2:", "2 columns"),
    "blanks for tabs": ("q1 d1 1\n", ":1:", "3 columns"),
    "empty query id": (HEADER + "\td1\t1\n", ":2:", "query id is empty"),
    "empty document id": (HEADER + "q1\t\t1\n", ":2:", "document id is empty"),
    "not utf-8": (HEADER.encode() + b"q1\t\xff\t1\n", ":2:", "UTF-8"),
}


@pytest.mark.parametrize("case", BAD_QRELS)
def test_bad_qrels(folder, case):
    content, *parts = BAD_QRELS[case]
    put(folder / "qrels" / "test.tsv", content)
    fails(folder, "test.tsv", *parts)


def test_missing_and_ambiguous_files(folder, tmp_path):
    fails(tmp_path / "nowhere", "nowhere", "no such file")
    fails(tmp_path, "no corpus.jsonl", "welding")
    (folder / "queries.jsonl").rename(folder / "old")
    fails(folder, "no queries.jsonl")
    (folder / "old").rename(folder / "queries.jsonl")
    put(folder / "qrels" / "test.tsv.gz", b"")
    fails(folder, "both test.tsv and test.tsv.gz")
    put(folder / "corpus.jsonl.gz", b"")
    fails(folder, "both corpus.jsonl and corpus.jsonl.gz")
    fails(tmp_path / "no.tsv", "no.tsv", "cannot be read", reader=read_qrels)
    fails(tmp_path, "cannot be read", reader=read_run)


def test_what_is_odd_is_counted_with_the_first_place(folder):
    put(
        folder / "corpus.jsonl",
        "\ufeff" + jsonl(DOCUMENTS) + "\n\r\n" + jsonl([{"_id": "e", "text": " "}]),
    )
    put(folder / "queries.jsonl", jsonl([*QUERIES, {"_id": "q3", "text": ""}]))
    put(folder / "qrels" / "notes.txt", "x")
    put(folder / "qrels" / ".hidden", "x")
    put(folder / "qrels" / "dev.tsv", HEADER)
    put(folder / "qrels" / "train.tsv", HEADER + "q1\td1\t1\nq1\td1\t1\n")
    corpus = read_corpus(folder)
    assert [document.id for document in corpus.documents] == ["d1", "d 2", "d3", "e"]
    assert corpus.qrels["dev"] == {}
    expected = {
        "notes.txt": "left unread",
        "corpus.jsonl:1": "byte order mark",
        "corpus.jsonl:4": "blank lines, skipped: 2",
        "corpus.jsonl:6": "documents without title and text",
        "queries.jsonl:3": "queries without judgements",
        "dev.tsv": "no judgements",
        "train.tsv:3": "judgements given twice",
    }
    for where, what in expected.items():
        assert any(where in line and what in line for line in corpus.warnings), (where, what)
    assert any("queries without text" in line for line in corpus.warnings)
    assert len(corpus.warnings) == len(expected) + 1


def test_few_unknown_documents_are_kept_and_told(folder):
    put(folder / "corpus.jsonl", jsonl([{"_id": f"d{i}", "text": "x"} for i in range(200)]))
    lines = [f"q1\td{i}\t1\n" for i in range(198)]
    put(folder / "qrels" / "train.tsv", HEADER + "q1\tgone\t1\n" + "".join(lines))
    put(folder / "qrels" / "test.tsv", HEADER + "q2\td1\t1\n")
    corpus = read_corpus(folder)
    assert corpus.qrels["train"]["q1"]["gone"] == 1
    assert len(corpus.pairs("train")) == 198
    (warning,) = corpus.warnings
    assert "train.tsv:2" in warning and "corpus lacks" in warning
    put(folder / "qrels" / "train.tsv", HEADER + "q1\tgone\t1\nq1\taway\t1\n" + "".join(lines))
    (warning,) = read_corpus(folder).warnings
    assert ": 2, this is the first" in warning


def test_windows_line_ends_and_table_programs(folder):
    put(folder / "qrels" / "test.tsv", HEADER.replace("\n", "\r\n") + "q2\td 2\t1.0\r\n")
    put(folder / "corpus.jsonl", jsonl(DOCUMENTS).replace("\n", "\r\n"))
    corpus = read_corpus(folder)
    assert corpus.qrels["test"] == {"q2": {"d 2": 1}}
    assert len(corpus.documents) == 3


def test_corpus_round_trip(folder, tmp_path):
    corpus = read_corpus(folder)
    copy = tmp_path / "copies" / "welding"
    write_corpus(corpus, copy)
    write_corpus(corpus, copy)  # an earlier one is replaced
    assert read_corpus(copy) == corpus
    assert [entry.name for entry in copy.parent.iterdir()] == ["welding"]
    assert "heiß" in (copy / "corpus.jsonl").read_text(encoding="utf-8"), "readable, not escaped"


def test_write_corpus_never_destroys(folder, tmp_path):
    corpus = read_corpus(folder)
    put(tmp_path / "home" / "thesis.tex", "x")
    fails(tmp_path / "home", "thesis.tex", reader=lambda path: write_corpus(corpus, path))
    file = put(tmp_path / "file", "x")
    fails(file, "is a file", reader=lambda path: write_corpus(corpus, path))
    bad = Corpus((Document("a\tb", "", "x"),), {}, {})
    fails(tmp_path / "new", "'a\\tb'", reader=lambda path: write_corpus(bad, path))
    half = Corpus((Document("a", "", "x\ud83d"),), {}, {})
    fails(tmp_path / "new", "surrogate", reader=lambda path: write_corpus(half, path))
    fails(file / "under", "cannot be written", reader=lambda path: write_corpus(corpus, path))
    assert not (tmp_path / "new").exists()


def test_qrels_forms(tmp_path):
    wanted = {"q1": {"d1": 1, "d2": 0}, "q2": {"d1": 3}}
    trec = put(tmp_path / "a", "q1 0 d1 1\nq1\t0\td2  0\n  q2 0 d1 3\n")
    bare = put(tmp_path / "b", "q1\td1\t1\nq1\td2\t0\nq2\td1\t3\n")
    packed = put(tmp_path / "c", gzip.compress((HEADER + bare.read_text()).encode()))
    for file in (trec, bare, packed):
        assert read_qrels(file) == wanted
    for name in ("x.tsv", "x.tsv.gz", "x.qrels", "x.gz"):
        write_qrels(wanted, tmp_path / name)
        assert read_qrels(tmp_path / name) == wanted
    assert (tmp_path / "x.qrels").read_text() == "q1 0 d1 1\nq1 0 d2 0\nq2 0 d1 3\n"
    assert (tmp_path / "x.tsv").read_text() == HEADER + bare.read_text()


def test_readers_alone_warn_aloud(tmp_path):
    file = put(tmp_path / "q", "q1 0 d1 1\n\nq1 0 d1 1\n")
    with pytest.warns(UserWarning) as caught:
        assert read_qrels(file) == {"q1": {"d1": 1}}
    assert {str(warning.message)[len(str(file)) :] for warning in caught} == {
        ":2: blank lines, skipped",
        ":3: judgements given twice, counted once",
    }
    assert {warning.filename for warning in caught} == {__file__}
    with pytest.warns(UserWarning, match="no results"):
        assert read_run(put(tmp_path / "r", "")) == {}
    with pytest.warns(UserWarning, match="no judgements"):
        assert read_qrels(tmp_path / "r") == {}


def test_write_qrels_refuses_what_cannot_be_read_back(tmp_path):
    for bad, part in [
        ({"q": {}}, "no judgements"),
        ({"q": {"d": -1}}, "-1"),
        ({"q": {"d": 0.5}}, "0.5"),
        ({"q": {"": 1}}, "empty"),
        ({"q x": {"d": 1}}, "white space"),
    ]:
        fails(tmp_path / "q", part, reader=lambda path, bad=bad: write_qrels(bad, path))
    assert list(tmp_path.iterdir()) == []
    write_qrels({"q x": {"d y": 1}}, tmp_path / "q.tsv")
    assert read_qrels(tmp_path / "q.tsv") == {"q x": {"d y": 1}}


def test_run_round_trip(tmp_path):
    run = {"q1": {"a": 0.1 + 0.2, "c": -1e-300, "b": 0.1 + 0.2}, "q2": {"a": float("-inf")}}
    for name in ("run", "run.gz"):
        write_run(run, tmp_path / name, tag="best")
        assert read_run(tmp_path / name) == run
    assert (tmp_path / "run").read_text().splitlines() == [
        "q1 Q0 b 1 0.30000000000000004 best",
        "q1 Q0 a 2 0.30000000000000004 best",
        "q1 Q0 c 3 -1e-300 best",
        "q2 Q0 a 1 -inf best",
    ]
    write_run({"q1": {}}, tmp_path / "none")
    assert (tmp_path / "none").read_text() == ""


def test_bad_runs(tmp_path):
    for content, *parts in [
        ("q Q0 d 1 0.5 x\nq Q0 e 2 0.4\n", ":2:", "5 columns"),
        ("q Q0 d 1 best x\n", ":1:", "'best'", "no number"),
        ("q Q0 d 1 nan x\n", ":1:", "'nan'"),
        ("q Q0 d 1 2 x\nq Q0 d 2 1 x\n", ":2:", "'d'", "second time"),
    ]:
        fails(put(tmp_path / "run", content), *parts, reader=read_run)
    assert read_run(put(tmp_path / "run", "q Q0 d 9 2 x and more\n")) == {"q": {"d": 2.0}}
    for run, tag, part in [
        ({"q": {"d": float("nan")}}, "x", "nan"),
        ({"q": {"a b": 1.0}}, "x", "'a b'"),
        ({"q": {"d": 1.0}}, "two words", "tag"),
        ({"q": {"d": 1.0}}, "", "tag"),
    ]:
        fails(
            tmp_path / "new",
            part,
            reader=lambda path, run=run, tag=tag: write_run(run, path, tag=tag),
        )
    assert not (tmp_path / "new").exists()


def test_long_foreign_values_keep_messages_short(folder):
    put(folder / "qrels" / "test.tsv", HEADER + "q" * 10_000 + "\td1\t1\n")
    assert len(fails(folder, ":2:")) < 400 + len(str(folder))
