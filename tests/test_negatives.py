"""Negatives against brute force: who shares a prefix, who must never be one, and what is kept."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings

from genret_jax.docids.table import DocidTable
from genret_jax.errors import UserError
from genret_jax.negatives import (
    Negatives,
    bm25_search,
    draw,
    known_positives,
    mine,
    prefix_negatives,
)
from genret_jax.trie import Trie, build_trie
from tests.tiny import tiny_corpus

LABELS = ["<pad>", "</s>", *(f"t{i}" for i in range(2, 12))]


def trie_of(sequences, documents=None) -> Trie:
    documents = range(len(sequences)) if documents is None else documents
    return build_trie(DocidTable.from_sequences(sequences, list(documents), LABELS, "test", {}))


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def found(row) -> list[int]:
    """The entries of a row, after checking that they differ and that padding stands behind."""
    row = row.tolist()
    entries = [i for i in row if i != -1]
    assert row == entries + [-1] * (len(row) - len(entries))
    assert len(set(entries)) == len(entries) and min(entries, default=0) >= 0
    return entries


class Oracle:
    """Pairs of documents by brute force, from the trie's rows as tuples of tokens with EOS."""

    def __init__(self, trie: Trie, rows=None):
        docids = [tuple(t for t in row if t) for row in trie.rows.tolist()]
        self.owned: dict[int, list[int]] = {}
        for row in range(len(docids)):
            for document in trie.documents(row).tolist():
                self.owned.setdefault(document, []).append(row)
        first = {document: min(owned) for document, owned in self.owned.items()}
        told = first if rows is None else {d: r for d, r in enumerate(rows.tolist()) if r >= 0}
        self.docid = {document: docids[row] for document, row in told.items()}

    def agreement(self, a: int, b: int) -> int:
        """Tokens at the beginning that both docids share."""
        x, y = self.docid[a], self.docid[b]
        return next((i for i, (s, t) in enumerate(zip(x, y, strict=False)) if s != t), len(x))

    def negatives(self, document: int) -> dict[int, int]:
        """Every possible negative -> the tokens it shares, one or more."""
        others = [d for d in self.docid if not set(self.owned[d]) & set(self.owned[document])]
        shared = {d: self.agreement(document, d) for d in others}
        return {d: n for d, n in shared.items() if n >= 1}


@st.composite
def tries(draw_):
    """Few tokens, so that prefixes and collisions abound; now and then several rows a document."""
    token = st.integers(2, draw_(st.integers(2, 4)))
    same_length = st.integers(1, 5).flatmap(lambda n: st.lists(token, min_size=n, max_size=n))
    sequence = draw_(st.sampled_from([same_length, st.lists(token, min_size=1, max_size=4)]))
    sequences = draw_(st.lists(sequence, min_size=1, max_size=25))
    if draw_(st.booleans()):
        return trie_of(sequences)
    number = st.integers(0, 12)
    some = st.lists(number, min_size=len(sequences), max_size=len(sequences))
    return trie_of(sequences, draw_(some))


def told_rows(trie: Trie, rng: np.random.Generator) -> np.ndarray:
    """Any row of each document; one in eight documents is left out."""
    rows = np.full(trie.row_documents.max() + 1, -1)
    for document, owned in Oracle(trie).owned.items():
        rows[document] = rng.choice(owned) if rng.random() < 7 / 8 else -1
    return rows


# --- prefix negatives --------------------------------------------------------------------------


@settings(max_examples=150)
@given(trie=tries(), depth=st.integers(1, 6), count=st.integers(0, 8), told=st.booleans())
@example(trie=trie_of([[2]]), depth=1, count=3, told=False)
@example(trie=trie_of([[2], [2, 3], [2, 3, 4]]), depth=1, count=3, told=False)
@example(trie=trie_of([[2, 3]] * 3), depth=1, count=2, told=False)
def test_a_depth_is_at_least_so_many_shared_tokens(trie, depth, count, told):
    rows = told_rows(trie, generator()) if told else None
    oracle = Oracle(trie, rows)
    documents = np.array(sorted(oracle.docid), np.int32)
    out = prefix_negatives(trie, documents, depth=depth, count=count, rng=generator(1), rows=rows)
    assert out.dtype == np.int32 and out.shape == (len(documents), count)
    for document, row in zip(documents.tolist(), out, strict=True):
        expected = {d for d, shared in oracle.negatives(document).items() if shared >= depth}
        assert set(found(row)) <= expected
        assert len(found(row)) == min(count, len(expected))
        if depth >= len(oracle.docid[document]):
            assert not expected


