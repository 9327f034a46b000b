"""Stage 2 from end to end on the tiny collection: what it leaves, resumes, and searches with."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from tiny import FAST, asked_questions, tiny_corpus

from genret_jax import Retriever, UserError
from genret_jax.cli import main
from genret_jax.data.contrastive import ContrastiveBatches, with_documents
from genret_jax.fit import fit
from genret_jax.indexing import Index
from genret_jax.negatives import Negatives
from genret_jax.recipe import load_recipe
from genret_jax.splitting import split_corpus
from genret_jax.stages.common import Materials
from genret_jax.stages.second import Miner, train_ranking
from genret_jax.training.budget import Clock
from genret_jax.training.interruption import Interrupted
from genret_jax.training.journal import read_records
from genret_jax.vectors import DocumentVectors

pytestmark = pytest.mark.usefixtures("one_device", "quiet")

# Rates at which so few steps change something. Docids of two tokens, so that some share a prefix.
BINDINGS = (
    *FAST,
    "TrainConfig.learning_rate = 1e-2",
    "ContrastiveConfig.learning_rate = 1e-2",
    "DocidConfig.kind = 'rq'",
    "DocidConfig.settings = {'codebooks': 2, 'codes': 4}",
)
QUERY = "bread from an oven"


def _recipe(*more, method="dogr"):
    return load_recipe(method, bindings=[*BINDINGS, *more])


@pytest.fixture(scope="module")
def run(collection, tmp_path_factory):
    """Both stages in one go."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    fit(collection, recipe=_recipe(), out=out)
    return out


@pytest.fixture(scope="module")
def retriever(run):
    return Retriever.load(run)


def _after_stage_1(run, out):
    """A folder as the run's own was between the stages."""
    out.mkdir()
    shutil.copyfile(run / "run.json", out / "run.json")
    for name in ("index", "training"):
        shutil.copytree(run / name, out / name)
    return out


def _equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def _same_retriever(a, b):
    one, other = Retriever.load(a), Retriever.load(b)
    assert _equal(one.params, other.params)
    assert (one.vectors.values == other.vectors.values).all()
    left, right = (
        {k: v for k, v in r.about.items() if k not in ("training", "corpus")} for r in (one, other)
    )
    assert left == right
    assert one.search(QUERY, k=8) == other.search(QUERY, k=8)


# --- what a run leaves -------------------------------------------------------------------------


def test_the_folder_says_what_was_done(run, retriever):
    assert (run / "retriever" / "vectors.npy").is_file()
    about = json.loads((run / "retriever" / "retriever.json").read_text())
    assert set(about["fusion"]) == {"alpha", "weight", "query_share"}
    stage = about["second_stage"]
    assert stage["steps"] == 20 and about["training"]["steps"] == 50
    assert stage["vector"] == "encoder_mean" and stage["similarity"] == "cosine"
    views = stage["vectors"]["views"]  # a piece of text and five queries each, or some more
    assert 48 <= views <= 64 and stage["vectors"]["store"] == "int8"
    assert stage["vectors"]["bytes"] == views * (16 + 4) + 9 * 2 * 8
    curve = {float(weight): value for weight, value in stage["fusion"]["dev"].items()}
    assert curve[about["fusion"]["weight"]] == max(curve.values())
    negatives = stage["negatives"]
    questions = len({query for query, _ in tiny_corpus().pairs("train")})
    assert negatives["source"] == "model" and negatives["retrieved"]["rows"] == questions + 8
    assert negatives["prefix"]["mean"] > 0 and negatives["retrieved"]["mean"] > 0
    assert {"mrr@10", "generation_mrr@10", "semantic_mrr@10"} <= set(about["dev"])
    assert (run / "curves.png").read_bytes() == (run / "ranking" / "curves.png").read_bytes()


def test_negatives_are_of_the_corpus_and_never_relevant(run):
    found = Negatives.load(run / "ranking" / "negatives" / "0")
    corpus = tiny_corpus()
    relevant: dict[str, set[int]] = {}
    for query, position in corpus.pairs("train"):
        relevant.setdefault(query, set()).add(position)
    assert found.prefix.shape[0] == len(corpus.documents) and found.retrieved.shape[1] == 4
    for row, known in zip(found.retrieved.tolist(), relevant.values(), strict=False):
        assert not set(row) & known
    own = found.retrieved[len(relevant) :]  # beginnings of the documents themselves
    assert not (own == np.arange(len(corpus.documents))[:, None]).any()


