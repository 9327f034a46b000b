"""Parameters that match words before the first step, against latent semantic analysis in numpy."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from tiny import tiny_corpus

from genret_jax.data.examples import make_examples
from genret_jax.docids.build import build_docids
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.model import RetrievalModel
from genret_jax.training.lexical_start import lexical_start, semantic_vectors
from genret_jax.vocabularies import Vocabulary, train_text_model

# 15 dimensions for eight documents: the analysis loses nothing.
SMALL = T5Config(
    vocab_size=0,
    embed_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
RANK = 15
LENGTH = 64


@pytest.fixture(scope="module")
def corpus():
    return tiny_corpus()


def _vocabulary(corpus, table):
    texts = [d.whole for d in corpus.documents] + [query for query, _ in corpus.pairs("train")]
    return Vocabulary(train_text_model(texts, size=300), table.vocab_size)


@pytest.fixture(scope="module")
def table(corpus):
    return build_docids("atomic", corpus.documents)


@pytest.fixture(scope="module")
def vocabulary(corpus, table):
    return _vocabulary(corpus, table)


@pytest.fixture(scope="module")
def examples(corpus, vocabulary, table):
    return make_examples(corpus.documents, corpus.pairs("train"), vocabulary, table)


@pytest.fixture(scope="module")
def queries(corpus, vocabulary):
    """Dev and test queries, none of which the analysis has seen, then the documents themselves."""
    texts = [*corpus.split_queries("dev").values(), *corpus.split_queries("test").values()]
    return vocabulary.encode_batch([*texts, *(d.whole for d in corpus.documents)], LENGTH)


def _model(vocabulary, **changes):
    config = dataclasses.replace(SMALL, vocab_size=vocabulary.size, **changes)
    return RetrievalModel(config, vocabulary.docids)


def _fresh(model):
    return jax.device_get(jax.jit(lambda key: model.init(key)[0])(jax.random.key(0)))


def _started(model, examples, seed=0):
    return lexical_start(_fresh(model), examples, model.config, model.docids, seed=seed)


def _logits(model, params, examples, tokens):
    """float[queries, documents]: of the first token of each document's docid, without anything."""
    batch = {
        "encoder_input_tokens": tokens,
        "decoder_input_tokens": np.zeros((len(tokens), 1), np.int32),
    }
    logits = np.asarray(jax.jit(model.teacher_forced)(params, batch))[:, 0]
    first = model.docids.to_local(examples.docids[examples.document_rows, 0])
    return logits[:, first]


@pytest.fixture(scope="module")
def started(vocabulary, examples, queries):
    """Model, parameters at the start, and their logits."""
    model = _model(vocabulary)
    params = _started(model, examples)
    return model, params, _logits(model, params, examples, queries)


def _analysis(examples, docids, tokens):
    """float64[queries, documents]: the sum of the pieces' vectors, none too long, by documents'."""
    pieces, documents = semantic_vectors(examples, docids.start, rank=RANK, seed=0)
    pieces = pieces.astype(np.float64)
    lengths = np.linalg.norm(pieces, axis=1)
    longest = np.percentile(lengths[lengths > 1e-9], 95)
    pieces *= np.minimum(longest / np.where(lengths > 0, lengths, 1.0), 1.0)[:, None]
    found = np.zeros((len(tokens), len(documents)))
    for row, query in zip(found, tokens.tolist(), strict=True):
        row += sum(pieces[t] for t in query if t > 0) @ documents.T
    return found


def _directions(scores):
    """Every row scaled to length one: the network's norms keep the order, not the size."""
    return scores / np.linalg.norm(scores, axis=1, keepdims=True)


def test_the_first_logits_are_the_analysis(started, vocabulary, examples, queries):
    _, _, logits = started
    expected = _analysis(examples, vocabulary.docids, queries)
    np.testing.assert_allclose(_directions(logits), _directions(expected), atol=1e-4)
    assert (np.diff(np.sort(expected, axis=1)[:, -2:]) > 1e-3).mean() > 0.8, "few ties at the top"


def test_the_next_token_is_chosen_by_the_same_words(started, queries):
    """Whatever was written first: its embedding is faint."""
    model, params, _ = started
    writable = np.arange(2, model.docids.size)
    inputs = np.zeros((len(queries), 2), np.int32)
    inputs[:, 1] = model.docids.to_model(np.resize(writable, len(queries)))
    batch = {"encoder_input_tokens": queries, "decoder_input_tokens": inputs}
    logits = np.asarray(jax.jit(model.teacher_forced)(params, batch))[..., writable]
    first, second = (_directions(logits[:, place]) for place in (0, 1))
    assert ((first * second).sum(-1) > 0.98).all()