@settings(max_examples=150)
@given(trie=tries(), count=st.integers(1, 8), told=st.booleans())
def test_deepest_takes_those_that_share_most_and_goes_up(trie, count, told):
    rows = told_rows(trie, generator()) if told else None
    oracle = Oracle(trie, rows)
    documents = np.array(sorted(oracle.docid))
    out = prefix_negatives(
        trie, documents, depth="deepest", count=count, rng=generator(1), rows=rows
    )
    for document, row in zip(documents.tolist(), out, strict=True):
        expected = oracle.negatives(document)
        assert set(found(row)) <= set(expected)
        shared = [expected[d] for d in found(row)]
        assert shared == sorted(expected.values(), reverse=True)[:count]


@settings(max_examples=100)
@given(trie=tries(), count=st.integers(1, 8), told=st.booleans())
def test_sampled_is_whole_at_some_depth(trie, count, told):
    rows = told_rows(trie, generator()) if told else None
    oracle = Oracle(trie, rows)
    documents = np.array(sorted(oracle.docid))
    out = prefix_negatives(
        trie, documents, depth="sampled", count=count, rng=generator(1), rows=rows
    )
    for document, row in zip(documents.tolist(), out, strict=True):
        expected = oracle.negatives(document)
        sets = [{d for d, n in expected.items() if n >= level} for level in expected.values()]
        fits = [set(found(row)) <= s and len(found(row)) == min(count, len(s)) for s in sets]
        assert any(fits) if sets else not found(row)


def test_depths_are_drawn_evenly_from_those_that_give_a_negative():
    """Document 0 shares 1, 2 and 4 tokens with one each: at depth 3 and 4 there is one alike."""
    trie = trie_of([[2, 2, 2, 2, 2, 2], [2, 3, 3, 3, 3, 3], [2, 2, 3, 3, 3, 3], [2, 2, 2, 2, 3, 3]])
    out = prefix_negatives(trie, np.zeros(4000, int), depth="sampled", count=3, rng=generator())
    sizes = Counter(len(found(row)) for row in out)
    assert sizes == {3: pytest.approx(1000, abs=120), 2: pytest.approx(1000, abs=120), 1: sizes[1]}


@pytest.mark.parametrize("count", [1, 3])
def test_all_of_a_set_are_as_likely_in_every_column(count):
    # Documents 2 and 3 own docids of 0 (and one beside them): neither is a negative of 0.
    docids = [[2, 2], [2, 3], [2, 4], [2, 5], [2, 6], [2, 7], [3, 2], [2, 2], [2, 2], [2, 8]]
    trie = trie_of(docids, [0, 1, 2, 3, 4, 5, 6, 2, 3, 7])
    rows = np.array([0, 1, 2, 3, 4, 5, 7, 6])
    out = prefix_negatives(
        trie, np.zeros(4000, int), depth=1, count=count, rng=generator(), rows=rows
    )
    for column in out.T:
        assert Counter(column.tolist()) == {d: pytest.approx(1000, abs=120) for d in (1, 4, 5, 7)}


def test_those_that_carry_the_same_docid_are_no_negatives():
    trie = trie_of([[2, 3], [2, 3], [2, 4], [2, 4], [5, 5], [5, 5]])
    out = prefix_negatives(trie, np.arange(6), depth="deepest", count=4, rng=generator())
    assert [set(found(row)) for row in out] == [{2, 3}, {2, 3}, {0, 1}, {0, 1}, set(), set()]


def test_a_document_counts_with_its_first_row_or_with_the_one_it_is_told():
    trie = trie_of([[2, 3], [5, 5], [2, 4], [5, 6]], [0, 0, 1, 2])
    assert trie.rows.tolist() == [[2, 3], [2, 4], [5, 5], [5, 6]]
    ask = {"depth": 1, "count": 1, "rng": generator()}
    assert prefix_negatives(trie, np.arange(3), **ask).tolist() == [[1], [0], [-1]]
    told = np.array([2, 1, 3])
    assert prefix_negatives(trie, np.arange(3), rows=told, **ask).tolist() == [[2], [-1], [0]]


def test_a_document_that_shares_another_docid_is_no_negative():
    """Document 1 counts with [2, 4], but [2, 3], that of document 0, names it too."""
    trie = trie_of([[2, 3], [2, 3], [2, 4], [2, 5]], [0, 1, 1, 2])
    told = np.array([0, 1, 2])
    ask = {"depth": "deepest", "count": 3, "rng": generator(), "rows": told}
    out = prefix_negatives(trie, np.arange(3), **ask)
    assert [set(found(row)) for row in out] == [{2}, {2}, {0, 1}]


def test_high_positions_with_several_rows():
    """Pairs of positions are kept as one number, which does not fit 32 bits."""
    high = 3_000_000
    trie = trie_of([[2, 3], [2, 3], [2, 4], [2, 5]], [high, high + 1, high + 1, high + 2])
    told = np.full(high + 3, -1)
    told[high:] = [0, 1, 2]
    ask = {"depth": 1, "count": 3, "rng": generator(), "rows": told}
    out = prefix_negatives(trie, np.arange(high, high + 3), **ask)
    assert [set(found(row)) for row in out] == [{high + 2}, {high + 2}, {high, high + 1}]


