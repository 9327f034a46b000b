"""The dual encoder: its loss and scores by hand, exact search, and a whole run."""

from __future__ import annotations

import json
import os
import signal

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAST, asked_questions, tiny_corpus

from genret_jax.baselines.protocol import Searcher
from genret_jax.cli import main
from genret_jax.data.contrastive import ContrastiveBatches
from genret_jax.dense import ExactSearch
from genret_jax.errors import UserError
from genret_jax.modeling.contrastive import JointWeights
from genret_jax.modeling.dense_model import DenseModel
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.model import RetrievalModel
from genret_jax.negatives import Negatives
from genret_jax.recipe import load_recipe
from genret_jax.retriever import Retriever
from genret_jax.searchers import fit_method, open_searcher
from genret_jax.splitting import split_corpus
from genret_jax.stages.dense import dense_materials
from genret_jax.training.interruption import Interrupted
from genret_jax.training.lexical_start import lexical_encoder, semantic_vectors
from genret_jax.vectors import DocumentVectors
from genret_jax.vocabularies import DocidSpace

pytestmark = pytest.mark.usefixtures("one_device", "quiet")

BINDINGS = (
    *FAST,
    "ContrastiveConfig.learning_rate = 1e-2",
    "ContrastiveConfig.refresh_every = 6",
    "ContrastiveConfig.queries = 64",  # views of both kinds
)
QUERY = "bread from an oven"


def _recipe(*more):
    return load_recipe("dense", bindings=[*BINDINGS, *more])


@pytest.fixture(scope="module")
def run(collection, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "dense"
    fit_method(collection, recipe=_recipe(), out=out)
    return out


@pytest.fixture(scope="module")
def fitted(run):
    return open_searcher(run)


# ---- the loss

CONFIG = T5Config(
    vocab_size=24,
    embed_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=16,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dropout_rate=0.0,
    embedding_scale=1.0,
)
MODEL = DenseModel(
    RetrievalModel(CONFIG, DocidSpace(20, 3), vector="encoder_mean"),
    JointWeights(0.0, 0.0, 1.0),
    temperature=0.5,
)
LOSS, VECTORS = jax.jit(MODEL.loss_fn), jax.jit(MODEL.model.vectors)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda rng: MODEL.init(rng)[0])(jax.random.key(0))


def _batch(rng, rows=4, negatives=2):
    def tokens(*shape):
        return rng.integers(2, 20, (*shape, 5)).astype(np.int32)

    document = np.arange(rows, dtype=np.int32)
    negative = rng.integers(rows, 12, (rows, negatives)).astype(np.int32)
    negative[0, 1] = -1  # padding
    negative[1, 0] = 11
    relevant = np.full((rows, 2), -1, np.int32)
    relevant[1, 0] = 11  # answers the second query, too
    relevant[2, 0] = 3  # the last row's document answers the third query
    return {
        "encoder_input_tokens": tokens(rows),
        "document_tokens": tokens(rows),
        "document_docids": np.full((rows, 1), 2, np.int32),
        "document_index": document,
        "document_row": document,
        "relevant_index": relevant,
        "negative_document_index": negative,
        "negative_document_row": negative,
        "negative_document_tokens": tokens(rows, negatives),
        "negative_document_docids": np.full((rows, negatives, 1), 2, np.int32),
    }


def _loss_by_hand(params, batch):
    """InfoNCE in a plain loop over rows and columns."""

    def unit(tokens):
        flat = tokens.reshape(-1, tokens.shape[-1])
        vectors = np.array(VECTORS(params, flat), np.float64)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    query, document = unit(batch["encoder_input_tokens"]), unit(batch["document_tokens"])
    rows, count = batch["negative_document_index"].shape
    hard = unit(batch["negative_document_tokens"]).reshape(rows, count, -1) if count else None
    costs = []
    for i in range(rows):
        known = {int(batch["document_index"][i]), *batch["relevant_index"][i].tolist()}
        columns = [document[j] for j in range(rows) if int(batch["document_index"][j]) not in known]
        for j in range(rows):
            for n in range(count):
                index = int(batch["negative_document_index"][j, n])
                if index >= 0 and index not in known:
                    columns.append(hard[j, n])
        positive = np.exp(query[i] @ document[i] / 0.5)
        others = sum(np.exp(query[i] @ column / 0.5) for column in columns)
        costs.append(-np.log(positive / (positive + others)))
    return np.mean(costs)


