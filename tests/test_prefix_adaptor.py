"""The prefix adaptor: by hand, one thing in training, scoring and cached search; and method nci."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from tiny import FAST, tiny_corpus

from genret_jax.docids.table import DocidTable
from genret_jax.errors import UserError
from genret_jax.export import export_retriever
from genret_jax.fit import fit
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.model import RetrievalModel
from genret_jax.recipe import load_recipe
from genret_jax.retriever import Retriever
from genret_jax.training import partitioning
from genret_jax.training.journal import read_records
from genret_jax.trie import build_trie
from genret_jax.vocabularies import DocidSpace

RANK, START, DOCIDS, BATCH = 3, 20, 10, 4
CONFIG = T5Config(
    vocab_size=32,
    embed_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=16,
    num_encoder_layers=1,
    num_decoder_layers=1,
    adaptor_rank=RANK,
)
MODEL = RetrievalModel(CONFIG, DocidSpace(START, DOCIDS))
PLAIN = dataclasses.replace(MODEL, config=dataclasses.replace(CONFIG, adaptor_rank=0))


@functools.cache
def params(fresh=False):
    made = jax.device_get(jax.jit(lambda rng: MODEL.init(rng)[0])(jax.random.key(1)))
    made = jax.tree.map(np.array, made)
    adaptor = made["decoder"]["prefix_adaptor"]
    if not fresh:
        adaptor["up"][:] = np.random.default_rng(2).normal(size=adaptor["up"].shape)
    return made


def queries():
    tokens = np.random.default_rng(3).integers(3, START, (BATCH, 5)).astype(np.int32)
    tokens[1, 3:] = 0
    return tokens


def logits_of(model, params, inputs):
    batch = {
        "encoder_input_tokens": queries(),
        "decoder_input_tokens": np.asarray(model.docids.to_model(inputs)),
    }
    return np.asarray(jax.jit(model.teacher_forced)(params, batch), np.float64)[..., 1:]


def test_the_output_matrix_depends_on_the_prefix_by_hand():
    inputs = np.array([[0, 2, 3, 5], [0, 3, 2, 5], [0, 4, 4, 4], [0, 9, 8, 7]], np.int32)
    tree = params()
    adaptor = {k: np.asarray(v, np.float64) for k, v in tree["decoder"]["prefix_adaptor"].items()}
    embedding = np.asarray(tree["token_embedder"]["embedding"], np.float64)
    kernel = np.asarray(tree["decoder"]["logits_dense"]["kernel"], np.float64)
    kernel = kernel[:, [1, *range(START, START + DOCIDS - 2)]]
    batch = {
        "encoder_input_tokens": queries(),
        "decoder_input_tokens": np.asarray(MODEL.docids.to_model(inputs)),
    }
    states = np.asarray(jax.jit(PLAIN.states)(tree, batch)[1], np.float64)
    expected = np.zeros((BATCH, 4, DOCIDS - 1))
    for row in range(BATCH):
        total = np.zeros(RANK)
        for t in range(4):
            token = batch["decoder_input_tokens"][row, t]
            total += (embedding[token] @ adaptor["gate"]) * adaptor["places"][t]
            lower = adaptor["down"] @ np.diag(np.tanh(total)) @ adaptor["up"]
            expected[row, t] = states[row, t] @ (np.eye(8) + lower) @ kernel
    found = logits_of(MODEL, tree, inputs)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - logits_of(PLAIN, tree, inputs)).max() > 0.1


def test_a_fresh_one_changes_nothing_and_learns():
    tree, inputs = params(fresh=True), np.array([[0, 2, 3]] * BATCH, np.int32)
    same = logits_of(MODEL, tree, inputs) - logits_of(PLAIN, tree, inputs)
    assert np.abs(same).max() < 1e-6
    targets = np.asarray(MODEL.docids.to_model(np.array([[2, 3, 1]] * BATCH, np.int32)))
    batch = {
        "encoder_input_tokens": queries(),
        "decoder_input_tokens": np.asarray(MODEL.docids.to_model(inputs)),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": np.ones(targets.shape, np.float32),
    }
    gradient = jax.jit(jax.grad(lambda p: MODEL.loss_fn(p, batch)[0]))(tree)
    assert np.abs(gradient["decoder"]["prefix_adaptor"]["up"]).max() > 1e-4


@pytest.mark.parametrize("length", [3, 6], ids=["steps", "tails"])
def test_cached_search_scores_what_teacher_forcing_scores(length):
    rng = np.random.default_rng(length)
    stems = [(a, b) for a in range(2, 6) for b in range(2, 5)]
    ids = [[*s, *rng.integers(2, DOCIDS, rng.integers(1, length - 1)).tolist()] for s in stems]
    labels = ["<pad>", "</s>", *(f"t{i}" for i in range(2, DOCIDS))]
    trie = build_trie(DocidTable.from_sequences(ids, range(len(ids)), labels, "test", {}))
    search = jax.jit(MODEL.search, static_argnames="beam")
    found = search(params(), queries(), trie.on_device(), beam=12)
    assert np.asarray(found.valid).all()
    score = jax.jit(MODEL.score)
    for place in range(12):
        rows = trie.rows[np.asarray(found.row[:, place])].astype(np.int32)
        expected = score(params(), queries(), rows)
        np.testing.assert_allclose(found.scores[:, place], expected, atol=1e-4)
    plain = jax.jit(PLAIN.search, static_argnames="beam")(
        params(), queries(), trie.on_device(), beam=12
    )
    assert np.abs(np.asarray(plain.scores) - np.asarray(found.scores)).max() > 0.01


def test_its_parameters_stand_beside_t5s():
    axes = MODEL.parameter_axes()
    assert set(axes["decoder"]) - set(PLAIN.parameter_axes()["decoder"]) == {"prefix_adaptor"}
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    shardings = partitioning.parameter_shardings(mesh, params(), axes)
    assert jax.tree.structure(shardings) == jax.tree.structure(params())


BINDINGS = (
    *FAST,
    "NetworkConfig.adaptor_rank = 4",
    "DocidConfig.settings = {'clusters': 3, 'leaf': 2}",
    "TrainConfig.start = 'lexical'",
    "TrainConfig.steps = 12",
    "TrainConfig.evaluations = 1",
)


def test_method_nci_from_end_to_end(tmp_path, monkeypatch):
    one = functools.partial(partitioning.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(partitioning, "make_mesh", one)
    retriever = fit(tiny_corpus(), recipe=load_recipe("nci", bindings=BINDINGS), out=tmp_path / "r")
    about = json.loads((tmp_path / "r" / "retriever" / "retriever.json").read_text())
    assert about["network"]["adaptor_rank"] == 4 and about["docids"]["kind"] == "hierarchical"
    records = read_records(tmp_path / "r" / "training" / "metrics.jsonl", up_to=99)
    assert [r for r in records if r["kind"] == "train"][-1]["r_drop"] > 0
    up = retriever.params["decoder"]["prefix_adaptor"]["up"]
    hits = Retriever.load(tmp_path / "r").search("bread from an oven", k=8)
    assert len(hits) == 8 and (about["training"]["best_step"] == 0 or np.abs(up).max() > 0)
    with pytest.raises(UserError, match="has a prefix adaptor"):
        export_retriever(retriever, tmp_path / "exported")
