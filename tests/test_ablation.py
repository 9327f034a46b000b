"""The ablation from end to end on a tiny collection, trained once; and what goes wrong in one."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import FAST, tiny_corpus

from genret_jax import Retriever, UserError
from genret_jax.ablation import FILES, ablate
from genret_jax.ablation import run as ablation_run
from genret_jax.cli import main
from genret_jax.corpus import read_run, write_corpus
from genret_jax.evaluation import DEFAULT_METRICS, evaluate
from genret_jax.files import held
from genret_jax.fit import fit
from genret_jax.recipe import load_recipe
from genret_jax.training.interruption import Interrupted

pytestmark = pytest.mark.usefixtures("one_device")

BINDINGS = [
    *FAST,
    "DocidConfig.kind = 'keywords'",
    "DocidConfig.settings = {}",
    "DataConfig.held_out = 0.0",
    "TrainConfig.start = 'random'",
    "TrainConfig.steps = 6",
    "TrainConfig.evaluations = 1",
    "ContrastiveConfig.source = 'bm25'",
    "ContrastiveConfig.share = 0.4",
    "ContrastiveConfig.steps = 4",
    "ContrastiveConfig.batch_size = 16",
    "ContrastiveConfig.evaluations = 1",
    "ContrastiveConfig.document_length = 8",
    "ContrastiveConfig.mined = 4",
]
GIN = [part for binding in BINDINGS for part in ("--gin", binding)]
VARIANTS = "generation-only,stage-1-only"
ROWS = ["bm25", "bm25+q", "dogr", "generation only", "stage 1 only"]


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """Without dev queries: the last parameters are kept, and nothing is compiled to choose them."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    corpus = tiny_corpus()
    del corpus.qrels["dev"]
    write_corpus(corpus, folder)
    return folder


def command(collection, out, *more):
    return ["ablate", str(collection), "--out", str(out), "--docids", "", *GIN, *more]