def test_the_loss_is_info_nce_over_what_may_count(params):
    rng = np.random.default_rng(0)
    for _ in range(3):
        batch = _batch(rng)
        loss, metrics = LOSS(params, batch)
        assert float(loss) == pytest.approx(_loss_by_hand(params, batch), rel=1e-5)
        assert 0 <= float(metrics["accuracy"]) <= 1


def test_what_may_not_count_does_not_change_the_loss(params):
    rng = np.random.default_rng(1)
    batch = _batch(rng)
    plain = float(LOSS(params, batch)[0])
    other = {**batch, "negative_document_tokens": batch["negative_document_tokens"].copy()}
    other["negative_document_tokens"][0, 1] = 7  # padding
    assert float(LOSS(params, other)[0]) == pytest.approx(plain, rel=1e-6)
    order = rng.permutation(4)
    turned = {name: array[order] for name, array in batch.items()}
    assert float(LOSS(params, turned)[0]) == pytest.approx(plain, rel=1e-5)
    other["negative_document_tokens"][2, 0] = 7
    assert float(LOSS(params, other)[0]) != pytest.approx(plain, rel=1e-4)


def test_without_hard_negatives_the_batch_is_enough(params):
    batch = _batch(np.random.default_rng(2))
    none = {n: a[:, :0] if n.startswith("negative") else a for n, a in batch.items()}
    loss = float(LOSS(params, none)[0])
    assert loss == pytest.approx(_loss_by_hand(params, none), rel=1e-5)


def test_a_step_down_the_gradient_lessens_the_loss_and_there_is_no_decoder(params):
    assert set(params) == {"token_embedder", "encoder"} == set(MODEL.parameter_axes())
    batch = _batch(np.random.default_rng(3))
    loss, gradient = jax.jit(jax.value_and_grad(lambda p: MODEL.loss_fn(p, batch)[0]))(params)
    lower = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient)
    assert float(LOSS(lower, batch)[0]) < float(loss)
    with pytest.raises(ValueError, match="encoder alone"):
        DenseModel(RetrievalModel(CONFIG, DocidSpace(20, 3)), JointWeights())


# ---- exact search


@st.composite
def stored(draw):
    """Vectors of small whole numbers, so that products are exact and ties happen."""
    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=6))
    pieces = [draw(st.integers(1, n)) for n in counts]
    begins = np.concatenate([[0], np.cumsum(counts)])
    bounds = np.stack([begins, begins + [*pieces, 0]], axis=1)
    bounds[-1] = begins[-1]
    numbers = st.integers(-3, 3)
    rows = [[draw(numbers) for _ in range(3)] for _ in range(begins[-1])]
    queries = draw(st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=3))
    vectors = DocumentVectors.of(np.array(rows, np.float32), bounds, store="float32")
    return vectors, np.array(queries, np.float32), draw(st.integers(1, 7))


def _check_nearest(exact, vectors, queries, k):
    begins = vectors.bounds[:, 0]
    for query, (documents, scores) in zip(queries, exact.nearest(queries, k), strict=True):
        expected = [
            max(float(query @ v) for v in vectors.values[begins[i] : begins[i + 1]])
            for i in range(len(vectors))
        ]
        found = dict(zip(documents.tolist(), scores.tolist(), strict=True))
        assert len(found) == len(documents) >= min(k, len(vectors))
        assert all(found[i] == expected[i] for i in found)
        assert sorted(found.values(), reverse=True)[:k] == sorted(expected, reverse=True)[:k]


