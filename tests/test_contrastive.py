"""The losses of stage 2 against hand numbers, slow loops, optax, sets, and themselves in chunks."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from genret_jax.modeling.contrastive import (
    JointWeights,
    in_chunks,
    info_nce,
    joint_loss,
    usable_columns,
)
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.losses import docid_cross_entropy
from genret_jax.modeling.network import T5

BATCH, NEGATIVES, EMBED, RELEVANT = 4, 2, 3, 2
MASKS = ("negative_mask", "in_batch_mask", "shared_mask")
ALL = {"similarity": "cosine", "in_batch": True, "share_negatives": True}
OWN = {"similarity": "cosine", "in_batch": False, "share_negatives": False}


@functools.partial(jax.jit, static_argnames=tuple(ALL))
def value_and_grad(vectors, masks, temperature=0.7, **switches):
    """The output, and the gradient with respect to the vectors and the temperature."""

    def loss(vectors, temperature):
        out = info_nce(*vectors, temperature=temperature, **masks, **switches)
        return out.loss, out

    derivative = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, out), gradient = derivative(vectors, temperature)
    return out, gradient


def make(seed: int):
    """Random vectors, masks (the first row has no usable column) and row weights."""
    rng = np.random.default_rng(seed)
    shapes = ((BATCH, EMBED), (BATCH, EMBED), (BATCH, NEGATIVES, EMBED))
    vectors = tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)
    widths = (NEGATIVES, BATCH, BATCH * NEGATIVES)
    masks = {name: rng.random((BATCH, w)) < 0.7 for name, w in zip(MASKS, widths, strict=True)}
    for mask in masks.values():
        mask[0] = False
    masks["weights"] = rng.uniform(0.5, 2, BATCH).astype(np.float32)
    return vectors, masks


def slow(vectors, masks, temperature, similarity, in_batch, share_negatives):
    """(loss, accuracy), column by column in float64."""
    query, positive, negatives = (np.asarray(x, np.float64) for x in vectors)

    def score(a, b):
        dot = float(a @ b)
        if similarity == "cosine":
            dot /= math.sqrt(a @ a) * math.sqrt(b @ b)
        return dot / temperature

    losses, right = [], []
    for i in range(BATCH):
        columns = [negatives[i, k] for k in range(NEGATIVES) if masks["negative_mask"][i, k]]
        for j in set(range(BATCH)) - {i}:
            if in_batch and masks["in_batch_mask"][i, j]:
                columns.append(positive[j])
            for k in range(NEGATIVES):
                if share_negatives and masks["shared_mask"][i, j * NEGATIVES + k]:
                    columns.append(negatives[j, k])
        own = score(query[i], positive[i])
        scores = [score(query[i], column) for column in columns]
        total = math.exp(own) + sum(math.exp(s) for s in scores)
        losses.append(-math.log(math.exp(own) / total))
        right.append(all(own > s for s in scores))
    return np.average(losses, weights=masks["weights"]), np.average(right, weights=masks["weights"])


# --- InfoNCE: values ---------------------------------------------------------------------------


def by_hand():
    """Dot products: row 0 has 2 with its own and 1, 0 with its negatives; row 1 has 1 and 1, 0."""
    query = jnp.array([[1.0, 0], [0, 1]])
    positive = jnp.array([[2.0, 1], [0, 1]])
    return query, positive, jnp.array([[[1.0, 5], [0, 5]], [[5, 1], [5, 0]]])


def test_hand_numbers():
    out = info_nce(*by_hand(), similarity="dot", temperature=2.0, in_batch=False)
    rows = math.log(1 + math.exp(-0.5) + math.exp(-1)), math.log(1 + 1 + math.exp(-0.5))
    assert float(out.loss) == pytest.approx(sum(rows) / 2, rel=1e-6)
    assert set(out.parts) == {"info_nce", "accuracy"}
    assert float(out.parts["info_nce"]) == float(out.loss)
    assert float(out.parts["accuracy"]) == 0.5  # a tie is not right
    assert float(out.weight) == 2.0
    assert all(x.dtype == jnp.float32 and x.shape == () for x in jax.tree.leaves(out))


def test_hand_numbers_with_the_batch():
    """Row 0 scores the other positive 0; row 1 scores it 1, and the shared negatives 5 and 5."""
    two = functools.partial(info_nce, *by_hand(), similarity="dot", temperature=1.0, in_batch=True)
    totals = [1 + math.exp(-1) + 2 * math.exp(-2), 1 + 1 + math.exp(-1) + 1]
    assert float(two().loss) == pytest.approx(math.log(math.prod(totals)) / 2, rel=1e-6)
    totals = [totals[0] + 2 * math.exp(5 - 2), totals[1] + 2 * math.exp(5 - 1)]
    shared = two(share_negatives=True)
    assert float(shared.parts["accuracy"]) == 0.0  # row 0: 5 is above 2
    assert float(shared.loss) == pytest.approx(math.log(math.prod(totals)) / 2, rel=1e-6)


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("share_negatives", [False, True])
@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), similarity=st.sampled_from(["cosine", "dot"]))
def test_against_a_loop(in_batch, share_negatives, seed, similarity):
    vectors, masks = make(seed)
    switches = dict(similarity=similarity, in_batch=in_batch, share_negatives=share_negatives)
    out, _ = value_and_grad(vectors, masks, **switches)
    loss, accuracy = slow(vectors, masks, 0.7, **switches)
    assert float(out.loss) == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert float(out.parts["accuracy"]) == pytest.approx(accuracy, rel=1e-6)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_gradients_against_differences_of_the_loop(similarity):
    vectors, masks = make(5)
    switches = ALL | {"similarity": similarity}
    _, gradient = value_and_grad(vectors, masks, **switches)
    flat = np.asarray(ravel_pytree((vectors, 0.7))[0], np.float64)

    def loss(x):
        *pieces, temperature = np.split(x, np.cumsum([x.size for x in vectors]))
        parts = [piece.reshape(x.shape) for piece, x in zip(pieces, vectors, strict=True)]
        return slow(parts, masks, temperature[0], **switches)[0]

    expected = [(loss(flat + e) - loss(flat - e)) / 2e-5 for e in 1e-5 * np.eye(len(flat))]
    np.testing.assert_allclose(ravel_pytree(gradient)[0], expected, atol=2e-6)


def test_against_ntxent():
    """NT-Xent contrasts both views with all others: [q; p] with [p; q], without one's own self."""
    both = np.random.default_rng(0).normal(size=(10, EMBED)).astype(np.float32)
    partner = np.roll(np.eye(10, dtype=bool), 5, axis=1)

    def ours(x):
        other = jnp.roll(x, 5, axis=0)
        return info_nce(x, other, temperature=0.2, in_batch=True, in_batch_mask=~partner).loss

    found, gradient = jax.jit(jax.value_and_grad(ours))(both)
    peer = jax.jit(jax.value_and_grad(optax.losses.ntxent))
    expected, expected_gradient = peer(both, np.arange(10) % 5, 0.2)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)


