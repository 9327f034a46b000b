"""The collection in the package: form of the questions, no leak between splits, BM25 on it."""

from __future__ import annotations

import json
import os
import re
import shelve
import subprocess
import sys
from importlib import resources

import pytest

from genret_jax.baselines.sparse import bm25_for
from genret_jax.corpus import Corpus, read_corpus
from genret_jax.evaluation import evaluate, run_of
from genret_jax.quickstart import standard_library_corpus, write_standard_library_corpus

SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module")
def lines() -> list[str]:
    file = resources.files("genret_jax.quickstart").joinpath("questions.jsonl")
    text = file.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return text.splitlines()


@pytest.fixture(scope="module")
def records(lines: list[str]) -> list[dict]:
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return standard_library_corpus()


def words(question: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z0-9_]+", question.lower()))


def near(a: frozenset[str], b: frozenset[str]) -> bool:
    """Jaccard similarity above 0.8."""
    common = len(a & b)
    return 5 * common > 4 * (len(a) + len(b) - common)


# The file.


def test_each_line_has_one_object_in_order_and_three_splits_of_questions(records):
    names = [record["object"] for record in records]
    assert names == sorted(set(names))
    for record in records:
        assert list(record) == ["object", *SPLITS]
        assert len(record["train"]) >= 8
        assert len(record["dev"]) == 1
        assert len(record["test"]) in (2, 3)


def test_lines_are_printable_ascii_as_json_writes_it(lines, records):
    for line, record in zip(lines, records, strict=True):
        assert line == json.dumps(record)
        for split in SPLITS:
            for question in record[split]:
                # A character beyond ASCII would be escaped in the line, not in the question.
                assert question.isascii() and question.isprintable(), question
                assert question == question.strip()
                assert 3 <= len(words(question)) <= 26, question


def test_no_question_comes_twice(records):
    seen: dict[str, str] = {}
    for record in records:
        for split in SPLITS:
            for question in record[split]:
                # Case, punctuation and blanks do not make another question.
                key = " ".join(words(question))
                where = f"{record['object']} {split}"
                assert seen.setdefault(key, where) is where, (question, seen[key], where)


def test_no_test_question_is_nearly_one_of_train_or_dev(records):
    held_out = [
        (frozenset(words(question)), question) for record in records for question in record["test"]
    ]
    known = [
        (frozenset(words(question)), question)
        for record in records
        for split in ("train", "dev")
        for question in record[split]
    ]
    leaks = [(test, other) for a, test in held_out for b, other in known if near(a, b)]
    assert leaks == []


def test_the_rule_for_near_questions_finds_one_changed_word():
    first, second = "sort a big list of names in place", "sort a big list of names in memory"
    assert near(frozenset(words(first)), frozenset(words(first.upper() + "?")))
    assert not near(frozenset(words(first)), frozenset(words(second)))  # 7 of 9 words
    assert near(frozenset(words(first + " now")), frozenset(words(first)))  # 8 of 9


def test_questions_hardly_ever_name_their_object(records):
    # One that gives the name away asks for nothing. Names that are plain words may occur.
    named = sum(
        record["object"].rpartition(".")[2].lower() in words(question)
        for record in records
        for split in SPLITS
        for question in record[split]
    )
    total = sum(len(record[split]) for record in records for split in SPLITS)
    assert named < 0.1 * total


# The corpus.


def test_there_are_enough_documents_each_with_questions_in_every_split(corpus):
    assert len(corpus.documents) >= 300
    assert corpus.splits == SPLITS
    for split, fewest in (("train", 8), ("dev", 1), ("test", 2)):
        counts = [0] * len(corpus.documents)
        for _, position in corpus.pairs(split):
            counts[position] += 1
        assert min(counts) >= fewest
    assert len(corpus.queries) == sum(len(corpus.split_queries(split)) for split in SPLITS)