def test_a_seed_decides_and_a_saved_trie_serves(tmp_path):
    rng = generator(3)
    trie = trie_of(rng.integers(2, 5, (60, 4)).tolist())
    trie.save(tmp_path / "trie")
    ask = {"depth": "sampled", "count": 4}
    one = prefix_negatives(trie, np.arange(60), rng=generator(1), **ask)
    two = prefix_negatives(Trie.load(tmp_path / "trie"), np.arange(60), rng=generator(1), **ask)
    other = prefix_negatives(trie, np.arange(60), rng=generator(2), **ask)
    assert (one == two).all() and (one != other).any()


def test_more_documents_than_are_drawn_for_at_once(monkeypatch):
    monkeypatch.setattr("genret_jax.negatives.prefix._CHUNK", 7)
    trie = trie_of(generator(3).integers(2, 4, (60, 5)).tolist())
    oracle = Oracle(trie)
    out = prefix_negatives(trie, np.arange(60), depth="deepest", count=5, rng=generator(1))
    for document, row in enumerate(out):
        expected = oracle.negatives(document)
        shared = [expected[d] for d in found(row)]
        assert shared == sorted(expected.values(), reverse=True)[:5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth 0; give 1 or more"),
        ({"depth": "deep"}, "depth 'deep'; give"),
        ({"count": -1}, "count -1; give 0"),
        ({"documents": np.array([0, 7, 8])}, "2 of 3 documents have no docid.*first is 7"),
        ({"documents": np.array([-1])}, "1 of 1 documents have no docid"),
        ({"rows": np.array([0, -1])}, "1 of 2 documents have no docid.*first is 1"),
        ({"rows": np.array([1, 0])}, "row 1 of the trie is no docid of document 0"),
    ],
)
def test_mistakes_with_prefixes(change, message):
    trie = trie_of([[2, 3], [2, 4]])
    ask = {"documents": np.arange(2), "depth": 1, "count": 2, "rng": generator()} | change
    with pytest.raises(UserError, match=message):
        prefix_negatives(trie, **ask)


# --- known positives and mining ----------------------------------------------------------------

PAIRS = st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 9)), max_size=20)


@given(PAIRS)
def test_known_positives_by_text(pairs):
    queries, relevant, query_of = known_positives(pairs)
    sets: dict[str, set[int]] = {}
    for query, position in pairs:
        sets.setdefault(query, set()).add(position)
    assert queries == list(sets)
    assert [found(row) for row in relevant] == [sorted(s) for s in sets.values()]
    assert relevant.shape == (len(sets), max(map(len, sets.values()), default=0))
    assert relevant.dtype == query_of.dtype == np.int32
    assert [queries[i] for i in query_of] == [query for query, _ in pairs]


@given(pairs=PAIRS, count=st.integers(1, 6), batch=st.integers(1, 4), seed=st.integers(0, 9))
def test_what_is_mined_is_best_first_and_never_relevant(pairs, count, batch, seed):
    queries, relevant, _ = known_positives(pairs)
    ranked = {q: generator(seed + ord(q)).permutation(10)[: ord(q) % 11] for q in queries}
    asked = []

    def search(texts, k):
        assert k == count + relevant.shape[1]
        asked.append(texts)
        return [np.insert(ranked[text][:k], 0, -1) for text in texts]  # padding, anywhere

    out = mine(search, queries, relevant, count=count, batch=batch, description="fake")
    assert out.dtype == np.int32 and out.shape == (len(queries), count)
    assert sum(asked, []) == queries and all(0 < len(texts) <= batch for texts in asked)
    for query, row in zip(queries, out, strict=True):
        positive = {position for text, position in pairs if text == query}
        assert found(row) == [d for d in ranked[query].tolist() if d not in positive][:count]


def test_mining_checks_what_it_is_given():
    relevant = np.array([[0]])
    for wrong in ({"count": 0}, {"count": 1, "batch": 0}):
        with pytest.raises(UserError, match="give 1 or more"):
            mine(lambda texts, k: [[1]], ["a"], relevant, **wrong)
    with pytest.raises(ValueError, match="zip"):
        mine(lambda texts, k: [], ["a"], relevant, count=1)


def test_bm25_finds_neighbours_of_the_tiny_corpus():
    corpus = tiny_corpus()
    lifts, locks = corpus.index["lifts"], corpus.index["locks"]
    search = bm25_search(corpus.documents)
    first, none = search(["who repairs lifts and escalators", "xylophone"], 3)
    assert first.tolist() == [lifts, locks] and len(none) == 0

    queries, relevant, _ = known_positives([("who repairs lifts", lifts), ("xylophone", 2)])
    out = mine(search, queries, relevant, count=2)
    assert out.tolist() == [[locks, -1], [-1, -1]]

    queries, relevant, _ = known_positives(corpus.pairs("train"))
    out = mine(search, queries, relevant, count=3, batch=7)
    assert not any(set(found(row)) & set(known) for row, known in zip(out, relevant, strict=True))


