"""Documents that no train query names, from the split to a hit's score, on the tiny collection."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest
from tiny import FAST, tiny_corpus

from genret_jax import Retriever, UserError, cli, splitting
from genret_jax.cli import main
from genret_jax.corpus import write_corpus
from genret_jax.evaluation import per_query
from genret_jax.fit import fit
from genret_jax.recipe import load_recipe
from genret_jax.searchers import fit_method
from genret_jax.training import partitioning
from genret_jax.training.journal import read_records

UNSEEN = ("bees", "maps")
QUERY = "honey from an oven"


@pytest.fixture(scope="module", autouse=True)
def small_numbers():
    """A split that holds documents out of eight, and programs for one device."""
    with pytest.MonkeyPatch.context() as patch:
        one = functools.partial(partitioning.make_mesh, devices=jax.devices()[:1])
        patch.setattr(partitioning, "make_mesh", one)
        patch.setattr(splitting, "_FEWEST", 1)
        for name in ("_MOST_DOCUMENTS", "_MOST_PAIRS"):
            patch.setattr(splitting, name, 0.4)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    corpus = tiny_corpus()
    train = corpus.qrels["train"]
    corpus.qrels["train"] = {q: j for q, j in train.items() if not set(UNSEEN) & j.keys()}
    folder = tmp_path_factory.mktemp("data") / "tiny"
    write_corpus(corpus, folder)
    return folder


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    few = ["TrainConfig.steps = 10", "ContrastiveConfig.steps = 4"]
    fit(folder, recipe=load_recipe("dogr", bindings=[*FAST, *few]), out=out)
    return out


@pytest.fixture(scope="module")
def retriever(run):
    return Retriever.load(run)


def _unseen(retriever):
    names = [retriever.index.documents[i].id for i in range(8)]
    return {name for name, flag in zip(names, retriever.vectors.unseen, strict=True) if flag}


def test_documents_are_held_out_and_remembered(run, retriever):
    unseen, bounds = _unseen(retriever), retriever.vectors.bounds
    assert len(unseen) == 4 and set(UNSEEN) < unseen
    training = retriever.about["training"]
    pairs, names = tiny_corpus().pairs("train"), list(tiny_corpus().index)
    held = {query for query, position in pairs if names[position] in unseen - set(UNSEEN)}
    left = [p for p in pairs if names[p[1]] not in unseen and p[0] not in held]
    assert training["pairs"] == len(left) in (19, 20), "a question about two documents goes, too"
    # Of the dev split's eight, and the five train queries of both that are held out.
    assert training["dev_queries"] == 8 + 10 and training["dev_queries_unseen"] == 4 + 10
    for position, name in enumerate(tiny_corpus().index):
        queries, end = bounds[position, 1], bounds[position + 1, 0]
        assert (queries == end) == (name in unseen), "no view of a query that was held out"


@pytest.mark.parametrize("stage", ["training", "ranking"])
def test_dev_metrics_are_the_mean_of_both_kinds(run, stage):
    records = [
        r for r in read_records(run / stage / "metrics.jsonl", up_to=99) if r["kind"] == "dev"
    ]
    prefixes = ("", "generation_", "semantic_") if stage == "ranking" else ("",)
    for record in records:
        for name in [p + m for p in prefixes for m in ("mrr@10", "hits@1")]:
            start, _, metric = name.rpartition("_")
            start += "_" if start else ""
            kinds = [record[f"{start}{kind}_{metric}"] for kind in ("seen", "unseen")]
            assert record[name] == pytest.approx(sum(kinds) / 2)
    assert len(records) >= 3


def test_dev_metrics_are_those_of_a_search(retriever):
    """Of the parameters that were kept; with the fusion of that evaluation, whatever it was."""
    corpus, unseen = tiny_corpus(), _unseen(retriever)
    held = [q for q, j in corpus.qrels["train"].items() if j.keys() & (unseen - set(UNSEEN))]
    qrels = corpus.qrels["dev"] | {q: corpus.qrels["train"][q] for q in held}
    run = {
        q: {hit.document: hit.score for hit in hits}
        for q, hits in zip(
            qrels,
            retriever.search([corpus.queries[q] for q in qrels], k=8, scoring="generation"),
            strict=True,
        )
    }
    values = per_query(run, qrels, ["mrr@10"])["mrr@10"]
    of_unseen = np.array([bool(j.keys() & unseen) for j in qrels.values()])
    dev = retriever.about["dev"]
    assert dev["generation_seen_mrr@10"] == pytest.approx(values[~of_unseen].mean(), abs=1e-6)
    assert dev["generation_unseen_mrr@10"] == pytest.approx(values[of_unseen].mean(), abs=1e-6)


def test_info_tells_what_both_kinds_gain(run, capsys, monkeypatch):
    monkeypatch.setattr(cli, "log_to_stderr", lambda: None)
    assert main(["info", str(run), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    kinds = about["second_stage"]["fusion"]["kinds"]
    assert {n: set(k) for n, k in kinds.items()} == {
        "one weight": {"seen", "unseen"},
        "two weights": {"seen", "unseen"},
    }
    assert sum(kinds["two weights"].values()) >= sum(kinds["one weight"].values())
    assert about["fusion"].items() <= about["second_stage"]["fusion"].items()


def test_hits_tell_their_kind_and_their_score_is_made_of_its_parts(retriever, tmp_path):
    fusion = {
        "alpha": 0.0,
        "weight": 2.0,
        "query_share": 0.25,
        "unseen_weight": 7.0,
        "unseen_offset": -0.5,
    }
    retriever.about["fusion"] = fusion
    retriever.save(tmp_path / "other")
    other, unseen = Retriever.load(tmp_path / "other"), _unseen(retriever)
    hits = other.search(QUERY, k=8)
    assert {hit.document for hit in hits if hit.unseen} == unseen and len(hits) == 8
    for hit in hits:
        weight, offset = (7.0, -0.5) if hit.unseen else (2.0, 0.0)
        assert hit.fused == pytest.approx(hit.generation + weight * hit.semantic + offset, abs=1e-4)
        assert hit.fused == hit.score
    (tmp_path / "other" / "vectors.unseen.npy").unlink()
    with pytest.raises(UserError, match="no train query names is not here"):
        Retriever.load(tmp_path / "other")


def test_another_method_has_dev_metrics_of_both_kinds_where_it_is_asked_for(folder, tmp_path):
    steps = ["TrainConfig.steps = 2", "ContrastiveConfig.steps = 2"]
    kinds = ["DataConfig.held_out_documents = 0.03", "DataConfig.unseen_share = 0.25"]
    recipe = load_recipe("dense", bindings=[*FAST, *steps, *kinds])
    dev = fit_method(folder, recipe=recipe, out=tmp_path / "run").about["dev"]
    for name in ("mrr@10", "hits@1"):
        mean = 0.75 * dev[f"seen_{name}"] + 0.25 * dev[f"unseen_{name}"]
        assert dev[name] == pytest.approx(mean)
