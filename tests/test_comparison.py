"""`genret compare` from end to end on a tiny collection; what resumes, and what goes wrong."""

from __future__ import annotations

import base64
import csv
import html.parser
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
from tiny import FAST, tiny_corpus

from genret_jax.cli import main
from genret_jax.comparison import bench
from genret_jax.comparison import run as compare_run
from genret_jax.comparison.run import compare_methods
from genret_jax.corpus import read_corpus, read_run, write_corpus
from genret_jax.errors import UserError
from genret_jax.evaluation import DEFAULT_METRICS, evaluate
from genret_jax.files import held
from genret_jax.harness.measuring import index_bytes
from genret_jax.hybrid import fit_weights, reciprocal_ranks, weighted
from genret_jax.pseudo_queries import PseudoQuery, write_pseudo_queries
from genret_jax.recipe import load_recipe
from genret_jax.training.budget import with_steps
from genret_jax.training.interruption import Interrupted

pytestmark = pytest.mark.usefixtures("one_device")

BINDINGS = [
    *FAST,
    "TrainConfig.start = 'random'",
    "TrainConfig.steps = 4",
    "TrainConfig.evaluations = 1",
]
GIN = [part for binding in BINDINGS for part in ("--gin", binding)]
METHODS = ["bm25", "tfidf+q", "dsi", "rrf:bm25:dsi", "weighted:bm25:tfidf+q"]


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """The test queries twice: as `test`, and the half of them as `seen`."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    corpus = tiny_corpus()
    corpus.qrels["seen"] = dict(list(corpus.qrels["test"].items())[:4])
    write_corpus(corpus, folder)
    return folder


def command(collection, out, methods=METHODS, *more):
    names = ",".join(methods)
    return ["compare", str(collection), "--out", str(out), "--methods", names, *GIN, *more]


@pytest.fixture(scope="module")
def comparison(collection, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "comparison"
    assert main(command(collection, out, METHODS, "--splits", "test,seen")) == 0
    return out


def report_of(comparison):
    return json.loads((comparison / "comparison.json").read_text())


# ---- a real one


def test_everything_is_there(comparison):
    pictures = {"quality-latency.png", "quality-training.png", "splits.png"}
    assert {path.name for path in (comparison / "pictures").iterdir()} == pictures
    for name in pictures:
        assert (comparison / "pictures" / name).stat().st_size > 5_000
    files = {path.name for path in comparison.iterdir() if path.is_file()}
    assert files == {f"comparison.{end}" for end in ("md", "json", "csv", "html")}
    runs = {re.sub("-[0-9a-f]{10}$", "", path.name) for path in (comparison / "runs").iterdir()}
    assert runs == {"bm25", "tfidf+q", "dsi-seed-0"}
    assert not [p for p in comparison.rglob(".*") if "checkpoints" not in p.parts], "all is renamed"


def test_numbers_are_those_of_the_written_rankings(comparison):
    report = report_of(comparison)
    assert list(report["splits"]) == ["test", "seen"] and report["queries"] == {
        "test": 8,
        "seen": 4,
    }
    qrels = {"test": tiny_corpus().qrels["test"]}
    qrels["seen"] = dict(list(qrels["test"].items())[:4])
    for split, table in report["splits"].items():
        assert list(table["rows"]) == METHODS
        for name, row in table["rows"].items():
            trained = "" if name in ("bm25", "tfidf+q", METHODS[-1]) else "-seed-0"
            run = read_run(comparison / "trec" / split / f"{name.replace(':', '-')}{trained}.trec")
            assert row["mean"] == pytest.approx(evaluate(run, qrels[split])), name
            assert set(row["mean"]) == set(DEFAULT_METRICS)
        assert table["best_baseline"] in ("bm25", "tfidf+q")
        assert table["best_baseline"] not in table["rows"][table["best_baseline"]]["against"]
        assert set(table["rows"]["dsi"]["against"]) == {table["best_baseline"]}


def test_costs_are_measured(comparison):
    rows = report_of(comparison)["splits"]["test"]["rows"]
    for name, row in rows.items():
        found = row["costs"]
        assert 0 < found["p50_ms"] <= found["p95_ms"] and found["queries_per_second"] > 0, name
        assert found["index_bytes"] > 0 and found["minutes"] >= 0
    assert rows["dsi"]["costs"]["minutes"] > rows["bm25"]["costs"]["minutes"]
    (run,) = (comparison / "runs").glob("bm25-*")
    counted = [p for p in (run / "retriever" / "bm25").iterdir()]
    about = (run / "retriever" / "retriever.json").stat().st_size + 0
    assert (
        index_bytes(run / "retriever")
        == sum(p.stat().st_size for p in counted)
        + about
        + (run / "retriever" / "documents.order.npy").stat().st_size
    )
    both = rows["bm25"]["costs"]["index_bytes"] + rows["dsi"]["costs"]["index_bytes"]
    assert rows["rrf:bm25:dsi"]["costs"]["index_bytes"] == both
    assert rows["rrf:bm25:dsi"]["costs"]["p50_ms"] > rows["dsi"]["costs"]["p50_ms"]


def test_hybrids_are_made_of_the_written_rankings(comparison):
    def run(split, name):
        return read_run(comparison / "trec" / split / f"{name}.trec")

    parts = [run("test", "bm25"), run("test", "dsi-seed-0")]
    assert run("test", "rrf-bm25-dsi-seed-0") == reciprocal_ranks(parts)
    dev = [run("dev", "bm25"), run("dev", "tfidf+q")]
    first = fit_weights(*dev, tiny_corpus().qrels["dev"]).first
    parts = [run("test", "bm25"), run("test", "tfidf+q")]
    assert run("test", "weighted-bm25-tfidf+q") == weighted(parts, [first, 1 - first])
    row = report_of(comparison)["splits"]["test"]["rows"][METHODS[-1]]
    assert row["figures"]["weight"] == first
    assert "dev" not in report_of(comparison)["splits"], "dev is for the weights alone"


class Page(html.parser.HTMLParser):
    """Sources and cells of a page."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.cells, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.sources += [v for k, v in attributes.items() if k in ("src", "href")]
        self.inside = tag == "td" or (self.inside and tag == "b")
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data):
        if self.inside:
            self.cells[-1] += data

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "td"