# --- InfoNCE: masks and weights ----------------------------------------------------------------


def test_a_row_without_negatives_costs_nothing():
    vectors, masks = make(1)
    masks |= {name: np.zeros_like(masks[name]) for name in MASKS}
    out, gradient = value_and_grad(vectors, masks, **ALL)
    assert float(out.loss) == 0.0
    assert float(out.parts["accuracy"]) == pytest.approx(1)
    assert not any(np.any(x) for x in jax.tree.leaves(gradient))


def test_other_relevant_documents_are_not_pushed_away():
    """Document 1 is relevant to every query, and its own row is out: it gets no gradient."""
    vectors, masks = make(2)
    not_one = np.arange(BATCH) != 1
    masks |= {"in_batch_mask": np.tile(not_one, (BATCH, 1)), "weights": not_one.astype(np.float32)}
    _, ((_, pushed, _), _) = value_and_grad(vectors, masks, **ALL)
    assert pushed.any(1).tolist() == not_one.tolist()


def test_weights_of_rows():
    vectors, masks = make(3)
    masks["weights"] = np.array([0, 3, 0, 1], np.float32)
    out, ((query, _, _), _) = value_and_grad(vectors, masks, **OWN)
    rows = [1, 1, 1, 3]
    masks = {name: x[rows] for name, x in masks.items()} | {"weights": np.ones(4, np.float32)}
    expected, _ = value_and_grad(tuple(x[rows] for x in vectors), masks, **OWN)
    assert float(out.loss) == pytest.approx(float(expected.loss), rel=1e-6)
    assert float(out.parts["accuracy"]) == float(expected.parts["accuracy"])
    assert float(out.weight) == 4.0
    assert not query[::2].any()
    masks["weights"] *= 0
    out, gradient = value_and_grad(vectors, masks, **OWN)
    assert not any(np.any(x) for x in jax.tree.leaves((out.loss, gradient)))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_zero_vectors_and_large_ones_stay_finite(similarity):
    vectors, masks = make(4)  # its first row is masked throughout
    for x in vectors:
        x[2] *= 1e4
    vectors[0][3] = vectors[1][1] = vectors[2][1] = 0
    half = tuple(jnp.asarray(x, jnp.bfloat16) for x in vectors)
    exact = tuple(np.asarray(x, np.float32) for x in half)
    switches = ALL | {"similarity": similarity}
    out, gradient = value_and_grad(half, masks, 0.01, **switches)
    wide, wide_gradient = value_and_grad(exact, masks, 0.01, **switches)
    assert out.loss.dtype == jnp.float32
    assert float(out.loss) == pytest.approx(float(wide.loss), rel=1e-6)
    for x in jax.tree.leaves((out, gradient, wide, wide_gradient)):
        assert np.isfinite(np.asarray(x, np.float32)).all()
    if similarity == "cosine":
        assert not np.any(wide_gradient[0][1][1]), "a zero vector has no direction to turn"


