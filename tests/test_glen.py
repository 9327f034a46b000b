"""GLEN: its loss by hand, states fed back, identifiers from argmax, ties, and a whole run."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAST, tiny_corpus

from genret_jax import cli
from genret_jax.baselines.protocol import Searcher
from genret_jax.cli import main
from genret_jax.comparison.methods import chosen_methods
from genret_jax.corpus import write_corpus
from genret_jax.docids.subwords import subword_docids
from genret_jax.errors import UserError
from genret_jax.glen import GlenRanker, Learned, descend
from genret_jax.modeling.glen import GlenModel, GlenWeights, KeywordModel, glen_loss, temperature
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.model import RetrievalModel
from genret_jax.modeling.network import T5
from genret_jax.recipe import load_recipe
from genret_jax.searchers import fit_method
from genret_jax.stages.glen import EpochBatches, Identifier, changed
from genret_jax.training.journal import read_records
from genret_jax.vocabularies import DocidSpace

pytestmark = pytest.mark.usefixtures("one_device")

STEPS, TOKENS, DOCID_SIZE = 3, 20, 8
LABELS = ("<pad>", "</s>", *"abcdef")
CONFIG = T5Config(
    vocab_size=TOKENS + DOCID_SIZE - 2,
    embed_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=16,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dropout_rate=0.0,
)


@pytest.fixture(scope="module")
def model():
    return GlenModel(RetrievalModel(CONFIG, DocidSpace(TOKENS, DOCID_SIZE)), STEPS)


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(lambda rng: model.init(rng)[0])(jax.random.key(0))


def _texts(rows, seed=0):
    tokens = np.random.default_rng(seed).integers(2, TOKENS, (rows, 6)).astype(np.int32)
    tokens[:, 4:] = 0
    tokens[::2, 4] = 5
    return tokens


# ---- docids of pieces


def test_the_heaviest_pieces_of_a_text_fill_its_identifier():
    texts = ["▁the ▁cat ▁cat s 7", "▁the ▁dog", "7 !", "▁the ▁cat s ▁the ▁the ▁emu"]
    table = subword_docids(texts, pieces=str.split, terms=3, tokens=5)
    rows = [table.text(row).split(" · ") for row in range(4)]
    assert rows[0] == ["▁cat", "s", "▁the"], "two of two, one of two, one of three texts"
    assert rows[1] == ["▁dog", "▁the", "▁dog"] and rows[2] == ["<none>"] * 3
    assert rows[3][0] == "▁the" or "▁emu" not in rows[3], "the sixth piece is cut off"
    assert table.tokens.shape == (4, 3) and table.tokens.min() >= 2, "no EOS"
    twins = ["▁a ▁b", "▁a ▁b", "▁c"]
    same = subword_docids(twins, pieces=str.split, terms=2, collisions="keep")
    assert (same.tokens[0] == same.tokens[1]).all() and same.tokens.shape == (3, 2)
    apart = subword_docids(twins, pieces=str.split, terms=2)
    assert len(np.unique(apart.tokens, axis=0)) == 3 and apart.tokens.shape == (3, 3)
    with pytest.raises(UserError, match="terms = 0"):
        subword_docids(texts, pieces=str.split, terms=0)


# ---- the loss


def _log_softmax(x):
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def _by_hand(query, positive, negatives, heat, usable, weights):
    """A plain loop in float64; `usable(row, other, number)`: number None for the other's own."""
    batch, steps, _ = query.shape

    def score(q, d):
        return np.mean([np.exp(_log_softmax(d[m] / heat)) @ q[m] for m in range(steps)])

    pairwise, pointwise, cosine = [], [], []
    for i in range(batch):
        others = [
            score(query[i], positive[j]) for j in range(batch) if j != i and usable(i, j, None)
        ]
        others += [
            score(query[i], negatives[j, n])
            for j in range(batch)
            for n in range(negatives.shape[1])
            if usable(i, j, n)
        ]
        pairwise.append(-_log_softmax(np.array([score(query[i], positive[i]), *others]))[0])
        tokens = positive[i].argmax(-1)
        pointwise += [-_log_softmax(query[i, m])[tokens[m]] for m in range(steps)]
        a = np.array([query[i, m, tokens[m]] for m in range(steps)])
        b = positive[i].max(-1)
        cosine.append(a @ b / np.sqrt((a @ a) * (b @ b)))
    return (
        weights[0] * np.mean(pairwise)
        + weights[1] * np.mean(pointwise)
        + weights[2] * (1 - np.mean(cosine))
    )


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from([1.0, 0.3, 1e-5]), st.integers(0, 2))
def test_the_loss_is_that_of_a_plain_loop(seed, heat, number):
    rng = np.random.default_rng(seed)
    query, positive = rng.normal(0, 2, (2, 3, 2, 5))
    negatives = rng.normal(0, 2, (3, number, 2, 5))
    own, in_batch = rng.random((3, number)) < 0.7, rng.random((3, 3)) < 0.7
    shared = rng.random((3, 3 * number)) < 0.7

    def usable(i, j, n):
        if n is None:
            return in_batch[i, j]
        return own[i, n] if i == j else shared[i, j * number + n]

    weights = (1.0, 0.5, 0.25)
    expected = _by_hand(query, positive, negatives, heat, usable, weights)
    out = glen_loss(
        *(jnp.asarray(x, jnp.float32) for x in (query, positive, negatives)),
        temperature=heat,
        weights=GlenWeights(*weights),
        negative_mask=jnp.asarray(own),
        in_batch_mask=jnp.asarray(in_batch),
        shared_mask=jnp.asarray(shared),
    )
    assert float(out.loss) == pytest.approx(expected, rel=2e-4, abs=1e-4)
    parts = out.parts
    total = parts["pairwise"] + 0.5 * parts["pointwise"] + 0.25 * (1 - parts["cosine"])
    assert float(total) == pytest.approx(float(out.loss), rel=1e-5)


