"""From rows of a beam to documents: ties, shared identifiers, several identifiers, similarities."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from genret_jax import ranking
from genret_jax.docids.table import DocidTable
from genret_jax.documents import descending
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.model import RetrievalModel
from genret_jax.ranking import Ranker, batch_sizes, forget_programs, with_similarities
from genret_jax.scoring import Fusion
from genret_jax.stages.common import compile_search
from genret_jax.trie import build_trie
from genret_jax.vocabularies import DocidSpace

LABELS = ("<pad>", "</s>", "a", "b", "c", "d")
QUERY = np.array([1.0, 0.0], np.float32)


def _ranker(documents, sequences=((2,), (3,), (4,), (5,)), fusion=None):
    table = DocidTable.from_sequences(sequences, documents, LABELS, "test", {})
    return Ranker(
        model=None,  # type: ignore[arg-type]
        vocabulary=None,  # type: ignore[arg-type]
        trie=build_trie(table),
        order=descending([f"d{position}" for position in range(max(documents) + 1)]),
        input_length=8,
        fusion=fusion or Fusion(),
    )


def test_searches_that_differ_in_weights_and_tries_alone_share_their_programs():
    config = T5Config(vocab_size=32, embed_dim=8, num_heads=2, head_dim=4, mlp_dim=16)
    model = RetrievalModel(config, DocidSpace(20, 10))
    ranker = dataclasses.replace(_ranker([0, 1, 2, 3]), model=model)
    other = dataclasses.replace(_ranker([3, 1, 0, 2]), model=dataclasses.replace(model, r_drop=0.5))
    assert other._programs is ranker._programs
    for change in (
        {"config": dataclasses.replace(config, dtype="bfloat16")},
        {"config": dataclasses.replace(config, adaptor_rank=4)},
        {"docids": DocidSpace(21, 10)},
        {"vector": "encoder_mean"},
        {"normaliser": "children"},
    ):
        changed = dataclasses.replace(ranker, model=dataclasses.replace(model, **change))
        assert changed._programs is not ranker._programs, change
    forget_programs()
    assert dataclasses.replace(ranker)._programs is not ranker._programs


def test_batches_are_as_large_as_their_logits_allow(monkeypatch):
    monkeypatch.setattr(ranking, "_LOGIT_BYTES", 4 * 8 * 10 * 20)
    assert batch_sizes(10, 20) == (1, 8)
    assert batch_sizes(10, 21) == (1,) and batch_sizes(1000, 1000) == (1,), "one there must be"
    assert batch_sizes(1, 25) == (1, 8, 64)


def _reached(ranker, rows, scores):
    return ranker._reached(np.array(rows), np.array(scores, np.float32), QUERY)


def _ids(ranker, rows, scores, k):
    found = ranker._ranked(_reached(ranker, rows, scores), k, "generation")
    assert all(r.score == r.generation and r.semantic is r.fused is None for r in found)
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


def test_ids_are_ordered_as_text_whatever_the_positions():
    assert descending(["b", "d10", "d9", "a"]).tolist() == [2, 1, 0, 3]


def test_a_document_with_several_identifiers_keeps_its_best():
    ranker = _ranker([0, 1, 0, 2])
    rows, scores = [0, 1, 2, 3], [-0.5, -1.0, -2.0, -3.0]
    assert _ids(ranker, rows, scores, 3) == [("d0", -0.5), ("d1", -1.0), ("d2", -3.0)]
    found = _reached(ranker, rows, scores)
    assert found.positions.tolist() == [0, 1, 2] and found.rows.tolist() == [0, 1, 3]


def test_documents_of_one_identifier_share_its_score():
    ranker = _ranker([0, 1, 2], sequences=[[2], [2], [3]])
    assert _ids(ranker, [0, 1], [-1.0, -2.0], 3) == [("d1", -1.0), ("d0", -1.0), ("d2", -2.0)]


def test_an_identifier_of_several_documents_gives_only_the_allowed_ones():
    ranker = _ranker([0, 1, 2], sequences=[[2], [2], [3]])
    for allowed in ([True, False, True], [False, True, False], [False, False, False]):
        allowed = np.array(allowed)
        rows = np.flatnonzero(ranker.trie.rows_with(allowed))
        scores = np.arange(-1, -1 - len(rows), -1, dtype=np.float32)
        found = ranker._reached(rows, scores, QUERY, allowed)
        assert found.positions.tolist() == np.flatnonzero(allowed).tolist()
        assert len(found.rows) == len(found.generation) == allowed.sum()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_k_cuts_documents_not_identifiers(k):
    ranker = _ranker([0, 0, 0, 1])
    found = _ids(ranker, [0, 1, 2, 3], [-1.0, -1.5, -2.0, -3.0], k)
    assert [d for d, _ in found] == ["d0", "d1"][:k]


def test_lengths_are_those_of_the_row_reached():
    """The trie closes a docid that is another's beginning with an EOS, which counts."""
    ranker = _ranker([0, 1, 2], sequences=[[2, 3, 4], [2, 3], [5]])
    found = _reached(ranker, range(3), [-1.0, -2.0, -3.0])
    tokens = [[int(t) for t in row if t > 0] for row in ranker.trie.rows[found.rows]]
    assert found.lengths.tolist() == [len(t) for t in tokens] and len(set(map(len, tokens))) > 1
    assert found.lengths.dtype == found.positions.dtype == np.int32
    assert found.generation.dtype == np.float32


