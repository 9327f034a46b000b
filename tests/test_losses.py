"""The docid loss against hand numbers, optax, derivatives on paper, and itself on four devices."""

from __future__ import annotations

import functools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from genret_jax.modeling.losses import docid_cross_entropy

BATCH, LENGTH, VOCAB = 8, 3, 7
PARTS = {"cross_entropy", "z_loss", "token_accuracy", "docid_accuracy"}


@functools.partial(jax.jit, static_argnames=("label_smoothing", "z_loss"))
def value_and_grad(logits, targets, weights, label_smoothing=0.0, z_loss=0.0):
    def loss(logits):
        out = docid_cross_entropy(
            logits, targets, weights, label_smoothing=label_smoothing, z_loss=z_loss
        )
        return out.loss, out

    (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(logits)
    return out, gradient


def make(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits whose padding column is -inf, targets of random lengths, weights 1 inside."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3.0, size=(BATCH, LENGTH, VOCAB)).astype(np.float32)
    logits[..., 0] = -np.inf
    inside = np.arange(LENGTH) < rng.integers(1, LENGTH + 1, BATCH)[:, None]
    targets = np.where(inside, rng.integers(1, VOCAB, (BATCH, LENGTH)), 0).astype(np.int32)
    return logits, targets, inside.astype(np.float32)


# --- values ------------------------------------------------------------------------------------


def by_hand():
    """Two rows: probabilities as they stand here; the last token of row 1 is padding."""
    p = np.array(
        [
            [[0, 0.5, 0.25, 0.25], [0, 0.125, 0.75, 0.125]],
            [[0, 0.25, 0.5, 0.25], [0, 0.5, 0.25, 0.25]],
        ]
    )
    targets = np.array([[1, 2], [1, 0]], np.int32)
    weights = np.array([[1, 1], [1, 0]], np.float32)
    with np.errstate(divide="ignore"):
        return np.log(p).astype(np.float32), targets, weights


def test_hand_numbers():
    """-(ln 1/2 + ln 3/4 + ln 1/4) / 3; two tokens of three and one docid of two are right."""
    out = docid_cross_entropy(*by_hand())
    expected = (math.log(2) + math.log(4 / 3) + math.log(4)) / 3
    assert float(out.loss) == pytest.approx(expected, rel=1e-6)
    assert set(out.parts) == PARTS
    assert float(out.parts["cross_entropy"]) == pytest.approx(expected, rel=1e-6)
    assert float(out.parts["token_accuracy"]) == pytest.approx(2 / 3)
    assert float(out.parts["docid_accuracy"]) == 0.5
    assert float(out.parts["z_loss"]) == 0.0
    assert float(out.weight) == 3.0
    assert all(x.dtype == jnp.float32 and x.shape == () for x in jax.tree.leaves(out))


def test_hand_numbers_with_smoothing():
    """At the first token 0.7 ln 2 + 0.3 (ln 2 + 2 ln 4) / 3, and so on: 3 ids, not 4."""
    out = docid_cross_entropy(*by_hand(), label_smoothing=0.3)
    ln = math.log
    tokens = [
        0.7 * ln(2) + 0.1 * (ln(2) + 2 * ln(4)),
        0.7 * ln(4 / 3) + 0.1 * (ln(4 / 3) + 2 * ln(8)),
        0.7 * ln(4) + 0.1 * (ln(2) + 2 * ln(4)),
    ]
    assert float(out.loss) == pytest.approx(sum(tokens) / 3, rel=1e-6)
    plain = (ln(2) + ln(4 / 3) + ln(4)) / 3
    assert float(out.parts["cross_entropy"]) == pytest.approx(plain, rel=1e-6)


def test_hand_numbers_of_the_z_loss():
    """Logits 2 above log p have the log normaliser 2: z * 4 a token."""
    logits, targets, weights = by_hand()
    out = docid_cross_entropy(logits + 2, targets, weights, z_loss=0.01)
    plain = docid_cross_entropy(logits, targets, weights).loss
    assert float(out.parts["z_loss"]) == pytest.approx(0.04, rel=1e-5)
    assert float(out.loss - plain) == pytest.approx(0.04, rel=1e-4)
    assert float(out.parts["cross_entropy"]) == pytest.approx(float(plain), rel=1e-5)


@jax.jit
@jax.value_and_grad
def peer(writable, targets, weights, smoothing):
    """optax, on the ids that can be written."""
    labels = optax.smooth_labels(jax.nn.one_hot(targets - 1, VOCAB - 1), smoothing)
    return (optax.softmax_cross_entropy(writable, labels) * weights).sum() / weights.sum()


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), smoothing=st.sampled_from([0.0, 0.1]))
def test_against_optax(seed, smoothing):
    logits, targets, weights = make(seed)
    out, gradient = value_and_grad(logits, targets, weights, label_smoothing=smoothing)

    expected, expected_gradient = peer(logits[..., 1:], targets, weights, smoothing)
    assert float(out.loss) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(gradient[..., 1:], expected_gradient, atol=1e-6)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), terms=st.sampled_from([(0.0, 0.0), (0.1, 0.01)]))
