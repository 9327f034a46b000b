"""Features, clusters and quantisers of docids against brute force and hand numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from docid_corpora import build, corpus_of, many_documents, texts_of
from hypothesis import given, settings
from hypothesis import strategies as st

from genret_jax.docids import clusters, features, quantisers, terms
from genret_jax.errors import UserError

# ---------------------------------------------------------------- features and clusters


@pytest.mark.parametrize(
    "texts", [[""], ["", ""], ["gas"], ["gas", "gas"], ["gas", "pipe seam", ""]]
)
def test_features_of_tiny_corpora(texts):
    vectors = features.tfidf_features(texts)
    assert vectors.dtype == np.float32
    assert 1 <= vectors.shape[1] <= max(len(texts), 1)
    norms = np.linalg.norm(vectors, axis=1)
    np.testing.assert_allclose(norms, [float(bool(text)) for text in texts], atol=1e-5)


def test_features_keep_the_cosines_of_tfidf():
    texts = [document.text for document in many_documents(40)]
    vectors = features.tfidf_features(texts, dimensions=128)
    counts = terms.count_terms(texts, stop_words=False)
    dense = np.zeros((40, len(counts.vocabulary)))
    owner = np.repeat(np.arange(40), np.diff(counts.offsets))
    dense[owner, counts.terms] = terms.tfidf_weights(counts)
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors @ vectors.T, dense @ dense.T, atol=1e-4)


def test_feature_options():
    texts = ["the gas pipe", "the pipe gas", "the seam"]
    plain = features.tfidf_features(texts)
    pairs = features.tfidf_features(texts, longest_ngram=2)
    assert plain[0] @ plain[1] == pytest.approx(1.0, abs=1e-5)  # word order does not count
    assert pairs[0] @ pairs[1] < 0.9
    bare = features.tfidf_features(texts, stop_words=True)
    assert bare[0] @ bare[2] == pytest.approx(0.0, abs=1e-5) != plain[0] @ plain[2]


def test_vectors_from_a_file(tmp_path):
    documents = many_documents(50)
    path = tmp_path / "vectors.npy"
    np.save(path, np.random.default_rng(0).normal(size=(50, 6)))
    table = build("hierarchical", documents, features=str(path), leaf=5, clusters=3)
    assert table.report()["unique_ids"] == 50
    assert features.document_features([""] * 50, features=str(path), dimensions=4).shape == (50, 4)
    for wrong in (np.zeros((49, 6)), np.zeros(50), np.full((50, 2), np.nan)):
        np.save(path, wrong)
        with pytest.raises(UserError, match=r"vectors\.npy holds"):
            build("pq", documents, features=str(path))
    with pytest.raises(UserError, match="cannot read vectors"):
        build("pq", documents, features=str(tmp_path / "missing.npy"))
    with pytest.raises(UserError, match="give 'tfidf'"):
        build("pq", documents, features="word2vec")


@given(st.integers(1, 120), st.integers(2, 5), st.integers(1, 6), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_paths_are_a_tree_with_small_leaves(documents, groups, leaf, distinct):
    rng = np.random.default_rng(documents)
    vectors = rng.normal(size=(distinct, 3)).astype(np.float32)[
        rng.integers(0, distinct, documents)
    ]
    paths = clusters.cluster_paths(vectors, clusters=groups, leaf=leaf)
    assert len(set(paths)) == documents
    for path in paths:
        inside = [other for other in paths if other[:-1] == path[:-1]]
        assert len(inside) <= leaf
        assert sorted(other[-1] for other in inside) == list(range(len(inside)))
        for level in range(len(path) - 1):
            siblings = {other[level] for other in paths if other[:level] == path[:level]}
            assert len(siblings) <= groups
            assert sum(other[:level] == path[:level] for other in paths) > leaf
    assert max(map(len, paths)) <= 3 + 2 * math.ceil(math.log(max(documents / leaf, 1), groups)) + (
        math.ceil(math.log(documents, groups))
    )


def test_documents_under_one_prefix_are_one_cluster():
    rng = np.random.default_rng(0)
    centres = np.array([[9, 0], [0, 9], [-9, -9]], np.float32)
    subject = rng.integers(0, 3, 60)
    vectors = (centres[subject] + rng.normal(size=(60, 2))).astype(np.float32)
    paths = clusters.cluster_paths(vectors, clusters=3, leaf=30)
    for one in range(60):
        for other in range(60):
            assert (paths[one][0] == paths[other][0]) == (subject[one] == subject[other])


def test_vectors_that_peel_off_do_not_make_endless_paths():
    vectors = (10.0 ** np.arange(-18, 18))[:, None].repeat(3, axis=0).astype(np.float32)
    paths = clusters.cluster_paths(vectors, clusters=2, leaf=1)
    assert max(map(len, paths)) <= 2 * 7 + 2 + 7 + 1


def test_levels_with_their_own_or_shared_tokens():
    documents = many_documents(60)
    own = build("hierarchical", documents, clusters=3, leaf=4)
    shared = build("hierarchical", documents, clusters=3, leaf=4, own_tokens=False)
    stripped = [" · ".join(p.split(":")[1] for p in t.split(" · ")) for t in texts_of(own)]
    assert stripped == texts_of(shared)
    assert shared.vocab_size == 2 + 4
    for row in own.tokens:
        labels = [own.labels[t] for t in row if t > 1]
        assert [int(label.split(":")[0]) for label in labels] == list(range(1, len(labels) + 1))


# ---------------------------------------------------------------- quantisers


@pytest.mark.parametrize("scheme", ["pq", "rq"])
def test_codes_are_the_nearest_centroids(scheme):
    vectors = np.random.default_rng(1).normal(size=(200, 10)).astype(np.float32)
    quantiser = quantisers.fit_quantiser(vectors, scheme, codebooks=3, codes=16)
    codes = quantiser.encode(vectors)
    assert codes.shape == (200, 3)
    assert codes.dtype == np.int32
    residual, start = vectors.astype(np.float64), 0
    for position, book in enumerate(quantiser.codebooks):
        part = residual
        if scheme == "pq":
            part = residual[:, start : start + book.shape[1]]
            start += book.shape[1]
        distance = ((part[:, None] - book) ** 2).sum(axis=2)
        np.testing.assert_array_equal(codes[:, position], distance.argmin(axis=1))
        if scheme == "rq":
            residual = residual - book[codes[:, position]]
    error = ((quantiser.decode(codes) - vectors) ** 2).sum()
    assert error < ((vectors - vectors.mean(axis=0)) ** 2).sum()
    if scheme == "rq":
        np.testing.assert_allclose(quantiser.decode(codes), vectors - residual, atol=1e-5)


def test_residual_codes_lose_less_with_every_codebook():
    vectors = np.random.default_rng(2).normal(size=(300, 8)).astype(np.float32)
    errors = []
    for codebooks in (1, 2, 4):
        quantiser = quantisers.fit_quantiser(vectors, "rq", codebooks=codebooks, codes=8)
        errors.append(((quantiser.decode(quantiser.encode(vectors)) - vectors) ** 2).sum())
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("kind", ["pq", "rq"])
def test_quantised_ids_have_one_length_and_position_tokens(kind):
    documents = [*many_documents(50), *corpus_of("w1 w2", "w1 w2", "w1 w2")]
    table = build(kind, documents, codebooks=3, codes=8)
    assert set(table.lengths.tolist()) == {4}
    for row in table.tokens:
        labels = [table.labels[token] for token in row]
        assert [label.split(":")[0] for label in labels[:3]] == ["1", "2", "3"]
    # Equal texts have equal codes and consecutive numbers.
    codes = {tuple(table.tokens[row, :3]) for row in (50, 51, 52)}
    numbers = [int(table.text(row).split(" · ")[3].strip("<#>")) for row in (50, 51, 52)]
    assert len(codes) == 1
    assert numbers == list(range(numbers[0], numbers[0] + 3))
    kept = build(kind, documents, codebooks=3, codes=8, collisions="keep")
    np.testing.assert_array_equal(kept.tokens, table.tokens[:, :3])