# --- draws -------------------------------------------------------------------------------------

ROWS = st.integers(0, 7).map(lambda n: [*range(100, 100 + n), *[-1] * (7 - n)])


@given(rows=st.lists(ROWS, max_size=5), count=st.integers(0, 10), seed=st.integers(0, 5))
def test_a_draw_pads_only_where_it_must(rows, count, seed):
    table = np.array(rows, np.int32).reshape(-1, 7)
    out = draw(table, count, generator(seed))
    assert out.dtype == np.int32 and out.shape == (len(table), count)
    for entries, row in zip(table.tolist(), out, strict=True):
        there = set(entries) - {-1}
        assert set(found(row)) <= there
        assert len(found(row)) == min(count, len(there))


def test_draws_are_even():
    table = np.tile(np.array([5, 6, 7, 8, -1, -1], np.int32), (4000, 1))
    out = draw(table, 2, generator())
    for column in out.T:
        assert Counter(column.tolist()) == {d: pytest.approx(1000, abs=120) for d in (5, 6, 7, 8)}
    assert (draw(table, 2, generator()) == out).all()


# --- the folder --------------------------------------------------------------------------------


def example_negatives() -> Negatives:
    prefix = np.array([[1, 2], [0, -1], [-1, -1], [-1, -1]], np.int32)
    retrieved = np.array([[3], [1]], np.int32)
    return Negatives(prefix, retrieved, digest="abc", source="bm25", depth="deepest")


@pytest.mark.parametrize("depth", ["deepest", 2])
@pytest.mark.parametrize("shape", [(2, 1), (0, 5), (3, 0)])
def test_saved_and_loaded(tmp_path, depth, shape):
    """Shapes without entries are what a corpus without train queries has."""
    retrieved = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    made = Negatives(example_negatives().prefix, retrieved, "abc", "bm25", depth)
    made.save(tmp_path / "negatives")
    made.save(tmp_path / "negatives")  # replaces
    again = Negatives.load(tmp_path / "negatives")
    assert isinstance(again.prefix, np.memmap)
    assert np.array_equal(again.prefix, made.prefix) and again.prefix.dtype == np.int32
    assert again.retrieved.shape == shape and np.array_equal(again.retrieved, retrieved)
    assert (again.digest, again.source, again.depth) == ("abc", "bm25", depth)
    assert again.report() == made.report()
    assert [p.name for p in tmp_path.iterdir()] == ["negatives"]


def test_report_counts():
    report = example_negatives().report()
    assert report == {
        "source": "bm25",
        "depth": "deepest",
        "prefix": {"rows": 4, "mean": 0.75, "without": 0.5, "bytes": 32},
        "retrieved": {"rows": 2, "mean": 1.0, "without": 0.0, "bytes": 8},
    }
    json.dumps(report)


def _replace_json(folder, **change):
    about = json.loads((folder / "negatives.json").read_text()) | change
    (folder / "negatives.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (shutil.rmtree, r"no whole negatives here \(prefix.npy, retrieved.npy, negatives.json"),
        (lambda f: (f / "retrieved.npy").unlink(), r"here \(retrieved.npy missing\)"),
        (lambda f: (f / "negatives.json").unlink(), r"here \(negatives.json missing\)"),
        (lambda f: (f / "negatives.json").write_text("{"), "cannot read negatives"),
        (lambda f: (f / "negatives.json").write_text("[]"), "cannot read negatives"),
        (lambda f: (f / "negatives.json").write_text('{"format": 1}'), "cannot read.*digest"),
        (lambda f: _replace_json(f, format=9), "format 9, this version reads 1"),
        (lambda f: (f / "prefix.npy").write_bytes(b""), "cannot read negatives"),
        (lambda f: (f / "prefix.npy").write_bytes(b"rubbish" * 9), "cannot read negatives"),
        (
            lambda f: (f / "prefix.npy").write_bytes((f / "prefix.npy").read_bytes()[:-8]),
            "cannot read negatives",
        ),
        (lambda f: np.save(f / "prefix.npy", np.zeros((2, 2))), "prefix.npy is float64 of rank 2"),
    ],
)
def test_a_broken_folder_is_one_line(tmp_path, harm, message):
    folder = tmp_path / "negatives"
    example_negatives().save(folder)
    harm(folder)
    with pytest.raises(UserError, match=message) as caught:
        Negatives.load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert "make them again" in str(caught.value)


def test_no_tensorflow_comes_in():
    code = "import sys, genret_jax.negatives; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