def test_the_journal_has_every_part_of_the_loss(run):
    records = read_records(run / "ranking" / "metrics.jsonl", up_to=99)
    last = [r for r in records if r["kind"] == "train"][-1]
    assert {"prefix_nce", "retrieval_nce", "prefix_accuracy", "retrieval_accuracy"} <= set(last)
    assert "temperature" not in last
    config = _recipe().contrastive
    parts = config.prefix * last["prefix_nce"] + config.retrieval * last["retrieval_nce"]
    assert last["loss"] > parts > 0


# --- scores ------------------------------------------------------------------------------------


def _query_vector(retriever, query):
    ranker = retriever.ranker
    tokens = ranker.vocabulary.encode_batch([query], ranker.input_length)
    vector = np.asarray(ranker.model.vectors(retriever.params, tokens))[0]
    return vector / np.linalg.norm(vector)


def _position(document):
    return tiny_corpus().index[document]


def test_a_fused_score_is_made_of_its_parts(retriever):
    fusion, trie = retriever.about["fusion"], retriever.index.trie
    hits = retriever.search(QUERY, k=8)
    assert len(hits) == 8 and [h.score for h in hits] == [h.fused for h in hits]
    vector = _query_vector(retriever, QUERY)
    rows = np.repeat(np.arange(len(trie.rows)), np.diff(trie.row_offsets))
    for hit in hits:
        position = _position(hit.document)
        row = trie.rows[rows[trie.row_documents == position][0]]
        parts = retriever.vectors.similarities(np.array([position]), vector)
        share = fusion["query_share"]
        semantic = ((1 - share) * parts[0] + share * parts[1])[0]
        assert hit.semantic == pytest.approx(semantic, abs=1e-5)
        mean = hit.generation / (row > 0).sum() ** fusion["alpha"]
        assert hit.fused == pytest.approx(mean + fusion["weight"] * hit.semantic, abs=1e-4)


def test_saved_vectors_are_the_models(retriever):
    model, vocabulary = retriever.ranker.model, retriever.index.vocabulary
    corpus = tiny_corpus()
    for position in range(8):
        queries = [query for query, of in corpus.pairs("train") if of == position]
        vectors = np.array(model.vectors(retriever.params, vocabulary.encode_batch(queries, 16)))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        begin, end = (
            retriever.vectors.bounds[position, 1],
            retriever.vectors.bounds[position + 1, 0],
        )
        saved = retriever.vectors.rows(np.arange(begin, end))
        np.testing.assert_allclose(saved, vectors, atol=np.abs(vectors).max() / 250)


@pytest.mark.parametrize("scoring", ["generation", "semantic", "fused"])
def test_each_scoring_orders_by_its_own_number(scoring, run, retriever, capsys):
    arguments = ["search", str(run), QUERY, "-k", "8", "--scoring", scoring, "--json"]
    assert main(arguments) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    values = [hit[scoring] for hit in hits]
    assert values == sorted(values, reverse=True) == [hit["score"] for hit in hits]
    names = {hit["document"]: hit for hit in hits}
    for hit in retriever.search(QUERY, k=8):  # the parts are the same, whatever they are ranked by
        for part in ("generation", "semantic", "fused"):
            assert names[hit.document][part] == pytest.approx(getattr(hit, part), abs=1e-5)


def test_scoring_is_an_option_of_evaluate(run, capsys):
    for scoring in ("generation", "semantic"):
        assert main(["evaluate", str(run), "--scoring", scoring, "--split", "dev", "--json"]) == 0
        values = json.loads(capsys.readouterr().out)["methods"]["dogr"]
        assert 0 <= values["mrr@10"] <= 1
    assert main(["search", str(run), QUERY, "--scoring", "sematnic"]) == 2
    assert "choose one of fused, generation, semantic" in capsys.readouterr().err


def test_a_narrow_beam_ranks_what_it_reached(retriever):
    wide = {hit.document: hit for hit in retriever.search(QUERY, k=8)}
    narrow = retriever.search(QUERY, k=2, beam=3)
    assert len(narrow) == 2
    for hit in narrow:
        assert hit.semantic == pytest.approx(wide[hit.document].semantic, abs=1e-5)


