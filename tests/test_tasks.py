"""Registrations in tasks/: the same examples as the native trainer's, from what lies on disk."""

from __future__ import annotations

import dataclasses
import gzip
import importlib
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import seqio
import tensorflow as tf
from tiny import tiny_corpus

from genret_jax.configs import ContrastiveConfig, DocidConfig, VocabularyConfig
from genret_jax.corpus import read_corpus, write_corpus
from genret_jax.data.contrastive_tasks import ContrastiveFeatureConverter
from genret_jax.errors import UserError
from genret_jax.indexing import build_index
from genret_jax.negatives import Negatives
from genret_jax.pseudo_queries import PseudoQuery, write_pseudo_queries
from genret_jax.recipe import load_recipe
from tasks import beir, msmarco
from tasks.command import run
from tasks.folder import register_folder, register_folder_contrastive, vocabulary
from tasks.squad import corpus_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Corpus and run as paths."""
    corpus, place = tiny_corpus(), tmp_path_factory.mktemp("folders")
    write_corpus(corpus, place / "tiny")
    build_index(
        corpus,
        place / "run" / "index",
        docids=DocidConfig("naive"),
        vocabulary=VocabularyConfig(size=200),
        pairs=corpus.pairs("train"),
    )
    return str(place / "tiny"), str(place / "run")


def test_folder_tasks_give_t5x_batches(folders):
    registered = register_folder(*folders, name="folder_test")
    assert registered.lengths["targets"] == 1  # eight documents, one digit
    dataset = seqio.get_dataset(
        registered.mixture,
        registered.lengths,
        seqio.EncDecFeatureConverter(pack=False),
        shuffle=True,
        num_epochs=None,
        seed=0,
        batch_size=6,
    )
    batch = next(iter(dataset.as_numpy_iterator()))
    assert batch["encoder_input_tokens"].shape == (6, registered.lengths["inputs"])
    space = vocabulary(folders[1])
    assert batch["decoder_target_tokens"].max() < space.vocab_size


def _contrastive(folders, **more):
    config = ContrastiveConfig(
        retrieval=1.0, prefix_negatives=1, retrieved_negatives=2, document_length=16
    )
    recipe = dataclasses.replace(load_recipe("dogr"), contrastive=config)
    registered = register_folder_contrastive(*folders, recipe=recipe, **more)
    dataset = seqio.get_dataset(
        registered.mixture,
        registered.lengths,
        ContrastiveFeatureConverter(pack=False),
        shuffle=True,
        num_epochs=None,
        seed=0,
        batch_size=16,
    )
    return next(iter(dataset.as_numpy_iterator()))


def test_folder_tasks_of_the_second_stage_mine_with_bm25(folders):
    batch = _contrastive(folders)
    assert batch["document_tokens"].shape == (16, 16)
    # Docids of one digit share no prefix, so there are retrieved ones alone.
    assert batch["negative_document_tokens"].shape == (16, 2, 16)
    found = batch["negative_document_index"]
    assert (found >= 0).any() and found.max() < 8
    known = np.concatenate([batch["document_index"][:, None], batch["relevant_index"]], axis=1)
    assert not ((found[:, :, None] == known[:, None]) & (found >= 0)[:, :, None]).any()


def test_folder_tasks_of_the_second_stage_read_what_a_fit_mined(folders):
    questions = len({query for query, _ in tiny_corpus().pairs("train")}) + 8
    prefix = np.full((8, 1), 5, np.int32)
    made = Negatives(prefix, np.tile([[6, 7]], (questions, 1)).astype(np.int32), "", "model", 1)
    folder = Path(folders[1]) / "ranking" / "negatives" / "40"
    folder.parent.mkdir(parents=True)
    made.save(folder)
    batch = _contrastive(folders, step=40)
    assert (np.sort(batch["negative_document_index"], axis=1) == [5, 6, 7]).all()
    Negatives(prefix[:7], made.retrieved, "", "model", 1).save(folder)
    with pytest.raises(UserError, match="negatives of 7 documents and 47 questions, but here are"):
        _contrastive(folders, step=40)


def test_squad_records_become_a_corpus():
    records = [
        {
            "id": f"q{i}".encode(),
            "title": b"1973_oil_crisis",
            "context": f"text {i % 3}".encode(),
            "question": f"what about {i}?".encode(),
        }
        for i in range(200)
    ]
    corpus = corpus_of(records)
    assert [d.id for d in corpus.documents] == [f"1973_oil_crisis#{i}" for i in range(3)]
    assert corpus.documents[0].title == "1973 oil crisis"
    sizes = {split: len(corpus.qrels[split]) for split in corpus.splits}
    assert sum(sizes.values()) == 200 and 8 < sizes["dev"] < 35 and 8 < sizes["test"] < 35
    assert corpus.qrels["train"].keys().isdisjoint(corpus.qrels["test"])
    grades = corpus.qrels["train"] | corpus.qrels["dev"] | corpus.qrels["test"]
    assert grades["q4"] == {"1973_oil_crisis#1": 1}


def _examples(task, **more):
    """Examples of a task before they are made model features."""
    lengths = {"inputs": 12, "targets": 1}
    dataset = seqio.TaskRegistry.get(task).get_dataset(
        lengths, split="train", shuffle=False, seed=3, **more
    )
    return [{k: v.tolist() for k, v in e.items()} for e in dataset.as_numpy_iterator()]


def _write_cache(task, place):
    """What `seqio_cache_tasks` writes, without Apache Beam."""
    folder = place / seqio.get_task_dir_from_name(task.name)
    folder.mkdir()
    dataset = task.preprocess_precache(task.source.get_dataset("train", shuffle=False), seed=0)
    rows = list(dataset.as_numpy_iterator())
    with tf.io.TFRecordWriter(f"{folder}/train.tfrecord-00000-of-00001") as writer:
        for row in rows:
            writer.write(seqio.dict_to_tfexample(row).SerializeToString())
    features = {k: {"shape": list(v.shape), "dtype": v.dtype.name} for k, v in rows[0].items()}
    ragged = {"title", "body", "inputs", "targets"}
    for name in ragged & features.keys():
        features[name]["shape"] = [None]
    info = {"num_shards": 1, "features": features, "seqio_version": seqio.__version__}
    (folder / "info.train.json").write_text(json.dumps(info))
    (folder / "stats.train.json").write_text(json.dumps({"examples": len(rows)}))
    (folder / "COMPLETED").write_text("")


def test_folder_tasks_can_be_cached(folders, tmp_path):
    registered = register_folder(*folders, name="cached")
    tasks = seqio.get_subtasks(seqio.get_mixture_or_task(registered.mixture))
    seqio.set_global_cache_dirs([])
    plain = {task.name: _examples(task.name) for task in tasks}
    for task in tasks:
        first, *online = task.preprocessors
        assert isinstance(first, seqio.CacheDatasetPlaceholder) and task.supports_caching
        assert online, "pieces and words are drawn when the cache is read"
        _write_cache(task, tmp_path)
    seqio.set_global_cache_dirs([str(tmp_path)])
    try:
        register_folder(*folders, name="cached")  # tasks look for their cache once
        for name, examples in plain.items():
            assert _examples(name, use_cached=True) == examples
    finally:
        seqio.set_global_cache_dirs([])


def test_folder_tasks_learn_from_pseudo_queries(folders, tmp_path):
    path = tmp_path / "pseudo.jsonl"
    write_pseudo_queries([PseudoQuery("bees", "wax and hives", -1.0)], path)
    registered = register_folder(*folders, name="pseudo", pseudo_queries=str(path))
    names = [t.name for t in seqio.get_subtasks(seqio.get_mixture_or_task(registered.mixture))]
    assert sorted(names) == ["pseudo_indexing", "pseudo_pseudo", "pseudo_retrieval"]
    (example,) = _examples("pseudo_pseudo")
    space = vocabulary(folders[1])
    assert space.decode(example["inputs"][:-1]) == "wax and hives"
    batch = _contrastive(folders, name="pseudo_second", pseudo_queries=str(path))
    assert batch["document_tokens"].shape == (16, 16)


def test_tasks_by_module_name(folders, monkeypatch):
    monkeypatch.setenv("GENRET_CORPUS", folders[0])
    monkeypatch.setenv("GENRET_RUN", folders[1])
    monkeypatch.setenv("GENRET_NAME", "by_name")
    monkeypatch.delitem(sys.modules, "tasks.from_environment", raising=False)
    module = importlib.import_module("tasks.from_environment")
    assert module.registered.mixture == "by_name"
    assert "by_name_retrieval" in seqio.TaskRegistry.names()
    monkeypatch.delenv("GENRET_RUN")
    monkeypatch.delitem(sys.modules, "tasks.from_environment")
    with pytest.raises(UserError, match="'GENRET_RUN' is not set"):
        importlib.import_module("tasks.from_environment")


@pytest.fixture
def marco(tmp_path):
    """A miniature of the official files."""
    passages = "".join(f"{i}\tpassage {i}, with\ttab\n" for i in range(5))
    (tmp_path / "collection.tsv.gz").write_bytes(gzip.compress(passages.encode()))
    (tmp_path / "queries.train.tsv").write_text("7\twhat is a\n8\tnot judged\n9\twhat is b\n")
    (tmp_path / "queries.dev.small.tsv").write_text("3\twhat is c\n")
    (tmp_path / "qrels.train.tsv").write_text("7\t0\t4\t1\n9 0 0 1\n9 0 4 1\n")
    (tmp_path / "qrels.dev.small.tsv").write_text("3\t0\t2\t1\n")
    return tmp_path


def _marco(place, **more):
    arguments = {
        "collection": place / "collection.tsv.gz",
        "queries": [place / "queries.train.tsv", place / "queries.dev.small.tsv"],
        "qrels": {
            "train": place / "qrels.train.tsv",
            "dev_small": place / "qrels.dev.small.tsv",
        },
        "out": place / "out",
        **more,
    }
    return msmarco.build(**arguments)


def test_marcos_files_become_a_corpus(marco):
    report = _marco(marco)
    corpus = read_corpus(marco / "out")
    assert [d.id for d in corpus.documents] == list("01234")
    assert corpus.documents[2].text == "passage 2, with\ttab"
    assert corpus.queries == {"7": "what is a", "9": "what is b", "3": "what is c"}
    assert corpus.qrels["train"] == {"7": {"4": 1}, "9": {"0": 1, "4": 1}}
    assert corpus.qrels["dev_small"] == {"3": {"2": 1}} and not corpus.warnings
    del report["sha256"]
    assert report == {"passages": 5, "train": 2, "dev_small": 1, "questions_left_out": 1}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("qrels.train.tsv", "7 0 4 1\n8 0 77 1\n", "qrels.train.tsv:2: passage 77 is in none"),
        ("qrels.train.tsv", "1 0 4 1\n", "qrels.train.tsv:1: question 1 is in none"),
        ("queries.train.tsv", "7 what is a\n", "queries.train.tsv:1: no id and text with a tab"),
        ("queries.train.tsv", "7\ta\n7\tb\n", "queries.train.tsv:2: 7 is also in the line above"),
    ],
)
def test_marcos_files_must_belong_together(marco, name, text, message):
    (marco / name).write_text(text)
    with pytest.raises(UserError, match=message):
        _marco(marco)
    assert not (marco / "out").exists()


def test_the_marco_program_says_what_differs(marco, monkeypatch, capsys):
    command = ["msmarco", "--collection", "collection.tsv.gz", "--queries", "queries.train.tsv"]
    command += ["--qrels", "train=qrels.train.tsv", "--out", "out"]
    monkeypatch.chdir(marco)
    monkeypatch.setattr("sys.argv", command)
    run(msmarco.main)
    printed = capsys.readouterr()
    assert json.loads(printed.out)["passages"] == 5
    assert "passages: 5, published are 8,841,823\ndev small: 0, published" in printed.err
    monkeypatch.setattr("sys.argv", [*command, "--expect", "published"])
    with pytest.raises(SystemExit, match="2"):
        run(msmarco.main)
    assert "msmarco: out: passages: 5" in capsys.readouterr().err


def _zip(path, homes):
    write_corpus(tiny_corpus(), path.parent / "tiny")
    with zipfile.ZipFile(path, "w") as packed:
        for home in homes:
            for file in (path.parent / "tiny").rglob("*.*"):
                packed.write(file, f"{home}/{file.relative_to(path.parent / 'tiny')}")
            packed.writestr(f"{home}/notes/../../outside.txt", "not taken")
    return path


def test_a_beir_zip_is_unpacked(tmp_path):
    report = beir.unpack(_zip(tmp_path / "tiny.zip", ["tiny"]), tmp_path / "out")
    corpus = tiny_corpus()
    read = read_corpus(tmp_path / "out")
    assert (read.documents, read.queries, read.qrels) == (
        corpus.documents,
        corpus.queries,
        corpus.qrels,
    )
    assert report["documents"] == 8
    assert report["judgements"] == {"train": 40, "dev": 8, "test": 8}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "corpus.jsonl",
        "qrels",
        "queries.jsonl",
    ]


def test_one_of_several_collections_is_unpacked(tmp_path):
    path = _zip(tmp_path / "both.zip", ["both/android", "both/unix"])
    with pytest.raises(UserError, match=r"2 \(android, unix\); name one with --subset"):
        beir.unpack(path, tmp_path / "out")
    beir.unpack(path, tmp_path / "out", subset="unix")
    assert len(read_corpus(tmp_path / "out").documents) == 8
    with pytest.raises(UserError, match="exists; give another"):
        beir.unpack(path, tmp_path / "out", subset="unix")


def test_beir_says_where_a_collection_is(tmp_path):
    with pytest.raises(UserError, match="no such file; get it from https://.*/scifact.zip"):
        beir.unpack("scifact", tmp_path / "out")
    (tmp_path / "broken.zip").write_text("no zip")
    with pytest.raises(UserError, match="no zip file, or damaged"):
        beir.unpack(tmp_path / "broken.zip", tmp_path / "out")