def test_the_page_stands_alone_and_says_what_the_markdown_says(comparison):
    page = Page((comparison / "comparison.html").read_text())
    assert len(page.sources) == 3
    for source, name in zip(
        page.sources, ("quality-latency", "quality-training", "splits"), strict=True
    ):
        kind, _, data = source.partition("base64,")
        assert kind == "data:image/png;"
        png = (comparison / "pictures" / f"{name}.png").read_bytes()
        assert base64.b64decode(data) == png
    markdown = (comparison / "comparison.md").read_text()
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    cells = [c.strip().strip("*") for line in lines for c in line.strip("|").split("|")]
    head = len(lines[0].strip("|").split("|"))
    kept = [
        c
        for i in range(0, len(cells), head)
        for c in cells[i : i + head]
        if cells[i] not in ("method", "---")
    ]
    assert page.cells == kept
    found = list(csv.DictReader(io.StringIO((comparison / "comparison.csv").read_text())))
    assert [(line["split"], line["method"]) for line in found] == [
        (split, name) for split in ("test", "seen") for name in METHODS
    ]


def test_a_second_call_fits_nothing_and_prints_one_object(
    comparison, collection, capsys, monkeypatch
):
    monkeypatch.setattr(bench, "fit_method", None)
    before = report_of(comparison)
    more = ["--splits", "test,seen", "--json"]
    assert main(command(collection, comparison, METHODS, *more)) == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert captured.out.count("\n") == 1 and {k: printed[k] for k in before} == before
    assert captured.err.count("is there") == 12, "two splits, and dev of two methods"
    assert "[1/12] bm25, test: is there" in captured.err


def test_another_call_is_kept_out_while_one_is_at_work(comparison, collection, capsys):
    with held(comparison):
        assert main(command(collection, comparison, METHODS, "--splits", "test,seen")) == 2
        assert "another process is at work in it" in capsys.readouterr().err
    with held(comparison / "runs"):
        assert main(command(collection, comparison, METHODS, "--splits", "test,seen")) == 0


# ---- with copies in place of trainings