# --- stages ------------------------------------------------------------------------------------


def test_stage_by_stage_equals_one_go(run, collection, tmp_path):
    out = _after_stage_1(run, tmp_path / "run")
    first = fit(collection, recipe=_recipe(), out=out, stage=1)
    assert first.vectors is None and "fusion" not in first.about
    assert first.about["training"]["steps"] == 30
    assert first.search(QUERY, k=3)[0].fused is None
    fit(collection, recipe=_recipe(), out=out, stage=2)
    _same_retriever(run, out)


def test_an_interrupted_stage_2_goes_on_to_the_same(run, collection, tmp_path, monkeypatch):
    out = _after_stage_1(run, tmp_path / "run")
    _interrupt_at(13, monkeypatch)
    with pytest.raises(Interrupted):
        fit(collection, recipe=_recipe(), out=out)
    monkeypatch.undo()
    assert not (out / "retriever").exists()
    fit(collection, recipe=_recipe(), out=out)
    _same_retriever(run, out)
    a, b = (read_records(x / "ranking" / "metrics.jsonl", up_to=99) for x in (run, out))
    dev = [[r for r in records if r["kind"] == "dev"] for records in (a, b)]
    assert dev[0] == dev[1] and [r["step"] for r in dev[0]] == [0, 10, 20]


def _interrupt_at(step, monkeypatch):
    """Sends SIGTERM to this process when a certain batch of stage 2 is asked for."""
    plain = ContrastiveBatches.__getitem__

    def item(self, n):
        if n == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, n)

    monkeypatch.setattr(ContrastiveBatches, "__getitem__", item)


def _materials(recipe, index):
    corpus = tiny_corpus()
    split = split_corpus(corpus, recipe.data, seed=recipe.train.seed)
    return Materials(corpus.documents, split, index, recipe)


def test_negatives_are_mined_again_and_resume_to_the_same(run, retriever, tmp_path, monkeypatch):
    recipe = _recipe("ContrastiveConfig.refresh_every = 6", "ContrastiveConfig.evaluations = 1")
    materials = _materials(recipe, Index.load(run / "index"))
    params = jax.device_get(retriever.params)  # any will do to begin with

    def stage_2(name):
        return train_ranking(materials, params, tmp_path / name, Clock(None))

    whole = stage_2("whole")
    folders = sorted((tmp_path / "whole" / "negatives").iterdir(), key=lambda p: int(p.name))
    assert [p.name for p in folders] == ["0", "6", "12", "18"]
    tables = [Negatives.load(p).retrieved for p in folders]
    assert any((tables[0] != t).any() for t in tables[1:]), "the model has changed its mind"
    _interrupt_at(14, monkeypatch)
    with pytest.raises(Interrupted):
        stage_2("parts")
    monkeypatch.undo()
    parts = stage_2("parts")
    assert _equal(whole.result.params, parts.result.params)
    assert (whole.vectors.values == parts.vectors.values).all() and whole.fusion == parts.fusion
    for folder in folders:
        again = Negatives.load(tmp_path / "parts" / "negatives" / folder.name)
        assert (again.retrieved == Negatives.load(folder).retrieved).all()


def test_stage_2_wants_stage_1_and_a_second_stage(collection, tmp_path, capsys):
    options = [part for binding in BINDINGS for part in ("--gin", binding)]
    start = ["fit", str(collection), "--out", str(tmp_path / "run"), *options]
    for more, message in (
        (["--stage", "2"], "stage 1 is not done here"),
        (["--stage", "3"], "stage must be 1 or 2"),
        (["--stage", "2", "--method", "dsi"], "method dsi has one stage"),
    ):
        assert main([*start, *more]) == 2
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith("genret: ") and message in error[-1]


# --- a beam that the vectors steer ----------------------------------------------------------------


