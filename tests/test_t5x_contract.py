"""The T5X runner without T5X: what T5X would ask, and numbers that T5X itself has computed."""

from __future__ import annotations

import inspect
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
from flax import traverse_util
from t5x_contract import LOGICAL_AXES, MODEL_ATTRIBUTES, MODEL_METHODS
from tiny import FAST, tiny_corpus

from genret_jax.data.query_tasks import register_queries
from genret_jax.decoding import constrained_beam_search
from genret_jax.docids.table import DocidTable
from genret_jax.errors import UserError
from genret_jax.indexing import build_index
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.network import T5, empty_cache
from genret_jax.recipe import gin_folder, load_recipe
from genret_jax.stages.common import retrieval_model
from genret_jax.t5x import checkpoint
from genret_jax.t5x.models import T5XModel
from genret_jax.trie import build_trie

GOLDEN = Path(__file__).parent / "data" / "t5x_golden.npz"
CONFIG = T5Config(
    vocab_size=7,
    embed_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=12,
    num_encoder_layers=2,
    num_decoder_layers=2,
    dropout_rate=0.0,
)


@pytest.fixture(scope="module")
def golden():
    """(parameters, batch, everything else) that T5X computed."""
    with np.load(GOLDEN) as file:
        found = dict(file)
    parts = ({}, {}, {})
    for name, value in found.items():
        which = 0 if name.startswith("params/") else 1 if name.startswith("batch/") else 2
        parts[which][name.removeprefix("params/").removeprefix("batch/")] = value
    return traverse_util.unflatten_dict(parts[0], sep="/"), parts[1], parts[2]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    corpus, recipe = tiny_corpus(), load_recipe("dogr", bindings=FAST)
    folder = tmp_path_factory.mktemp("t5x") / "index"
    return build_index(
        corpus,
        folder,
        docids=recipe.docids,
        vocabulary=recipe.vocabulary,
        pairs=corpus.pairs("train"),
    )


@pytest.fixture(scope="module")
def model(index):
    native = retrieval_model(load_recipe("dogr", bindings=FAST), index)
    return T5XModel(native, native, index, beam=5)


@pytest.fixture(scope="module")
def params(model):
    return model.get_initial_variables(jax.random.key(3), {}, {})["params"]


def _batch(index, *texts):
    rows = [[*index.vocabulary.encode(text), 1] for text in texts]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, out in zip(rows, tokens, strict=True):
        out[: len(row)] = row
    return {"encoder_input_tokens": jnp.asarray(tokens)}


def test_parameters_are_named_as_in_t5x_and_give_its_logits(golden):
    params, batch, found = golden
    network = T5(CONFIG)
    ours = network.init(jax.random.key(0), *batch.values(), method=_logits)["params"]
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, params)
    tokens = batch["encoder_input_tokens"], batch["decoder_input_tokens"]
    logits = network.apply({"params": params}, *tokens, method=_logits)
    written = batch["decoder_target_tokens"] > 0  # T5X does not attend to what comes after
    np.testing.assert_allclose(logits[written], found["logits"][written], atol=1e-5)


def _logits(network, encoder_tokens, decoder_tokens, *_):
    return network.logits(network(encoder_tokens, decoder_tokens))


def test_constrained_search_over_all_sequences_is_t5x_beam_search(golden):
    """Over a trie of every sequence, cached decoding step by step, against T5X's wide beam."""
    params, batch, found = golden
    network, variables = T5(CONFIG), {"params": params}
    words = [list(w) for n in (1, 2) for w in itertools.product(range(2, 7), repeat=n)]
    labels = ("<pad>", "</s>", *"abcde")
    table = DocidTable.from_sequences(words, list(range(len(words))), labels, "all", {})
    tokens = jnp.asarray(batch["encoder_input_tokens"])
    cross = network.apply(variables, tokens, method=T5.start)

    def step(last, position, cache):
        states, cache = network.apply(variables, last, position, cache, cross, method=T5.step)
        return network.apply(variables, states, method=T5.logits), cache

    trie = build_trie(table).on_device()
    result = constrained_beam_search(
        step, empty_cache(CONFIG, len(tokens), 1, 3), trie, batch=len(tokens), beam=len(words)
    )
    for row in range(len(tokens)):
        # T5X may write padding inside a sequence, and orders from worst to best.
        theirs = {
            tuple(int(t) for t in sequence if t): float(score)
            for sequence, score in zip(
                found["beam_tokens"][row], found["beam_scores"][row], strict=True
            )
            if re.fullmatch(r"[2-6]{1,2}10*", "".join(map(str, sequence))) and score > -1e6
        }
        ours = {
            tuple(int(t) for t in sequence if t): float(score)
            for sequence, score in zip(result.tokens[row], result.scores[row], strict=True)
        }
        assert ours.keys() == theirs.keys() and len(ours) == 30
        for sequence, score in ours.items():
            assert score == pytest.approx(theirs[sequence], abs=1e-4)