@pytest.fixture
def pretended(comparison, monkeypatch):
    """In place of a training, a copy of one; the list of those that were asked for."""
    asked = []
    real = bench.fit_method

    def copied(corpus, *, recipe, out, minutes, **more):
        if recipe.searcher.module:
            return real(corpus, recipe=recipe, out=out, minutes=minutes, **more)
        asked.append((out.name.rsplit("-", 1)[0], recipe, minutes))
        (source,) = (comparison / "runs").glob("dsi-seed-*")
        shutil.copytree(source / "retriever", out / "retriever")

    monkeypatch.setattr(bench, "fit_method", copied)
    return asked


def test_every_seed_is_trained_once_with_the_same_budget(collection, tmp_path, pretended, capsys):
    methods = ["dsi", "bm25", "weighted:dsi:dsi-rq"]
    more = ["--seeds", "0,1", "--minutes", "7", "--splits", "test,seen"]
    assert main(command(collection, tmp_path / "out", methods, *more)) == 0
    asked = {name: (recipe, minutes) for name, recipe, minutes in pretended}
    assert set(asked) == {f"{m}-seed-{s}" for m in ("dsi", "dsi-rq") for s in (0, 1)}
    assert len(pretended) == 4
    for name, (recipe, minutes) in asked.items():
        assert minutes == 7 and str(recipe.train.seed) == name[-1]
    rows = report_of(tmp_path / "out")["splits"]["test"]["rows"]
    assert list(rows) == ["dsi", "bm25", "dsi-rq", "weighted:dsi:dsi-rq"], "parts are rows too"
    assert set(rows["dsi"]["seeds"]) == {"0", "1"} and rows["dsi"]["spread"]
    assert rows["bm25"]["seeds"] == {} and not rows["bm25"]["spread"]
    assert set(rows["weighted:dsi:dsi-rq"]["seeds"]) == {"0", "1"}
    assert (tmp_path / "out" / "pictures" / "identifiers.png").is_file(), "two kinds"
    assert "4 trainings left, about 28 minutes" in capsys.readouterr().err


def test_one_job_is_a_process_of_its_own(collection, tmp_path, pretended, monkeypatch, capsys):
    """One that is killed is a row that failed, and is not trained once more here."""
    begun = []

    def killed(children, *, jobs):
        begun.append((jobs, [child.title for child in children]))
        return {children[0].title: "killed by SIGKILL"}

    monkeypatch.setattr(compare_run, "run_side_by_side", killed)
    arguments = command(collection, tmp_path / "out", ["dsi", "genre", "bm25"], "--jobs", "1")
    assert main(arguments) == 1
    assert begun == [(1, ["tiny, dsi, seed 0", "tiny, genre, seed 0"])]
    assert "dsi, seed 0 failed: dsi-seed-0" in capsys.readouterr().err
    rows = report_of(tmp_path / "out")["splits"]["test"]["rows"]
    assert not rows["dsi"]["mean"] and rows["genre"]["mean"] and rows["bm25"]["mean"]


def test_one_failure_does_not_lose_the_others(collection, tmp_path, pretended, monkeypatch, capsys):
    copied = bench.fit_method

    def fails(corpus, *, recipe, out, minutes, **more):
        if recipe.method == "genre":
            raise RuntimeError("out of\nmemory")
        copied(corpus, recipe=recipe, out=out, minutes=minutes, **more)

    monkeypatch.setattr(bench, "fit_method", fails)
    out = tmp_path / "out"
    methods = ["genre", "rrf:genre:bm25", "dsi"]
    assert main(command(collection, out, methods)) == 1
    captured = capsys.readouterr()
    assert "genret: genre, seed 0 failed: RuntimeError: out of memory" in captured.err
    table = (out / "comparison.md").read_text()
    assert captured.out.startswith(table) and "| genre (failed) | –" in table
    assert "rrf:genre:bm25, seed 0: genre, seed 0 on test failed, and there is nothing" in table
    rows = report_of(out)["splits"]["test"]["rows"]
    assert rows["dsi"]["mean"] and rows["bm25"]["mean"] and not rows["genre"]["mean"]
    assert "<b>genre, seed 0</b>: RuntimeError" in (out / "comparison.html").read_text()
    # Once it is mended, only what is missing is done.
    pretended.clear()
    monkeypatch.setattr(bench, "fit_method", copied)
    assert main(command(collection, out, methods)) == 0
    assert [name for name, *_ in pretended] == ["genre-seed-0"]
    assert "failed" not in (out / "comparison.md").read_text()