def test_every_documents_own_words_find_it(started, corpus):
    _, _, logits = started
    own = logits[-len(corpus.documents) :]
    assert own.argmax(1).tolist() == list(range(len(corpus.documents)))


def test_unseen_queries_find_their_documents(started, corpus):
    """Each holds a word of its document; a fresh network would find one in eight."""
    _, _, logits = started
    found = logits[:8].argmax(1) == np.arange(8), logits[8:16].argmax(1) == np.arange(8)
    assert np.mean(found) > 0.6


@pytest.mark.parametrize(
    "changes",
    [
        {"tied_embeddings": True},
        {"num_decoder_layers": 2, "num_encoder_layers": 2},
    ],
)
def test_other_networks_begin_with_the_same_logits(changes, started, vocabulary, examples, queries):
    model = _model(vocabulary, **changes)
    logits = _logits(model, _started(model, examples), examples, queries)
    np.testing.assert_allclose(_directions(logits), _directions(started[2]), atol=1e-4)


def test_the_rotation_changes_parameters_and_no_logit(started, examples, queries):
    model, params, logits = started
    again, other = _started(model, examples), _started(model, examples, seed=1)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), params, again)
    assert all(jax.tree.leaves(same)), "a seed decides"
    name = "encoder_decoder_attention"
    value = [p["decoder"]["layers_0"][name]["value"]["kernel"] for p in (params, other)]
    assert not np.allclose(*value)
    np.testing.assert_allclose(_logits(model, other, examples, queries), logits, atol=1e-3)


def test_shapes_and_types_stay_and_what_was_given_is_not_written_to(vocabulary, examples):
    model = _model(vocabulary, num_decoder_layers=2)
    fresh = _fresh(model)
    kept = jax.tree.map(np.array, fresh)
    params = lexical_start(fresh, examples, model.config, model.docids)
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    for old, now, before in zip(*map(jax.tree.leaves, (fresh, params, kept)), strict=True):
        assert now.shape == old.shape and now.dtype == old.dtype == np.float32
        assert np.isfinite(now).all() and (old == before).all()


def test_it_begins_below_the_loss_of_chance_and_passes_gradients(started, vocabulary, examples):
    model, params, _ = started
    pairs = len(examples.queries)
    tokens = np.zeros((pairs, LENGTH), np.int32)
    for i in range(pairs):
        query = examples.queries[i]
        tokens[i, : len(query) + 1] = [*query, 1]
    targets = examples.docids[examples.query_rows]
    batch = {
        "encoder_input_tokens": tokens,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.float32),
    }
    (loss, _), gradient = jax.jit(jax.value_and_grad(model.loss_fn, has_aux=True))(params, batch)
    assert loss < 0.9 * np.log(8)
    layer = gradient["encoder"]["layers_0"]
    for kernel in (layer["mlp"]["wo"]["kernel"], layer["attention"]["out"]["kernel"]):
        assert np.abs(kernel).max() > 1e-6, "what is silent at the start is not dead"


def test_a_network_too_small_for_the_analysis_keeps_the_best_of_it(vocabulary, examples, queries):
    model = _model(vocabulary, embed_dim=5, num_heads=1, head_dim=4)
    logits = _logits(model, _started(model, examples), examples, queries)
    assert np.isfinite(logits).all()
    assert (logits[-8:].argmax(1) == np.arange(8)).mean() >= 0.375


def test_documents_without_words_have_no_direction(corpus, table):
    documents = [dataclasses.replace(d, title="", text="") for d in corpus.documents[:2]]
    documents += corpus.documents[2:]
    vocabulary = _vocabulary(corpus, table)
    examples = make_examples(documents, [], vocabulary, table)
    pieces, vectors = semantic_vectors(examples, vocabulary.docids.start, rank=RANK, seed=0)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [0, 0, 1, 1, 1, 1, 1, 1], atol=1e-5)
    assert np.isfinite(pieces).all()


def test_with_rank_to_spare_pieces_and_documents_meet_where_they_did(examples, vocabulary):
    """A piece's vector by a document's is above zero where the document or its queries hold it."""
    pieces, documents = semantic_vectors(examples, vocabulary.docids.start, rank=RANK, seed=0)
    assert pieces.shape == (vocabulary.text_size, RANK) and pieces.dtype == np.float32
    held = np.zeros((vocabulary.text_size, 8), bool)
    for i in range(8):
        held[examples.titles[i], i] = held[examples.bodies[i], i] = True
    for i, document in enumerate(examples.query_documents.tolist()):
        held[examples.queries[i], document] = True
    product = pieces @ documents.T
    assert (product[held] > 1e-3).all() and np.abs(product[~held]).max() < 1e-4