@pytest.fixture(scope="module")
def ablation(collection, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "ablation"
    assert main(command(collection, out, "--variants", VARIANTS)) == 0
    return out


def run_of(ablation, name):
    (folder,) = (ablation / "runs").glob(f"{name}-seed-*")
    return folder


@pytest.fixture
def pretended(ablation, monkeypatch):
    """In place of a training, a copy of one; the list of trainings that were asked for."""
    asked = []

    def copied(corpus, *, out, **settings):
        asked.append((out.name.rsplit("-", 1)[0], settings))
        source = run_of(ablation, "stage-1" if settings.get("stage") == 1 else "dogr")
        shutil.copytree(source / "retriever", out / "retriever")

    monkeypatch.setattr(ablation_run, "fit", copied)
    return asked


# ---- a real one


def test_everything_is_there(ablation):
    assert {path.name for path in ablation.iterdir()} == {"runs", "results", "trec", *FILES}
    trained = {re.sub("-[0-9a-f]{10}$", "", path.name) for path in (ablation / "runs").iterdir()}
    assert trained == {"stage-1-seed-0", "dogr-seed-0"}
    for run in (ablation / "runs").iterdir():
        assert (run / "retriever" / "retriever.json").is_file() and (run / "curves.png").is_file()
    assert (ablation / "ablation.png").stat().st_size > 10_000
    assert not [p for p in ablation.rglob(".*") if "checkpoints" not in p.parts], "all is renamed"


def test_numbers_are_those_of_the_written_rankings(ablation):
    report = json.loads((ablation / "ablation.json").read_text())
    assert list(report["rows"]) == ROWS and report["queries"] == 8 and not report["failures"]
    for name, row in report["rows"].items():
        seed = "" if row["group"] == "baseline" else "-seed-0"
        run = read_run(ablation / "trec" / f"{name.replace(' ', '-')}{seed}.trec")
        assert row["mean"] == pytest.approx(evaluate(run, tiny_corpus().qrels["test"])), name
        assert set(row["mean"]) == set(DEFAULT_METRICS)
    rows = report["rows"]
    assert report["best_baseline"] in ("bm25", "bm25+q")
    assert set(rows["stage 1 only"]["against"]) == {"dogr", report["best_baseline"]}
    assert set(rows["dogr"]["against"]) == {report["best_baseline"]}
    assert rows["stage 1 only"]["minutes"] < rows["dogr"]["minutes"], "stage 1 counts for both"


def test_processes_of_their_own_give_what_this_one_gives(
    collection, ablation, tmp_path, monkeypatch
):
    waves = []

    def here(children, *, jobs):  # in this process; `run_side_by_side` itself is test_comparison's
        waves.append([child.title[:-11] for child in children])
        assert jobs == 1 and not any(main(list(child.arguments)) for child in children)
        return {}

    monkeypatch.setattr(ablation_run, "run_side_by_side", here)
    out = tmp_path / "ablation"
    assert main(command(collection, out, "--variants", VARIANTS, "--jobs", "1")) == 0
    assert waves == [["stage-1-seed-0"], ["dogr-seed-0"]], "stage 1 is done once, and first"
    for name in ("dogr", "generation-only", "stage-1-only"):
        trec = f"trec/{name}-seed-0.trec"
        assert read_run(out / trec) == read_run(ablation / trec), name


def test_a_row_of_scoring_is_another_search_of_the_full_run(ablation):
    retriever = Retriever.load(run_of(ablation, "dogr"))
    queries = tiny_corpus().split_queries("test")
    hits = retriever.search(list(queries.values()), k=100, scoring="generation")
    run = read_run(ablation / "trec" / "generation-only-seed-0.trec")
    for query, found in zip(queries, hits, strict=True):
        assert run[query] == {hit.document: hit.score for hit in found}


def test_a_second_call_trains_nothing_and_prints_one_object(
    ablation, collection, capsys, pretended
):
    before = (ablation / "ablation.json").read_text()
    assert main(command(collection, ablation, "--variants", VARIANTS, "--json")) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    printed = json.loads(captured.out)
    assert {k: printed[k] for k in json.loads(before)} == json.loads(before)
    assert [ablation / name for name in FILES] == [type(ablation)(p) for p in printed["written"]]
    assert captured.err.count("is there") == 5 and "[5/5] stage 1 only, seed 0" in captured.err
    assert not pretended


def test_another_call_is_kept_out_while_one_is_at_work(ablation, collection, capsys):
    with held(ablation):
        assert main(command(collection, ablation, "--variants", VARIANTS)) == 2
    assert "another process is at work in it" in capsys.readouterr().err


def test_stage_2_from_a_shared_stage_1_is_that_of_one_run(ablation, collection, tmp_path):
    # The same stage 1 with its checkpoints in the run's own folder, as a plain `fit` leaves it.
    shutil.copytree(run_of(ablation, "stage-1"), tmp_path / "plain")
    recipe = load_recipe("dogr", bindings=[*BINDINGS, "TrainConfig.seed = 0"])
    plain = fit(collection, recipe=recipe, out=tmp_path / "plain")
    shared = Retriever.load(run_of(ablation, "dogr"))
    a, b = (load_file(r.folder / "model.safetensors") for r in (plain, shared))
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
    first = load_file(run_of(ablation, "stage-1") / "retriever" / "model.safetensors")
    assert any(not np.array_equal(a[k], first[k]) for k in a), "stage 2 has changed them"
    assert plain.about["fusion"] == shared.about["fusion"]
    assert plain.about["training"]["steps"] == shared.about["training"]["steps"] == 10


# ---- stage 1 of another run, where it cannot be


@pytest.mark.parametrize(
    ("bindings", "stage", "place", "message"),
    [
        (["TrainConfig.seed = 1"], None, "stage-1", "its train differs"),
        (["DocidConfig.kind = 'naive'"], None, "stage-1", "its docids differs"),
        (["ContrastiveConfig.learned_temperature = True"], None, "stage-1", "learned_temperature"),
        ([], None, "dogr", "holds a retriever of stage 2"),
        ([], 1, "stage-1", "no stage 2 is wanted"),
        (
            ["ContrastiveConfig.prefix = 0", "ContrastiveConfig.retrieval = 0"],
            None,
            "stage-1",
            "no stage 2 is wanted",
        ),
    ],
)
def test_another_stage_1(bindings, stage, place, message, ablation, collection, tmp_path):
    recipe = load_recipe("dogr", bindings=[*BINDINGS, *bindings])
    with pytest.raises(UserError, match=message):
        fit(
            collection,
            recipe=recipe,
            out=tmp_path / "new",
            stage=stage,
            stage_one=run_of(ablation, place),
        )
    assert not (tmp_path / "new").exists()


def test_stage_1_of_another_corpus_or_of_none(ablation, tmp_path):
    corpus = tiny_corpus()
    del corpus.qrels["dev"], corpus.qrels["train"]["bees-train-0"]
    recipe = load_recipe("dogr", bindings=BINDINGS)
    with pytest.raises(UserError, match="stage 1 of another corpus"):
        fit(corpus, recipe=recipe, out=tmp_path / "a", stage_one=run_of(ablation, "stage-1"))
    # A retriever by itself does not say what it was trained on.
    shutil.copytree(run_of(ablation, "stage-1") / "retriever", tmp_path / "alone" / "retriever")
    for place in ("nothing", "alone"):
        with pytest.raises(UserError, match="holds no retriever of a run"):
            fit(corpus, recipe=recipe, out=tmp_path / "a", stage_one=tmp_path / place)


# ---- what is trained, with copies in place of trainings


def test_stage_1_is_trained_once_a_seed_and_kind(collection, tmp_path, pretended, capsys):
    more = ["--docids", "rq,keywords", "--seeds", "0,1", "--minutes", "10"]
    more += ["--variants", "without-retrieval-loss,stage-1-only,semantic-only,stage-1-all-the-time"]
    assert main(command(collection, tmp_path / "out", *more)) == 0
    names = [name for name, _ in pretended]
    asked = {(name, s["minutes"]) for name, s in pretended}
    assert len(names) == len(asked) == 2 * (2 + 2 + 2), names
    for seed in (0, 1):
        for name in ("stage-1", "dogr", "stage-1-docids-rq", "docids-rq"):
            assert f"{name}-seed-{seed}" in names
    for name, settings in pretended:
        expected = (
            {6, 10} if name.startswith("stage-1-seed") else {6} if "stage-1" in name else {10}
        )
        assert settings["minutes"] in expected, "a share of 0.4, or all of it"
        assert str(settings["recipe"].train.seed) == name[-1]
    by_name = dict(pretended)
    recipe = by_name["without-retrieval-loss-seed-1"]["recipe"]
    assert recipe.contrastive.retrieval == 0 and recipe.contrastive.prefix > 0
    assert by_name["docids-rq-seed-0"]["stage_one"].name.startswith("stage-1-docids-rq-seed-0")
    captured = capsys.readouterr()
    assert (
        "docids keywords: is dogr itself" in captured.err and "docids keywords" not in captured.out
    )
    assert sorted(s["minutes"] for n, s in pretended if n == "stage-1-seed-1") == [6, 10]
    assert "12 trainings left, about 68 minutes" in captured.err, "4 of 6, 6 of 4 and 2 of 10"


def test_one_failure_does_not_lose_the_others(collection, tmp_path, pretended, monkeypatch, capsys):
    copied = ablation_run.fit

    def fails(corpus, *, out, **settings):
        if out.name.startswith("stage-1-docids-title"):
            raise UserError("no document has a title")
        if out.name.startswith("without-prefix-loss-seed-1"):
            raise RuntimeError("out of\nmemory")
        copied(corpus, out=out, **settings)

    monkeypatch.setattr(ablation_run, "fit", fails)
    out = tmp_path / "out"
    more = ["--docids", "title,rq", "--seeds", "0,1", "--variants", "without-prefix-loss"]
    assert main(command(collection, out, *more)) == 1
    captured = capsys.readouterr()
    failed = "RuntimeError: out of memory"
    assert f"genret: without prefix loss, seed 1 failed: {failed}" in captured.err
    table = (out / "ablation.md").read_text()
    assert captured.out.startswith(table)
    assert "| without prefix loss (1 of 2 seeds) | " in table and f"seed 1: {failed}\n" in table
    assert "| docids title (failed) | –" in table and "no document has a title" in table
    report = json.loads((out / "ablation.json").read_text())
    assert report["rows"]["docids rq"]["mean"] and not report["rows"]["docids title"]["mean"]
    assert len(report["failures"]) == 3
    # Once it is mended, only what is missing is done.
    pretended.clear()
    monkeypatch.setattr(ablation_run, "fit", copied)
    assert main(command(collection, out, *more)) == 0
    assert len(pretended) == 5 and "failed" not in (out / "ablation.md").read_text()


def test_it_goes_on_after_an_interruption(collection, tmp_path, pretended, monkeypatch, capsys):
    copied = ablation_run.fit

    def stops(corpus, *, out, **settings):
        if out.name.startswith("without-prefix-loss"):
            raise Interrupted("training stopped at step 3; run the same command to go on", 143)
        copied(corpus, out=out, **settings)

    monkeypatch.setattr(ablation_run, "fit", stops)
    arguments = command(collection, tmp_path / "out", "--variants", "without-prefix-loss")
    assert main(arguments) == 143
    assert not (tmp_path / "out" / "ablation.md").exists(), "whole or not at all"
    assert "run the same command" in capsys.readouterr().err
    monkeypatch.setattr(ablation_run, "fit", copied)
    assert main(arguments) == 0
    assert [n for n, _ in pretended] == [
        "stage-1-seed-0",
        "dogr-seed-0",
        "without-prefix-loss-seed-0",
    ]
    # Other minutes are another training; another split only another search.
    pretended.clear()
    assert main([*arguments, "--split", "train"]) == 0
    assert not pretended
    assert json.loads((tmp_path / "out" / "ablation.json").read_text())["split"] == "train"
    assert main([*arguments, "--minutes", "3"]) == 0
    assert len(pretended) == 3


def test_a_damaged_result_is_measured_again(collection, tmp_path, pretended, capsys):
    arguments = command(collection, tmp_path / "out", "--variants", "")
    assert main(arguments) == 0
    first = (tmp_path / "out" / "ablation.json").read_text()
    (tmp_path / "out" / "results" / "dogr-seed-0.json").write_text('{"digest": ')
    assert main(arguments) == 0
    assert "damaged; measured again" in capsys.readouterr().err
    assert (tmp_path / "out" / "ablation.json").read_text() == first and len(pretended) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--variants", "without-loss"], "choose of dogr, generation-only, semantic-only"),
        (["--docids", "keywords,numbers"], "docids 'numbers' are not known"),
        (["--seeds", "1,1"], "seeds 1, 1: give different whole numbers"),
        (["--seeds", ""], "seeds none: give"),
        (["--minutes", "0"], "minutes must be a number above 0"),
        (["--split", "tset"], "no split 'tset'"),
        (["--size", "huge"], "size 'huge' is not known"),
        (["--gin", "ContrastiveConfig.prefix = 0"], "choose other --variants"),
        (
            [
                *("--gin", "ContrastiveConfig.prefix = 0", "--variants", ""),
                *("--gin", "ContrastiveConfig.retrieval = 0"),
            ],
            "no stage 2 to take apart",
        ),
        (["--out", "{foreign}"], "is not an ablation of genret_jax"),
        (["--out", "{file}"], "is a file"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(
    more, message, collection, tmp_path, pretended, capsys
):
    (tmp_path / "foreign").mkdir()
    for file in (tmp_path / "foreign" / "thesis.tex", tmp_path / "file"):
        file.write_text("mine")
    more = [part.format(foreign=tmp_path / "foreign", file=tmp_path / "file") for part in more]
    assert main(command(collection, tmp_path / "out", *more)) == 2
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1] and not captured.out
    assert not pretended and not (tmp_path / "out").exists()


def test_seeds_that_are_no_numbers(collection, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(command(collection, tmp_path, "--seeds", "0,x"))
    assert "'0,x' are no whole numbers with commas between them" in capsys.readouterr().err


def test_a_corpus_without_train_queries_has_one_baseline(tmp_path, pretended):
    corpus = tiny_corpus()
    del corpus.qrels["train"]
    report = ablate(corpus, out=tmp_path / "out", variants=[], docids=[], bindings=BINDINGS)
    assert [row.name for row in report.rows] == ["bm25", "dogr"]


def test_losses_stand_with_docids_that_share_prefixes(collection, tmp_path, pretended):
    """Where the full method's docids are atomic; from the stage 1 of those docids."""
    atomic = ["--gin", "DocidConfig.kind = 'atomic'", "--seeds", "0,1"]
    more = [*atomic, "--docids", "title,rq", "--variants", "without-prefix-loss"]
    assert main(command(collection, tmp_path / "out", *more)) == 0
    names = [name for name, _ in pretended]
    assert sorted(names[:5]) == sorted(set(names[:5])) and len(names) == 2 * (2 + 2 + 2 + 1)
    settings = dict(pretended)["docids-rq-without-prefix-loss-seed-1"]
    assert settings["stage_one"].name.startswith("stage-1-docids-rq-seed-1")
    recipe = settings["recipe"]
    assert (recipe.docids.kind, recipe.contrastive.prefix) == ("rq", 0) < ("rq", 0.1)
    assert recipe.contrastive.retrieval > 0
    report = json.loads((tmp_path / "out" / "ablation.json").read_text())
    rows = list(report["rows"])
    assert rows[rows.index("docids rq") + 1] == "docids rq without prefix loss"
    found = report["beside"]["docids rq"]["docids rq without prefix loss"]["mrr@10"]
    means = [report["rows"][name]["mean"]["mrr@10"] for name in rows[-2:]]
    assert found["difference"] == pytest.approx(means[1] - means[0])
    text = (tmp_path / "out" / "ablation.md").read_text()
    assert "docids rq without prefix loss against docids rq: hits@1 +0.000, p 1.000" in text


def test_what_is_usual_gives_way_to_what_is_asked_for(collection, tmp_path, pretended):
    arguments = command(collection, tmp_path / "out", "--docids", "rq", "--variants", "")
    assert main(arguments) == 0
    assert dict(pretended)["docids-rq-seed-0"]["recipe"].train.learning_rate == 1e-3
    (tmp_path / "mine.gin").write_text("TrainConfig.learning_rate = 7e-4\n")
    asked = ["--gin", "TrainConfig.learning_rate = 5e-4"]
    for more, rate in ((asked, 5e-4), (["--gin_file", str(tmp_path / "mine.gin")], 7e-4)):
        assert main([*arguments, *more]) == 0
        assert dict(pretended)["docids-rq-seed-0"]["recipe"].train.learning_rate == rate