def test_it_goes_on_after_an_interruption(collection, tmp_path, pretended, monkeypatch, capsys):
    copied = bench.fit_method

    def stops(corpus, *, recipe, out, minutes, **more):
        if recipe.method == "genre":
            raise Interrupted("training stopped at step 3; run the same command to go on", 143)
        copied(corpus, recipe=recipe, out=out, minutes=minutes, **more)

    monkeypatch.setattr(bench, "fit_method", stops)
    arguments = command(collection, tmp_path / "out", ["dsi", "genre"])
    assert main(arguments) == 143
    assert not (tmp_path / "out" / "comparison.md").exists(), "whole or not at all"
    assert "run the same command" in capsys.readouterr().err
    monkeypatch.setattr(bench, "fit_method", copied)
    assert main(arguments) == 0
    assert [name for name, *_ in pretended] == ["dsi-seed-0", "genre-seed-0"]
    pretended.clear()
    assert main([*arguments, "--splits", "seen"]) == 0
    assert not pretended, "another split is another search only"
    assert main([*arguments, "--minutes", "3"]) == 0
    assert len(pretended) == 2, "other minutes are another training"


def test_pseudo_queries_are_for_those_that_learn_from_them(
    collection, tmp_path, monkeypatch, capsys
):
    asked = {}

    def noted(corpus, *, recipe, out, minutes, pseudo_queries):
        asked[recipe.method] = out.name, pseudo_queries
        raise UserError("only noted")

    monkeypatch.setattr(bench, "fit_method", noted)
    arguments = command(collection, tmp_path / "out", ["bm25", "dsi", "minder", "dense", "glen"])
    assert main(arguments) == 1 and {given for _, given in asked.values()} == {None}
    before, files = dict(asked), [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for file, text in zip(files, ("stings", "honey"), strict=True):
        write_pseudo_queries([PseudoQuery("bees", text, -1.0)], file)
        assert main([*arguments, "--pseudo-queries", str(file)]) == 1
        changed = {method for method in asked if asked[method][0] != before[method][0]}
        assert changed == {"dsi", "minder"}, "others would make what they have made"
        assert {method for method in asked if asked[method][1] == str(file)} == changed
        before = dict(asked)
    shutil.copyfile(files[1], tmp_path / "three.jsonl")
    assert main([*arguments, "--pseudo-queries", str(tmp_path / "three.jsonl")]) == 1
    assert all(asked[method][0] == before[method][0] for method in asked), "the same content"
    assert "pseudo-queries for dsi, minder, seed" in (tmp_path / "out/comparison.md").read_text()
    settings = bench.Settings(pseudo_queries="p")
    assert "--pseudo-queries=p" in settings.command("dsi", 0)
    assert "--pseudo-queries=p" not in settings.command("dense", 0)
    capsys.readouterr()
    assert main([*arguments, "--pseudo-queries", str(tmp_path / "none")]) == 2
    assert (
        main(["compare", str(collection), str(tmp_path), *arguments[2:], "--pseudo-queries=p"]) == 2
    )
    assert "--pseudo-queries are of one collection" in capsys.readouterr().err
    lexical = command(collection, tmp_path / "out", ["bm25", "dense"])
    assert main([*lexical, "--pseudo-queries", str(files[0])]) == 2
    assert "none of --methods learns from them" in capsys.readouterr().err


def test_a_budget_of_steps_is_that_of_all_stages(collection, tmp_path, pretended):
    methods = ["dsi", "dogr", "bm25"]
    more = ["--steps", "10", "--seeds", "3"]
    assert main(command(collection, tmp_path / "out", methods, *more)) == 0
    found = {recipe.method: recipe for _, recipe, minutes in pretended}
    assert found["dsi"].train.steps == 10
    assert (found["dogr"].train.steps, found["dogr"].contrastive.steps) == (7, 3), "share is 0.3"
    assert "10 steps a training, seed 3" in (tmp_path / "out" / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("steps", "share", "expected"),
    [(10, 0.3, (7, 3)), (2, 0.3, (1, 1)), (2, 0.9, (1, 1)), (10, 0.0, (9, 1))],
)
def test_a_stage_has_at_least_one_step(steps, share, expected):
    recipe = load_recipe("dogr", bindings=[f"ContrastiveConfig.share = {share}"])
    found = with_steps(recipe, steps)
    assert (found.train.steps, found.contrastive.steps) == expected
    with pytest.raises(UserError, match="at least 1 a stage, found 1 in all"):
        with_steps(recipe, 1)


@pytest.mark.parametrize(
    ("methods", "more", "message"),
    [
        (["bm25"], ["--steps", "0"], "steps must be a whole number from 1, found 0"),
        (["dogr"], ["--steps", "1"], "steps must be at least 1 a stage, found 1"),
        (["bm25"], ["--steps", "9", "--minutes", "1"], "both steps and minutes are given"),
        (["bm25"], ["--queries", "0"], "queries of a split must be a whole number from 1, found 0"),
        (["bm25"], ["--against", "dsi"], "--against 'dsi' is not among --methods"),
        (["bm25"], ["--jobs", "0"], "jobs must be a whole number from 1, found 0"),
        (["dis"], [], "method 'dis' is not known; choose one of bm25, "),
        (["rrf:bm25"], [], "a fusion is rrf:A:B"),
        (["rrf:bm25:bm25"], [], "two different methods"),
        (["max:bm25:dsi"], [], "a fusion is rrf:A:B"),
        (["rrf:bm25:dis"], [], "method 'dis' is not known"),
        ([], [], "no methods; choose of"),
        (["bm25"], ["--seeds", "1,1"], "seeds 1, 1: give different whole numbers"),
        (["bm25"], ["--minutes", "0"], "minutes must be a number above 0"),
        (["bm25"], ["--splits", "tset"], "no split 'tset'"),
        (["bm25"], ["--splits", ""], "no --splits; there are dev, seen, test, train"),
        (["bm25"], ["--size", "huge"], "size 'huge' is not known"),
        (["bm25"], ["--out", "{foreign}"], "is not a comparison of genret_jax"),
    ],
)
def test_mistakes_are_found_before_anything_is_fitted(
    methods, more, message, collection, tmp_path, pretended, capsys
):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("mine")
    more = [part.format(foreign=tmp_path / "foreign") for part in more]
    assert main(command(collection, tmp_path / "out", methods, *more)) == 2
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1] and not captured.out
    assert not pretended and not (tmp_path / "out").exists()


