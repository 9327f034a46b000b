"""What is measured of the speed: FLOPs against hand counts, tokens, utilisation, traces."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genret_jax.cli import main
from genret_jax.configs import TrainConfig
from genret_jax.data.batches import Batches, Pool
from genret_jax.modeling.contrastive import JointWeights
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.model import RetrievalModel
from genret_jax.modeling.ranking_model import RankingModel
from genret_jax.training import partitioning
from genret_jax.training.journal import read_records
from genret_jax.training.profiling import (
    Measuring,
    device_memory,
    global_shapes,
    peak_of,
    product_flops,
    tokens_of,
    training_flops,
)
from genret_jax.training.trainer import train
from genret_jax.vocabularies import DocidSpace

EMBED, HEADS, HEAD, MLP, ENCODER, DECODER, DOCID_TOKENS = 16, 2, 8, 32, 2, 1, 12
MODEL = RetrievalModel(
    T5Config(
        vocab_size=128,
        embed_dim=EMBED,
        num_heads=HEADS,
        head_dim=HEAD,
        mlp_dim=MLP,
        num_encoder_layers=ENCODER,
        num_decoder_layers=DECODER,
    ),
    DocidSpace(50, DOCID_TOKENS),
)
CONFIG = TrainConfig(steps=12, batch_size=8, warmup_steps=2, evaluations=1, log_every=4)


def _flops(function, *arguments):
    return product_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_products_by_hand():
    a, b = jnp.ones((3, 5)), jnp.ones((5, 7))
    once = 2 * 3 * 5 * 7
    assert _flops(jnp.dot, a, b) == once
    assert _flops(lambda a, b: a @ b + a.sum(), a, b) == once, "products alone"
    assert _flops(jax.jit(jnp.dot), a, b) == once
    assert _flops(lambda x, y: jnp.einsum("bij,bkj->bik", x, y), a[None] + 0, b.T[None] + 0) == once
    batched = _flops(lambda x: jnp.einsum("bij,bkj->bik", x, x), jnp.ones((4, 3, 5)))
    assert batched == 4 * 2 * 3 * 5 * 3
    assert _flops(jax.checkpoint(jnp.dot), a, b) == once, "what is computed again does not count"

    def loop(a, b):
        return jax.lax.scan(lambda carry, _: (carry @ b @ b.T, None), a, length=6)[0]

    assert _flops(loop, a, b) == 6 * 2 * once
    assert _flops(lambda a, b: jax.lax.cond(a[0, 0] > 0, jnp.dot, _nothing, a, b), a, b) == once

    @jax.custom_vjp
    def own(a, b):
        return a @ b

    own.defvjp(lambda a, b: (own(a, b), (a, b)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    assert _flops(own, a, b) == once


def _nothing(a, b):
    return jnp.zeros((a.shape[0], b.shape[1]))


def _shapes(batch, length, docid, views=0, view=6):
    def tokens(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    found = {
        "encoder_input_tokens": tokens(batch, length),
        "decoder_input_tokens": tokens(batch, docid),
        "decoder_target_tokens": tokens(batch, docid),
        "decoder_loss_weights": jax.ShapeDtypeStruct((batch, docid), jnp.float32),
    }
    if views:
        found |= {
            "document_tokens": tokens(batch, view),
            "document_docids": tokens(batch, docid),
            "document_index": tokens(batch),
            "document_row": tokens(batch),
            "relevant_index": tokens(batch, 1),
            "negative_document_tokens": tokens(batch, views - 1, view),
            "negative_document_docids": tokens(batch, views - 1, docid),
            "negative_document_index": tokens(batch, views - 1),
            "negative_document_row": tokens(batch, views - 1),
        }
    return found


def _network(batch, length, written):
    """FLOPs of one forward pass: projections, attention and MLP, written out."""
    joined = HEADS * HEAD

    def attention(queries, keys):
        project = 2 * EMBED * joined * (2 * queries + 2 * keys)
        return batch * (project + 2 * 2 * queries * keys * joined)

    def mlp(positions, matrices):
        return batch * positions * matrices * 2 * EMBED * MLP

    gated = 3 if "wi_1" in MODEL.init(jax.random.key(0))[0]["encoder"]["layers_0"]["mlp"] else 2
    encoder = attention(length, length) + mlp(length, gated)
    decoder = attention(written, written) + attention(written, length) + mlp(written, gated)
    return ENCODER * encoder + DECODER * decoder


@pytest.fixture(scope="module")
def params():
    return jax.eval_shape(lambda rng: MODEL.init(rng)[0], jax.random.key(0))


@pytest.mark.parametrize(("batch", "length", "docid"), [(4, 8, 3), (2, 12, 1)])
def test_a_step_of_stage_1_by_hand(batch, length, docid, params):
    logits = batch * docid * 2 * EMBED * DOCID_TOKENS
    forward = _network(batch, length, docid) + logits
    assert training_flops(MODEL.loss_fn, params, _shapes(batch, length, docid)) == 3 * forward


@pytest.mark.parametrize("chunk", [0, 4])
def test_a_step_of_stage_2_by_hand(chunk, params):
    batch, length, docid, views, view = 4, 8, 3, 3, 6
    stage_2 = RankingModel(MODEL, JointWeights(1.0, 0.0, 1.0), chunk=chunk)
    shapes = _shapes(batch, length, docid, views, view)
    forward = _network(batch, length, docid) + batch * docid * 2 * EMBED * DOCID_TOKENS
    documents = _network(batch * views, view, 1)  # one decoder step, for the first state
    found = training_flops(stage_2.loss_fn, params, shapes) / 3
    similarities = 2 * EMBED * batch * batch * views  # of queries with all documents, about
    assert forward + documents <= found <= forward + documents + 2 * similarities


def test_xla_counts_no_less(params):
    """XLA counts what is not a product, too."""
    shapes = _shapes(4, 8, 3)
    loss = functools.partial(jax.jit(MODEL.loss_fn).lower, params, shapes)
    counted = loss().compile().cost_analysis()["flops"]
    assert 0.5 * counted < training_flops(MODEL.loss_fn, params, shapes) / 3 < counted


def test_kinds_of_devices():
    assert peak_of("TPU v5 lite") == 197e12 and peak_of("TPU v5") == peak_of("TPU v5p") == 459e12
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12 and peak_of("NVIDIA H100 PCIe") == 756e12
    assert peak_of("cpu") is None and Measuring().peak is None
    assert Measuring(peak_flops=1e9).peak == 1e9


def test_shapes_of_the_global_batch():
    """Of two processes' share; what is beside the examples has rows of its own."""
    share = {"encoder_input_tokens": np.zeros((4, 7), np.int32), "ranked": np.zeros((2, 3))}
    found = global_shapes(share, 8)
    assert {name: one.shape for name, one in found.items()} == {
        "encoder_input_tokens": (8, 7),
        "ranked": (4, 3),
    }


