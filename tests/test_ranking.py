"""From rows of a beam to documents: ties, shared identifiers, several identifiers a document."""

from __future__ import annotations

import numpy as np
import pytest

from genret_jax.docids.table import DocidTable
from genret_jax.ranking import Ranker
from genret_jax.trie import build_trie

LABELS = ("<pad>", "</s>", "a", "b", "c", "d")


def _ranker(documents):
    table = DocidTable.from_sequences([[2], [3], [4], [5]], documents, LABELS, "test", {})
    return Ranker(
        model=None,  # type: ignore[arg-type]
        vocabulary=None,  # type: ignore[arg-type]
        trie=build_trie(table),
        document_id=lambda position: f"d{position}",
        input_length=8,
    )


def _ids(ranker, rows, scores, k):
    found = ranker._documents(np.array(rows), np.array(scores), k)
    return [(f"d{r.position}", r.score) for r in found]


def test_best_first_and_invalid_rows_end_the_list():
    ranker = _ranker([0, 1, 2, 3])
    rows, scores = [2, 0, -1, -1], [-1.0, -2.0, -np.inf, -np.inf]
    assert _ids(ranker, rows, scores, 10) == [("d2", -1.0), ("d0", -2.0)]
    assert _ids(ranker, rows, scores, 1) == [("d2", -1.0)]


def test_equal_scores_stand_in_descending_order_of_id_even_at_the_cut():
    ranker = _ranker([0, 1, 2, 3])
    rows, scores = [0, 1, 2, 3], [-1.0, -2.0, -2.0, -2.0]
    assert _ids(ranker, rows, scores, 2) == [("d0", -1.0), ("d3", -2.0)]


def test_a_document_with_several_identifiers_keeps_its_best():
    ranker = _ranker([0, 1, 0, 2])
    rows, scores = [0, 1, 2, 3], [-0.5, -1.0, -2.0, -3.0]
    assert _ids(ranker, rows, scores, 3) == [("d0", -0.5), ("d1", -1.0), ("d2", -3.0)]


def test_documents_of_one_identifier_share_its_score():
    table = DocidTable.from_sequences([[2], [2], [3]], [0, 1, 2], LABELS, "test", {})
    ranker = Ranker(
        model=None,  # type: ignore[arg-type]
        vocabulary=None,  # type: ignore[arg-type]
        trie=build_trie(table),
        document_id=lambda position: f"d{position}",
        input_length=8,
    )
    assert _ids(ranker, [0, 1], [-1.0, -2.0], 3) == [("d1", -1.0), ("d0", -1.0), ("d2", -2.0)]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_k_cuts_documents_not_identifiers(k):
    ranker = _ranker([0, 0, 0, 1])
    found = _ids(ranker, [0, 1, 2, 3], [-1.0, -1.5, -2.0, -3.0], k)
    assert [d for d, _ in found] == ["d0", "d1"][:k]
