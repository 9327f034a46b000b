"""The main job from end to end, through the command line and from Python, on a tiny collection."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import FAST, tiny_corpus

from genret_jax import Retriever, UserError, ranking
from genret_jax.cli import main
from genret_jax.configs import DataConfig
from genret_jax.corpus import Document, read_run, write_corpus
from genret_jax.evaluation import evaluate
from genret_jax.files import held
from genret_jax.fit import fit
from genret_jax.indexing import Index
from genret_jax.recipe import load_recipe, methods
from genret_jax.splitting import split_corpus

pytestmark = pytest.mark.usefixtures("one_device")

OPTIONS = [part for binding in FAST for part in ("--gin", binding)]


@pytest.fixture(scope="module")
def run(collection, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["fit", str(collection), "--out", str(out), *OPTIONS]) == 0
    return out


def _json(capsys):
    out = capsys.readouterr().out
    assert out.count("\n") == 1, "one JSON object and nothing else on stdout"
    return json.loads(out)


def test_the_run_folder_is_whole(run):
    names = {p.name for p in (run / "retriever").iterdir()}
    assert names == {
        "README.md",
        "docids",
        "documents.jsonl",
        "documents.offsets.npy",
        "documents.order.npy",
        "index.json",
        "metrics.json",
        "model.safetensors",
        "retriever.json",
        "spiece.model",
        "trie",
        "vectors.bounds.npy",
        "vectors.npy",
        "vectors.scales.npy",
        "vocabulary.json",
    }
    assert (run / "curves.png").stat().st_size > 1000
    card = (run / "retriever" / "README.md").read_text()
    assert "documents: 8; train pairs: 40" in card and "hits@1" in card
    assert not list(run.glob(".*")), "no temporary folders are left"


def test_search(run, capsys):
    assert main(["search", str(run), "repair lifts", "-k", "3", "--json"]) == 0
    found = _json(capsys)
    assert found["query"] == "repair lifts" and len(found["hits"]) == 3
    scores = [hit["score"] for hit in found["hits"]]
    assert scores == sorted(scores, reverse=True)
    assert scores == [hit["fused"] for hit in found["hits"]], "vectors are there, so they count"
    assert max(hit["generation"] for hit in found["hits"]) <= 0
    assert [hit["rank"] for hit in found["hits"]] == [1, 2, 3]
    assert {hit["title"] for hit in found["hits"]} < {d.title for d in tiny_corpus().documents}
    assert main(["search", str(run), "repair lifts", "-k", "3"]) == 0
    assert found["hits"][0]["title"] in capsys.readouterr().out.splitlines()[0]


def test_only_and_without_search_a_part_of_the_documents(run, tmp_path, capsys):
    """Against the whole ranking, which a beam of 100 has of 8 documents; and no beam is wasted."""
    retriever = Retriever.load(run)
    whole = {h.document: h for h in retriever.search("repair lifts", k=8)}
    some = list(whole)[1::3]
    ways = [{"only": some}, {"without": set(whole) - set(some)}]
    ways.append({"only": list(whole)[1:], "without": set(whole) - set(some)})
    for way in ways:
        hits = retriever.search("repair lifts", k=8, **way)
        assert [h.document for h in hits] == some
        for hit in hits:
            assert hit.generation == pytest.approx(whole[hit.document].generation, abs=1e-4)
        narrow = retriever.search(["repair lifts"], k=1, beam=1, scoring="generation", **way)[0]
        assert len(narrow) == 1 and narrow[0].document in some
    assert retriever.search("repair lifts", only=[]) == []
    (tmp_path / "ids.txt").write_text("\n".join(some) + "\n")
    for options in (["--only", ",".join(some)], ["--only", f"@{tmp_path / 'ids.txt'}"]):
        assert main(["search", str(run), "repair lifts", "--json", *options]) == 0
        assert [h["document"] for h in _json(capsys)["hits"]] == some
    left_out = ["--without", some[0], "--without", some[1]]
    assert main(["search", str(run), "repair lifts", "--json", *left_out]) == 0
    assert not {h["document"] for h in _json(capsys)["hits"]} & set(some[:2])
    with pytest.raises(UserError, match="not one text"):
        retriever.search("repair lifts", only="lifts")


def test_the_trie_of_an_older_version_is_made_again(run, tmp_path):
    folder = tmp_path / "older"
    shutil.copytree(run / "retriever", folder)
    about = json.loads((folder / "trie" / "trie.json").read_text())
    (folder / "trie" / "trie.json").unlink()  # a hard link, perhaps
    (folder / "trie" / "trie.json").write_text(json.dumps({**about, "format": 1}))
    (folder / "trie" / "row_begin.npy").unlink()
    ours, theirs = (Retriever.load(f).search("repair lifts") for f in (folder, run))
    assert ours == theirs


@pytest.mark.parametrize("normaliser", ["children", "vocabulary"])
def test_a_retriever_keeps_what_its_probabilities_sum_to_one_over(collection, tmp_path, normaliser):
    few = ["DocidConfig.kind = 'rq'", "TrainConfig.steps = 2"]
    few += [f"LossConfig.normaliser = {normaliser!r}", "TrainConfig.evaluations = 1"]
    fit(collection, recipe=load_recipe("dsi", bindings=[*FAST, *few]), out=tmp_path / "run")
    retriever = Retriever.load(tmp_path / "run")
    hits = retriever.search("bread from an oven", k=8)
    total = sum(np.exp(hit.generation) for hit in hits)
    assert len(hits) == 8 and (total == pytest.approx(1, abs=1e-4)) == (normaliser == "children")
    only = [hit.document for hit in hits[::2]]
    some = retriever.search("bread from an oven", k=8, only=only)
    kept = {hit.document: hit.generation for hit in hits}
    assert {h.document: pytest.approx(h.generation, abs=1e-5) for h in some} == {
        document: kept[document] for document in only
    }
    about = retriever.folder / "retriever.json"
    older = json.loads(about.read_text())
    del older["recipe"]["loss"]["normaliser"]
    about.unlink()
    about.write_text(json.dumps(older))
    found = Retriever.load(tmp_path / "run").ranker.model.normaliser
    assert found == "vocabulary", "before there was a choice"


def test_generation_is_the_teacher_forced_log_probability(run):
    retriever = Retriever.load(run)
    hits = retriever.search("bread from an oven", k=8)
    assert len(hits) == 8, "a beam of 100 reaches every one of 8 documents"
    ranker, table = retriever.ranker, retriever.index.table
    tokens = ranker.vocabulary.encode_batch(["bread from an oven"], ranker.input_length)
    for hit in hits:
        position = next(i for i, d in enumerate(tiny_corpus().documents) if d.id == hit.document)
        row = table.tokens[list(table.documents).index(position)]
        score = ranker.scoring_model.score(
            retriever.params, jnp.asarray(tokens), jnp.asarray(row)[None]
        )
        assert float(score[0]) == pytest.approx(hit.generation, abs=1e-4)


def test_smaller_batches_find_the_same(run, monkeypatch):
    retriever = Retriever.load(run)
    queries = [f"bread and {word}" for word in ("roofs", "honey", "keys", "maps", "teeth")]
    found = retriever.search(queries, k=8)
    monkeypatch.setattr(ranking, "_LOGIT_BYTES", 1)
    sizes, encode_batch = [], type(retriever.ranker.vocabulary).encode_batch

    def noted(vocabulary, texts, length):
        sizes.append(len(texts))
        return encode_batch(vocabulary, texts, length)

    monkeypatch.setattr(type(retriever.ranker.vocabulary), "encode_batch", noted)
    again = retriever.search(queries, k=8)
    assert sizes == [1] * 5
    for one, other in zip(found, again, strict=True):
        assert [hit.document for hit in one] == [hit.document for hit in other]
        np.testing.assert_allclose([h.score for h in one], [h.score for h in other], atol=1e-5)


def test_evaluate(run, collection, capsys, tmp_path):
    trec = tmp_path / "out.trec"
    options = ["--split", "test", "--baseline", "bm25", "--baseline", "bm25+q", "--json"]
    assert main(["evaluate", str(run), *options, "--run-file", str(trec)]) == 0
    methods_found = _json(capsys)["methods"]
    assert list(methods_found) == ["dogr", "bm25", "bm25+q"]
    for values in methods_found.values():
        assert set(values) == {
            "hits@1",
            "hits@10",
            "mrr@10",
            "ndcg@10",
            "recall@100",
            "queries",
            "queries_per_second",
        }
        assert values["queries"] == 8 and 0 <= values["hits@1"] <= values["hits@10"] <= 1
    again = evaluate(read_run(trec), tiny_corpus().qrels["test"])
    for name, value in again.items():
        assert methods_found["dogr"][name] == pytest.approx(value), (
            "the written run scores the same"
        )
    assert (run / "retriever" / "comparison-test.png").exists()
    assert "bm25" in (run / "retriever" / "comparison-test.md").read_text()
    kept = json.loads((run / "retriever" / "metrics.json").read_text())["test"]
    assert kept == methods_found["dogr"]
    assert main(["evaluate", str(run), "--beam", "1", "--scoring", "generation", "--json"]) == 0
    one = _json(capsys)["methods"]["dogr"]
    metrics = json.loads((run / "retriever" / "metrics.json").read_text())
    assert metrics["test"] == kept, "another search does not take its place"
    assert metrics["test-beam-1-scoring-generation"] == one
    assert (run / "retriever" / "comparison-test-beam-1-scoring-generation.md").exists()


def test_info_and_index(run, collection, capsys, tmp_path):
    assert main(["info", str(run), "--json"]) == 0
    about = _json(capsys)
    assert about["method"] == "dogr" and about["bytes"]["model.safetensors"] > 1000
    out = tmp_path / "keywords"
    arguments = ["index", str(collection), "--docids", "keywords", "--out", str(out), "--json"]
    assert main([*arguments, "--gin", "VocabularyConfig.size = 200"]) == 0
    report = _json(capsys)
    assert report["report"]["unique_ids"] == 8 and report["docids"]["kind"] == "keywords"
    assert Index.load(out / "index").trie.report() == report["report"]["trie"]
    assert main(["info", str(out)]) == 0
    assert "keywords" in capsys.readouterr().out


def test_a_finished_run_is_not_trained_again(run, collection, capsys):
    weights = run / "retriever" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert main(["fit", str(collection), "--out", str(run), *OPTIONS]) == 0
    assert weights.stat().st_mtime_ns == before


def log_p_by_hand(retriever, query, row):
    """log p of an identifier: each token among those that go on with the prefix before it.

    Where all identifiers are of one token, it is one of all tokens and the end.
    """
    model, rows = retriever.ranker.model, retriever.index.table.tokens.tolist()
    targets = np.asarray(model.docids.to_model(np.asarray(row)))[None]
    batch = {
        "encoder_input_tokens": retriever.ranker.vocabulary.encode_batch(
            [query], retriever.ranker.input_length
        ),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    }
    states = model.states(retriever.params, batch)[1]
    logits = np.asarray(model.docid_logits(retriever.params, states))[0].astype(np.float64)
    total = 0.0
    for place, token in enumerate(token for token in row if token):
        after = sorted({other[place] for other in rows if other[:place] == row[:place]})
        if model.normaliser == "vocabulary":
            after = list(range(1, model.docids.size))
        total += logits[place, token] - np.log(np.exp(logits[place, after]).sum())
    return total


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("dsi", ()),
        ("dsi-naive", ()),
        ("dsi-hierarchical", ["DocidConfig.settings = {'clusters': 3, 'leaf': 3}"]),
        ("dsi-pq", ()),
        ("dsi-rq", ()),
        ("genre", ()),
    ],
)
def test_every_method_of_docids_scores_by_their_probability(method, more, tmp_path):
    corpus, query = tiny_corpus(), "honey and wax"
    documents = [dataclasses.replace(d, title="Trades") for d in corpus.documents[:3]]
    documents += [*corpus.documents[3:]]
    documents += [Document(f"z{i}", f"Smith {i}", f"forge iron in a fire, {i}") for i in range(4)]
    corpus = dataclasses.replace(corpus, documents=tuple(documents))
    retriever = Retriever.fit(
        corpus,
        out=tmp_path,
        method=method,
        bindings=[*FAST, "TrainConfig.steps = 2", "TrainConfig.evaluations = 1", *more],
    )
    hits = retriever.search(query, k=12)
    assert {hit.document for hit in hits} == {document.id for document in corpus.documents}
    table = retriever.index.table
    assert (table.tokens.shape[1] > 1) == (method != "dsi")
    rows = {d: row for row, d in zip(table.tokens.tolist(), table.documents.tolist(), strict=True)}
    for hit in hits:
        by_hand = log_p_by_hand(retriever, query, rows[corpus.index[hit.document]])
        assert hit.score == hit.generation == pytest.approx(by_hand, abs=1e-4)
    if method == "genre":
        named = {hit.document: hit.docid for hit in hits}
        first, second, third = (named[document.id] for document in corpus.documents[:3])
        assert (second, third) == (first + " · <#2>", first + " · <#3>")


def test_a_time_budget_ends_the_run(collection, tmp_path, capsys):
    out = tmp_path / "run"
    fast = [
        x
        for pair in zip(OPTIONS[::2], OPTIONS[1::2], strict=True)
        if "steps = 30" not in pair[1]
        for x in pair
    ]
    budget = ["--minutes", "0.5"]  # with much less, a busy machine would have none left for stage 2
    assert main(["fit", str(collection), "--out", str(out), *budget, *fast, "--json"]) == 0
    about = _json(capsys)
    # However slow the machine, one step is taken; the recipe's own number takes far longer.
    assert 0 < about["training"]["seconds"] < 300
    assert 1 <= about["training"]["steps"] < load_recipe("dsi").train.steps


def test_a_folder_in_which_another_process_trains(run, collection, capsys):
    with held(run):
        assert main(["fit", str(collection), "--out", str(run), *OPTIONS]) == 2
        assert f"{run}: another process is at work in it" in capsys.readouterr().err
        assert main(["search", str(run), "bread"]) == 0, "reading is for all"
    assert main(["fit", str(collection), "--out", str(run), *OPTIONS]) == 0


def test_a_mistake_does_not_claim_the_folder(collection, tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main(["fit", str(collection), "--out", out, "--docids", "numbers"]) == 2
    assert main(["index", str(collection), "--out", out, "--docids", "naive", *OPTIONS]) == 0
    capsys.readouterr()


def test_another_corpus_is_found_out(run, tmp_path, capsys):
    corpus = tiny_corpus()
    first = corpus.documents[0]
    changed = dataclasses.replace(first, text=first.text + " and rails")
    corpus = dataclasses.replace(corpus, documents=(changed, *corpus.documents[1:]))
    write_corpus(corpus, tmp_path / "tiny")
    assert main(["evaluate", str(run), "--corpus", str(tmp_path / "tiny")]) == 2
    assert "not those that the retriever was made from" in capsys.readouterr().err
    assert main(["fit", str(tmp_path / "tiny"), "--out", str(run), *OPTIONS]) == 2
    assert "another recipe or corpus" in capsys.readouterr().err


def test_an_empty_query_among_others_has_no_hits(run):
    hits = Retriever.load(run).search(["bees", " ", "bread"], k=3)
    assert [len(h) for h in hits] == [3, 0, 3]


def test_documents_without_queries_are_enough(tmp_path, capsys):
    path = tmp_path / "corpus.jsonl"
    path.write_text(
        "".join(
            json.dumps({"_id": d.id, "title": d.title, "text": d.text}) + "\n"
            for d in tiny_corpus().documents
        )
    )
    assert main(["fit", str(path), "--out", str(tmp_path / "run"), *OPTIONS]) == 0
    assert "no train queries" in capsys.readouterr().err
    retriever = Retriever.load(tmp_path / "run")
    assert len(retriever.search("honey", k=2)) == 2
    # No dev queries to fit weights on: the similarity counts as it did in training.
    temperature = retriever.about["recipe"]["contrastive"]["temperature"]
    expected = {"alpha": 0.0, "weight": pytest.approx(1 / temperature), "query_share": 0.5}
    assert retriever.about["fusion"] == expected


def test_saved_elsewhere_and_loaded_it_searches_the_same(run, tmp_path):
    retriever = Retriever.load(run)
    retriever.save(tmp_path / "copy")
    shutil.move(tmp_path / "copy", tmp_path / "moved")
    a, b = (
        r.search(["honey", "dough"], k=4) for r in (retriever, Retriever.load(tmp_path / "moved"))
    )
    assert a == b


def test_search_needs_no_tensorflow(run):
    code = (
        "import sys; from genret_jax.cli import main; "
        f"assert main(['search', {str(run)!r}, 'bees']) == 0; "
        "found = {'tensorflow', 'seqio', 'sklearn', 'matplotlib'} & set(sys.modules); "
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "{none}", "bees"], "no such folder"),
        (["search", "{run}", "\udcff"], "is not UTF-8"),
        (["search", "{run}", "  "], "is empty; write some words"),
        (["search", "{run}", "bees", "-k", "0"], "k and beam must be at least 1"),
        (["search", "{run}", "bees", "--only", "bees,boes"], "no document has the id 'boes'"),
        (["search", "{run}", "bees", "--without", "@nowhere.txt"], "nowhere.txt: No such file"),
        (["search", "{foreign}", "bees"], "not a retriever"),
        (["search", "{unfinished}", "bees"], "run the same `genret fit` again"),
        (["evaluate", "{run}", "--split", "tset"], "tset"),
        (["evaluate", "{run}", "--baseline", "bm52"], "choose one of bm25, bm25+q"),
        (["fit", "{none}", "--out", "{new}"], "none"),
        (["fit", "{data}", "--out", "{new}", "--method", "dis"], "choose one of"),
        (["fit", "{data}", "--out", "{new}", "--docids", "numbers"], "keywords"),
        (["fit", "{data}", "--out", "{new}", "--gin", "TrainConfig.stpes = 3"], "stpes"),
        (["fit", "{data}", "--out", "{new}", "--minutes", "-1"], "above 0"),
        (["fit", "{data}", "--out", "{run}"], "another recipe or corpus"),
        (["fit", "{data}", "--out", "{foreign}"], "not a run of genret_jax"),
        (["info", "{foreign}"], "not a retriever"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments, message, run, collection, tmp_path, capsys):
    places = {n: tmp_path / n for n in ("none", "new", "foreign", "unfinished")}
    places["foreign"].mkdir()
    (places["foreign"] / "thesis.tex").write_text("mine")
    (places["unfinished"] / "training").mkdir(parents=True)
    places |= {"run": run, "data": collection}
    filled = [a.format(**places) if a.startswith("{") else a for a in arguments]
    assert main(filled) == 2
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert last.startswith("genret: ") and message in last and "Traceback" not in captured.err
    assert not captured.out


@pytest.mark.parametrize("name", ["model.safetensors", "trie/rows.npy", "index.json", "docids"])
def test_an_incomplete_retriever_is_one_line(name, run, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(run / "retriever", broken)
    path = broken / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError) as error:
        Retriever.load(broken)
    assert "\n" not in str(error.value) and "broken" in str(error.value)


def test_held_out_dev_shares_no_question_with_train():
    corpus = tiny_corpus()
    del corpus.qrels["dev"]
    split = split_corpus(corpus, DataConfig(held_out=0.2), seed=0)
    assert len(split.dev_queries) == 8 and len(split.pairs) == 32
    assert not set(split.dev_queries.values()) & {query for query, _ in split.pairs}


def test_recipes_load_and_later_bindings_win():
    for method in methods():
        recipe = load_recipe(method, size="base", bindings=["TrainConfig.steps = 7"])
        assert recipe.network.embed_dim == 768 and recipe.train.steps == 7
        assert recipe.method == method
    with pytest.raises(UserError, match="no such gin file"):
        load_recipe("dsi", gin_files=["missing.gin"])


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("TrainConfig.steps = 'many'", "TrainConfig.steps is 'many', but must be a int"),
        ("TrainConfig.batch_size = 0", "at least 1"),
        ("TrainConfig.log_every = True", "must be a int"),
        ("NetworkConfig.dtype = 'float8'", "one of 'float32', 'bfloat16'"),
        ("TrainConfig.start = 'warm'", "one of 'random', 'lexical'"),
        ("ContrastiveConfig.vector = 'first'", "one of 'decoder_first', 'decoder_mean'"),
        ("ContrastiveConfig.store = 'float16'", "one of 'float32', 'bfloat16', 'int8'"),
        ("ContrastiveConfig.share = 1.0", "below 1"),
        ("ContrastiveConfig.mined = 0", "at least 1"),
        ("DataConfig.indexing_share = 1.5", "at most 1"),
        ("LossConfig.label_smoothing = 1.0", "below 1"),
        ("DocidConfig.settings = 3", "must be a dict"),
    ],
)
def test_values_that_cannot_be_are_refused(binding, message):
    with pytest.raises(UserError, match=message):
        load_recipe("dsi", bindings=[binding])


@pytest.mark.parametrize(
    ("binding", "settings", "message"),
    [
        ("DocidConfig.kind = 'numbers'", {}, "unknown kind of docids 'numbers'"),
        ("TrainConfig.seed = 1", {"stage_one": "no/such/run"}, "holds no retriever of a run"),
        ("ContrastiveConfig.retrieval = 0.0", {"stage_one": "run"}, "no stage 2 is wanted"),
    ],
)
def test_mistakes_are_told_before_the_corpus_is_read(binding, settings, message, tmp_path):
    recipe = load_recipe("dogr", bindings=["ContrastiveConfig.prefix = 0.0", binding])
    with pytest.raises(UserError, match=message):
        fit(tmp_path / "no corpus", recipe=recipe, out=tmp_path / "run", **settings)


def test_other_methods_are_told_so(tmp_path):
    with pytest.raises(UserError, match="method dense makes no generative retriever"):
        fit(tmp_path / "no corpus", recipe=load_recipe("dense"), out=tmp_path / "run")


def test_python_names_are_the_documented_ones():
    import genret_jax

    for name in genret_jax.__all__:
        assert getattr(genret_jax, name) is not None
    with pytest.raises(AttributeError):
        genret_jax.nothing  # noqa: B018