def test_fewer_queries_are_evenly_drawn_and_the_same_for_all(collection, tmp_path, capsys):
    methods = ["bm25", "tfidf+q", "rrf:bm25:tfidf+q", "weighted:bm25:tfidf+q"]
    arguments = command(collection, tmp_path, methods)
    assert main([*arguments, "--queries", "3"]) == 0
    corpus = read_corpus(collection)
    assert len(corpus.qrels["test"]) == 8 and len(corpus.qrels["dev"]) == 8
    names = list(corpus.qrels["test"])
    wanted = {name: corpus.qrels["test"][name] for name in (names[0], names[4], names[7])}
    trec = tmp_path / "trec" / "test-3-queries"
    for method in methods:
        run = read_run(trec / f"{method.replace(':', '-')}.trec")
        assert list(run) == list(wanted)
        found = report_of(tmp_path)["splits"]["test"]["rows"][method]["mean"]
        assert found == pytest.approx(evaluate(run, wanted, DEFAULT_METRICS))
    dev = [read_run(trec.parent / "dev-3-queries" / f"{name}.trec") for name in methods[:2]]
    assert all(len(run) == 3 for run in dev), "weights are fitted on as many"
    assert "## test: 3 of 8 queries" in (tmp_path / "comparison.md").read_text()
    assert "test: 3 of 8 queries" in (tmp_path / "comparison.html").read_text()
    lines = list(csv.DictReader(io.StringIO((tmp_path / "comparison.csv").read_text())))
    assert {(line["queries"], line["judged"]) for line in lines} == {("3", "8")}
    built = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("retriever.json")}
    capsys.readouterr()
    for number, heading in ((4, "4 of 8"), (9, "8")):
        assert main([*arguments, "--queries", str(number)]) == 0
        assert "is there" not in capsys.readouterr().err, "other queries, other results"
        assert f"## test: {heading} queries" in (tmp_path / "comparison.md").read_text()
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("retriever.json")} == built
    against = [*arguments, "--against", "rrf:bm25:tfidf+q"]
    for same in (arguments, [*arguments, "--queries", "3"], against):
        assert main(same) == 0 and capsys.readouterr().err.count("is there") == 6
    assert "rrf:bm25:tfidf+q" in report_of(tmp_path)["splits"]["test"]["rows"]["bm25"]["against"]
    corpus.qrels["test"] = dict(reversed(corpus.qrels["test"].items()))
    rows = compare_methods(corpus, out=tmp_path, methods=["bm25"], queries=4).tables["test"]
    found = read_run(trec.parent / "test-4-queries" / "bm25.trec")
    assert rows[0].measured and list(found) == [names[i] for i in (7, 5, 2, 0)], "drawn anew"