def test_errors():
    vectors, _ = make(0)
    with pytest.raises(ValueError, match="similarity must be one of"):
        info_nce(*vectors, temperature=1.0, in_batch=True, similarity="cosin")
    for temperature in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature must be a positive number"):
            info_nce(*vectors, temperature=temperature, in_batch=True)
    for switches in ({"in_batch": False}, {"in_batch": True, "share_negatives": True}):
        with pytest.raises(ValueError, match="nothing to contrast with"):
            info_nce(*vectors[:2], temperature=1.0, **switches)
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="weight prefix must be a number >= 0"):
            JointWeights(prefix=value)
    with pytest.raises(ValueError, match="chunk must be >= 0"):
        in_chunks(lambda x: x, jnp.ones((2, 2)), chunk=-1)


# --- usable columns ----------------------------------------------------------------------------


def numbers(low, high, *shape):
    if not shape:
        return st.integers(low, high)
    return st.lists(numbers(low, high, *shape[1:]), min_size=shape[0], max_size=shape[0])


@settings(max_examples=60)
@given(
    document=numbers(-1, 5, BATCH),
    negative=numbers(-1, 5, BATCH, NEGATIVES),
    relevant=numbers(-1, 5, BATCH, RELEVANT),
    rows=numbers(0, 4, 2, 7),
)
def test_usable_columns_against_sets(document, negative, relevant, rows):
    """A document may have several docids: another as a negative than as a positive."""
    first, second = np.array(rows, np.int32)  # of documents 0 to 5, and of padding
    arrays = [np.array(x, np.int32) for x in (document, negative, relevant)]
    found = jax.jit(usable_columns)(*arrays, first[arrays[0]], second[arrays[1]])

    def usable(i, columns, row):
        same = {c for c in columns if row[c] == first[document[i]]}
        return [c not in {-1, document[i], *relevant[i], *same} for c in columns]

    for i in range(BATCH):
        assert found[0][i].tolist() == usable(i, document, first)
        assert found[1][i].tolist() == usable(i, negative[i], second)
        assert found[2][i].tolist() == usable(i, sum(negative, []), second)