def test_gradients_on_paper(seed, terms):
    """d/d logits = w / W * (p - target + 2 z log Z p), target smoothed over what can be written."""
    smoothing, z = terms
    logits, targets, weights = make(seed)
    out, gradient = value_and_grad(logits, targets, weights, label_smoothing=smoothing, z_loss=z)
    exact = logits.astype(np.float64)
    log_z = np.log(np.exp(exact).sum(-1, keepdims=True))
    p = np.exp(exact - log_z)
    target = np.eye(VOCAB)[targets] * (1 - smoothing) + smoothing / (VOCAB - 1)
    target[..., 0] = 0
    expected = (p - target + 2 * z * log_z * p) * weights[..., None] / weights.sum()
    assert np.isfinite(gradient).all(), "an id of logit -inf must not give NaN"
    np.testing.assert_allclose(gradient, expected, atol=2e-6)
    log_p = np.where(np.isfinite(exact), exact - log_z, 0)
    value = (-(target * log_p).sum(-1) + z * log_z[..., 0] ** 2) * weights
    assert float(out.loss) == pytest.approx(value.sum() / weights.sum(), rel=1e-5)


def test_several_ids_that_are_never_written():
    """Smoothing spreads over the ids of finite logit, wherever the others stand."""
    logits, targets, weights = make(5)
    targets = np.minimum(targets, VOCAB - 3)
    logits[..., VOCAB - 2 :] = -np.inf
    out, gradient = value_and_grad(logits, targets, weights, label_smoothing=0.1)
    shorter, short_gradient = value_and_grad(
        logits[..., : VOCAB - 2], targets, weights, label_smoothing=0.1
    )
    assert float(out.loss) == pytest.approx(float(shorter.loss), rel=1e-6)
    np.testing.assert_allclose(gradient[..., : VOCAB - 2], short_gradient, atol=1e-7)
    assert not gradient[..., VOCAB - 2 :].any()


# --- masks -------------------------------------------------------------------------------------


def test_padding_contributes_nothing():
    smoothing = 0.1
    logits, targets, weights = make(1)
    assert (weights == 0).any() and (weights > 0).any()
    out, gradient = value_and_grad(logits, targets, weights, label_smoothing=smoothing, z_loss=0.01)
    rng = np.random.default_rng(9)
    padding = weights == 0
    noise = np.where(padding[..., None], rng.normal(scale=9, size=logits.shape), 0)
    others = np.where(padding, rng.integers(1, VOCAB, targets.shape), targets).astype(np.int32)
    noisy, noisy_gradient = value_and_grad(
        (logits + noise).astype(np.float32), others, weights, label_smoothing=smoothing, z_loss=0.01
    )
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(noisy), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(gradient, noisy_gradient, atol=1e-7)
    assert not gradient[padding].any()
    assert np.abs(gradient[~padding]).max() > 0