def test_tokens_that_are_never_written_give_no_nan():
    rng = np.random.default_rng(1)
    logits = [rng.normal(size=shape) for shape in ((2, 3, 6), (2, 3, 6), (2, 1, 3, 6))]
    for x in logits:
        x[..., :2] = -np.inf
    plain = [jnp.asarray(x[..., 2:], jnp.float32) for x in logits]
    given_ = [jnp.asarray(x, jnp.float32) for x in logits]

    @jax.jit
    def loss(*arrays):
        return glen_loss(*arrays, temperature=0.5).loss

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))

    assert float(loss(*given_)) == pytest.approx(float(loss(*plain)), rel=1e-6)
    for whole, part in zip(gradient(*given_), gradient(*plain), strict=True):
        np.testing.assert_allclose(whole[..., 2:], part, atol=1e-6)
        assert (np.asarray(whole[..., :2]) == 0).all()


def test_distributions_grow_cold_by_the_epoch():
    found = temperature(jnp.array([0.0, 1.0, 2.5, 100.0]))
    np.testing.assert_allclose(found, [1.0, np.exp(-1), np.exp(-2.5), 1e-5], rtol=1e-5)
    document, query = jnp.array([[[2.0, 1.0, 0.0]]] * 2), jnp.array([[[3.0, 5.0, 7.0]]] * 2)
    out = glen_loss(query, document, document[:, :0, None], temperature=1e-5)
    assert np.isfinite(float(out.loss)) and float(out.parts["pairwise"]) == pytest.approx(np.log(2))

    class Numbers:
        def __getitem__(self, n):
            return {"document_index": np.arange(4)}

        def shapes(self):
            return [self[0]]

    dated = EpochBatches(Numbers(), steps=8)
    assert dated[12]["epoch"].tolist() == [1.5] * 4 and dated.shapes()[0]["epoch"].shape == (4,)


# ---- the model


def test_a_step_is_fed_with_the_state_before_it(model, params):
    tokens = _texts(2)
    states = np.asarray(jax.jit(model.states)(params, tokens))
    assert states.shape == (2, STEPS, 8)

    def whole(network, fed):
        encoded = network.encode(tokens)
        bias = jnp.where(tokens > 0, 0.0, -1e10)[:, None, None, :]
        return network.decoder(fed, encoded, bias, True)

    embedding = np.asarray(params["token_embedder"]["embedding"])
    fed = np.broadcast_to(embedding[0], (2, 1, 8))
    fed = np.concatenate([fed, states[:, :-1]], axis=1)
    apply = jax.jit(lambda fed: T5(CONFIG).apply({"params": params}, fed, method=whole))
    again = apply(fed)
    np.testing.assert_allclose(again, states, atol=1e-5)
    assert np.abs(states[:, 0] - states[:, 1]).max() > 1e-3