# --- the joint loss ----------------------------------------------------------------------------

ROWS, LENGTH, VOCAB, TOKENS = 8, 3, 6, 5
INPUTS = {"generation": "logits", "prefix": "prefix_negatives", "retrieval": "retrieved_negatives"}


def joint_batch():
    """Inputs of `joint_loss`; half of the rows have no prefix negative, the last is padding."""
    rng = np.random.default_rng(7)
    tensors = {
        "logits": rng.normal(size=(ROWS, LENGTH, VOCAB)),
        "targets": rng.integers(1, VOCAB, (ROWS, LENGTH)),
        "token_weights": rng.random((ROWS, LENGTH)) < 0.8,
        "query": rng.normal(size=(ROWS, EMBED)),
        "positive": rng.normal(size=(ROWS, EMBED)),
        "prefix_negatives": rng.normal(size=(ROWS, 3, EMBED)),
        "retrieved_negatives": rng.normal(size=(ROWS, NEGATIVES, EMBED)),
    }
    masks = {
        "prefix_mask": (rng.random((ROWS, 3)) < 0.6) & (np.arange(ROWS) % 2 == 0)[:, None],
        "retrieved_mask": rng.random((ROWS, NEGATIVES)) < 0.7,
        "in_batch_mask": rng.random((ROWS, ROWS)) < 0.7,
        "shared_mask": rng.random((ROWS, ROWS * NEGATIVES)) < 0.7,
        "row_weights": np.array([1] * (ROWS - 1) + [0], np.float32),
    }
    tensors = {k: v.astype(np.int32 if k == "targets" else np.float32) for k, v in tensors.items()}
    return tensors, masks