def test_tokens_without_padding():
    batch = {
        "encoder_input_tokens": np.array([[3, 1, 0], [4, 5, 1]]),
        "decoder_input_tokens": np.array([[0, 9], [0, 9]]),
        "decoder_target_tokens": np.array([[9, 1], [1, 0]]),
        "negative_document_tokens": np.array([[[2, 1]], [[0, 0]]]),
    }
    assert int(tokens_of(batch)) == 5 + 3 + 2


def test_memory_where_devices_tell(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    def of(*stats):
        monkeypatch.setattr(jax, "local_devices", lambda: [Device(s) for s in stats])
        return device_memory()

    full = {"bytes_in_use": 5, "peak_bytes_in_use": 9}
    assert of(full, {"bytes_in_use": 7, "peak_bytes_in_use": 8}) == {
        "device_bytes": 7.0,
        "device_bytes_peak": 9.0,
    }
    assert of(None) == {} and of({"bytes_in_use": 5}) == {"device_bytes": 5.0}


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(0)
    inputs = rng.integers(2, 50, (40, 8)).astype(np.int32)
    targets = rng.integers(50, 60, (40, 3)).astype(np.int32)
    arrays = {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": np.ones((40, 3), np.float32),
    }
    return Batches([Pool(arrays, 1.0)], batch_size=8, seed=0, buckets=(8,))


def test_a_run_writes_down_its_speed(batches, tmp_path, params):
    mesh = partitioning.make_mesh(devices=jax.devices()[:2])
    measuring = Measuring(tmp_path / "profile", peak_flops=1e9)
    train(
        MODEL,
        batches,
        config=CONFIG,
        folder=tmp_path / "training",
        mesh=mesh,
        measuring=measuring,
    )
    lines = read_records(tmp_path / "training" / "metrics.jsonl", up_to=99)
    assert len(lines) == 3
    flops = training_flops(MODEL.loss_fn, params, _shapes(8, 8, 3))
    for line in lines:
        assert line["tokens_per_second"] * line["step_seconds"] == pytest.approx(8 * (8 + 3))
        assert line["examples_per_second"] * line["step_seconds"] == pytest.approx(8)
        expected = flops / line["step_seconds"] / (2 * 1e9)
        assert line["flop_utilisation"] == pytest.approx(expected)
        assert "tokens" not in line and "device_bytes" not in line, "a CPU does not tell"
    traces = list((tmp_path / "profile" / "training").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 1000
    content = traces[0].read_bytes()
    assert b"train" in content and b"step_num" in content, "steps are marked"


def test_without_a_peak_there_is_no_utilisation_and_no_trace(batches, tmp_path, caplog):
    mesh = partitioning.make_mesh(devices=jax.devices()[:2])
    config = dataclasses.replace(CONFIG, steps=2)
    measuring = Measuring(tmp_path / "profile")
    train(MODEL, batches, config=config, folder=tmp_path / "a", mesh=mesh, measuring=measuring)
    (line,) = read_records(tmp_path / "a" / "metrics.jsonl", up_to=99)
    assert "flop_utilisation" not in line and line["tokens_per_second"] > 0
    assert not (tmp_path / "profile").exists() and "too few for a trace" in caplog.text


def test_a_peak_that_cannot_be(tmp_path, capsys):
    assert main(["fit", "none", "--out", str(tmp_path / "run"), "--peak-flops", "0"]) == 2
    assert "peak_flops must be a number above 0" in capsys.readouterr().err
