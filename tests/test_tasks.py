"""Registrations in tasks/: the same examples as the native trainer's, from what lies on disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import seqio
from tiny import tiny_corpus

from genret_jax.corpus import write_corpus
from genret_jax.data.contrastive_tasks import ContrastiveFeatureConverter
from genret_jax.errors import UserError
from genret_jax.indexing import build_index
from genret_jax.negatives import Negatives
from genret_jax.recipe import (
    ContrastiveConfig,
    DocidConfig,
    VocabularyConfig,
    load_recipe,
)
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
    config = ContrastiveConfig(prefix_negatives=1, retrieved_negatives=2, document_length=16)
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
    assert batch["negative_document_tokens"].shape == (16, 3, 16)
    found = batch["negative_document_index"]
    assert (found[:, 0] == -1).all(), "docids of one digit share no prefix"
    assert (found[:, 1:] >= 0).any() and found.max() < 8
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
