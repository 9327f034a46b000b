"""A trie with documents added and removed against one built anew of the same documents."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import example, given, settings

from genret_jax.docids.table import DocidTable
from genret_jax.errors import UserError
from genret_jax.live_trie import add_documents, remove_documents
from genret_jax.trie import build_trie

LABELS = ("<pad>", "</s>", *(f"t{i}" for i in range(2, 12)))
SEQUENCES = st.lists(st.lists(st.integers(2, 4), min_size=1, max_size=3), min_size=1, max_size=12)


def table_of(sequences, documents) -> DocidTable:
    """Every row ends in EOS, whatever the lengths, so that parts of it are such tables too."""
    tokens = np.zeros((len(sequences), 4), np.int32)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence) + 1] = [*sequence, 1]
    lengths = (tokens > 0).sum(1).astype(np.int32)
    return DocidTable(tokens, lengths, np.asarray(documents, np.int32), LABELS, "test", {})


def part(table: DocidTable, which) -> DocidTable:
    names = ("tokens", "lengths", "documents")
    return dataclasses.replace(table, **{name: getattr(table, name)[which] for name in names})


def assert_equal(ours, expected) -> None:
    for field in dataclasses.fields(expected):
        a, b = getattr(ours, field.name), getattr(expected, field.name)
        assert np.asarray(a).dtype == np.asarray(b).dtype, field.name
        np.testing.assert_array_equal(a, b, err_msg=field.name)


@settings(max_examples=150)
@given(sequences=SEQUENCES, seed=st.integers(0, 2**32 - 1))
@example(sequences=[[2, 3], [2, 3], [2, 3]], seed=0)
@example(sequences=[[2], [3]], seed=1)
def test_added_and_removed_is_built_anew(sequences, seed):
    """Documents with several identifiers and identifiers of several documents among them."""
    rng = np.random.default_rng(seed)
    table = table_of(sequences, rng.integers(0, len(sequences), len(sequences)))
    late = np.isin(table.documents, rng.permutation(table.documents)[: len(sequences) // 2])
    late &= table.documents != table.documents[0]
    whole, early = build_trie(table), build_trie(part(table, ~late))
    assert_equal(add_documents(early, part(table, late)), whole)
    assert_equal(remove_documents(whole, table.documents[late]), early)


def test_within_the_capacity_the_program_on_the_device_stays():
    rng = np.random.default_rng(0)
    numbers = rng.permutation(1000)[:200]
    table = table_of([[2 + n // 100, 2 + n // 10 % 10, 2 + n % 10] for n in numbers], range(200))
    live = build_trie(part(table, slice(0, 150)))
    device, within = live.on_device(), 0

    def structure(trie):
        return jax.tree.structure(trie), [(x.shape, x.dtype) for x in jax.tree.leaves(trie)]

    for change in range(40):
        if change % 4 == 3:
            live = remove_documents(live, live.row_documents[:1])
        else:
            live = add_documents(live, part(table, slice(150 + change, 151 + change)))
        now, anew = live.on_device(like=device), live.on_device()
        fits = len(live.rows) <= len(device.rows) and live.num_states <= len(device.edge_token)
        for beam in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            for level in (0, 1, 2):
                assert now.candidates(beam, level) >= anew.candidates(beam, level)
                fits &= device.candidates(beam, level) >= anew.candidates(beam, level)
        if fits:
            assert structure(now) == structure(device)
            within += 1
        assert now.num_rows == anew.num_rows
        for ours, fresh in zip(now.dense, anew.dense, strict=True):
            least = min(len(ours), len(fresh))
            np.testing.assert_array_equal(ours[:least], fresh[:least])
    assert 5 < within < 40, "the test is to see both"


def test_what_cannot_be_added_or_removed_is_said():
    trie = build_trie(table_of([[2, 3], [4]], [0, 1]))
    with pytest.raises(UserError, match="document 7 is not in the trie"):
        remove_documents(trie, np.array([1, 7]))
    with pytest.raises(UserError, match="no document would be left"):
        remove_documents(trie, np.array([0, 1]))
    other = DocidTable(
        np.array([[2]], np.int32), *(np.array([n], np.int32) for n in (1, 2)), LABELS[:5], "t", {}
    )
    with pytest.raises(UserError, match="over 5 labels and the trie over 12"):
        add_documents(trie, other)
    with pytest.raises(UserError, match="is a prefix of another"):
        add_documents(trie, dataclasses.replace(other, labels=LABELS))
    long = np.array([[2, 3, 4, 5, 6]], np.int32)
    with pytest.raises(UserError, match="5 tokens and the trie has room for 4"):
        add_documents(
            trie,
            dataclasses.replace(other, tokens=long, lengths=np.array([5], np.int32), labels=LABELS),
        )
