"""The model: docid logits, scores, search and loss say the same thing of one identifier."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny import SMALL_NETWORK

from genret_jax.docids.table import DocidTable
from genret_jax.modeling.model import RetrievalModel
from genret_jax.modeling.network import T5
from genret_jax.trie import build_trie
from genret_jax.vocabularies import DocidSpace

CONFIG = SMALL_NETWORK
START, DOCIDS = 40, 14  # local ids 2..13 are model ids 40..51; 52..63 are spare rows
UNTIED = RetrievalModel(CONFIG, DocidSpace(START, DOCIDS))
SMOOTH = dataclasses.replace(UNTIED, label_smoothing=0.1, z_loss=1e-3)
TIED = dataclasses.replace(UNTIED, config=dataclasses.replace(CONFIG, tied_embeddings=True))
MODELS = pytest.mark.parametrize("model", [UNTIED, TIED], ids=["untied", "tied"])
BATCH, LENGTH = 8, 6


@functools.cache
def params_of(model: RetrievalModel):
    """Random parameters of the right shapes, which spares the compilation of `init`."""
    shapes, _ = jax.eval_shape(model.init, jax.random.key(1))
    rng = np.random.default_rng(1)

    def make(path, leaf):
        if path[-1].key == "scale":
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        scale = 1.0 if path[-1].key == "embedding" else leaf.shape[0] ** -0.5
        return rng.normal(scale=scale, size=leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(make, shapes)


@functools.partial(jax.jit, static_argnames=("model", "beam"))
def search(params, tokens, trie, *, model, beam):
    return model.search(params, tokens, trie, beam=beam)


@functools.partial(jax.jit, static_argnames="model")
def score(params, tokens, docids, *, model):
    return model.score(params, tokens, docids)


@functools.partial(jax.jit, static_argnames="model")
def gradient(params, batch, key=None, *, model):
    return jax.value_and_grad(model.loss_fn, has_aux=True)(params, batch, key)


def queries() -> np.ndarray:
    rng = np.random.default_rng(2)
    tokens = rng.integers(3, START, (BATCH, LENGTH)).astype(np.int32)
    inside = np.arange(LENGTH) < rng.integers(1, LENGTH + 1, BATCH)[:, None]
    return np.where(inside, tokens, 0).astype(np.int32)


@functools.cache
def identifiers():
    """Variable lengths, one identifier inside another before EOS, one with two documents."""
    rng = np.random.default_rng(4)
    sequences = [rng.integers(2, DOCIDS, rng.integers(1, 4)).tolist() for _ in range(20)]
    sequences += [[2], [2, 3], [2, 3, 4], [2, 3]]
    labels = ["<pad>", "</s>", *(f"t{i}" for i in range(2, DOCIDS))]
    return build_trie(
        DocidTable.from_sequences(sequences, range(len(sequences)), labels, "test", {})
    )


def make_batch() -> dict[str, np.ndarray]:
    rows = identifiers().rows[np.arange(BATCH) * 2]
    targets = UNTIED.docids.to_model(rows)
    return {
        "encoder_input_tokens": queries(),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.float32),
    }


def score_all(model: RetrievalModel) -> np.ndarray:
    """float32[rows, batch]: every identifier of the trie for every query, teacher-forced."""
    rows = identifiers().rows
    return np.stack(
        [score(params_of(model), queries(), np.tile(r, (BATCH, 1)), model=model) for r in rows]
    )


# --- docid logits ------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize(("start", "size"), [(START, DOCIDS), (10, 50), (2, 62)])
def test_docid_logits_are_slices_of_the_full_logits(model, start, size):
    """Whether docids are few of the vocabulary or most of it."""
    model = dataclasses.replace(model, docids=DocidSpace(start, size))
    states = np.random.default_rng(0).normal(size=(3, 2, 16)).astype(np.float32)
    ours = np.asarray(model.docid_logits(params_of(model), states))
    full = T5(model.config).apply({"params": params_of(model)}, states, method=T5.logits)
    assert ours.shape == (3, 2, size) and ours.dtype == np.float32
    assert np.isneginf(ours[..., 0]).all(), "padding is never written"
    np.testing.assert_allclose(ours[..., 1], full[..., 1], atol=1e-5)
    np.testing.assert_allclose(ours[..., 2:], full[..., start : start + size - 2], atol=1e-5)


def test_init_gives_the_names_of_the_axes_in_the_same_tree():
    params, axes = jax.eval_shape(UNTIED.init, jax.random.key(0))
    names = set(traverse_util.flatten_dict(params))
    assert {(*path[:-1], f"{path[-1]}_axes") for path in names} == set(
        traverse_util.flatten_dict(axes)
    )
    assert ("decoder", "logits_dense", "kernel") in names


# --- scores ------------------------------------------------------------------------------------


def test_score_is_the_sum_over_the_docid_vocabulary():
    """By hand from the full logits: log softmax over EOS and docid tokens, at each true token."""
    params, encoder = params_of(UNTIED), queries()
    network = T5(CONFIG)
    columns = np.r_[1, START : START + DOCIDS - 2]

    @jax.jit
    def full_logits(inputs):
        states = network.apply({"params": params}, encoder, inputs)
        return network.apply({"params": params}, states, method=T5.logits)

    for row in identifiers().rows[::7]:
        inputs = np.array([0, *[t if t < 2 else t + START - 2 for t in row[:-1]]], np.int32)
        logits = np.asarray(full_logits(np.tile(inputs, (BATCH, 1))), np.float64)[..., columns]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = sum(log_p[:, n, t - 1] for n, t in enumerate(row) if t)
        ours = score(params, encoder, np.tile(row, (BATCH, 1)), model=UNTIED)
        np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "beam"),
    [(UNTIED, 4), (UNTIED, 30), (TIED, 30)],
    ids=["untied-4", "untied-30", "tied-30"],
)
def test_search_scores_what_score_scores(model, beam):
    """Cached, with beams, against teacher-forced: the same log p for every identifier found."""
    trie, expected = identifiers(), score_all(model)
    result = search(params_of(model), queries(), trie.on_device(), model=model, beam=beam)
    assert result.valid.all(axis=1).any() or beam > len(trie.rows)
    for query in range(BATCH):
        valid = np.asarray(result.valid[query])
        rows = np.asarray(result.row[query])[valid]
        assert len(set(rows)) == len(rows) == min(beam, len(trie.rows))
        np.testing.assert_array_equal(np.asarray(result.tokens[query])[valid], trie.rows[rows])
        np.testing.assert_allclose(
            np.asarray(result.scores[query])[valid], expected[rows, query], atol=1e-4
        )
        if beam >= len(trie.rows):
            best = np.sort(expected[:, query])[::-1]
            np.testing.assert_allclose(np.asarray(result.scores[query])[valid], best, atol=1e-4)


@pytest.mark.parametrize("beam", [3, 12])
def test_a_tail_in_one_pass_scores_what_score_scores(beam):
    """Identifiers that part early: most of their tokens are scored at once, behind the cache."""
    rng = np.random.default_rng(6)
    stems = [(a, b) for a in range(2, 6) for b in range(2, 5)]
    ids = [[*stem, *rng.integers(2, DOCIDS, rng.integers(2, 5))] for stem in stems]
    labels = ["<pad>", "</s>", *(f"t{i}" for i in range(2, DOCIDS))]
    trie = build_trie(DocidTable.from_sequences(ids, range(len(ids)), labels, "test", {}))
    device = trie.on_device()
    assert device.tail(BATCH * beam) == trie.max_length - 2 > 2
    result = search(params_of(UNTIED), queries(), device, model=UNTIED, beam=beam)
    assert result.valid.all()
    for place in range(beam):
        rows = np.asarray(result.row[:, place])
        expected = score(params_of(UNTIED), queries(), trie.rows[rows], model=UNTIED)
        np.testing.assert_allclose(result.scores[:, place], expected, atol=1e-4)
    assert all(len(set(rows)) == beam for rows in np.asarray(result.row).tolist())


def test_padding_of_the_queries_changes_no_score():
    docids = identifiers().rows[:BATCH]
    wider = np.pad(queries(), ((0, 0), (0, 3)))
    plain = score(params_of(UNTIED), queries(), docids, model=UNTIED)
    padded = score(params_of(UNTIED), wider, docids, model=UNTIED)
    np.testing.assert_allclose(plain, padded, rtol=1e-5)


def test_bfloat16_searches_and_scores_nearly_the_same():
    half = dataclasses.replace(UNTIED, config=dataclasses.replace(CONFIG, dtype="bfloat16"))
    trie, exact = identifiers(), score_all(UNTIED)
    result = search(params_of(UNTIED), queries(), trie.on_device(), model=half, beam=30)
    assert result.scores.dtype == jnp.float32
    for query in range(BATCH):
        valid = np.asarray(result.valid[query])
        assert valid.sum() == len(trie.rows)
        rows = np.asarray(result.row[query])[valid]
        error = np.abs(np.asarray(result.scores[query])[valid] - exact[rows, query])
        assert error.max() < 1.0 and error.mean() < 0.2  # of scores around -15


# --- loss --------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_of_the_scores():
    """Before smoothing and z-loss."""
    batch = make_batch()
    (loss, parts), _ = gradient(params_of(UNTIED), batch, model=SMOOTH)
    local = UNTIED.docids.to_local(batch["decoder_target_tokens"])
    scores = score(params_of(UNTIED), batch["encoder_input_tokens"], local, model=UNTIED)
    expected = -float(scores.sum()) / batch["decoder_loss_weights"].sum()
    assert float(parts["cross_entropy"]) == pytest.approx(expected, rel=1e-5)
    assert parts["loss"] == loss
    assert {"token_accuracy", "docid_accuracy"} < set(parts)


def test_gradients_are_finite_and_stay_in_the_docid_block():
    """With smoothing and z-loss; columns of the output matrix that are no docids get none."""
    (loss, parts), grads = gradient(params_of(UNTIED), make_batch(), model=SMOOTH)
    without_z = float(loss) - float(parts["z_loss"])
    assert float(parts["z_loss"]) > 0, "the z-loss reaches the loss"
    assert abs(without_z - float(parts["cross_entropy"])) > 1e-3, "and so does smoothing"
    for path, value in traverse_util.flatten_dict(grads).items():
        assert np.isfinite(value).all(), path
        assert np.abs(value).max() > 0, path
    columns = np.abs(grads["decoder"]["logits_dense"]["kernel"]).max(axis=0)
    touched = [1, *range(START, START + DOCIDS - 2)]
    assert (columns[touched] > 0).all()
    assert not np.delete(columns, touched).any()


def dropout_key(seed: int):
    return jax.random.key(seed, impl="unsafe_rbg")  # compiles faster than threefry


def test_dropout_only_with_a_key():
    """Without one the loss agrees with `score`, which knows no dropout (tested above)."""
    batch, params = make_batch(), params_of(UNTIED)
    plain, one, again, other = (
        float(gradient(params, batch, key, model=SMOOTH)[0][0])
        for key in (None, dropout_key(1), dropout_key(1), dropout_key(2))
    )
    assert one == again
    assert len({plain, one, other}) == 3


def test_remat_changes_no_gradient():
    """Nor the dropout: the backward pass draws the masks of the forward pass again."""
    lean = dataclasses.replace(SMOOTH, config=dataclasses.replace(CONFIG, remat=True))
    key = dropout_key(5)
    (loss, _), grads = gradient(params_of(UNTIED), make_batch(), key, model=SMOOTH)
    (lean_loss, _), lean_grads = gradient(params_of(UNTIED), make_batch(), key, model=lean)
    assert float(loss) == pytest.approx(float(lean_loss), rel=1e-6)
    assert jax.tree.structure(grads) == jax.tree.structure(lean_grads)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(lean_grads), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=1e-4)


def test_one_and_four_devices_give_the_same_loss_and_gradients():
    """The batch is split over the devices, and most of its padding falls to the last of them."""
    batch = make_batch()
    batch["decoder_loss_weights"][5:] = 0
    batch["decoder_target_tokens"][5:] = 0
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axis)) for axis in (("data",), ()))
    placed = {name: jax.device_put(x, rows) for name, x in batch.items()}
    assert len(placed["encoder_input_tokens"].sharding.device_set) == 4
    alone = gradient(params_of(UNTIED), batch, model=SMOOTH)
    split = gradient(jax.device_put(params_of(UNTIED), everywhere), placed, model=SMOOTH)
    for one, four in zip(*map(jax.tree.leaves, (alone, split)), strict=True):
        np.testing.assert_allclose(one, four, atol=1e-5, rtol=1e-4)
