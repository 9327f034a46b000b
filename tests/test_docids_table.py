"""The docid table: validation, end of sequence, report, collisions, folder on disk."""

from __future__ import annotations

import collections
import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genret_jax.docids import collisions as collisions_lib
from genret_jax.docids.table import EOS_ID, EOS_LABEL, PAD_LABEL, DocidTable
from genret_jax.errors import UserError

LABELS = [PAD_LABEL, EOS_LABEL, *"abcde"]
SEQUENCES = st.lists(st.lists(st.integers(2, 6), min_size=1, max_size=5), min_size=1, max_size=30)


def table_of(sequences, documents=None):
    documents = range(len(sequences)) if documents is None else documents
    return DocidTable.from_sequences(sequences, documents, LABELS, "keywords", {"terms": 2})


def rows_of(table):
    return [tuple(row[:n].tolist()) for row, n in zip(table.tokens, table.lengths, strict=True)]


@given(SEQUENCES)
def test_rows_hold_the_sequences_and_none_is_a_proper_prefix(sequences):
    table = table_of(sequences)
    ended = len(set(map(len, sequences))) > 1
    assert rows_of(table) == [(*s, EOS_ID) if ended else tuple(s) for s in sequences]
    assert table.tokens.dtype == table.lengths.dtype == table.documents.dtype == np.int32
    assert table.tokens.shape[1] == table.lengths.max()
    for one in set(rows_of(table)):
        assert not any(one != other and other[: len(one)] == one for other in rows_of(table))


@given(SEQUENCES)
def test_from_array_ignores_what_lies_beyond_the_lengths(sequences):
    longest = max(map(len, sequences)) + 1
    noise = np.array([[*s, *[99] * (longest - len(s))] for s in sequences])
    lengths = np.array(list(map(len, sequences)))
    table = DocidTable.from_array(noise, lengths, range(len(sequences)), LABELS, "keywords", {})
    assert rows_of(table) == rows_of(table_of(sequences))


@given(SEQUENCES, st.data())
def test_report_against_brute_force(sequences, data):
    owners = st.integers(0, 8)
    documents = data.draw(st.lists(owners, min_size=len(sequences), max_size=len(sequences)))
    table = table_of(sequences, documents)
    report = table.report()
    rows = rows_of(table)
    behind = collections.defaultdict(set)
    for row, document in zip(rows, documents, strict=True):
        behind[row].add(document)
    sharing = {d for owners in behind.values() if len(owners) > 1 for d in owners}
    assert report["documents"] == len(set(documents))
    assert report["rows"] == len(rows)
    assert report["unique_ids"] == len(behind)
    assert report["collisions"] == {
        "documents": len(sharing),
        "largest_group": max(map(len, behind.values())),
    }
    lengths = list(map(len, rows))
    mean = pytest.approx(sum(lengths) / len(lengths), abs=1e-3)
    assert report["length"] == {"min": min(lengths), "mean": mean, "max": max(lengths)}
    assert report["bytes"] == 4 * (table.tokens.size + 2 * len(rows))
    children = collections.defaultdict(set)
    for row in rows:
        for level in range(len(row)):
            children[row[:level]].add(row[level])
    for entry in report["trie"]:
        sizes = [len(c) for prefix, c in children.items() if len(prefix) == entry["level"] - 1]
        assert (entry["nodes"], entry["max_children"]) == (len(sizes), max(sizes))
        assert entry["mean_children"] == pytest.approx(sum(sizes) / len(sizes), abs=1e-3)
    assert len(report["trie"]) == max(lengths)
    json.dumps(report)


def test_report_of_an_empty_table():
    report = DocidTable.from_sequences([], [], LABELS, "keywords", {}).report()
    assert (report["rows"], report["unique_ids"], report["trie"]) == (0, 0, [])
    assert report["collisions"] == {"documents": 0, "largest_group": 0}


def test_a_document_does_not_collide_with_itself():
    assert table_of([[2], [2]], [4, 4]).report()["collisions"]["documents"] == 0


def test_text_leaves_out_the_end():
    assert table_of([[2, 3], [4]]).text(0) == "a · b"
    assert table_of([[2, 3], [4]]).text(1) == "c"


@pytest.mark.parametrize("mmap", [True, False])
def test_save_and_load(tmp_path, mmap):
    labels = [*LABELS, "naïve 標籤", "half \ud83d"]
    table = DocidTable.from_sequences(
        [[2, 3], [4], [7, 8]], [0, 1, 1], labels, "title", {"max_length": 3, "k": 0.5, "on": True}
    )
    table.save(tmp_path / "docids")
    table.save(tmp_path / "docids")  # over an older one
    again = DocidTable.load(tmp_path / "docids", mmap=mmap)
    for name in ("tokens", "lengths", "documents"):
        np.testing.assert_array_equal(getattr(table, name), getattr(again, name))
        assert isinstance(getattr(again, name), np.memmap) == mmap
    assert (again.labels, again.kind) == (table.labels, "title")
    assert again.settings == {"max_length": 3, "k": 0.5, "on": True}
    assert again.report() == table.report()