def test_the_first_phase_has_the_cross_entropy_of_states_fed_back(model, params):
    """What was written is not read: targets change the loss by their own log p alone."""
    rng = np.random.default_rng(5)
    queries = rng.integers(3, 20, (4, 6)).astype(np.int32)
    space = model.model.docids
    local = rng.integers(2, space.size, (4, model.steps))
    batch = {
        "encoder_input_tokens": queries,
        "decoder_input_tokens": rng.integers(2, 9, (4, model.steps)),
        "decoder_target_tokens": np.asarray(space.to_model(local)),
        "decoder_loss_weights": np.ones((4, model.steps), np.float32),
    }
    plain = dataclasses.replace(model, model=dataclasses.replace(model.model, label_smoothing=0.0))
    logits = plain.logits(params, plain.states(params, queries))
    log_p = np.asarray(jax.nn.log_softmax(logits))
    expected = -np.mean([log_p[i, m, local[i, m]] for i in range(4) for m in range(model.steps)])
    loss, parts = KeywordModel(plain).loss_fn(params, batch)
    assert float(loss) == pytest.approx(expected, rel=1e-5) and "cross_entropy" in parts


def test_the_models_loss_is_that_of_its_logits(model, params):
    rng = np.random.default_rng(3)
    index, negative = np.array([0, 1, 2, 0]), np.array([[3], [0], [-1], [1]])
    relevant = np.array([[-1], [3], [-1], [-1]])
    batch = {
        "encoder_input_tokens": _texts(4, 1),
        "document_tokens": _texts(4, 2),
        "negative_document_tokens": rng.integers(2, TOKENS, (4, 1, 6)),
        "document_index": index,
        "negative_document_index": negative,
        "relevant_index": relevant,
        "document_row": index,
        "negative_document_row": negative,
        "epoch": np.full(4, 0.5, np.float32),
    }
    loss, metrics = jax.jit(model.loss_fn)(params, batch)

    @jax.jit
    def logits(tokens):
        return model.logits(params, model.states(params, tokens))[..., 2:]

    names = ("encoder_input_tokens", "document_tokens")
    query, positive = (np.asarray(logits(batch[name]), np.float64) for name in names)
    negatives = np.asarray(logits(batch["negative_document_tokens"][:, 0]), np.float64)[:, None]

    def usable(i, j, n):
        column = index[j] if n is None else negative[j, n]
        return column >= 0 and column != index[i] and column not in relevant[i]

    expected = _by_hand(query, positive, negatives, np.exp(-0.5), usable, (1.0, 0.5, 0.25))
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert float(metrics["temperature"]) == pytest.approx(np.exp(-0.5), rel=1e-5)
    chunked = GlenModel(model.model, STEPS, chunk=3)
    assert float(jax.jit(chunked.loss_fn)(params, batch)[0]) == pytest.approx(float(loss), rel=1e-5)


def test_argmax_gives_a_valid_table(model, params):
    documents = _texts(70, 5)
    documents[9] = documents[3]
    learned = Identifier(model, documents, LABELS)(params, quiet=True)
    tokens, weights = (np.asarray(x) for x in jax.jit(model.identify)(params, documents))
    assert (learned.table.tokens == tokens).all() and tokens.min() >= 2
    assert learned.table.tokens.shape == (70, STEPS) and learned.table.labels == LABELS
    np.testing.assert_allclose(learned.weights, weights, atol=1e-5)
    assert (learned.table.tokens[9] == learned.table.tokens[3]).all()
    assert len(learned.trie.rows) == len(np.unique(tokens, axis=0)) < 70
    other = tokens.copy()
    other[:7, 0] = other[:7, 0] % 6 + 2  # another of 2 .. 7
    assert changed(other, tokens) == 0.1 and changed(tokens, tokens) == 0


def _ranker(model, documents):
    vocabulary = SimpleNamespace(encode_batch=lambda texts, length: _texts(len(texts), 8))
    return GlenRanker(model, vocabulary, 6, np.arange(documents)[::-1])