def test_ids_are_dotted_names_and_texts_are_docstrings(corpus):
    for document in corpus.documents:
        assert document.id == document.title
        assert re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", document.id)
        assert len(document.text) >= 20
        assert document.text == document.text.strip()
        assert not re.search(r"[ \t]$|\n{3}", document.text, flags=re.MULTILINE)
    shelf = corpus.documents[corpus.index["shelve.open"]]
    assert shelf.text.split() == (shelve.open.__doc__ or "").split()
    texts = [document.text for document in corpus.documents]
    assert len(set(texts)) == len(texts), "two names of one object"


def test_a_question_is_judged_for_its_object_alone(corpus, records):
    for split in SPLITS:
        asked = corpus.split_queries(split)
        for query, judged in corpus.qrels[split].items():
            assert judged == {query.partition("/")[0]: 1}
        assert list(asked.values()) == [
            question
            for record in records
            if record["object"] in corpus.index
            for question in record[split]
        ]


@pytest.mark.skipif(sys.platform != "linux", reason="some functions of os exist on Linux only")
def test_every_object_resolves_on_linux(corpus, records):
    assert corpus.warnings == ()
    assert [document.id for document in corpus.documents] == [
        record["object"] for record in records
    ]


def test_absent_and_undocumented_objects_are_left_out_and_counted(monkeypatch, corpus):
    monkeypatch.delattr(os, "strerror")
    monkeypatch.setattr(shelve.open, "__doc__", None)
    smaller = standard_library_corpus()
    gone = {"os.strerror", "shelve.open"}
    assert corpus.index.keys() - smaller.index.keys() == gone
    assert not any(query.partition("/")[0] in gone for query in smaller.queries)
    assert all(gone.isdisjoint(judged) for q in smaller.qrels.values() for judged in q.values())
    (warning,) = smaller.warnings
    assert re.search(r": \d+, \S+ is the first$", warning)
    if not corpus.warnings:
        assert warning.endswith(": 2, os.strerror is the first")


def test_without_docstrings_the_remedy_is_told():
    code = (
        "from genret_jax.errors import UserError\n"
        "from genret_jax.quickstart import standard_library_corpus\n"
        "try: standard_library_corpus()\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-OO", "-c", code], capture_output=True, text=True, check=True
    )
    assert "-OO" in done.stdout and done.stdout.count("\n") == 1


def test_reading_it_shows_nothing_and_opens_nothing():
    code = (
        "import sys\n"
        "from genret_jax.quickstart import standard_library_corpus\n"
        "standard_library_corpus()\n"
        "loud = {'this', 'antigravity', 'turtle', 'tkinter', 'idlelib', 'readline', 'pdb', 'jax'}\n"
        "assert not loud & sys.modules.keys(), loud & sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_it_can_be_written_and_read_as_a_folder(tmp_path, corpus):
    write_standard_library_corpus(tmp_path / "library")
    back = read_corpus(tmp_path / "library", splits=SPLITS)
    assert back.documents == corpus.documents
    assert back.queries == corpus.queries
    assert back.qrels == corpus.qrels


# What the lexical baselines make of it.


def test_bm25_finds_some_and_train_questions_help(corpus):
    figures = {}
    for with_train_queries in (False, True):
        searcher = bm25_for(corpus, with_train_queries=with_train_queries)
        run = run_of(searcher, corpus.split_queries("test"), k=10).run
        figures[searcher.name] = evaluate(run, corpus.qrels["test"], ["hits@1", "hits@10"])
    plain, with_questions = figures["BM25"], figures["BM25+q"]
    # Neither trivial nor hopeless; the wide bounds leave room for other Pythons' docstrings.
    assert 0.12 < plain["hits@1"] < 0.35
    assert 0.35 < plain["hits@10"] < 0.6
    assert 0.25 < with_questions["hits@1"] < 0.5
    assert 0.55 < with_questions["hits@10"] < 0.8
    assert with_questions["hits@1"] > plain["hits@1"] + 0.05