def test_a_beam_of_one_with_much_look_ahead_finds_the_nearest_document(retriever, capsys):
    nearest = [h.document for h in retriever.search(QUERY, k=8, scoring="semantic")]
    for without in ([], nearest[:1], nearest[:5]):
        (expected, *_) = retriever.search(QUERY, k=8, scoring="semantic", without=without)
        options = {"k": 1, "scoring": "semantic", "look_ahead": 1e4, "without": without}
        for hit in (
            retriever.search(QUERY, beam=1, **options)[0],
            retriever.search([*["bees"] * 9, QUERY], beam=1, **options)[-1][0],
        ):
            assert hit.document == expected.document
            assert hit.generation == pytest.approx(expected.generation, abs=1e-4)
    assert retriever.search(QUERY, k=8, look_ahead=3) == retriever.search(QUERY, k=8)
    command = ["search", str(retriever.folder), QUERY, "--beam", "1", "-k", "1", "--json"]
    assert main([*command, "--scoring", "semantic", "--look-ahead", "1e4"]) == 0
    (hit,) = json.loads(capsys.readouterr().out)["hits"]
    assert hit["document"] == nearest[0]
    for wrong in ("-1", "nan", "inf"):
        assert main([*command, f"--look-ahead={wrong}"]) == 2
        assert "look-ahead must be a number from 0 on" in capsys.readouterr().err


# --- weights of fewer bytes -----------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "near"), [("bfloat16", 0.3), ("int8", 0.1)])
def test_smaller_weights_search_within_their_rounding(precision, near, retriever, tmp_path, capsys):
    small = retriever.with_weights(precision)
    exact = {h.document: h for h in retriever.search(QUERY, k=8)}
    hits = small.search(QUERY, k=8)
    moved = [abs(h.generation - exact[h.document].generation) for h in hits]
    assert len(hits) == 8 and 0 < max(moved) < near
    with pytest.raises(UserError, match=f"weights of {precision} are for searching"):
        small.save(tmp_path / "small")
    with pytest.raises(UserError, match=f"are {precision} already"):
        small.with_weights("float32")
    assert small.with_weights(precision) is small
    command = ["search", str(retriever.folder), QUERY, "-k", "8", "--json", "--weights"]
    assert main([*command, precision]) == 0
    found = json.loads(capsys.readouterr().out)["hits"]
    assert [h["document"] for h in found] == [h.document for h in hits]
    assert main([*command, "int4"]) == 2
    assert "choose one of float32, bfloat16, int8" in capsys.readouterr().err


# --- retrievers without vectors, and with smaller ones -------------------------------------------