def test_search_is_the_best_sum_of_log_probabilities(model, params):
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, DOCID_SIZE, (40, STEPS))
    tokens[20:24] = tokens[0]
    learned = Learned.of(tokens, rng.normal(size=(40, STEPS)).astype(np.float32), LABELS)
    found = _ranker(model, 40).rank(params, learned, ["a", "b", "c"], k=40, beam=99)
    states = jax.jit(model.states)(params, _texts(3, 8))
    logits = np.asarray(jax.jit(model.logits)(params, states), np.float64)
    for query, (positions, scores) in zip(logits, found, strict=True):
        log_p = np.stack([_log_softmax(row[2:]) for row in query])
        sums = sum(log_p[m, tokens[:, m] - 2] for m in range(STEPS))
        assert sorted(positions.tolist()) == list(range(40))
        np.testing.assert_allclose(scores, sums[positions], atol=1e-4)
        assert (np.diff(scores) < 0).all(), "scores alone give the order"
        same = [p for p in positions.tolist() if (tokens[p] == tokens[0]).all()]
        at = query[np.arange(STEPS), tokens[0]]
        near = {
            p: at @ learned.weights[p] / np.linalg.norm(at) / np.linalg.norm(learned.weights[p])
            for p in same
        }
        assert len(same) >= 5 and same == sorted(same, key=lambda p: -near[p])


def test_what_is_equal_in_all_stands_by_its_id(model, params):
    learned = Learned.of(np.full((4, STEPS), 3), np.ones((4, STEPS), np.float32) * 2, LABELS)
    ((positions, scores),) = _ranker(model, 4).rank(params, learned, ["a"], k=3, beam=9)
    assert positions.tolist() == [3, 2, 1] and len(np.unique(scores)) == 3
    assert descend(np.array([2.0, 2.0, 2.0, 1.0])).tolist()[3] == 1.0


# ---- a whole run

BINDINGS = (
    *FAST,
    "TrainConfig.start = 'random'",
    "TrainConfig.steps = 10",
    "TrainConfig.evaluations = 1",
    "ContrastiveConfig.steps = 8",
    "ContrastiveConfig.evaluations = 1",
    "DocidConfig.settings = {'terms': 2, 'collisions': 'keep'}",
    "DataConfig.input_length = 8",  # programs of one length
    "ContrastiveConfig.document_length = 8",
    "ContrastiveConfig.source = 'bm25'",
    "ContrastiveConfig.learning_rate = 1e-2",
)


def test_a_run_from_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "log_to_stderr", lambda: None)
    write_corpus(tiny_corpus(), tmp_path / "data")
    recipe = load_recipe("glen", bindings=BINDINGS)
    fitted = fit_method(tmp_path / "data", recipe=recipe, out=tmp_path / "run")
    assert isinstance(fitted.searcher, Searcher) and fitted.name == "glen"
    about = json.loads((tmp_path / "run" / "retriever" / "retriever.json").read_text())
    assert about["training"]["steps"] == 18 and about["second_stage"]["steps"] == 8
    assert about["docids"]["kind"] == "subwords" and 0 < about["dev"]["distinct_docids"] <= 1
    records = read_records(tmp_path / "run" / "ranking" / "metrics.jsonl", up_to=99)
    last = [r for r in records if r["kind"] == "train"][-1]
    assert {"pairwise", "pointwise", "cosine", "temperature"} <= set(last)
    assert 0 < last["temperature"] < 1
    hits = fitted.search("bread from an oven", k=8)
    assert len({h.document for h in hits}) == 8 and hits[0].score > hits[-1].score
    assert fitted.search(["bread from an oven", " "], k=2) == [hits[:2], []]
    run = str(tmp_path / "run")
    assert main(["search", run, "bread from an oven", "-k", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["hits"]
    assert [hit["document"] for hit in found] == [hit.document for hit in hits[:2]]
    start = ["fit", str(tmp_path / "data"), "--method", "glen", "--out", str(tmp_path / "other")]
    for more, message in (
        (["--gin", "ContrastiveConfig.prefix = 0.5"], "ContrastiveConfig.prefix is 0.5"),
        (["--gin", "SearcherConfig.settings = {'pairwise': -1}"], "pairwise is -1"),
        (["--gin", "SearcherConfig.settings = {'heat': 1}"], "'heat'; leave it out"),
    ):
        assert main([*start, *more]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_tables_know_it_as_a_generative_method():
    found = {m.name: m for m in chosen_methods(["glen", "dense", "bm25", "nci"], load_recipe)}
    groups = {name: method.group for name, method in found.items()}
    assert groups == {
        "glen": "generative",
        "dense": "dense",
        "bm25": "lexical",
        "nci": "generative",
    }
    assert found["glen"].docids == "glen" and found["glen"].trained


def test_docids_of_several_lengths_are_refused(tmp_path):
    bindings = (*BINDINGS, "DocidConfig.kind = 'title'", "DocidConfig.settings = {}")
    with pytest.raises(UserError, match="needs docids of one length"):
        fit_method(tiny_corpus(), recipe=load_recipe("glen", bindings=bindings), out=tmp_path / "r")
