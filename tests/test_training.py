"""The trainer: exact resume, shardings, time budgets, and what it writes down."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genret_jax.configs import TrainConfig
from genret_jax.data.batches import Batches, Pool
from genret_jax.errors import UserError
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.model import RetrievalModel
from genret_jax.training import partitioning
from genret_jax.training.budget import Clock, Plan
from genret_jax.training.interruption import Interrupted
from genret_jax.training.journal import Journal, read_records
from genret_jax.training.optimizers import (
    learning_rate,
    make_optimizer,
    pull_to_start,
    set_learning_rate,
)
from genret_jax.training.trainer import Stepper, train
from genret_jax.vocabularies import DocidSpace

CONFIG = TrainConfig(
    steps=24,
    batch_size=8,
    learning_rate=1e-2,
    warmup_steps=4,
    evaluations=3,
    checkpoint_every=7,
    log_every=5,
)


@pytest.fixture(scope="module")
def model():
    config = T5Config(
        vocab_size=128,
        embed_dim=16,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        num_encoder_layers=1,
        num_decoder_layers=1,
        embedding_scale=0.1,
    )
    return RetrievalModel(config, DocidSpace(50, 12))


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(0)
    inputs = rng.integers(2, 50, (40, 8)).astype(np.int32)
    inputs[:20, 4:] = 0
    targets = rng.integers(50, 60, (40, 3)).astype(np.int32)
    arrays = {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": np.ones((40, 3), np.float32),
    }
    return Batches([Pool(arrays, 1.0)], batch_size=8, seed=0, buckets=(4, 8))


@pytest.fixture(scope="module")
def mesh():
    """One device: what these tests are about does not depend on the number."""
    return partitioning.make_mesh(devices=jax.devices()[:1])


def _evaluation(params):
    return {"mrr@10": float(jnp.abs(params["token_embedder"]["embedding"]).sum() % 1)}


def _equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


@pytest.mark.parametrize("stop_at", [10, 14])
def test_resume_equals_uninterrupted(model, batches, mesh, tmp_path, stop_at):
    whole = train(
        model, batches, config=CONFIG, folder=tmp_path / "a", evaluate=_evaluation, mesh=mesh
    )

    class Stopping:
        """Sends SIGTERM to this process when a certain batch is asked for."""

        def __getitem__(self, n):
            if n == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return batches[n]

        def shapes(self):
            return batches.shapes()

    with pytest.raises(Interrupted) as stop:
        train(
            model, Stopping(), config=CONFIG, folder=tmp_path / "b", evaluate=_evaluation, mesh=mesh
        )
    assert stop.value.code == 128 + signal.SIGTERM and "same command" in stop.value.message
    assert (tmp_path / "b" / "curves.png").is_file(), "drawn up to the stop"
    parts = train(
        model, batches, config=CONFIG, folder=tmp_path / "b", evaluate=_evaluation, mesh=mesh
    )
    assert whole.steps == parts.steps == 24 and whole.best_step == parts.best_step
    assert _equal(whole.params, parts.params)
    a, b = (read_records(tmp_path / x / "metrics.jsonl", up_to=99) for x in "ab")
    dev = [[r for r in records if r["kind"] == "dev"] for records in (a, b)]
    assert dev[0] == dev[1] and [r["step"] for r in dev[0]] == [0, 8, 16, 24]


def test_a_crash_goes_on_from_the_last_checkpoint(model, batches, mesh, tmp_path):
    whole = train(
        model, batches, config=CONFIG, folder=tmp_path / "a", evaluate=_evaluation, mesh=mesh
    )

    class Crashing:
        def __getitem__(self, n):
            if n == 18:
                raise RuntimeError("power cut")
            return batches[n]

        def shapes(self):
            return batches.shapes()

    with pytest.raises(RuntimeError, match="power cut"):
        train(
            model, Crashing(), config=CONFIG, folder=tmp_path / "b", evaluate=_evaluation, mesh=mesh
        )
    parts = train(
        model, batches, config=CONFIG, folder=tmp_path / "b", evaluate=_evaluation, mesh=mesh
    )
    assert _equal(whole.params, parts.params)


def test_training_lowers_the_loss_and_keeps_the_best(model, batches, mesh, tmp_path):
    seen = []

    def evaluation(params):
        seen.append(params["token_embedder"]["embedding"].copy())
        return {"mrr@10": [0.0, 0.1, 0.9, 0.4, 0.2][len(seen) - 1]}  # the first one compiles

    result = train(model, batches, config=CONFIG, folder=tmp_path, evaluate=evaluation, mesh=mesh)
    assert result.best_step == 8 and result.dev == {"mrr@10": 0.9}
    assert (result.params["token_embedder"]["embedding"] == seen[2]).all()
    losses = [r["loss"] for r in read_records(tmp_path / "metrics.jsonl", up_to=99) if "loss" in r]
    assert losses[-1] < 0.9 * losses[0]
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_without_dev_the_last_parameters_are_kept(model, batches, mesh, tmp_path):
    result = train(model, batches, config=CONFIG, folder=tmp_path, mesh=mesh)
    assert result.best_step == 24 and result.dev == {}


def test_learning_rate_by_hand():
    kw = {"warmup_steps": 10}
    assert learning_rate(2.0, 0.0, 4, schedule="cosine", **kw) == pytest.approx(1.0)
    assert learning_rate(2.0, 0.5, 100, schedule="cosine", **kw) == pytest.approx(1.0)
    assert learning_rate(2.0, 0.25, 100, schedule="linear", **kw) == pytest.approx(1.5)
    assert learning_rate(2.0, 0.9, 100, schedule="constant", **kw) == 2.0
    assert learning_rate(2.0, 1.0, 100, schedule="cosine", **kw) == pytest.approx(0.0)
    with pytest.raises(UserError, match="cosine, linear, constant"):
        learning_rate(1.0, 0.0, 0, schedule="square", **kw)


def test_adamw_is_optax_adamw_with_decay_on_matrices_alone():
    params = {"w": jnp.full((2, 2), 2.0), "scale": jnp.ones(2)}
    grads = {"w": jnp.full((2, 2), 0.1), "scale": jnp.full(2, 0.1)}
    optimizer = make_optimizer("adamw", weight_decay=0.5, clip_norm=0.0)
    state = set_learning_rate(optimizer.init(params), jnp.float32(0.1))
    updates, _ = optimizer.update(grads, state, params)
    # First step of Adam: the sign of the gradient; plus lr * decay * w for the matrix.
    np.testing.assert_allclose(updates["scale"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["w"], -0.1 - 0.1 * 0.5 * 2.0, rtol=1e-5)


def test_clipping_bounds_the_gradient():
    optimizer = make_optimizer("adafactor", clip_norm=1.0)
    params = {"w": jnp.ones((4, 4))}
    state = set_learning_rate(optimizer.init(params), jnp.float32(0.1))
    updates, _ = optimizer.update({"w": jnp.full((4, 4), 1e9)}, state, params)
    assert np.isfinite(np.asarray(updates["w"])).all() and (np.asarray(updates["w"]) < 0).all()
    with pytest.raises(UserError, match="adamw, adafactor"):
        make_optimizer("sgd")
    assert isinstance(optimizer, optax.GradientTransformationExtraArgs)


def test_plan_without_budget_is_step_over_total():
    plan = Plan(total=8)
    for step in range(8):
        assert plan.progress == pytest.approx(step / 8, abs=1e-6) and not plan.done
        plan.advance()
    assert plan.done and plan.progress == pytest.approx(1.0)


def test_budget_plans_the_steps_that_fit_and_never_jumps():
    now = [100.0]
    clock = Clock(60.0, started=100.0, reserve=5.0, now=lambda: now[0])
    plan = Plan(step=10)
    now[0] = 110.0
    clock.plan(plan, step_seconds=0.5, other_seconds=5.0)
    assert plan.total == 10 + 80  # 60 - 5 - 10 - 5 = 40 seconds of 0.5
    for _ in range(40):
        plan.advance()
    before = plan.progress
    now[0] = 140.0  # slower than planned: 10 seconds left
    clock.plan(plan, step_seconds=1.0, other_seconds=5.0)
    assert plan.total == 50 + 10 and plan.progress == before
    for _ in range(10):
        plan.advance()
    assert plan.done and plan.progress == pytest.approx(1.0, abs=1e-5)
    now[0] = 1000.0  # far too late: one more step, and the end
    clock.plan(plan, step_seconds=1.0, other_seconds=0.0)
    assert plan.total == plan.step + 1


def test_keeping_more_than_is_left_is_told(caplog):
    clock = Clock(60.0, started=0.0, reserve=5.0, now=lambda: 20.0)
    clock.keep(30.0, "vectors")
    assert clock.reserve == 35.0 and not caplog.text
    clock.keep(6.0, "vectors")
    assert "6 s are kept for vectors: more than is left; give more minutes" in caplog.text
    caplog.clear()
    Clock(None).keep(1e9, "vectors")
    assert not caplog.text, "without a budget there is nothing to overrun"


def test_a_stage_that_follows_has_its_share():
    now = [0.0]
    clock = Clock(60.0, started=0.0, reserve=5.0, now=lambda: now[0])
    for share, whole in ((0.0, 60.0), (0.25, 45.0)):
        with clock.without(share):
            assert clock.seconds == whole
        assert clock.seconds == 60.0
    with pytest.raises(KeyError), clock.without(0.5):
        raise KeyError
    assert clock.seconds == 60.0, "whatever happens"
    now[0] = 55.0
    clock.check_left("stage 2")
    with pytest.raises(UserError, match="0.9 of 1 minutes are used, and nothing is left for st"):
        clock.check_left("stage 2", elapsed=56.0)
    unlimited = Clock(None)
    with unlimited.without(0.5):
        unlimited.check_left("stage 2", elapsed=1e9)
    assert unlimited.seconds is None


def test_a_run_with_a_budget_ends_whatever_its_first_measurement():
    now = [0.0]
    clock = Clock(10.0, started=0.0, reserve=1.0, now=lambda: now[0])
    plan, turns = Plan(), 0
    while not plan.done:
        now[0] += 0.5
        plan.advance()
        turns += 1
        if not plan.done and turns % 4 == 0:
            clock.plan(plan, step_seconds=0.5, other_seconds=1.0)
        assert turns < 30
    assert now[0] <= 9.5


def test_resumed_clock_counts_earlier_sessions():
    clock = Clock(60.0, started=0.0, now=lambda: 10.0)
    clock.resume(np.float32(30.0))
    assert clock.elapsed == 40.0


def test_time_budget_is_kept(model, batches, mesh, tmp_path):
    clock = Clock(12.0)
    result = train(model, batches, config=CONFIG, folder=tmp_path, clock=clock, mesh=mesh)
    # The bound is wide because compiling is not in our hands; without planning it would not end.
    assert result.steps > 24 and clock.elapsed < 200


def test_journal_drops_what_will_be_written_again(tmp_path):
    lines = [{"kind": "train", "step": s, "loss": 1.0} for s in (5, 10, 15)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tr'
    (tmp_path / "metrics.jsonl").write_text(text)
    journal = Journal(tmp_path, after_step=10)
    assert [r["step"] for r in journal.records] == [5, 10]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_not_a_number_stops_with_a_remedy(model, batches, mesh, tmp_path):
    config = dataclasses.replace(CONFIG, learning_rate=float("nan"))
    with pytest.raises(UserError, match="lower the learning rate"):
        train(model, batches, config=config, folder=tmp_path, mesh=mesh)


def test_a_start_that_training_makes_worse_is_kept(model, batches, mesh, tmp_path):
    """The best step may be 0, and the dev metrics reported are its own."""
    calls = []

    def falling(params):
        calls.append(params)
        return {"mrr@10": 1.0 / len(calls)}

    config = dataclasses.replace(CONFIG, steps=6, evaluations=2)
    result = train(model, batches, config=config, folder=tmp_path, evaluate=falling, mesh=mesh)
    assert result.best_step == 0 and result.steps == 6
    assert result.dev == {"mrr@10": 0.5}, "the first call compiles, the second is step 0"
    start = Stepper(model, config, mesh).init(jax.random.key(config.seed)).params
    assert _equal(result.params, jax.device_get(start))


def test_an_anchor_pulls_to_the_start(model, batches, mesh, tmp_path):
    """Adam moves a number by at most about the rate; pulled by r * anchor a step, it stays near."""

    def distance(anchor):
        config = dataclasses.replace(CONFIG, anchor=anchor, schedule="constant", evaluations=1)
        begun = []

        def start(params):
            begun.append(jax.tree.map(lambda x: x + 1.0, params))
            return begun[0]

        folder = tmp_path / str(anchor)
        result = train(model, batches, config=config, folder=folder, mesh=mesh, start=start)
        kernel = "token_embedder", "embedding"
        now, then = (tree[kernel[0]][kernel[1]] for tree in (result.params, begun[0]))
        return float(np.abs(now - then).max())

    free, held = distance(0.0), distance(50.0)
    assert held < 0.5 * free
    assert held > 0, "it is a pull, not a lock"


def test_a_pull_by_hand():
    transform = pull_to_start(0.25)
    state = transform.init({"w": jnp.full((1, 2), 8.0), "b": jnp.zeros(1)})
    params = {"w": jnp.array([[4.0, 8.0]]), "b": jnp.ones(1)}
    updates, _ = transform.update({"w": jnp.ones((1, 2)), "b": jnp.ones(1)}, state, params)
    assert updates["w"].tolist() == [[2.0, 1.0]], "1 + 0.25 * (8 - 4), and 1 + 0"
    assert updates["b"].tolist() == [1.0], "matrices only"