@given(stored())
def test_exact_search_is_brute_force(case):
    vectors, queries, k = case
    _check_nearest(ExactSearch(vectors, faiss=False), vectors, queries, k)


@settings(max_examples=50)
@given(stored())
def test_blocks_and_kept_vectors_change_nothing(case):
    vectors, queries, _ = case
    with pytest.MonkeyPatch.context() as patch:
        plain = ExactSearch(vectors, faiss=False).scores(queries)
        patch.setattr("genret_jax.dense._BLOCK_BYTES", 24)
        patch.setattr("genret_jax.dense._IN_MEMORY_BYTES", 0)
        small = ExactSearch(vectors, faiss=False)
        assert (small.scores(queries) == plain).all()
        assert len(small._blocks) > 1 or len(vectors) == 1 or vectors.bounds[-1, 0] <= 2


@given(stored())
def test_faiss_finds_the_same(case):
    pytest.importorskip("faiss")
    vectors, queries, k = case
    _check_nearest(ExactSearch(vectors, faiss=True), vectors, queries, k)


def test_a_document_without_a_view_is_found_by_nobody():
    bounds = np.array([[0, 1], [1, 1], [1, 2], [2, 2]])
    vectors = DocumentVectors(np.eye(2, dtype=np.float32), bounds)
    exact = ExactSearch(vectors, faiss=False)
    assert exact.scores(np.ones((1, 2), np.float32)).tolist() == [[1.0, -np.inf, 1.0]]
    ((documents, _),) = exact.nearest(np.ones((1, 2), np.float32), 3)
    assert documents.tolist() == [0, 2]


# ---- the start


def test_it_begins_as_latent_semantic_analysis(tmp_path):
    corpus = tiny_corpus()
    recipe = _recipe("NetworkConfig.embed_dim = 64")
    split = split_corpus(corpus, recipe.data, seed=0)
    materials = dense_materials(corpus, split, recipe, tmp_path / "index")
    model, pieces = materials.model, materials.index.vocabulary.text_size
    params = jax.jit(lambda rng: DenseModel(model, JointWeights()).init(rng)[0])(jax.random.key(0))
    params = lexical_encoder(params, materials.examples, model.config, pieces)
    vectors, _ = semantic_vectors(materials.examples, pieces, rank=63, seed=0)
    texts = [document.text for document in corpus.documents]
    tokens = materials.index.vocabulary.encode_batch(texts, 32)
    found = np.asarray(jax.jit(model.vectors)(params, tokens))
    # The mean of the pieces' vectors, the common ones cut to length one, EOS among them as zero.
    lengths = np.linalg.norm(vectors, axis=1)
    full = np.percentile(lengths[lengths > 1e-9], 95)
    cut = vectors * (np.minimum(lengths / full, 1) / np.maximum(lengths, 1e-9))[:, None]
    expected = np.stack([cut[row[row > 0]].mean(0) for row in tokens]) * 64**0.5
    np.testing.assert_allclose(found[:, :63], expected, atol=1e-3)
    assert np.abs(found[:, 63]).max() == 0.0


# ---- a whole run


def test_the_folder_is_whole(run, fitted):
    names = {p.name for p in (run / "retriever").iterdir()}
    assert names == {
        "dense.json",
        "documents.jsonl",
        "documents.offsets.npy",
        "documents.order.npy",
        "ids.json",
        "metrics.json",
        "model.safetensors",
        "retriever.json",
        "spiece.model",
        "vectors.bounds.npy",
        "vectors.npy",
        "vectors.scales.npy",
        "vocabulary.json",
    }
    about = json.loads((run / "retriever" / "retriever.json").read_text())
    assert about["training"]["steps"] == 20 and set(about["dev"]) == {"hits@1", "hits@10", "mrr@10"}
    assert (run / "curves.png").stat().st_size > 1000
    assert fitted.name == "dense" and isinstance(fitted.searcher, Searcher)
    with pytest.raises(UserError, match="does not generate"):
        Retriever.load(run)