def test_a_retriever_of_one_stage_refuses_what_needs_vectors(collection, tmp_path, capsys):
    # Without dropout, as in dogr, so that its step is compiled already.
    recipe = _recipe("NetworkConfig.dropout_rate = 0.0", "TrainConfig.steps = 2", method="dsi")
    fit(collection, recipe=recipe, out=tmp_path / "run")
    capsys.readouterr()  # its log is no part of what the search says
    retriever = Retriever.load(tmp_path / "run")
    assert retriever.vectors is None and not (retriever.folder / "vectors.npy").exists()
    hits = retriever.search(QUERY, k=8)
    assert len(hits) == 8 and all(h.semantic is h.fused is None for h in hits)
    assert [h.score for h in hits] == [h.generation for h in hits]
    assert retriever.search(QUERY, k=8, scoring="generation") == hits
    for options in (["--scoring", "semantic"], ["--scoring", "fused"], ["--look-ahead", "1"]):
        assert main(["search", str(tmp_path / "run"), QUERY, *options]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and "needs document vectors" in captured.err
        assert not captured.out


@pytest.mark.parametrize("store", ["float32", "bfloat16", "int8"])
def test_smaller_vectors_search_within_their_rounding(store, retriever, tmp_path):
    bounds = retriever.vectors.bounds
    plain = retriever.vectors.rows(np.arange(bounds[-1, 0]))
    retriever = dataclasses.replace(
        retriever, vectors=DocumentVectors.of(plain, bounds, store="float32")
    )
    vectors = DocumentVectors.of(plain, bounds, store=store)
    small = dataclasses.replace(retriever, vectors=vectors)
    small.save(tmp_path / "copy")
    small = Retriever.load(tmp_path / "copy")
    assert small.vectors.store == store
    query = _query_vector(retriever, QUERY)
    # bfloat16 rounds by half a unit in the last of 8 bits, int8 by half a step in each dimension.
    bound = {
        "float32": np.zeros(len(plain)),
        "bfloat16": 2.0**-8 * (np.abs(plain) @ np.abs(query)),
        "int8": np.abs(plain).max(1) / 254 * np.abs(query).sum(),
    }[store]
    exact = {hit.document: hit.semantic for hit in retriever.search(QUERY, k=8)}
    found = small.search(QUERY, k=8)
    assert len(found) == 8
    for hit in found:
        error = abs(hit.semantic - exact[hit.document])
        begin, end = bounds[_position(hit.document), 0], bounds[_position(hit.document) + 1, 0]
        assert error <= bound[begin:end].max() + 1e-5


def test_vectors_of_another_collection_are_found_out(retriever, tmp_path):
    retriever.save(tmp_path / "copy")
    np.save(tmp_path / "copy" / "vectors.npy", np.zeros((3, 16), np.float32))
    with pytest.raises(UserError, match=r"shape \(3, 16\), but the documents have"):
        Retriever.load(tmp_path / "copy")
    (tmp_path / "copy" / "vectors.npy").unlink()
    with pytest.raises(UserError, match="no whole document vectors here"):
        Retriever.load(tmp_path / "copy")


# --- what a fit reads and mines, and no more ---------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "second", "times"),
    [(1, 0, (1, 1)), (10, 0, (3, 6)), (10_000, 0, (4, 8)), (1, 10, (3, 6)), (1, 10_000, (4, 8))],
)
def test_examples_are_read_as_often_as_the_longer_stage_draws_them(run, steps, second, times):
    """40 train queries and 8 documents; batches of 16, of which three tenths are of documents."""
    more = [
        f"TrainConfig.steps = {steps}",
        f"ContrastiveConfig.steps = {max(1, second)}",
        "DataConfig.indexing_share = 0.3",
        "DataConfig.word_dropout = 0.2",
    ]
    off = ["ContrastiveConfig.prefix = 0.0", "ContrastiveConfig.retrieval = 0.0"]
    recipe = load_recipe("dogr", bindings=[*FAST, *more, *([] if second else off)])
    pools = {pool.name: len(pool) for pool in _materials(recipe, Index.load(run / "index")).pools}
    assert pools == {"genret_retrieval": 40 * times[0], "genret_indexing": 8 * times[1]}


@pytest.mark.parametrize("refresh", [0, 2])
def test_questions_are_mined_for_that_the_steps_ask(run, retriever, tmp_path, refresh):
    recipe = _recipe(
        "ContrastiveConfig.steps = 3",
        "ContrastiveConfig.batch_size = 4",
        f"ContrastiveConfig.refresh_every = {refresh}",
    )
    materials = _materials(recipe, Index.load(run / "index"))

    def by_model(params):
        return lambda queries, k: [np.roll(np.arange(8), len(q))[:k] for q in queries]

    miner = Miner(materials, tmp_path / "some", by_model=by_model)
    pools = [with_documents(p, materials.examples, miner.positives) for p in materials.pools]
    drawn = materials.batches(pools, batch_size=4)
    every = Miner(materials, tmp_path / "all", by_model=by_model)
    everything = every.negatives(0, retriever.params).retrieved
    last = 3
    for step, end in ((0, refresh or 3), *([(2, 3)] if refresh else [])):
        asked = asked_questions(materials, range(step, end))
        found = miner.negatives(step, retriever.params, drawn).retrieved
        np.testing.assert_array_equal(found[asked], everything[asked])
        others = np.setdiff1d(np.arange(len(found)), asked)
        assert len(others) and (found[others] == -1).all()
        last = end
    assert last == 3 and (everything >= 0).any(1).all()


def test_under_a_time_budget_what_is_asked_first_is_mined_first(run, tmp_path):
    materials = _materials(_recipe("ContrastiveConfig.batch_size = 4"), Index.load(run / "index"))
    miner = Miner(materials, tmp_path, Clock(60.0))
    pools = [with_documents(p, materials.examples, miner.positives) for p in materials.pools]
    drawn = materials.batches(pools, batch_size=4)
    order = miner._order(0, np.random.default_rng(0), drawn)
    assert sorted(order) == list(range(len(miner.questions.texts)))
    first = list(dict.fromkeys(drawn.whole(0)["question_index"].tolist()))
    assert order[: len(first)].tolist() == first