def test_nothing_reached_is_an_empty_ranking():
    ranker = _ranker([0, 1, 2, 3])
    assert _ids(ranker, [-1, -1], [-np.inf, -np.inf], 5) == []


VECTORS = np.array([[0.1, 0.9], [0.5, 0.0], [0.8, 0.2], [-0.4, 0.0]], np.float32)


@pytest.mark.parametrize(
    ("scoring", "order"),
    [("generation", "0123"), ("semantic", "2103"), ("fused", "1203")],
)
def test_each_scoring_orders_by_its_own_number(scoring, order):
    ranker = _ranker([0, 1, 2, 3], fusion=Fusion(alpha=0.0, weight=4.0))
    (found,) = with_similarities(
        [_reached(ranker, range(4), [-1.0, -1.5, -3.0, -4.0])],
        lambda positions, queries: [(VECTORS[positions[0]] @ queries[0],) * 2],
    )
    ranked = ranker._ranked(found, 4, scoring)
    assert "".join(str(r.position) for r in ranked) == order
    for r in ranked:
        assert r.semantic == pytest.approx(VECTORS[r.position, 0])
        assert r.fused == pytest.approx(r.generation + 4.0 * r.semantic)
        assert r.score == getattr(r, scoring)


def test_similarities_tie_by_id_too():
    ranker = _ranker([0, 1, 2, 3])
    (found,) = with_similarities(
        [_reached(ranker, range(4), [-1.0, -2.0, -3.0, -4.0])],
        lambda positions, queries: [(np.ones(len(positions[0]), np.float32),) * 2],
    )
    assert [r.position for r in ranker._ranked(found, 2, "semantic")] == [3, 2]


def test_a_scoring_without_vectors_is_an_error():
    ranker = _ranker([0, 1, 2, 3])
    with pytest.raises(ValueError, match="'semantic' needs document vectors"):
        ranker._ranked(_reached(ranker, [0], [-1.0]), 1, "semantic")


@pytest.mark.parametrize(
    ("count", "searched"), [(0, [0]), (5, [5]), (64, [0, 64]), (70, [6, 64]), (200, [8, 64])]
)
def test_a_search_is_compiled_by_a_batch_of_every_size(count, searched):
    """Few queries are searched for once."""
    sizes = []
    ranker = SimpleNamespace(candidates=lambda params, some, beam: sizes.append(len(some)))
    compile_search(ranker, {}, map(str, range(count)), beam=3)
    assert sorted(sizes) == searched
