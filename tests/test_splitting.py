"""What is held out of training, and what is left: counts by hand, and what must never leak."""

from __future__ import annotations

import numpy as np
import pytest

from genret_jax.configs import DataConfig
from genret_jax.corpus import Corpus, Document
from genret_jax.splitting import split_corpus

SHARE = 0.03


def _corpus(seen=600, unseen=60, queries=4, dev=(), **more):
    """Documents with so many train queries each, then documents with none."""
    documents = tuple(Document(f"d{i}", f"title {i}", "text") for i in range(seen + unseen))
    texts = {f"q{i}-{n}": f"question {n} of {i}" for i in range(seen) for n in range(queries)}
    qrels = {"train": {q: {f"d{q[1:].split('-')[0]}": 1} for q in texts}}
    texts |= {f"dev{i}": f"dev question of {i}" for i in dev}
    if len(dev):
        qrels["dev"] = {f"dev{i}": {f"d{i}": 1} for i in dev}
    texts |= more.get("texts", {})
    qrels["train"] |= more.get("train", {})
    return Corpus(documents, texts, qrels, name="made")


def _split(corpus, share=SHARE, seed=0, **config):
    return split_corpus(corpus, DataConfig(held_out_documents=share, **config), seed=seed)


def _named(pairs):
    return {position for _, position in pairs}


def test_whole_documents_are_held_out_where_others_have_no_queries():
    corpus = _corpus()
    split = _split(corpus)
    # 3 % of 600 are fewer than 50, of which 5 % of them, 30, are the most.
    apart = set(range(600)) - _named(split.pairs)
    about = {d for q in split.unseen for d in split.dev_qrels[q]}
    assert len(apart) == 30 and about == {f"d{i}" for i in apart}
    assert len(split.unseen) == 4 * 30 and split.unseen < split.dev_queries.keys()
    assert len(split.dev_queries) == 120 + int(0.05 * (2400 - 120))
    assert len(split.pairs) + len(split.dev_queries) == 2400
    assert not set(split.dev_queries.values()) & {query for query, _ in split.pairs}
    assert split.dev_qrels.keys() == split.dev_queries.keys()
    flags = split.unseen_documents(660)
    assert set(np.flatnonzero(flags)) == apart | set(range(600, 660))
    assert _split(corpus) == split and _split(corpus, seed=1).unseen != split.unseen


@pytest.mark.parametrize(
    ("corpus", "share"),
    [
        (_corpus(unseen=0), SHARE),
        (_corpus(unseen=19), SHARE),  # too few to tell anything
        (_corpus(seen=300, unseen=60), SHARE),  # 5 % of them are too few
        (_corpus(), 0.0),
    ],
    ids=["none", "some", "small", "not asked for"],
)
def test_nothing_changes_where_it_would_not_serve(corpus, share):
    split, plain = _split(corpus, share), split_corpus(corpus, DataConfig(), seed=0)
    assert split == plain and not split.unseen
    assert split.unseen_documents(len(corpus.documents)) is None


def test_without_held_out_queries_there_is_no_dev_of_unseen_ones_alone():
    split = _split(_corpus(), held_out=0.0)
    assert not split.dev_queries and not split.unseen and len(split.pairs) == 2400
    own = _split(_corpus(dev=range(50)), held_out=0.0)
    assert own.unseen < own.dev_queries.keys(), "a corpus's own dev split is another matter"


def test_what_they_count_is_the_recipes():
    assert _split(_corpus(), unseen_share=0.25).unseen_share == 0.25


def test_never_more_documents_than_there_are_without_queries():
    split = _split(_corpus(seen=2000, unseen=25, queries=2), held_out=1e-4)
    assert len(set(range(2000)) - _named(split.pairs)) == 25


def test_a_share_of_many_documents():
    split = _split(_corpus(seen=3000, unseen=500, queries=2), dev_queries=10_000, held_out=1e-4)
    assert len(set(range(3000)) - _named(split.pairs)) == 90 and len(split.unseen) == 180


def test_of_many_queries_about_them_some_are_asked_and_none_is_learned():
    corpus = _corpus()
    split = _split(corpus, dev_queries=40)
    assert len(split.unseen) == 20 and len(split.dev_queries) == 60
    assert len(set(range(600)) - _named(split.pairs)) == 30


def test_a_document_with_too_many_queries_keeps_them():
    many = {f"many{n}": {"d0": 1} for n in range(400)}
    corpus = _corpus(texts={q: f"one of {q}" for q in many}, train=many)
    for seed in range(40):
        assert 0 in _named(_split(corpus, seed=seed).pairs)


def test_copies_and_queries_of_several_documents_do_not_leak():
    """Every document shares one question with its neighbour, and one text with the next but one."""
    both = {f"both{i}": {f"d{i}": 1, f"d{(i + 1) % 600}": 1} for i in range(600)}
    copies = {f"copy{i}": {f"d{(i + 2) % 600}": 1} for i in range(600)}
    texts = {q: f"shared {q}" for q in both}
    texts |= {q: f"question 0 of {q[4:]}" for q in copies}
    corpus = _corpus(texts=texts, train=both | copies)
    split = _split(corpus)
    named = {f"d{position}" for position in _named(split.pairs)}
    assert split.unseen and not {query for query, _ in split.pairs} & set(
        split.dev_queries.values()
    )
    for query in split.unseen:
        assert not named & split.dev_qrels[query].keys()


def test_a_dev_split_stays_and_gets_queries_about_unseen_documents():
    corpus = _corpus(dev=range(100))
    split, plain = _split(corpus), split_corpus(corpus, DataConfig(), seed=0)
    ours = {q: text for q, text in split.dev_queries.items() if q.startswith("dev")}
    assert ours == plain.dev_queries and len(split.dev_queries) == 100 + 4 * 30
    # Of the split's own queries, those about documents held out are of that kind, too.
    named = _named(split.pairs)
    assert all((q in split.unseen) == (int(q[3:]) not in named) for q in ours)


def test_a_dev_split_that_asks_about_unseen_documents_needs_no_more():
    corpus = _corpus(unseen=200, dev=range(500, 750))
    split, plain = _split(corpus), split_corpus(corpus, DataConfig(), seed=0)
    assert split.pairs == plain.pairs and split.dev_queries == plain.dev_queries
    assert split.unseen == {f"dev{i}" for i in range(600, 750)}
    assert np.flatnonzero(split.unseen_documents(800)).tolist() == list(range(600, 800))


@pytest.mark.parametrize(("count", "of_unseen"), [(300, 100), (60, 30)])
def test_a_sample_of_dev_has_enough_queries_about_unseen_documents(count, of_unseen):
    """120 of 1,120 queries are: by chance a sample would have 32, or 6."""
    corpus = _corpus(seen=1000, unseen=120, dev=range(1120))
    split = _split(corpus, dev_queries=count)
    assert len(split.unseen) == of_unseen and len(split.dev_queries) == count
    assert split == _split(corpus, dev_queries=count)
    assert len(_named(split.pairs)) == 1000, "nothing is held out for them"
    plain = split_corpus(corpus, DataConfig(dev_queries=count), seed=0)
    assert not plain.unseen and len(plain.dev_queries) == count