@pytest.mark.parametrize("method", MODEL_METHODS)
def test_methods_take_what_t5x_passes(method):
    names = list(inspect.signature(getattr(T5XModel, method)).parameters)[1:]
    wanted = MODEL_METHODS[method]
    assert names[: len(wanted)] == wanted
    # T5X decides by these names what it passes besides.
    assert not {"flax_mutables"} & set(names)


def test_attributes_are_those_that_t5x_reads(model, index):
    assert all(hasattr(model, name) for name in MODEL_ATTRIBUTES)
    assert issubclass(model.FEATURE_CONVERTER_CLS, seqio.FeatureConverter)
    assert model.output_vocabulary.vocab_size == index.vocabulary.size


def test_every_parameter_has_logical_axes_that_t5x_knows(model):
    variables = model.get_initial_variables(jax.random.key(0), {}, {})
    axes = traverse_util.flatten_dict(variables["params_axes"].unfreeze(), sep="/")
    for name, value in traverse_util.flatten_dict(variables["params"].unfreeze(), sep="/").items():
        names = axes[f"{name}_axes"].names
        assert len(names) == value.ndim and set(names) <= LOGICAL_AXES


def test_loss_is_the_native_one_with_metrics_of_clu(model, params, index):
    docid = index.vocabulary.docids.to_model(np.asarray(index.table.tokens[:1]))
    batch = {
        **_batch(index, "repair a lift"),
        "decoder_input_tokens": jnp.pad(docid, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": jnp.asarray(docid),
        "decoder_loss_weights": jnp.ones(docid.shape),
    }
    loss, metrics = model.loss_fn(params, batch, None)
    expected, parts = model.trainable.loss_fn(params, batch, None)
    assert float(loss) == float(expected)
    two = metrics["loss"].merge(metrics["loss"])  # as over two steps
    assert float(two.compute()) == pytest.approx(float(expected))
    assert metrics.keys() == parts.keys()
    assert float(model.eval_fn(params, batch)[0]) == float(expected)
    score = model.score_batch(params, batch)
    assert score.shape == (1,) and score[0] < 0
    with pytest.raises(ValueError, match="keeps no intermediates"):
        model.score_batch(params, batch, return_intermediates=True)


def test_beams_come_in_t5x_order_and_in_its_vocabulary(model, params, index):
    batch = _batch(index, "repair a lift", "honey")
    tokens, aux = model.predict_batch_with_aux(params, batch)
    found = model.model.search(
        params, batch["encoder_input_tokens"], index.trie.on_device(), beam=5
    )
    np.testing.assert_array_equal(aux["scores"][:, ::-1], found.scores)
    np.testing.assert_array_equal(aux["row"][:, ::-1], found.row)
    assert (np.diff(aux["scores"], axis=1) >= 0).all(), "the best comes last"
    local = index.vocabulary.docids.to_local(np.asarray(tokens[:, ::-1]))
    np.testing.assert_array_equal(local, found.tokens)
    np.testing.assert_array_equal(model.predict_batch(params, batch), tokens)
    best, one = model.predict_batch_with_aux(params, batch, return_all_decodes=False)
    np.testing.assert_array_equal(best, tokens[:, -1])
    np.testing.assert_array_equal(one["scores"], aux["scores"][:, -1])
    part = build_trie(
        DocidTable.from_sequences(
            [[int(t) for t in index.table.tokens[3] if t]], [3], index.table.labels, "one", {}
        )
    )
    where = {"trie": part.on_device()}
    only, few = model.predict_batch_with_aux(params, batch, decoder_params=where, num_decodes=2)
    assert few["row"].tolist() == [[-1, 0]] * 2 and np.isneginf(few["scores"][:, 0]).all()


def test_a_beam_must_be_positive(model, index):
    with pytest.raises(UserError, match="beam must be at least 1, found 0"):
        T5XModel(model.model, model.model, index, beam=0)


def test_the_trie_is_no_constant_of_the_program_where_jax_is_told_so():
    """With the flag that README names, a program's text does not grow with what it closes over."""
    program = (
        "import jax, jax.numpy as jnp, numpy as np\n"
        "table = np.arange(100_000, dtype=np.int32)\n"
        "text = jax.jit(lambda i: jnp.asarray(table)[i]).lower(jnp.arange(4)).as_text()\n"
        "print(len(text))"
    )
    lengths = [
        int(
            subprocess.run(
                [sys.executable, "-c", program],
                env={**os.environ, "JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS": flag},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for flag in ("0", "1")
    ]
    assert lengths[0] > 400_000 > 10_000 > lengths[1]


def test_query_tasks_measure_documents(index):
    corpus = tiny_corpus()
    ids = [document.id for document in corpus.documents]
    name = register_queries(
        "t5x_queries", corpus.split_queries("dev"), corpus.qrels["dev"], index, ids, split="dev"
    )
    task = seqio.TaskRegistry.get(name)
    data = list(task.get_dataset({"inputs": 12, "targets": 4}, split="dev", shuffle=False))
    assert [e["query_id_pretokenized"].numpy().decode() for e in data] == list(corpus.qrels["dev"])
    vocabulary = task.output_features["targets"].vocabulary
    assert data[0]["inputs"].numpy()[-1] == 1
    # A beam, worst first: another document, then what is no docid, then the right one.
    right = vocabulary.decode(data[1]["targets"].numpy().tolist())
    wrong = vocabulary.decode(data[0]["targets"].numpy().tolist())
    example = {k: v.numpy() for k, v in data[1].items()}
    read = task.postprocess_fn([wrong, "<docid:99>", right], example=example, is_target=False)
    assert read == ("bread-dev-0", ["bread", "lifts"])
    (metric,) = task.metric_fns
    others = [(q, []) for q in corpus.qrels["dev"] if q != "bread-dev-0"]
    assert metric([], [read, *others])["hits@1"] == pytest.approx(1 / 8)
    swapped = (read[0], read[1][::-1])
    assert metric([], [swapped, *others])["mrr@10"] == pytest.approx(1 / 16)


def test_docids_decode_alike_with_and_without_tensorflow(model, index):
    tokens = index.vocabulary.docids.to_model(np.asarray(index.table.tokens[:3]))
    text = [model.output_vocabulary.decode(row.tolist()) for row in tokens]
    decoded = model.output_vocabulary.decode_tf(np.asarray(tokens)).numpy()
    assert [t.decode() for t in decoded] == text and text[0].startswith("<docid:")
    words = index.vocabulary.encode("repair lifts")
    assert (
        model.output_vocabulary.decode_tf(np.array([words], np.int32)).numpy()[0].decode()
        == "repair lifts"
    )


def test_checkpoints_that_are_none_are_refused(tmp_path):
    with pytest.raises(UserError, match="no checkpoint_STEP there; give T5X's MODEL_DIR"):
        checkpoint.latest(tmp_path)
    for step in (9, 10):
        (tmp_path / f"checkpoint_{step}").mkdir()
    (tmp_path / "checkpoint_tmp").mkdir()
    found = checkpoint.latest(tmp_path)
    assert (
        found.name == "checkpoint_10"
        and checkpoint.latest(tmp_path / "checkpoint_9").name[-1] == "9"
    )
    with pytest.raises(UserError, match="checkpoint_10: no whole checkpoint of T5X"):
        checkpoint.load_params(found, {})


def test_recipes_for_t5x_include_files_that_exist():
    for file in (gin_folder() / "recipes").glob("*.gin"):
        for name in re.findall(r"include '([^']+)'", file.read_text()):
            if name.startswith("t5x/"):
                continue  # of T5X's own
            place = gin_folder().parent if name.startswith("gin_configs/") else gin_folder()
            assert (place / name).is_file(), f"{file.name} includes {name}"
