"""R-Drop: its divergence by hand, and what stage 1 makes of it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genret_jax.errors import UserError
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.losses import symmetric_divergence
from genret_jax.modeling.model import RetrievalModel
from genret_jax.recipe import load_generator_recipe, load_recipe
from genret_jax.vocabularies import DocidSpace

CONFIG = T5Config(
    vocab_size=26,
    embed_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=16,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dropout_rate=0.3,
)
MODEL = RetrievalModel(CONFIG, DocidSpace(20, 8), label_smoothing=0.1, r_drop=0.15)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_the_divergence_is_that_of_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    p, q = rng.normal(0, 3, (2, 2, 3, 5))
    counted = rng.random((2, 3)) < 0.6
    p[..., 0] = q[..., 0] = -np.inf
    total = 0.0
    for place in np.argwhere(counted):
        a, b = (np.exp(x[tuple(place)][1:]) for x in (p, q))
        a, b = a / a.sum(), b / b.sum()
        total += 0.5 * (a @ np.log(a / b) + b @ np.log(b / a))
    arrays = [jnp.asarray(x, jnp.float32) for x in (p, q)]
    found, gradient = jax.value_and_grad(symmetric_divergence)(*arrays, jnp.asarray(counted))
    assert float(found) == pytest.approx(total / max(counted.sum(), 1), rel=1e-4, abs=1e-5)
    assert np.isfinite(gradient).all() and (np.asarray(gradient)[~counted] == 0).all()


def _batch():
    rng = np.random.default_rng(0)
    docids = np.array([[2, 3, 1], [4, 1, 0], [5, 2, 1], [7, 7, 1]], np.int32)
    targets = np.asarray(MODEL.docids.to_model(docids))
    return {
        "encoder_input_tokens": rng.integers(2, 20, (4, 5)).astype(np.int32),
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_loss_weights": (docids > 0).astype(np.float32),
    }


def test_it_is_nothing_without_dropout_and_something_with():
    batch, key = _batch(), jax.random.key(3)
    params = jax.jit(lambda rng: MODEL.init(rng)[0])(jax.random.key(0))
    dry = dataclasses.replace(MODEL, config=dataclasses.replace(CONFIG, dropout_rate=0.0))
    plain = dataclasses.replace(MODEL, r_drop=0.0)

    @jax.jit
    def everything(params):
        passes = [plain.loss_fn(params, batch, rng) for rng in jax.random.split(key)]
        logits = [plain.teacher_forced(params, batch, rng) for rng in jax.random.split(key)]
        apart = symmetric_divergence(*logits, batch["decoder_loss_weights"] > 0)
        return {
            "passes": passes,
            "apart": apart,
            "with": MODEL.loss_fn(params, batch, key),
            "dry": dry.loss_fn(params, batch, key),
            "no key": MODEL.loss_fn(params, batch),
            "plain": plain.loss_fn(params, batch),
        }

    found = everything(params)
    loss, parts = found["with"]
    mean = np.mean([float(one) for one, _ in found["passes"]])
    assert float(found["apart"]) > 1e-3
    assert float(parts["r_drop"]) == pytest.approx(float(found["apart"]), rel=1e-5)
    assert float(loss) == pytest.approx(mean + 0.15 * float(found["apart"]), rel=1e-5)
    for name in ("dry", "no key"):
        loss, parts = found[name]
        assert float(parts["r_drop"]) == 0.0
        assert float(loss) == pytest.approx(float(found["plain"][0]), rel=1e-6)
    assert "r_drop" not in found["plain"][1]


def test_recipes_know_it():
    assert load_recipe("nci").loss.r_drop == 0.15 and load_recipe("dsi").loss.r_drop == 0.0
    with pytest.raises(UserError, match=r"LossConfig\.r_drop is -1"):
        load_recipe("nci", bindings=["LossConfig.r_drop = -1.0"])
    with pytest.raises(UserError, match="a generator of queries has no such loss"):
        load_generator_recipe(bindings=["LossConfig.r_drop = 0.1"])
