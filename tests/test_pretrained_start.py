"""Runs that begin with a pretrained T5: recipe, first parameters, the run's folder, its export."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from live import LIVE
from tiny import FAST, tiny_corpus

from genret_jax import Retriever, UserError
from genret_jax.cli import main
from genret_jax.docids.build import build_docids
from genret_jax.docids.collisions import plain_label, text_of_label
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.model import RetrievalModel
from genret_jax.modeling.network import T5
from genret_jax.pretrained.checkpoint import open_checkpoint, write_checkpoint
from genret_jax.recipe import load_recipe
from genret_jax.training.pretrained_start import pretrained_start, token_pieces
from genret_jax.vocabularies import DocidSpace, Vocabulary, train_text_model

pytestmark = pytest.mark.usefixtures("one_device")

# T5 1.1 and T5 1.0 in small. ROWS: more than there are pieces, as sentinels and padding are.
ROWS = 300
SIZES = T5Config(
    vocab_size=ROWS,
    embed_dim=16,
    num_heads=3,
    head_dim=8,
    mlp_dim=24,
    num_encoder_layers=1,
    num_decoder_layers=2,
    dropout_rate=0.05,
    layer_norm_epsilon=1e-5,
)
KINDS = {
    "1.1": SIZES,
    "1.0": dataclasses.replace(SIZES, tied_embeddings=True, feed_forward="relu"),
}
# A schedule without sizes: those are the checkpoint's.
QUICK = [b for b in FAST if not b.startswith(("NetworkConfig", "VocabularyConfig"))]
QUICK += ["TrainConfig.steps = 3", "TrainConfig.evaluations = 1"]
OPTIONS = [part for binding in QUICK for part in ("--gin", binding)]


@pytest.fixture(scope="module")
def text_model():
    corpus = tiny_corpus()
    return train_text_model([d.whole for d in corpus.documents], size=200)


def _shapes(config):
    model = RetrievalModel(config, DocidSpace(start=4, size=4))
    return jax.eval_shape(lambda rng: model.init(rng)[0], jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, encoder, decoder):
    """Over the whole vocabulary, float32[batch, length, vocab]."""

    def run(network, a, b):
        return network.logits(network(a, b))

    return T5(config).apply({"params": params}, encoder, decoder, method=run)


@pytest.fixture(scope="module")
def checkpoints(text_model, tmp_path_factory):
    """Kind -> folder, with numbers as T5 has them: output columns that tell pieces apart."""
    home, rng = tmp_path_factory.mktemp("pretrained"), np.random.default_rng(1)

    def number(path, leaf):
        if path[-1].key == "scale":
            return np.full(leaf.shape, 2.0, np.float32)
        size = {"token_embedder": 5.0, "logits_dense": 3.0}.get(path[-2].key, leaf.shape[0] ** -0.5)
        return rng.normal(1.0 if size > 1 else 0.0, size, leaf.shape).astype(np.float32)

    for kind, config in KINDS.items():
        params = jax.tree_util.tree_map_with_path(number, _shapes(config))
        (home / kind).mkdir()
        write_checkpoint(params, config, home / kind, text_model=text_model)
    return {kind: home / kind for kind in KINDS}


# --- the recipe --------------------------------------------------------------------------------


def test_a_pretrained_t5_decides_sizes_pieces_and_start(checkpoints):
    folder = checkpoints["1.1"]
    recipe = load_recipe("dogr", init=str(folder))
    network = recipe.network.t5(ROWS)
    assert dataclasses.replace(network, embedding_scale=1.0) == KINDS["1.1"]
    assert recipe.vocabulary.model == str(folder / "spiece.model")
    assert (recipe.vocabulary.rows, recipe.train.start) == (ROWS, "pretrained")
    assert recipe.train.init == str(folder)
    assert recipe.train.learning_rate != load_recipe("dogr").train.learning_rate
    assert len(recipe.checkpoint) == 64 and load_recipe("dogr").checkpoint == ""
    same = load_recipe("dogr", bindings=[f"TrainConfig.init = {str(folder)!r}"])
    assert same == recipe, "a line of gin is as good"


def test_what_may_be_chosen_may_still_be_chosen(checkpoints, monkeypatch):
    folder = checkpoints["1.1"]
    free = [
        "NetworkConfig.dropout_rate = 0.3",
        "NetworkConfig.dtype = 'bfloat16'",
        "NetworkConfig.remat = True",
        "NetworkConfig.embed_dim = 16",  # says what the checkpoint says
        "TrainConfig.learning_rate = 1e-5",
    ]
    recipe = load_recipe("dsi", init=str(folder), bindings=free)
    assert (recipe.network.dropout_rate, recipe.network.dtype) == (0.3, "bfloat16")
    assert recipe.network.remat and recipe.train.learning_rate == 1e-5
    monkeypatch.chdir(folder.parent)
    relative = load_recipe("dsi", init=folder.name, bindings=free)
    assert relative == recipe, "one run, from wherever it is asked for"
    assert load_recipe("dsi", init="").train.init == "", "no name is no checkpoint"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "base"], "NetworkConfig.embed_dim is 768, but .* has 16; leave out"),
        (["--gin", "NetworkConfig.num_heads = 4"], "NetworkConfig.num_heads is 4, but .* has 3"),
        (["--gin", "NetworkConfig.feed_forward = 'relu'"], "is 'relu', but .* has 'gated-gelu'"),
        (["--gin", "VocabularyConfig.model = 'other.model'"], "VocabularyConfig.model is 'other"),
        (["--gin", "VocabularyConfig.rows = 400"], "VocabularyConfig.rows is 400, but"),
        (["--gin", "TrainConfig.start = 'lexical'"], "TrainConfig.start is 'lexical', but"),
        (["--init", "/nowhere/t5"], "/nowhere/t5: no such folder; give one with config.json"),
    ],
)
def test_contradictions_are_one_line(options, message, checkpoints, collection, tmp_path, capsys):
    init = ["--init", str(checkpoints["1.1"])]
    assert main(["fit", str(collection), "--out", str(tmp_path / "run"), *init, *options]) == 2
    found = capsys.readouterr().err
    assert found.startswith("genret: ") and found.count("\n") == 1
    with pytest.raises(UserError, match=message):
        raise UserError(found)
    assert not (tmp_path / "run").exists()


def test_a_start_without_a_model_or_a_model_without_pieces_is_refused(checkpoints, tmp_path):
    with pytest.raises(UserError, match="start is 'pretrained', but no model is given; give --ini"):
        load_recipe("dsi", bindings=["TrainConfig.start = 'pretrained'"])
    folder = shutil.copytree(checkpoints["1.1"], tmp_path / "mute")
    (folder / "spiece.model").rename(tmp_path / "moved.model")
    with pytest.raises(UserError, match="mute: no spiece.model, and .* put it there, or give Voc"):
        load_recipe("dsi", init=str(folder))
    given = f"VocabularyConfig.model = {str(tmp_path / 'moved.model')!r}"
    recipe = load_recipe("dsi", init=str(folder), bindings=[given])
    assert recipe.vocabulary.model == str(tmp_path / "moved.model")


def test_more_pieces_than_rows_are_refused(collection, tmp_path, text_model, capsys):
    (tmp_path / "spiece.model").write_bytes(text_model)
    lines = ["VocabularyConfig.rows = 20", f"VocabularyConfig.model = '{tmp_path}/spiece.model'"]
    options = [part for line in lines for part in ("--gin", line)]
    assert main(["index", str(collection), "--out", str(tmp_path / "run"), *options]) == 2
    assert "VocabularyConfig.rows is 20, but" in capsys.readouterr().err


# --- the first parameters ----------------------------------------------------------------------


def _table(kind, vocabulary):
    return build_docids(kind, tiny_corpus().documents, pieces=vocabulary.pieces)


def _start(folder, text_model, kind, seed=0):
    """(model, vocabulary, table, parameters at the start)."""
    checkpoint = open_checkpoint(folder)
    table = _table(kind, Vocabulary(text_model, 2))
    vocabulary = Vocabulary(text_model, table.vocab_size, ROWS)
    config = dataclasses.replace(checkpoint.config, vocab_size=vocabulary.size)
    model = RetrievalModel(config, vocabulary.docids)
    fresh = jax.tree.map(lambda x: np.full(x.shape, np.nan, np.float32), _shapes(config))
    params = pretrained_start(fresh, checkpoint, config, vocabulary, table, seed=seed)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, fresh)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params)), "nothing fresh is left"
    return model, vocabulary, table, params


@pytest.mark.parametrize("size", KINDS)
def test_text_is_read_as_the_pretrained_model_reads_it(size, checkpoints, text_model):
    model, vocabulary, _, params = _start(checkpoints[size], text_model, "keywords")
    checkpoint = open_checkpoint(checkpoints[size])
    assert vocabulary.docids.start == ROWS > vocabulary.text_size
    tokens = vocabulary.encode_batch(["who repairs lifts?", "bread"], 8)
    before = _logits(checkpoint.config, checkpoint.params(), tokens, tokens[:, :3])
    now = _logits(model.config, params, tokens, tokens[:, :3])
    np.testing.assert_allclose(now[..., :ROWS], before, atol=1e-4)


@pytest.mark.parametrize("size", KINDS)
@pytest.mark.parametrize("kind", ["keywords", "title"])
def test_docid_tokens_with_a_text_begin_as_its_pieces(size, kind, checkpoints, text_model):
    model, vocabulary, table, params = _start(checkpoints[size], text_model, kind)
    embedding = params["token_embedder"]["embedding"]
    columns = embedding.T if model.config.tied_embeddings else params["decoder"]["logits_dense"]
    columns = columns if model.config.tied_embeddings else columns["kernel"]
    for local, label in enumerate(table.labels[2:], 2):
        row = int(vocabulary.docids.to_model(np.int32(local)))
        if kind == "title":  # a title's tokens are pieces themselves
            ids = [vocabulary.piece_id(label)]
            assert ids[0] > 2
        else:
            ids = vocabulary.encode(label)
        np.testing.assert_allclose(embedding[row], embedding[ids].mean(0), rtol=1e-5)
        np.testing.assert_allclose(columns[:, row], columns[:, ids].mean(1), rtol=1e-5, atol=1e-6)


def test_only_labels_that_are_text_have_pieces(text_model):
    for text in ("torch", "<#2>", "\\<none>", "<pad>"):
        assert text_of_label(plain_label(text)) == text
    assert not text_of_label("<#2>") and not text_of_label("<none>")
    vocabulary = Vocabulary(text_model, 2)
    assert not any(token_pieces(_table("atomic", vocabulary), vocabulary)), "ids are no words"
    assert not any(token_pieces(_table("naive", vocabulary), vocabulary))
    documents = [dataclasses.replace(d, title="Bakers", text="") for d in tiny_corpus().documents]
    for kind in ("keywords", "title"):
        table = build_docids(kind, documents, pieces=vocabulary.pieces)
        found = dict(zip(table.labels[2:], token_pieces(table, vocabulary), strict=True))
        numbers = [ids for label, ids in found.items() if label.startswith("<#")]
        words = [ids for label, ids in found.items() if not label.startswith("<#")]
        assert numbers and not any(numbers), "what tells equal documents apart is no text"
        assert words and all(words)


@pytest.mark.parametrize("size", KINDS)
def test_other_docid_tokens_begin_at_random_and_without_confidence(size, checkpoints, text_model):
    model, vocabulary, table, params = _start(checkpoints[size], text_model, "atomic")
    block = slice(ROWS, ROWS + len(table.labels) - 2)
    embedding = params["token_embedder"]["embedding"]
    pieces, rows = embedding[3 : vocabulary.text_size], embedding[block]
    assert len(np.unique(rows, axis=0)) == 8
    if not model.config.tied_embeddings:
        assert rows.std() == pytest.approx(pieces.std(), rel=0.25)
        np.testing.assert_allclose(rows.mean(), pieces.mean(), atol=1.5)
    tokens = vocabulary.encode_batch([d.title for d in tiny_corpus().documents], 8)
    logits = np.asarray(_logits(model.config, params, tokens, np.zeros((8, 1), np.int32)))
    random, known = (logits[..., part].std(-1).mean() for part in (block, slice(3, 100)))
    assert 0.3 < random < 2 < known / 2, "pretrained columns of that size would be sure of nothing"
    again, other = (_start(checkpoints[size], text_model, "atomic", s)[3] for s in (0, 1))
    assert (again["token_embedder"]["embedding"] == embedding).all(), "a seed decides"
    assert (other["token_embedder"]["embedding"][block] != rows).any()


def test_a_learned_temperature_keeps_its_fresh_value(checkpoints, text_model):
    checkpoint = open_checkpoint(checkpoints["1.0"])
    table = _table("naive", Vocabulary(text_model, 2))
    vocabulary = Vocabulary(text_model, table.vocab_size, ROWS)
    config = dataclasses.replace(checkpoint.config, vocab_size=vocabulary.size)
    fresh = {"log_temperature": np.float32(0.25)}
    params = pretrained_start(fresh, checkpoint, config, vocabulary, table)
    assert params["log_temperature"] == np.float32(0.25)


# --- a run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(checkpoints, collection, tmp_path_factory):
    """A fit that hardly moves the parameters, of a copy of the checkpoint, and that copy."""
    home = tmp_path_factory.mktemp("runs")
    folder = shutil.copytree(checkpoints["1.0"], home / "t5")
    out = home / "run"
    command = ["fit", str(collection), "--out", str(out), "--init", str(folder)]
    command += ["--method", "dsi", "--docids", "keywords", *OPTIONS]
    command += ["--gin", "TrainConfig.learning_rate = 1e-9"]
    assert main(command) == 0
    return out, folder, command


def test_a_run_begins_with_the_checkpoint_and_says_so(run):
    out, folder, _ = run
    retriever, checkpoint = Retriever.load(out), open_checkpoint(folder)
    params, pretrained = retriever.params, checkpoint.params()
    np.testing.assert_allclose(
        params["token_embedder"]["embedding"][:ROWS],
        pretrained["token_embedder"]["embedding"],
        atol=1e-5,
    )
    for side in ("encoder", "decoder"):
        same = jax.tree.map(
            lambda a, b: np.allclose(a, b, atol=1e-6), params[side], pretrained[side]
        )
        assert all(jax.tree.leaves(same))
    mark = json.loads((out / "run.json").read_text())
    assert mark["recipe"]["checkpoint"] == checkpoint.digest
    assert mark["recipe"]["train"]["init"] == str(folder)
    assert f"pretrained T5 {folder}" in (out / "retriever" / "README.md").read_text()


def test_a_run_goes_on_with_the_same_checkpoint_only(run, caplog, capsys, tmp_path):
    out, folder, command = run
    assert main(command) == 0
    assert "already fitted" in capsys.readouterr().err
    about = (folder / "config.json").read_text()
    (folder / "config.json").write_text(about + "\n")
    assert main(command) == 2
    assert f"begun with other files than those now at {folder}; put" in capsys.readouterr().err
    (folder / "config.json").write_text(about)
    assert main(command) == 0


def test_the_retriever_needs_no_checkpoint(run, tmp_path):
    out, folder, _ = run
    alone = shutil.copytree(out / "retriever", tmp_path / "retriever")
    folder.rename(tmp_path / "away")
    try:
        hits = Retriever.load(alone).search("who repairs lifts?", k=8)
    finally:
        (tmp_path / "away").rename(folder)
    assert len(hits) == 8 and all(np.isfinite(hit.generation) for hit in hits)


def test_fit_from_python_takes_the_same_word(checkpoints, collection, tmp_path):
    with pytest.raises(UserError, match="NetworkConfig.embed_dim is 768"):
        Retriever.fit(collection, out=tmp_path, init=str(checkpoints["1.0"]), size="base")


# --- export ------------------------------------------------------------------------------------


def test_export_and_load_give_equal_logits(run, tmp_path, capsys):
    out, _, _ = run
    assert main(["export", str(out), "--out", str(tmp_path / "hf"), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert set(about["bytes"]) == {
        "config.json",
        "docids.jsonl",
        "model.safetensors",
        "spiece.model",
        "tokenizer_config.json",
        "generation_config.json",
    }
    retriever, exported = Retriever.load(out), open_checkpoint(tmp_path / "hf")
    model = retriever.ranker.model
    assert exported.config == model.config
    vocabulary = retriever.index.vocabulary
    tokens = vocabulary.encode_batch(["who repairs lifts?"], 8)
    targets = np.array([[0, about["docid_start"], 5]], np.int32)
    now, before = (
        _logits(model.config, params, tokens, targets)
        for params in (exported.params(), jax.device_get(retriever.params))
    )
    np.testing.assert_array_equal(now, before)
    assert (tmp_path / "hf" / "spiece.model").read_bytes() == vocabulary.model
    lines = [json.loads(x) for x in (tmp_path / "hf" / "docids.jsonl").read_text().splitlines()]
    assert [line["document"] for line in lines] == [d.id for d in tiny_corpus().documents]
    table = retriever.index.table
    for row, line in enumerate(lines):
        local = table.tokens[row, : table.lengths[row]]
        assert line["tokens"] == vocabulary.docids.to_model(local).tolist()
        assert line["docid"] == table.text(row)
    assert load_recipe("dsi", init=str(tmp_path / "hf")).vocabulary.rows == vocabulary.size


def test_export_refuses_what_it_should(run, tmp_path, capsys):
    out, _, _ = run
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        assert main(["export", str(out), "--out", str(tmp_path / name)]) == 2
        found = capsys.readouterr().err
        assert f"{name}: is there already; choose another --out" in found
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    assert main(["export", str(tmp_path / "full"), "--out", str(tmp_path / "new")]) == 2
    assert "not a retriever of genret_jax" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["export", str(out), "--out", str(tmp_path / "empty")]) == 0
    assert "config.json" in capsys.readouterr().out


@LIVE
def test_live_transformers_ranks_an_export_as_we_do(run, tmp_path):
    """Its tokenizer, its model, and the docids that docids.jsonl lists, within the docid block."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    out, _, _ = run
    assert main(["export", str(out), "--out", str(tmp_path / "hf")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf").eval()
    lines = [json.loads(x) for x in (tmp_path / "hf" / "docids.jsonl").read_text().splitlines()]
    retriever, query = Retriever.load(out), "Who repairs lifts, and who bakes bread?"
    space = retriever.index.vocabulary.docids
    allowed = torch.tensor([1, *range(space.start, space.start + space.size - 2)])
    expected = {hit.document: hit.generation for hit in retriever.search(query, k=8)}
    inputs = tokenizer(query, return_tensors="pt", truncation=True)
    length = retriever.ranker.input_length
    whole, ours = tokenizer(query)["input_ids"], retriever.index.vocabulary
    assert len(whole) > length and whole == [*ours.encode(query), 1]
    assert inputs["input_ids"].tolist() == ours.encode_batch([query], length).tolist()
    for line in lines:
        labels = torch.tensor([line["tokens"]])
        with torch.no_grad():
            logits = model(**inputs, labels=labels).logits
        log_p = logits - logits[..., allowed].logsumexp(-1, keepdim=True)
        score = log_p.gather(-1, labels[..., None]).sum()
        assert float(score) == pytest.approx(expected[line["document"]], abs=1e-3)
