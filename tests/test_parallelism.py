"""Meshes over eight simulated devices train as one device does, and who holds which rows."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

from genret_jax.configs import TrainConfig
from genret_jax.errors import UserError
from genret_jax.modeling.contrastive import JointWeights
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.model import RetrievalModel
from genret_jax.modeling.ranking_model import RankingModel
from genret_jax.training import partitioning
from genret_jax.training.trainer import Stepper
from genret_jax.vocabularies import DocidSpace

BATCH, LENGTH, DOCIDS, NEGATIVES, DOCUMENTS = 16, 8, 3, 2, 20
NETWORK = T5Config(
    vocab_size=128,
    embed_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=1,
    num_decoder_layers=1,
    embedding_scale=0.1,
    learned_temperature=True,
)
MODEL = RetrievalModel(NETWORK, DocidSpace(50, 12), label_smoothing=0.1)
STAGES = {
    "stage 1": MODEL,
    "stage 2": RankingModel(MODEL, JointWeights(1.0, 0.5, 0.7), prefix_negatives=1),
}


class Numbered:
    """Batches of random numbers that both stages can read."""

    def __getitem__(self, n):
        rng = np.random.default_rng(n)

        def text(*shape):
            return rng.integers(2, 50, (*shape, LENGTH)).astype(np.int32)

        def docid(*shape):
            return rng.integers(2, 12, (*shape, DOCIDS)).astype(np.int32)

        targets = docid(BATCH) + 48
        document = rng.integers(0, DOCUMENTS, BATCH).astype(np.int32)
        negative = rng.integers(-1, DOCUMENTS, (BATCH, NEGATIVES)).astype(np.int32)
        return {
            "encoder_input_tokens": text(BATCH),
            "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
            "decoder_target_tokens": targets,
            "decoder_loss_weights": np.ones((BATCH, DOCIDS), np.float32),
            "relevant_index": np.stack([document, (document + 3) % DOCUMENTS], 1),
            "document_index": document,
            "document_row": document // 2,
            "document_tokens": text(BATCH),
            "document_docids": docid(BATCH),
            "negative_document_index": negative,
            "negative_document_row": negative // 2,
            "negative_document_tokens": text(BATCH, NEGATIVES),
            "negative_document_docids": docid(BATCH, NEGATIVES),
        }

    def shapes(self):
        return [self[0]]


def _train(model, optimizer, mesh):
    """Losses of three steps, and the state after them."""
    stepper = Stepper(model, TrainConfig(batch_size=BATCH, optimizer=optimizer), mesh)
    state = stepper.init(jax.random.key(0))
    batches = Numbered()
    stepper.compile(state, batches)
    losses = []
    for n in range(3):
        state, metrics = stepper(state, batches[n], 1e-2)
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.fixture(scope="module")
def one_device():
    found = {}

    def run(name, optimizer):
        if (name, optimizer) not in found:
            mesh = partitioning.make_mesh(devices=jax.devices()[:1])
            losses, state = _train(STAGES[name], optimizer, mesh)
            found[name, optimizer] = losses, jax.device_get(state.params)
        return found[name, optimizer]

    return run


@pytest.mark.parametrize(
    ("name", "optimizer", "data"),
    [
        *((name, "adamw", data) for name in STAGES for data in (8, 4, 2)),
        ("stage 1", "adafactor", 2),
    ],
)
def test_eight_devices_train_as_one(name, optimizer, data, one_device):
    model_parallel = 8 // data
    mesh = partitioning.make_mesh(model_parallel=model_parallel)
    assert dict(mesh.shape) == {"data": data, "model": model_parallel}
    expected, params = one_device(name, optimizer)
    losses, state = _train(STAGES[name], optimizer, mesh)
    assert losses == pytest.approx(expected, abs=1e-5), "the same losses"
    assert max(losses) - min(losses) > 1e-3, "and they are different from step to step"
    kernel = state.params["decoder"]["layers_0"]["mlp"]["wi_0"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (16, 32 // model_parallel)
    moments = jax.tree.leaves(state.opt_state)
    assert any(not x.is_fully_replicated for x in moments) == (model_parallel > 1)
    got, wanted = (
        x["encoder"]["layers_0"]["mlp"]["wi_0"]["kernel"] for x in (state.params, params)
    )
    # Adam's first steps go by the sign of a gradient, and where that is about 0 rounding decides:
    # almost every number is the same.
    assert np.mean(np.abs(np.asarray(got) - wanted) > 1e-4) < 0.01


def test_indivisible_devices():
    with pytest.raises(UserError, match="3 devices do not divide"):
        partitioning.make_mesh(model_parallel=2, devices=jax.devices()[:3])


@pytest.mark.parametrize(
    ("owners", "shares"),
    [
        ([[0], [0], [1], [1]], {0: (0, 2), 1: (1, 2)}),
        ([[0], [1], [0], [1]], {0: (0, 2), 1: (1, 2)}),  # a mesh that follows the wires
        ([[0, 0], [1, 1]], {0: (0, 2), 1: (1, 2)}),
        ([[0, 1]], {0: (0, 1), 1: (0, 1)}),  # one copy over two processes: both read all rows
        ([[0, 1], [2, 3]], {0: (0, 2), 1: (0, 2), 2: (1, 2), 3: (1, 2)}),
        ([[1], [0]], {0: (1, 2), 1: (0, 2)}),
    ],
)
def test_who_holds_which_rows(owners, shares):
    owners = np.array(owners)
    assert {p: partitioning.share_of_rows(owners, p) for p in shares} == shares
    devices = np.vectorize(lambda p: types.SimpleNamespace(process_index=p))(owners)
    mesh = types.SimpleNamespace(devices=devices)
    assert {p: partitioning.share_of_batch(mesh, p) for p in shares} == shares


def test_rows_that_are_shared_in_part_are_refused():
    with pytest.raises(UserError, match="do not share a batch evenly"):
        partitioning.share_of_rows(np.array([[0, 0], [0, 1], [1, 1]]), 0)


def test_to_the_devices_and_back():
    mesh = partitioning.make_mesh(model_parallel=2)
    rng = np.random.default_rng(0)
    tree = {"a": rng.normal(size=(8, 4)), "b": rng.normal(size=6), "c": np.float32(3)}
    spread = jax.sharding.PartitionSpec
    shardings = {
        "a": jax.sharding.NamedSharding(mesh, spread("data", "model")),
        "b": jax.sharding.NamedSharding(mesh, spread("model")),
        "c": partitioning.replicated(mesh),
    }
    tree = {name: np.asarray(x, np.float32) for name, x in tree.items()}
    placed = partitioning.put(tree, shardings)
    assert placed["a"].sharding.shard_shape((8, 4)) == (2, 2)
    back = partitioning.on_host(placed)
    for name, array in tree.items():
        assert isinstance(back[name], np.ndarray) and (back[name] == array).all()
    assert partitioning.on_own_devices(placed) is placed, "one process has them all"