def test_a_score_is_the_cosine_with_the_nearest_view(fitted):
    searcher, corpus = fitted.searcher, tiny_corpus()
    encoder, model = searcher.encoder, searcher.encoder.model

    vectors = jax.jit(model.vectors)

    def vector(text, length):
        tokens = encoder.vocabulary.encode_batch([text], length)
        found = np.array(vectors(searcher.params, tokens), np.float64)[0]
        return found / np.linalg.norm(found)

    query = vector(QUERY, encoder.input_length)
    (hits,) = fitted.search([QUERY], k=8)
    assert len(hits) == 8 and [h.rank for h in hits] == list(range(1, 9))
    bounds = searcher.exact._vectors.bounds
    for hit in hits:
        position = corpus.index[hit.document]
        asked = [q for q, of in corpus.pairs("train") if of == position]
        best = max(float(query @ vector(text, 16)) for text in asked)
        pieces = searcher.exact._vectors.rows(np.arange(*bounds[position]))
        best = max(best, float((pieces @ query).max()))
        assert hit.score == pytest.approx(best, abs=0.02), "but for int8"
    assert fitted.search(QUERY, k=3) == hits[:3] and fitted.search([QUERY, " "], k=3)[1] == []


def test_negatives_are_retrieved_anew_and_never_relevant(run):
    folders = sorted((run / "training" / "negatives").iterdir(), key=lambda p: int(p.name))
    assert [p.name for p in folders] == ["0", "6", "12", "18"]
    tables = [Negatives.load(p).retrieved for p in folders]
    assert any((tables[0] != table).any() for table in tables[1:])
    relevant: dict[str, set[int]] = {}
    for query, position in tiny_corpus().pairs("train"):
        relevant.setdefault(query, set()).add(position)
    corpus, recipe = tiny_corpus(), _recipe()
    split = split_corpus(corpus, recipe.data, seed=recipe.train.seed)
    materials = dense_materials(corpus, split, recipe, run / "index")
    for begin, table in zip((0, 6, 12, 18), tables, strict=True):
        for row, known in zip(table.tolist(), relevant.values(), strict=False):
            assert not set(row) & known
        asked = asked_questions(materials, range(begin, min(begin + 6, 20)))
        assert np.flatnonzero(table[:, 0] >= 0).tolist() == asked, "all of them, and no others"


def test_an_interrupted_run_goes_on_to_the_same(run, collection, tmp_path, monkeypatch):
    plain = ContrastiveBatches.__getitem__

    def item(self, n):
        if n == 14:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, n)

    monkeypatch.setattr(ContrastiveBatches, "__getitem__", item)
    with pytest.raises(Interrupted):
        fit_method(collection, recipe=_recipe(), out=tmp_path / "run")
    monkeypatch.undo()
    assert not (tmp_path / "run" / "retriever").exists()
    again = fit_method(collection, recipe=_recipe(), out=tmp_path / "run")
    assert again.search([QUERY], k=8) == open_searcher(run).search([QUERY], k=8)


def test_the_command_line(run, collection, tmp_path, capsys):
    assert main(["search", str(run), QUERY, "-k", "2", "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    assert len(hits) == 2 and {"document", "title", "score"} <= set(hits[0])
    assert main(["evaluate", str(run), "--split", "test", "--baseline", "bm25", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["methods"]) == ["dense", "bm25"]
    start = ["fit", str(collection), "--method", "dense", "--out", str(tmp_path / "run")]
    for more, message in (
        (["--docids", "rq"], "DocidConfig.kind is 'rq', but must be 'none'"),
        (["--gin", "ContrastiveConfig.prefix = 0.5"], "ContrastiveConfig.prefix is 0.5"),
        (["--gin", "ContrastiveConfig.vector = 'decoder_first'"], "must be 'encoder_mean'"),
        (["--method", "dsi", "--docids", "none"], "unknown kind of docids 'none'"),
    ):
        assert main([*start, *more]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