def test_load_names_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match=r"docids.json does not exist"):
        DocidTable.load(tmp_path)
    folder = tmp_path / "docids"
    table_of([[2], [3]]).save(folder)
    (folder / "lengths.npy").unlink()
    with pytest.raises(UserError, match=r"lengths.npy does not exist"):
        DocidTable.load(folder)
    (folder / "lengths.npy").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="cannot read docids"):
        DocidTable.load(folder)
    np.save(folder / "lengths.npy", np.array([2, 2], np.int32))
    with pytest.raises(UserError, match=r"lengths run from 2 to 2"):
        DocidTable.load(folder)
    for text in ('{"format": "other"}', "[]"):
        (folder / "docids.json").write_text(text)
        with pytest.raises(UserError, match="not of the format"):
            DocidTable.load(folder)


@pytest.mark.parametrize(
    ("sequences", "documents", "labels", "message"),
    [
        ([[2], []], [0, 1], LABELS, "row 1 is empty"),
        ([[1]], [0], LABELS, "token 1 is outside 2..6"),
        ([[7]], [0], LABELS, "token 7 is outside 2..6"),
        ([[2]], [0, 1], LABELS, "1 docid rows, 1 lengths and 2 documents"),
        ([[2]], [-1], LABELS, "documents hold -1"),
        ([[2]], [0], ["x", "y", "z"], r"start with \['x', 'y'\]"),
        ([[2]], [0], [*LABELS, "a"], "'a' stands for two tokens"),
    ],
)
def test_mistakes_are_named(sequences, documents, labels, message):
    with pytest.raises(UserError, match=message):
        DocidTable.from_sequences(sequences, documents, labels, "keywords", {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros((2, 1), np.int64)}, "tokens is int64"),
        ({"tokens": np.array([[2], [9]], np.int32)}, "tokens run from 2 to 9"),
        ({"lengths": np.array([1, 2], np.int32)}, "lengths run from 1 to 2"),
        ({"tokens": np.array([[2], [0]], np.int32)}, "tokens and lengths disagree"),
    ],
)
def test_a_table_of_its_own_arrays_is_checked_too(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(table_of([[2], [3]]), **change)


RANKED = st.integers(1, 5).flatmap(
    lambda depth: st.lists(
        st.lists(st.integers(0, 2), max_size=depth), min_size=1, max_size=25
    ).map(lambda rows: np.array([r + [-1] * (depth - len(r)) for r in rows], np.int32))
)


@given(RANKED, st.integers(1, 5))
def test_own_lengths_separate_exactly_what_differs(ranked, base):
    lengths, places = collisions_lib.own_lengths(ranked, base=base)
    base = min(base, ranked.shape[1])
    whole = [tuple(row[row >= 0]) for row in ranked]
    ids = [row[:n] for row, n in zip(whole, lengths, strict=True)]
    named = list(zip(ids, places, strict=True))
    assert len(set(named)) == len(named)
    for row, one in enumerate(whole):
        equals = [i for i, other in enumerate(whole) if other == one]
        assert places[row] == equals.index(row)
        # Brute force: the shortest cut that only its equals share.
        for cut in range(base, ranked.shape[1] + 1):
            if [
                i for i, other in enumerate(ranked) if (other[:cut] == ranked[row, :cut]).all()
            ] == equals:
                break
        assert lengths[row] == min(len(one), cut)


@given(st.integers(1, 2500), st.booleans())
def test_numbers_make_equal_rows_distinct(rows, every_row):
    tokens = np.full((rows, 1), 2, np.int32)
    places = collisions_lib.places_of(tokens)
    out, lengths, labels = collisions_lib.append_numbers(
        tokens, np.ones(rows, np.int64), places, vocab_size=3, every_row=every_row
    )
    names = [PAD_LABEL, EOS_LABEL, "a", *labels]
    table = DocidTable.from_array(out, lengths, range(rows), names, "title", {})
    assert table.report()["unique_ids"] == rows
    assert len(labels) <= 1000
    if every_row:
        assert len(set(lengths)) == 1
    elif rows > 1:
        assert table.text(0) == "a"
        assert table.text(1) == "a · <#2>"


@given(
    st.lists(st.sampled_from(["<pad>", "</s>", "<#2>", "<none>", "\\", "a", "<", "\n"]), max_size=4)
)
def test_labels_from_a_corpus_never_become_reserved_ones(parts):
    text = "".join(parts)
    label = collisions_lib.plain_label(text)
    assert label not in (PAD_LABEL, EOS_LABEL, "<none>", "<#2>")
    assert label == text or label == "\\" + text
    assert label == text or collisions_lib.plain_label(label) == "\\" + label


def test_row_groups_are_the_equal_rows():
    groups = collisions_lib.row_groups(np.array([[1, -1], [0, 3], [1, -1], [1, 3]]))
    assert groups[0] == groups[2]
    assert len(set(groups.tolist())) == 3