@functools.partial(jax.jit, static_argnames="weights")
def joint(tensors, masks, weights=None):
    def loss(floats):
        options = dict(temperature=0.3, label_smoothing=0.1, z_loss=1e-3, share_negatives=True)
        out = joint_loss(**floats, targets=targets, **masks, **options, weights=weights)
        return out.loss, out

    targets = tensors["targets"]
    floats = {name: x for name, x in tensors.items() if name != "targets"}
    (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(floats)
    return out, gradient


def test_joint_loss_is_the_weighted_sum_of_its_terms():
    tensors, masks = joint_batch()
    out, _ = joint(tensors, masks, JointWeights(0.5, 2.0, 3.0))
    written = jax.jit(functools.partial(docid_cross_entropy, label_smoothing=0.1, z_loss=1e-3))
    generation = written(*(tensors[n] for n in ("logits", "targets", "token_weights")))
    # The prefix term by hand: rows with a prefix negative alone, as a batch of their own.
    some = masks["prefix_mask"].any(1)
    assert 0 < some.sum() < ROWS and masks["row_weights"][some].all()
    vectors = tuple(tensors[n][some] for n in ("query", "positive", "prefix_negatives"))
    own = {"negative_mask": masks["prefix_mask"][some]}
    prefix, _ = value_and_grad(vectors, own, 0.3, **OWN)
    vectors = tuple(tensors[n] for n in ("query", "positive", "retrieved_negatives"))
    names = ("retrieved_mask", "in_batch_mask", "shared_mask", "row_weights")
    own = dict(zip((*MASKS, "weights"), (masks[n] for n in names), strict=True))
    retrieval, _ = value_and_grad(vectors, own, 0.3, **ALL)
    expected = dict(generation.parts)
    for name, term in (("prefix", prefix), ("retrieval", retrieval)):
        expected |= {f"{name}_nce": term.loss, f"{name}_accuracy": term.parts["accuracy"]}
    assert set(out.parts) == set(expected)
    for name, value in expected.items():
        assert float(out.parts[name]) == pytest.approx(float(value), rel=1e-5), name
    total = 0.5 * generation.loss + 2 * prefix.loss + 3 * retrieval.loss
    assert float(out.loss) == pytest.approx(float(total), rel=1e-5)
    assert float(out.weight) == ROWS - 1


@pytest.mark.parametrize("off", INPUTS)
def test_a_weight_of_zero_gives_no_gradient(off):
    """Even where the term that is off is broken: its inputs are inf."""
    tensors, masks = joint_batch()
    weights = dataclasses.replace(JointWeights(), **{off: 0.0})
    out, gradient = joint(tensors, masks, weights)
    for term, name in INPUTS.items():
        assert np.any(gradient[name]) == (term != off), term
    everything, _ = joint(tensors, masks)
    for name, value in everything.parts.items():
        assert float(out.parts[name]) == pytest.approx(float(value), rel=1e-6), name
    broken, after = joint({**tensors, INPUTS[off]: tensors[INPUTS[off]] + np.inf}, masks, weights)
    assert float(broken.loss) == pytest.approx(float(out.loss), rel=1e-6)
    np.testing.assert_allclose(after["query"], gradient["query"], rtol=1e-6)


def test_no_negatives_of_a_kind():
    """Length 0 works: without prefix documents the term is 0, with the batch alone as negatives."""
    tensors, _ = joint_batch()
    none = np.zeros((ROWS, 0, EMBED), np.float32)
    tensors |= {"prefix_negatives": none, "retrieved_negatives": none}
    out, _ = joint(tensors, {})
    alone, _ = value_and_grad((tensors["query"], tensors["positive"]), {}, 0.3, in_batch=True)
    assert float(out.parts["prefix_nce"]) == 0.0
    assert float(out.parts["retrieval_nce"]) == pytest.approx(float(alone.loss), rel=1e-6)


def test_one_and_eight_devices_agree():
    assert jax.device_count() == 8, "tests/conftest.py asks for eight simulated devices"
    results = []
    for count in (1, 8):
        mesh = Mesh(np.array(jax.devices()[:count]), ("data",))
        placed = jax.device_put(joint_batch(), NamedSharding(mesh, PartitionSpec("data")))
        assert len(placed[0]["query"].sharding.device_set) == count
        results.append(joint(*placed))
    for one, eight in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, eight, rtol=1e-5, atol=1e-6)


# --- chunks ------------------------------------------------------------------------------------

WIDTHS = dict(embed_dim=8, num_heads=2, head_dim=4, mlp_dim=16)
CONFIG = T5Config(vocab_size=32, num_encoder_layers=1, num_decoder_layers=1, **WIDTHS)


def params():
    tokens = jnp.ones((1, 2), jnp.int32)
    init = functools.partial(T5(CONFIG).init, method=T5.encode)
    shapes = jax.eval_shape(init, jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.5, shapes)


def encoder(params, tokens):
    """The mean of T5's states over tokens that are not padding."""
    states = T5(CONFIG).apply({"params": params}, tokens, method=T5.encode)
    inside = (tokens > 0)[..., None]
    return (states * inside).sum(1) / inside.sum(1)  # a row of zeros would be 0 / 0


@functools.partial(jax.jit, static_argnames="chunk")
def chunked(params, tokens, chunk):
    """Loss and gradient of 10 queries, each with a positive and a negative that all share."""

    def loss(params):
        vectors = in_chunks(functools.partial(encoder, params), tokens, chunk=chunk)
        query, positive, negative = jnp.split(vectors, 3)
        switches = dict(temperature=0.2, in_batch=True, share_negatives=True)
        return info_nce(query, positive, negative[:, None], **switches).loss

    return jax.value_and_grad(loss)(params)


