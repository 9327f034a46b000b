"""Stacked layers under a scan against layers one by one: the same network, number for number."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file
from t5x_contract import LOGICAL_AXES
from test_lexical_start import _fresh, _model, corpus, examples, table, vocabulary  # noqa: F401
from test_parallelism import Numbered
from test_pretrained import GOLDEN, _forward
from tiny import FAST, tiny_corpus

from genret_jax import Retriever, UserError
from genret_jax.configs import TrainConfig
from genret_jax.docids.build import build_docids
from genret_jax.docids.table import DocidTable
from genret_jax.export import export_retriever
from genret_jax.modeling.contrastive import JointWeights
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.model import RetrievalModel
from genret_jax.modeling.network import T5, empty_cache
from genret_jax.modeling.query_generator import QueryGenerator
from genret_jax.modeling.ranking_model import RankingModel
from genret_jax.modeling.stacking import (
    is_stacked,
    stack_layers,
    through_layers,
    unstack_layers,
    with_layers,
)
from genret_jax.pretrained.checkpoint import open_checkpoint, write_checkpoint
from genret_jax.recipe import load_recipe
from genret_jax.t5x.checkpoint import load_params
from genret_jax.training import partitioning
from genret_jax.training.lexical_start import lexical_start
from genret_jax.training.optimizers import make_optimizer, set_learning_rate
from genret_jax.training.pretrained_start import pretrained_start
from genret_jax.training.trainer import Stepper
from genret_jax.trie import build_trie
from genret_jax.vocabularies import DocidSpace, Vocabulary

CONFIG = T5Config(
    vocab_size=128,
    embed_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=2,
    num_decoder_layers=2,
    embedding_scale=0.5,
    dropout_rate=0.0,
    learned_temperature=True,
)
SCANNED = dataclasses.replace(CONFIG, scan_layers=True)
DOCIDS = DocidSpace(50, 12)


def model_of(config: T5Config) -> RetrievalModel:
    return RetrievalModel(config, DOCIDS, label_smoothing=0.1)


@functools.cache
def params_of(config: T5Config = CONFIG):
    """Of layers one by one, every number of its own: norm scales and the like are moved."""
    params = jax.device_get(jax.jit(lambda: model_of(config).init(jax.random.key(0))[0])())
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda x: np.asarray(x + 0.1 * rng.standard_normal(x.shape), np.float32), params
    )


def near(got, wanted, tolerance=2e-5):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        finite = np.isfinite(b)
        np.testing.assert_array_equal(np.isfinite(a), finite)
        size = max(1.0, float(np.abs(b[finite]).max(initial=0.0)))
        np.testing.assert_allclose(a[finite], b[finite], atol=tolerance * size)


# --- the tree ----------------------------------------------------------------------------------


def test_stacked_is_one_by_one_with_an_axis_in_front():
    one, one_axes = jax.eval_shape(lambda: model_of(CONFIG).init(jax.random.key(0)))
    params, axes = jax.eval_shape(lambda: model_of(SCANNED).init(jax.random.key(0)))
    expected = jax.eval_shape(stack_layers, one)
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, expected)
    assert is_stacked(params) and not is_stacked(one)
    flat, shapes = (traverse_util.flatten_dict(x, sep="/") for x in (axes, params))
    alone = traverse_util.flatten_dict(one_axes, sep="/")
    for name, value in flat.items():
        before = alone[name.replace("layers/", "layers_0/")].names
        assert value.names == (("layers", *before) if "/layers/" in name else before)
        assert set(value.names) <= LOGICAL_AXES
        assert len(value.names) == len(shapes[name.removesuffix("_axes")].shape)
    assert set(flat) == {f"{name}_axes" for name in shapes}


def test_every_stacked_layer_begins_with_numbers_of_its_own():
    params = jax.jit(lambda: model_of(SCANNED).init(jax.random.key(0))[0])()
    kernel = np.asarray(params["encoder"]["layers"]["mlp"]["wi_0"]["kernel"])
    assert kernel.shape == (2, 16, 32)
    assert abs(np.corrcoef(kernel.reshape(2, -1))[0, 1]) < 0.2
    assert kernel.std(axis=(1, 2)) == pytest.approx(np.full(2, 16**-0.5), rel=0.15)  # fan in


@pytest.mark.parametrize("count", [1, 2, 11])
def test_there_and_back(count):
    rng = np.random.default_rng(count)
    layers = {f"layers_{n}": {"a": {"kernel": rng.normal(size=(2, 3))}} for n in range(count)}
    params = {"encoder": {**layers, "norm": np.ones(3)}, "scalar": np.float32(2)}
    stacked = stack_layers(params)
    kernel = stacked["encoder"]["layers"]["a"]["kernel"]
    assert isinstance(kernel, np.ndarray) and kernel.shape == (count, 2, 3)
    for n in range(count):  # 10 stands behind 9, not behind 1
        np.testing.assert_array_equal(kernel[n], layers[f"layers_{n}"]["a"]["kernel"])
    back = unstack_layers(stacked)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    for form, other in ((params, stacked), (stacked, params)):
        for tree in (form, other):
            found = with_layers(tree, stacked=is_stacked(form))
            jax.tree.map(np.testing.assert_array_equal, found, form)


@pytest.mark.parametrize(
    "layers",
    [
        {"layers_0": {"a": np.ones(2)}, "layers_2": {"a": np.ones(2)}},
        {"layers_0": {"a": np.ones(2)}, "layers_1": {"a": np.ones(3)}},
        {"layers_0": {"a": np.ones(2)}, "layers_1": {"b": np.ones(2)}},
    ],
)
def test_what_is_no_stack_is_refused(layers):
    with pytest.raises(UserError, match="not 2 layers of equal shapes from 0 on"):
        stack_layers({"encoder": layers})


# --- forward and backward ----------------------------------------------------------------------


@functools.cache
def _logits_and_gradient(config: T5Config):
    model, batch = model_of(config), Numbered()[0]
    params = with_layers(params_of(), stacked=config.scan_layers)

    def loss(params):
        value, _ = model.loss_fn(params, batch)
        return value, model.teacher_forced(params, batch)

    gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    return logits, gradient


@pytest.mark.parametrize("remat", [False, True])
def test_logits_and_gradients(remat):
    logits, gradient = _logits_and_gradient(dataclasses.replace(SCANNED, remat=remat))
    expected, expected_gradient = _logits_and_gradient(CONFIG)
    near(logits, expected)
    assert min(float(np.abs(x).max()) for x in jax.tree.leaves(gradient["encoder"])) > 1e-5
    near(gradient, stack_layers(expected_gradient))


def test_loss_and_gradients_of_stage_2():
    weights, batch = JointWeights(1.0, 0.5, 0.7), Numbered()[1]

    def run(config, params):
        ranking = RankingModel(model_of(config), weights, prefix_negatives=1)
        return jax.jit(jax.value_and_grad(ranking.loss_fn, has_aux=True))(params, batch)

    (loss, parts), gradient = run(SCANNED, stack_layers(params_of()))
    (expected, expected_parts), expected_gradient = run(CONFIG, params_of())
    near((loss, parts), (expected, expected_parts))
    near(gradient, stack_layers(expected_gradient))


class _Noise(nn.Module):
    @nn.compact
    def __call__(self, x):
        kept = self.param("one", nn.initializers.ones, (64,))
        return x, nn.Dropout(0.5)(kept, deterministic=False)


class _Noises(nn.Module):
    def setup(self):
        self.layers = _Noise()

    def __call__(self):
        return through_layers(self.layers, lambda layer, x, _: layer(x), 0.0, length=4)[1]


def test_every_layer_drops_other_numbers():
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    masks = np.asarray(_Noises().init_with_output(keys)[0]) > 0
    assert masks.shape == (4, 64) and len({mask.tobytes() for mask in masks}) == 4
    assert 0.4 < masks.mean() < 0.6


def test_dropout_is_on_with_a_key_and_off_without():
    model = model_of(dataclasses.replace(SCANNED, dropout_rate=0.3))
    params, batch = stack_layers(params_of()), Numbered()[0]
    loss = jax.jit(lambda key: model.loss_fn(params, batch, key)[0])
    first, again, other = (float(loss(jax.random.key(n))) for n in (0, 0, 1))
    without = float(jax.jit(lambda: model.loss_fn(params, batch)[0])())
    assert first == again and len({round(x, 5) for x in (first, other, without)}) == 3


# --- decoding ----------------------------------------------------------------------------------


def test_steps_and_tail():
    """Three steps of four beams, then three more at once, which leave the cache as it is."""
    batch = Numbered()[0]
    queries, tokens = batch["encoder_input_tokens"][:2], np.arange(48).reshape(2, 4, 6) + 50

    @functools.partial(jax.jit, static_argnums=0)
    def run(config, params):
        apply = functools.partial(T5(config).apply, {"params": params})
        cross = apply(queries, method=T5.start)
        cache, states = empty_cache(config, 2, 4, 6), []
        assert cache.max_length == 6
        for n in range(3):
            state, cache = apply(tokens[:, :, n], jnp.int32(n), cache, cross, method=T5.step)
            states.append(state)
        tail = apply(tokens[:, :, 3:], jnp.int32(3), cache, cross, method=T5.tail)
        return states, tail, cache.self_kv, cross

    states, tail, kv, cross = run(SCANNED, stack_layers(params_of()))
    wanted_states, wanted_tail, wanted_kv, wanted_cross = run(CONFIG, params_of())
    near((states, tail), (wanted_states, wanted_tail))
    near(kv, tuple(jnp.stack(x, axis=2) for x in zip(*wanted_kv, strict=True)))
    assert kv[0].shape == (2, 4, 2, 6, 2, 8), "layers stand behind batch and beam"
    near(cross.cross_kv, tuple(jnp.stack(x) for x in zip(*wanted_cross.cross_kv, strict=True)))


@pytest.mark.parametrize("normaliser", ["vocabulary", "children"])
def test_beam_search_finds_the_same(normaliser):
    rng = np.random.default_rng(8)
    rows = np.unique(rng.integers(2, 12, (60, 5)).astype(np.int32), axis=0)
    trie = build_trie(_table_of(rows)).on_device()
    queries = Numbered()[2]["encoder_input_tokens"][:4]

    def run(config, params):
        model = dataclasses.replace(model_of(config), normaliser=normaliser)
        search = functools.partial(model.search, beam=7)
        return jax.jit(search)(params, queries, trie)

    found, wanted = run(SCANNED, stack_layers(params_of())), run(CONFIG, params_of())
    assert np.ptp(np.asarray(wanted.scores)) > 0.5 and wanted.valid.all()
    np.testing.assert_array_equal(found.row, wanted.row)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-4)


def _table_of(rows):
    return DocidTable(
        tokens=rows,
        lengths=(rows > 0).sum(1).astype(np.int32),
        documents=np.arange(len(rows), dtype=np.int32),
        labels=("<pad>", "</s>", *map(str, range(2, 12))),
        kind="test",
        settings={},
    )


def test_sampled_queries_are_the_same():
    documents = jnp.asarray(Numbered()[0]["encoder_input_tokens"][:3])
    keys = jax.random.split(jax.random.key(5), 3)
    how = {"samples": 4, "length": 5, "top_k": 10, "temperature": 1.0}

    def run(config, params):
        return jax.jit(functools.partial(QueryGenerator(config, 40).sample, **how))(
            params, documents, keys
        )

    found, wanted = run(SCANNED, stack_layers(params_of())), run(CONFIG, params_of())
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.log_p, wanted.log_p, atol=1e-4)


# --- optimisers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adamw", {"weight_decay": 0.3}),
        ("adamw", {"weight_decay": 0.3, "anchor": 0.5}),
        ("adafactor", {}),
        ("adafactor", {"anchor": 0.5, "clip_norm": 0.0}),
    ],
)
def test_an_optimiser_sees_the_layers_and_not_the_stack(name, options):
    """Matrices long enough to be factored, layers of sizes apart, and scales that do not decay."""
    rng = np.random.default_rng(2)

    def tree(scale):
        layer = {"kernel": (130, 140), "thin": (130, 4), "scale": (130,)}
        sides = {
            f"layers_{n}": {
                k: np.float32(rng.normal(size=s) * scale ** (n + 1)) for k, s in layer.items()
            }
            for n in range(3)
        }
        return {"encoder": {**sides, "norm": {"scale": np.float32(rng.normal(size=130))}}}

    params, optimizer = tree(3.0), make_optimizer(name, **options)
    stacked = stack_layers(params)
    states = [optimizer.init(params), optimizer.init(stacked)]
    for _ in range(3):
        gradient = tree(5.0)
        states = [set_learning_rate(state, jnp.float32(0.1)) for state in states]
        update, states[0] = optimizer.update(gradient, states[0], params)
        found, states[1] = optimizer.update(stack_layers(gradient), states[1], stacked)
        near(found, stack_layers(update), 1e-6)
        params, stacked = optax.apply_updates(params, update), optax.apply_updates(stacked, found)
    near(stacked, stack_layers(params), 1e-6)


def test_adafactor_is_that_of_optax_where_nothing_is_stacked():
    rng = np.random.default_rng(4)
    params = {"a": jnp.asarray(rng.normal(size=(130, 140))), "b": jnp.asarray(rng.normal(size=9))}
    gradient = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)) * 1e3, params)
    ours, theirs = make_optimizer("adafactor", clip_norm=0.0), optax.adafactor(0.1, decay_rate=0.8)
    state, expected_state = set_learning_rate(ours.init(params), 0.1), theirs.init(params)
    for _ in range(2):
        found, state = ours.update(gradient, state, params)
        expected, expected_state = theirs.update(gradient, expected_state, params)
        near(found, expected, 1e-6)
    assert jax.tree.structure(state.inner_state) == jax.tree.structure(expected_state)


# --- what begins with other weights ------------------------------------------------------------


def test_a_lexical_start_is_the_same(vocabulary, examples):  # noqa: F811
    model = _model(vocabulary, num_encoder_layers=2, num_decoder_layers=3)
    fresh = _fresh(model)
    wanted = lexical_start(fresh, examples, model.config, model.docids)
    config = dataclasses.replace(model.config, scan_layers=True)
    found = lexical_start(stack_layers(fresh), examples, config, model.docids)
    jax.tree.map(np.testing.assert_array_equal, found, stack_layers(wanted))
    last = found["decoder"]["layers"]["encoder_decoder_attention"]["out"]["kernel"]
    assert not last[:2].any() and last[2].any()


def test_a_pretrained_t5_in_and_out(tmp_path):
    checkpoint = open_checkpoint(GOLDEN / "t5_v1_1")
    golden, params = np.load(GOLDEN / "t5_v1_1" / "golden.npz"), checkpoint.params()
    scanned = dataclasses.replace(checkpoint.config, scan_layers=True)
    tokens = golden["encoder_tokens"], golden["decoder_tokens"]
    logits, _ = _forward(scanned, stack_layers(params), *tokens)
    near(logits, golden["logits"], 1e-4)  # of transformers
    files = []
    for name, config, tree in (
        ("one", checkpoint.config, params),
        ("stacked", scanned, stack_layers(params)),
    ):
        (tmp_path / name).mkdir()
        write_checkpoint(tree, config, tmp_path / name, text_model=b"pieces")
        files.append([(tmp_path / name / x).read_bytes() for x in ("model.safetensors",)])
        files[-1].append((tmp_path / name / "config.json").read_bytes())
    assert files[0] == files[1]


def test_a_pretrained_start_is_the_same(corpus, vocabulary):  # noqa: F811
    checkpoint = open_checkpoint(GOLDEN / "t5_v1_1")
    docids = build_docids("atomic", corpus.documents)
    rows = max(checkpoint.config.vocab_size, vocabulary.text_size)
    larger = Vocabulary(vocabulary.model, docids.vocab_size, rows)
    config = dataclasses.replace(
        checkpoint.config, vocab_size=larger.size, learned_temperature=True
    )
    fresh = _fresh(RetrievalModel(config, larger.docids))
    wanted = pretrained_start(fresh, checkpoint, config, larger, docids)
    scanned = dataclasses.replace(config, scan_layers=True)
    found = pretrained_start(stack_layers(fresh), checkpoint, scanned, larger, docids)
    jax.tree.map(np.testing.assert_array_equal, found, stack_layers(wanted))
    assert "log_temperature" in found


@pytest.mark.parametrize("stacked", [False, True])
def test_a_checkpoint_of_t5x_is_read_into_either_form(stacked, tmp_path):
    params = with_layers(params_of(), stacked=not stacked)
    ocp.save(tmp_path / "checkpoint_7", {"target": params})
    like = jax.eval_shape(lambda: with_layers(params_of(), stacked=stacked))
    found = load_params(tmp_path / "checkpoint_7", like)
    expected = with_layers(params_of(), stacked=stacked)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# --- training ----------------------------------------------------------------------------------


def test_eight_devices_train_a_stack_as_one_device_trains_layers():
    batches, losses, states = Numbered(), [], []
    for config, params, mesh in (
        (CONFIG, params_of(), partitioning.make_mesh(devices=jax.devices()[:1])),
        (
            SCANNED,
            stack_layers(params_of()),
            partitioning.make_mesh(model_parallel=4, devices=jax.devices()),
        ),
    ):
        train = TrainConfig(batch_size=16, optimizer="adafactor")
        stepper = Stepper(model_of(config), train, mesh)
        state = stepper.begin_with(stepper.init(jax.random.key(0)), params)
        stepper.compile(state, batches)
        losses.append([])
        for n in range(3):
            state, metrics = stepper(state, batches[n], 1e-3)
            losses[-1].append(float(metrics["loss"]))
        states.append(state)
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)
    kernel = states[1].params["decoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 8)


@pytest.fixture(scope="module")
def retriever(one_device, tmp_path_factory):
    """Both stages of the default method, two layers a side, stacked."""
    bindings = [
        *FAST,
        "NetworkConfig.num_encoder_layers = 2",
        "NetworkConfig.num_decoder_layers = 2",
        "NetworkConfig.scan_layers = True",
        "TrainConfig.steps = 10",
        "TrainConfig.evaluations = 1",
        "ContrastiveConfig.steps = 5",
        "ContrastiveConfig.evaluations = 1",
    ]
    out = tmp_path_factory.mktemp("scanned") / "run"
    return Retriever.fit(tiny_corpus(), out=out, bindings=bindings)


def test_a_retriever_keeps_the_form_that_it_was_trained_in(retriever):
    assert retriever.about["network"]["scan_layers"] and is_stacked(retriever.params)
    names = set(load_file(retriever.folder / "model.safetensors"))
    assert "encoder/layers/mlp/wi_0/kernel" in names
    about = {**retriever.about, "network": {**retriever.about["network"], "scan_layers": False}}
    other = dataclasses.replace(retriever, params=unstack_layers(retriever.params), about=about)
    again = Retriever.load(retriever.folder)
    for query in ("find lifts people", "who bakes bread"):
        hits = [r.search(query, k=8, beam=8) for r in (retriever, again, other)]
        assert hits[0] == hits[1] and len(hits[0]) == 8
        for mine, theirs in zip(hits[0], hits[2], strict=True):
            assert mine.document == theirs.document
            assert mine.score == pytest.approx(theirs.score, abs=1e-4)
            assert mine.semantic == pytest.approx(theirs.semantic, abs=1e-3)


def test_a_stacked_retriever_is_exported_layer_by_layer(retriever, tmp_path):
    export_retriever(retriever, tmp_path / "t5")
    found = open_checkpoint(tmp_path / "t5").params()
    wanted = jax.device_get(unstack_layers(retriever.params))
    wanted.pop("log_temperature", None)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_the_largest_sizes_are_stacked():
    """Traced alone: bfloat16, remat and dropout fit into the loop, forward, backward and search."""
    for size in ("xxl", "xl"):
        network = load_recipe("dogr", size=size).network
        assert network.scan_layers and network.remat and network.dtype == "bfloat16"
    model = model_of(network.t5(128))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0))[0])
    assert params["decoder"]["layers"]["mlp"]["wo"]["kernel"].shape[0] == 24
    gradient = jax.grad(lambda p: model.loss_fn(p, Numbered()[0], jax.random.key(1))[0])
    assert jax.eval_shape(gradient, params) == params
    trie = build_trie(_table_of(np.array([[2, 3], [2, 4], [5, 6]], np.int32))).on_device()
    queries = Numbered()[0]["encoder_input_tokens"]
    found = jax.eval_shape(functools.partial(model.search, beam=2), params, queries, trie)
    assert found.scores.shape == (16, 2)
    assert not load_recipe("dogr", size="base").network.scan_layers
