"""The documents' vectors on disk: three stores there and back, and what a broken folder says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from genret_jax.errors import UserError
from genret_jax.vectors import STORES, DocumentVectors

# Three documents: two pieces and two queries; a piece; a piece and a query.
BOUNDS = np.array([[0, 2], [4, 5], [5, 6], [7, 7]])


@pytest.fixture(scope="module")
def vectors():
    """Directions, one of them along an axis, and one vector of zeros."""
    found = np.random.default_rng(0).normal(size=(7, 12)).astype(np.float32)
    found[1] = np.eye(12)[3]
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    found[4] = 0.0
    return found


def _bound(vectors, store):
    """What rounding may change in every number."""
    if store == "bfloat16":
        return np.abs(vectors) * 2.0**-8
    return np.abs(vectors).max(1, keepdims=True) / 254 if store == "int8" else 0.0 * vectors


@pytest.mark.parametrize("store", STORES)
def test_saved_and_loaded_within_rounding(store, vectors, tmp_path):
    made = DocumentVectors.of(vectors, BOUNDS, store=store)
    made.save(tmp_path)
    found = DocumentVectors.load(tmp_path, documents=3)
    assert isinstance(found.values, np.memmap) and found.store == made.store == store
    assert len(found) == 3 and found.num_bytes == made.num_bytes
    rows = found.rows(np.arange(7))
    assert rows.dtype == np.float32 and (rows == made.rows(np.arange(7))).all()
    assert (np.abs(rows - vectors) <= _bound(vectors, store) * 1.0001).all()
    assert (rows[4] == 0).all(), "a vector of zeros is one"
    np.testing.assert_allclose(rows[1], vectors[1], rtol=1e-6)


def test_bytes_of_each_store(vectors):
    plain = {"float32": 7 * 12 * 4, "bfloat16": 7 * 12 * 2, "int8": 7 * 12 + 7 * 4}
    bounds = 4 * 2 * 8
    sizes = {s: DocumentVectors.of(vectors, BOUNDS, store=s).num_bytes for s in STORES}
    assert sizes == {s: bounds + n for s, n in plain.items()}


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("rows", [[], [3], [6, 0, 6]])
def test_any_rows_in_any_order(store, rows, vectors, tmp_path):
    DocumentVectors.of(vectors, BOUNDS, store=store).save(tmp_path)
    found = DocumentVectors.load(tmp_path, documents=3)
    some = found.rows(np.array(rows, np.int32))
    assert some.shape == (len(rows), 12) and some.dtype == np.float32
    assert (some == found.rows(np.arange(7))[rows]).all()


def test_int8_keeps_vectors_of_any_length():
    """Each has its own scale, so that a long one leaves the others their digits."""
    vectors = np.array([[1e-4, -5e-5], [1e4, 3e3]], np.float32)
    bounds = np.array([[0, 1], [1, 2], [2, 2]])
    found = DocumentVectors.of(vectors, bounds, store="int8").rows(np.arange(2))
    np.testing.assert_allclose(found, vectors, rtol=1.3e-2)


def test_an_unknown_store_is_an_error(vectors):
    with pytest.raises(ValueError, match="must be one of .*'int8'.* found 'int4'"):
        DocumentVectors.of(vectors, BOUNDS, store="int4")


def _cut(path):
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "vectors.npy").unlink(), "no whole document vectors here"),
        (lambda f: _cut(f / "vectors.npy"), "no whole document vectors here"),
        (lambda f: (f / "vectors.npy").write_bytes(b""), "no whole document vectors here"),
        (lambda f: (f / "vectors.npy").write_bytes(b"rubbish" * 9), "no whole document vectors"),
        (lambda f: (f / "vectors.scales.npy").unlink(), "no whole document vectors here"),
        (lambda f: _cut(f / "vectors.scales.npy"), "no whole document vectors here"),
        (lambda f: np.save(f / "vectors.npy", np.zeros((6, 12), np.int8)), "have 7 views"),
        (lambda f: np.save(f / "vectors.npy", np.zeros(7, np.float32)), "have 7 views"),
        (lambda f: np.save(f / "vectors.scales.npy", np.ones(3, np.float32)), "have 7 views"),
        (lambda f: (f / "vectors.bounds.npy").unlink(), "no whole document vectors here"),
        (lambda f: np.save(f / "vectors.bounds.npy", BOUNDS[:-1]), "has 3 documents"),
        (lambda f: np.save(f / "vectors.bounds.npy", BOUNDS / 1.0), "has 3 documents"),
        (lambda f: np.save(f / "vectors.bounds.npy", BOUNDS[::-1]), "damaged"),
        (lambda f: np.save(f / "vectors.npy", np.zeros((7, 12), np.complex64)), "complex64"),
    ],
)
def test_a_broken_folder_is_one_line(harm, message, vectors, tmp_path):
    DocumentVectors.of(vectors, BOUNDS, store="int8").save(tmp_path)
    harm(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        DocumentVectors.load(tmp_path, documents=3)
    text = str(caught.value)
    assert "\n" not in text and str(tmp_path) in text and "run `genret fit` again" in text


def test_saving_again_in_another_store_leaves_nothing_behind(vectors, tmp_path):
    for store in ("int8", "float32"):
        DocumentVectors.of(vectors, BOUNDS, store=store).save(tmp_path)
    found = DocumentVectors.load(tmp_path, documents=3)
    assert found.store == "float32" and (found.rows(np.arange(7)) == vectors).all()


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("positions", [[], [1], [2, 0, 1]])
def test_similarities_are_those_of_the_nearest_view(store, positions, vectors):
    found = DocumentVectors.of(vectors, BOUNDS, store=store)
    query = vectors[2] - 0.3 * vectors[6]
    text, asked = found.similarities(np.array(positions, np.int32), query)
    assert text.shape == asked.shape == (len(positions),)
    for i, position in enumerate(positions):
        begin, middle, end = *BOUNDS[position], BOUNDS[position + 1, 0]
        pieces = [float(found.rows(np.array([j]))[0] @ query) for j in range(begin, middle)]
        queries = [float(found.rows(np.array([j]))[0] @ query) for j in range(middle, end)]
        assert text[i] == pytest.approx(max(pieces), abs=1e-5)
        assert asked[i] == pytest.approx(max(queries or pieces), abs=1e-5)


@pytest.mark.parametrize("most", [0, 1 << 20])
@pytest.mark.parametrize("store", STORES)
def test_several_queries_at_once_are_as_each_by_itself(store, most, vectors, monkeypatch):
    monkeypatch.setattr("genret_jax.vectors._MOST_AT_ONCE", most)
    monkeypatch.setattr("genret_jax.vectors._QUERIES_AT_ONCE", 2)
    # The last document has no train query, and one between has none.
    for bounds in (BOUNDS, np.array([[0, 2], [3, 5], [5, 7], [7, 7]])):
        found = DocumentVectors.of(vectors, bounds, store=store)
        positions = [np.array(p, np.int32) for p in ([2, 0], [], [1], [0, 1, 2])]
        queries = [vectors[i] - 0.2 * vectors[i + 1] for i in range(4)]
        for (text, asked), one, query in zip(
            found.of_several(positions, queries), positions, queries, strict=True
        ):
            alone = found.similarities(one, query)
            np.testing.assert_allclose(text, alone[0], atol=1e-5)
            np.testing.assert_allclose(asked, alone[1], atol=1e-5)
    assert found.of_several([], []) == []


@pytest.mark.parametrize("most", [12, 30, 1 << 20])
@pytest.mark.parametrize("store", STORES)
def test_all_documents_in_blocks_are_as_each_by_itself(store, most, vectors, monkeypatch):
    monkeypatch.setattr("genret_jax.vectors._MOST_AT_ONCE", most)
    found = DocumentVectors.of(vectors, BOUNDS, store=store)
    queries = np.stack([vectors[i] - 0.2 * vectors[i + 1] for i in range(4)])
    text, asked = found.of_all(queries)
    assert text.shape == asked.shape == (4, 3)
    for i, query in enumerate(queries):
        alone = found.similarities(np.arange(3), query)
        np.testing.assert_allclose(text[i], alone[0], atol=1e-5)
        np.testing.assert_allclose(asked[i], alone[1], atol=1e-5)


def test_a_document_without_a_piece_is_an_error(vectors):
    found = DocumentVectors.of(vectors, np.array([[0, 3], [3, 3], [7, 7]]), store="float32")
    assert found.similarities(np.array([0]), vectors[0])[0].shape == (1,)
    with pytest.raises(ValueError, match="without a piece"):
        found.similarities(np.array([0, 1]), vectors[0])
    with pytest.raises(ValueError, match="without a piece"):
        found.of_several([np.array([0]), np.array([1])], [vectors[0]] * 2)


def test_documents_without_vectors_leave_the_others_theirs(vectors):
    """While parameters are compared, only documents that some beam reached have vectors."""
    bounds = np.array([[0, 0], [0, 2], [4, 4], [4, 5], [5, 5], [7, 7]])
    bounds[4] = [5, 7]
    found = DocumentVectors.of(vectors, np.vstack([bounds, [[7, 7]]]), store="float32")
    positions = [np.array([1, 3]), np.array([4]), np.array([4, 1])]
    for (text, asked), one, query in zip(
        found.of_several(positions, vectors[:3]), positions, vectors[:3], strict=True
    ):
        alone = found.similarities(one, query)
        np.testing.assert_allclose(text, alone[0], atol=1e-6)
        np.testing.assert_allclose(asked, alone[1], atol=1e-6)


def test_what_no_train_query_names_is_kept_beside_the_vectors(vectors, tmp_path):
    unseen = np.array([True, False, True])
    made = DocumentVectors.of(vectors, BOUNDS, store="int8")
    told = dataclasses.replace(made, unseen=unseen)
    told.save(tmp_path)
    found = DocumentVectors.load(tmp_path, documents=3)
    assert found.unseen.tolist() == unseen.tolist()
    assert found.num_bytes == told.num_bytes == made.num_bytes + 3
    for wrong in (unseen[:2], unseen.astype(np.int8)):
        np.save(tmp_path / "vectors.unseen.npy", wrong)
        with pytest.raises(UserError, match="vectors.unseen.npy: .* has 3 documents"):
            DocumentVectors.load(tmp_path, documents=3)


@pytest.mark.parametrize("store", STORES)
def test_vectors_put_together_from_parts_are_those_of_one_call(store, vectors):
    whole = DocumentVectors.of(vectors, BOUNDS, store=store)
    parts = [np.array([5, 0, 2]), np.array([1, 3, 4, 6])]
    made = DocumentVectors.of(vectors[:1], BOUNDS, store=store).empty(7)
    for rows in parts:
        made.put(rows, DocumentVectors.of(vectors[rows], BOUNDS, store=store))
    assert (made.rows(np.arange(7)) == whole.rows(np.arange(7))).all() and made.store == store