def tokens(n):
    rng = np.random.default_rng(n)
    inside = np.arange(TOKENS) < rng.integers(1, TOKENS + 1, n)[:, None]
    return np.where(inside, rng.integers(1, 32, (n, TOKENS)), 0).astype(np.int32)


def test_chunked_gradients_are_those_of_one_call():
    """The last chunk of 4 is filled up: there are 30 texts."""
    one, one_gradient = chunked(params(), tokens(30), 0)
    four, gradient = chunked(params(), tokens(30), 4)
    assert float(four) == pytest.approx(float(one), rel=1e-6)
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(one_gradient)) > 0.01
    for a, b in zip(*map(jax.tree.leaves, (one_gradient, gradient)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize(("n", "chunk"), [(5, 9), (6, 2), (5, 2)])
def test_rows_keys_and_gradients_against_a_loop(n, chunk, keys):
    """A tree of arrays, with noise by a key a row or by a key a chunk, forward and backward."""
    key = jax.random.key(1)
    rows = {"x": jnp.arange(2.0, 2 + 2 * n).reshape(n, 2), "key": jax.random.split(key, n)}
    count = -(-n // chunk) if chunk else 1

    def encode(weights, rows, key=None):
        # By a key a chunk it is the same for all its rows, so that places in it do not matter.
        noise = jax.random.uniform(key) if keys else jax.vmap(jax.random.uniform)(rows["key"])
        return jnp.sin(rows["x"] * weights) * noise.reshape(-1, 1)

    def by_loop(weights):
        found = jnp.zeros((n, 2))
        for c in range(count):
            some = jax.tree.map(lambda x, c=c: x[c::count], rows)
            found = found.at[c::count].set(encode(weights, some, jax.random.fold_in(key, c)))
        return found

    def chunked(weights):
        rng = key if keys else None
        return in_chunks(functools.partial(encode, weights), rows, chunk=chunk, rng=rng)

    # The Jacobian says for every row whether it came back in its place, with its own noise.
    both = [jax.jit(lambda w, f=f: (f(w), jax.jacrev(f)(w))) for f in (chunked, by_loop)]
    results = [f(jnp.ones(2)) for f in both]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


SMALL = ((32, 16), (16, 64))


def small(weights, tokens):
    """An encoder that compiles fast: two layers for each token, and the mean."""
    embedded = jax.nn.one_hot(tokens, 32) @ weights[0]
    return jnp.tanh(jnp.tanh(embedded @ weights[1]) @ weights[1].T).mean(1)


def test_chunks_keep_memory_small():
    """1,024 queries with a positive and 8 negatives each, a chunk of 64: compiled, not run."""

    def temporary(chunk):
        def loss(weights, tokens):
            vectors = in_chunks(functools.partial(small, weights), tokens, chunk=chunk)
            v = vectors.reshape(1024, 10, -1)
            return info_nce(v[:, 0], v[:, 1], v[:, 2:], temperature=0.1, in_batch=True).loss

        weights = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in SMALL]
        tokens = jax.ShapeDtypeStruct((10 * 1024, 32), jnp.int32)
        compiled = jax.jit(jax.grad(loss)).lower(weights, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(64) * 20 < temporary(0)  # 12 MiB and 380 MiB


def test_chunks_of_a_spread_batch_need_no_exchange():
    """Every device encodes its share of every chunk: forward, not a byte goes between devices."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    spread = NamedSharding(mesh, PartitionSpec("data"))
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=shape).astype(np.float32) for shape in SMALL]
    placed = jax.device_put(tokens(64), spread)

    def run(weights, x):
        return in_chunks(functools.partial(small, weights), x, chunk=16)

    compiled = jax.jit(run, out_shardings=spread).lower(weights, placed).compile()
    assert not re.search(r"all-|collective-|reduce-scatter", compiled.as_text())
    expected = jax.jit(small)(weights, tokens(64))
    np.testing.assert_allclose(compiled(weights, placed), expected, rtol=1e-5, atol=1e-6)