def test_rows_of_padding_only():
    """The last batch of an epoch is filled up with empty rows: they count for nothing."""
    value_and_grad_of = functools.partial(value_and_grad, label_smoothing=0.1, z_loss=0.01)
    logits, targets, weights = make(2)
    short, _ = value_and_grad_of(logits[:5], targets[:5], weights[:5])
    weights[5:] = 0
    targets[5:] = 0
    filled, gradient = value_and_grad_of(logits, targets, weights)
    for a, b in zip(jax.tree.leaves(short), jax.tree.leaves(filled), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert not gradient[5:].any()
    nothing, gradient = value_and_grad_of(logits, targets * 0, weights * 0)
    assert all(float(x) == 0 for x in jax.tree.leaves(nothing))
    assert not gradient.any()


@pytest.mark.parametrize("scale", [3.0, 0.001])
def test_weights_are_relative(scale):
    """An average does not change when all weights are multiplied, even to less than 1 in all."""
    logits, targets, weights = make(3)
    weights *= np.linspace(0.5, 2, BATCH, dtype=np.float32)[:, None]
    one, _ = value_and_grad(logits, targets, weights, label_smoothing=0.1, z_loss=0.01)
    other, _ = value_and_grad(logits, targets, weights * scale, label_smoothing=0.1, z_loss=0.01)
    assert float(other.loss) == pytest.approx(float(one.loss), rel=1e-5)
    for name in PARTS:
        assert float(other.parts[name]) == pytest.approx(float(one.parts[name]), rel=1e-5)


def test_heavier_tokens_count_for_more():
    logits, targets, weights = by_hand()
    weights = weights * np.array([[3], [1]], np.float32)
    out = docid_cross_entropy(logits, targets, weights)
    expected = (3 * math.log(2) + 3 * math.log(4 / 3) + math.log(4)) / 7
    assert float(out.loss) == pytest.approx(expected, rel=1e-6)
    assert float(out.weight) == 7.0


# --- types, errors, devices --------------------------------------------------------------------


def test_bfloat16_logits_are_reduced_in_float32():
    logits, targets, weights = make(4)
    half = jnp.asarray(logits, jnp.bfloat16)
    out = docid_cross_entropy(half, targets, weights, label_smoothing=0.1, z_loss=1e-3)
    exact = docid_cross_entropy(
        half.astype(jnp.float32), targets, weights, label_smoothing=0.1, z_loss=1e-3
    )
    assert out.loss.dtype == jnp.float32
    assert float(out.loss) == float(exact.loss)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, 2.0])
def test_smoothing_outside_its_range(smoothing):
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\)"):
        docid_cross_entropy(*by_hand(), label_smoothing=smoothing)


def test_one_and_four_devices_agree():
    """The mean is over the whole batch: padding is spread unevenly over the devices."""
    assert jax.device_count() == 8, "tests/conftest.py asks for eight simulated devices"
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(5, VOCAB)).astype(np.float32)
    states = rng.normal(size=(BATCH, LENGTH, 5)).astype(np.float32)
    lengths = np.array([1, 1, 3, 3, 0, 1, 2, 3])
    weights = (np.arange(LENGTH) < lengths[:, None]).astype(np.float32)
    targets = (rng.integers(1, VOCAB, weights.shape) * (weights > 0)).astype(np.int32)

    def loss(kernel, states, targets, weights):
        logits = (states @ kernel).at[..., 0].set(-jnp.inf)
        out = docid_cross_entropy(logits, targets, weights, label_smoothing=0.1, z_loss=1e-2)
        return out.loss, out

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    results = []
    for count in (1, 4):
        mesh = Mesh(np.array(jax.devices()[:count]), ("data",))
        rows = NamedSharding(mesh, PartitionSpec("data"))
        everywhere = NamedSharding(mesh, PartitionSpec())
        placed = [jax.device_put(x, rows) for x in (states, targets, weights)]
        assert len(placed[0].sharding.device_set) == count
        results.append(step(jax.device_put(kernel, everywhere), *placed))
    for one, four in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, four, rtol=1e-5, atol=1e-6)
