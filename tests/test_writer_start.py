"""The start of a network that writes text, against its formula in numpy."""

# ruff: noqa: F811  (fixtures of another file)

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from test_lexical_start import SMALL, corpus, examples, table, vocabulary  # noqa: F401

from genret_jax.errors import UserError
from genret_jax.modeling.model import RetrievalModel
from genret_jax.training.writer_start import bigrams, lexical_writer
from genret_jax.vocabularies import DocidSpace

TARGET = 5


@pytest.fixture(scope="module")
def model(vocabulary):
    """32 dimensions: eight for neighbours, and more than enough for eight documents."""
    config = dataclasses.replace(SMALL, vocab_size=vocabulary.size, embed_dim=32, num_heads=3)
    return RetrievalModel(config, DocidSpace(2, vocabulary.text_size))


@pytest.fixture(scope="module")
def fresh(model):
    return jax.device_get(jax.jit(lambda key: model.init(key)[0])(jax.random.key(0)))


@pytest.fixture(scope="module")
def pairs(examples, vocabulary):
    """(inputs, targets): every query, behind a mark, with each window of its document's text."""
    inputs, targets = [], []
    for i, document in enumerate(examples.query_documents.tolist()):
        text, query = examples.bodies[document], examples.queries[i]
        for start in range(len(text) - TARGET + 1):
            row = [vocabulary.docids.start, *query, 1]
            inputs.append(row + [0] * (24 - len(row)))
            targets.append(text[start : start + TARGET])
    return np.array(inputs, np.int32), np.array(targets, np.int32)


@pytest.fixture(scope="module")
def started(fresh, model, examples, vocabulary, pairs):
    return lexical_writer(
        fresh,
        examples,
        model.config,
        vocabulary.text_size,
        inputs=pairs[0],
        targets=pairs[1],
    )


def cross_entropy(model, params, inputs, targets):
    batch = {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    }
    log_p = jax.nn.log_softmax(np.asarray(jax.jit(model.teacher_forced)(params, batch)))
    return -np.take_along_axis(np.asarray(log_p), targets[..., None], 2)[..., 0]


def test_it_begins_below_chance_and_below_what_is_common(started, model, vocabulary, pairs):
    """Every token's loss on average: of the first by the query, of later ones by neighbours."""
    nats = cross_entropy(model, started, *pairs)
    counts = np.bincount(pairs[1].ravel(), minlength=vocabulary.text_size)
    common = -(counts / counts.sum() * np.log(np.maximum(counts, 1) / counts.sum())).sum()
    assert common < np.log(vocabulary.text_size)
    assert nats.mean() < 0.8 * common
    assert nats[:, 1:].mean() < nats[:, 0].mean() < common


def test_the_query_is_heard(started, model, pairs):
    """Another document's query makes a text less likely."""
    inputs, targets = pairs
    right = cross_entropy(model, started, inputs, targets)
    wrong = cross_entropy(model, started, np.roll(inputs, len(inputs) // 2, 0), targets)
    assert right.mean() < wrong.mean() - 0.2


def test_the_weights_are_the_best(started, model, pairs):
    """Every other size of the output vectors, and so every other sureness, is a greater loss."""
    own = cross_entropy(model, started, *pairs).mean()
    for factor in (0.7, 1.4):
        other = jax.tree.map(np.array, started)
        other["decoder"]["logits_dense"]["kernel"] *= factor
        assert cross_entropy(model, other, *pairs).mean() > own


def test_neighbours_by_hand():
    """With rank to spare the product is log p(w | v) - log p(w), smoothed, where above 0."""
    targets = np.array([[2, 3, 0], [2, 4, 3], [2, 3, 4]])
    left, right, log_p = bigrams(targets, 5, rank=7, seed=0)
    assert left.shape == right.shape == (5, 7)
    # Frequencies 0, 0, 3, 3, 2 of 8, with half a count more each of 5.
    np.testing.assert_allclose(np.exp(log_p), np.array([0.5, 0.5, 3.5, 3.5, 2.5]) / 10.5)
    expected = np.zeros((5, 5))
    for first, second, count, all_of_first in (
        (0, 2, 3, 3),
        (2, 3, 2, 3),
        (2, 4, 1, 3),
        (3, 4, 1, 1),
        (4, 3, 1, 1),
    ):
        p = np.exp(log_p[second])
        expected[first, second] = max(0.0, np.log((count + 5 * p) / (all_of_first + 5) / p))
    np.testing.assert_allclose(left @ right.T, expected, atol=1e-6)


def test_what_is_given_stays_and_shared_embeddings_are_refused(
    fresh,
    started,
    model,
    examples,
    vocabulary,
    pairs,
):
    assert jax.tree.structure(started) == jax.tree.structure(fresh)
    for old, now in zip(*map(jax.tree.leaves, (fresh, started)), strict=True):
        assert now.shape == old.shape and now.dtype == old.dtype and np.isfinite(now).all()
    tied = dataclasses.replace(model.config, tied_embeddings=True)
    given = {"inputs": pairs[0], "targets": pairs[1]}
    with pytest.raises(UserError, match=r"NetworkConfig\.tied_embeddings to False"):
        lexical_writer(fresh, examples, tied, vocabulary.text_size, **given)
