"""Registrations in tasks/: the same examples as the native trainer's, from what lies on disk."""

from __future__ import annotations

import seqio
from tiny import tiny_corpus

from genret_jax.corpus import write_corpus
from genret_jax.indexing import build_index
from genret_jax.recipe import DocidConfig, VocabularyConfig
from tasks.folder import register_folder, vocabulary
from tasks.squad import corpus_of


def test_folder_tasks_give_t5x_batches(tmp_path):
    corpus = tiny_corpus()
    write_corpus(corpus, tmp_path / "tiny")
    build_index(
        corpus,
        tmp_path / "run" / "index",
        docids=DocidConfig("naive"),
        vocabulary=VocabularyConfig(size=200),
        pairs=corpus.pairs("train"),
    )
    registered = register_folder(str(tmp_path / "tiny"), str(tmp_path / "run"), name="folder_test")
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
    space = vocabulary(str(tmp_path / "run"))
    assert batch["decoder_target_tokens"].max() < space.vocab_size


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