def test_weights_need_dev(tmp_path, capsys):
    corpus = tiny_corpus()
    del corpus.qrels["dev"]
    write_corpus(corpus, tmp_path / "data")
    assert main(command(tmp_path / "data", tmp_path / "out", ["weighted:bm25:tfidf"])) == 2
    assert "fits its weights on dev" in capsys.readouterr().err


# ---- several collections


def test_collections_side_by_side(collection, tmp_path, capsys, monkeypatch):
    """One table of two collections; trained by two processes, each with its own log."""
    one_device = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    monkeypatch.setenv("XLA_FLAGS", one_device)
    other = tmp_path / "other"
    corpus = tiny_corpus()
    corpus.qrels["unseen"] = corpus.qrels.pop("test")
    write_corpus(corpus, other)
    out = tmp_path / "out"
    names = ["compare", str(collection), str(other), "--methods", "bm25,dsi", "--out", str(out)]
    more = ["--steps", "3", "--splits", "test,unseen", "--jobs", "2", *GIN]
    assert main([*names, *more]) == 0
    err = capsys.readouterr().err
    assert err.count("done in") == 2 and "0 running, 0 waiting" in err
    for name, split in (("tiny", "test"), ("other", "unseen")):
        report = report_of(out / name)
        assert list(report["splits"]) == [split] and report["corpus"] == name
        assert report["splits"][split]["rows"]["dsi"]["seeds"]["0"]["steps"] == 3
        (log,) = (out / name / "logs").iterdir()
        assert re.fullmatch(r"dsi-seed-0-[0-9a-f]{10}.log", log.name)
        text = log.read_text()
        assert text.startswith(f"$ genret fit {tmp_path if name == 'other' else collection.parent}")
        assert "step 3 of 3" in text
    table = (out / "collections.md").read_text()
    assert "| method | tiny | other unseen | mean |" in table
    rows = {n: report_of(out / n)["splits"][s]["rows"] for n, s in (("tiny", "test"),)}
    rows["other"] = report_of(out / "other")["splits"]["unseen"]["rows"]
    found = json.loads((out / "collections.json").read_text())
    both = [rows[name]["dsi"]["mean"]["mrr@10"] for name in rows]
    assert found["mean"]["dsi"]["mrr@10"] == pytest.approx(np.mean(both))
    lines = list(csv.DictReader(io.StringIO((out / "collections.csv").read_text())))
    assert [(line["collection"], line["method"]) for line in lines] == [
        (name, method) for name in ("tiny", "other") for method in ("bm25", "dsi")
    ]
    page = Page((out / "collections.html").read_text())
    assert "tiny/comparison.html" in page.sources and len(page.cells) == 3 * 2 * 4
    assert main([*names, *more]) == 0
    assert "begins" not in capsys.readouterr().err, "nothing is trained again"


def test_mistakes_in_several_collections(collection, tmp_path, capsys):
    names = ["compare", str(collection), str(collection), "--methods", "bm25"]
    assert main([*names, "--out", str(tmp_path / "out")]) == 2
    assert "two of one name" in capsys.readouterr().err
    corpus = tiny_corpus()
    del corpus.qrels["test"]
    write_corpus(corpus, tmp_path / "other")
    names[2] = str(tmp_path / "other")
    assert main([*names, "--out", str(tmp_path / "out")]) == 2
    assert "other: has none of the splits test; there are dev, train" in capsys.readouterr().err
    assert main([*names, "--out", str(tmp_path / "out"), "--splits", "test,nil"]) == 2
    assert "no collection has a split 'nil'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
