"""Which rows an ablation has, and its report of invented numbers."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

from genret_jax import UserError
from genret_jax.ablation import FILES, Report
from genret_jax.ablation.variants import BASELINES, chosen_variants, without_repetition
from genret_jax.evaluation import DEFAULT_METRICS
from genret_jax.harness.rows import Measured, Row
from genret_jax.recipe import load_recipe
from genret_jax.significance import holm


def made(seeds=(0, 1)) -> Report:
    """A report of invented numbers over four queries."""
    values = {
        "bm25": {None: [0, 0, 0, 1]},
        "bm25+q": {None: [0, 1, 0, 1]},
        "dogr": {0: [1, 1, 0, 1], 1: [1, 1, 1, 1]},
        "stage 1 only": {0: [1, 0, 0, 1], 1: [0, 0, 0, 1]},
    }
    rows = []
    for variant in (*BASELINES, *chosen_variants(["stage-1-only"], ["rq"])):
        measured = tuple(
            Measured(
                seed,
                {metric: np.array(hits, np.float64) for metric in DEFAULT_METRICS},
                "" if seed is None else "runs/x",
                seconds=60.0 * (1 + (seed or 0)),
            )
            for seed, hits in values.get(variant.name, {}).items()
            if seed is None or seed in seeds
        )
        rows.append(Row(variant, measured, {} if measured else {"0": "too few documents"}))
    return Report(tuple(rows), "invented", "test", 4, tuple(seeds), 5.0, "atomic")


def test_report_by_hand(tmp_path):
    report = made()
    rows = {row.name: row for row in report.rows}
    assert rows["dogr"].mean["hits@1"] == 0.875
    # 0.75 and 1: each 0.125 from their mean, and n - 1 is one.
    assert rows["dogr"].spread["hits@1"] == pytest.approx(np.sqrt(2 * 0.125**2))
    assert rows["dogr"].per_query["mrr@10"].tolist() == [1, 1, 0.5, 1]
    assert rows["bm25"].spread == {} and rows["dogr"].minutes == 1.5
    assert report.best_baseline == "bm25+q"
    tests = report.tests["dogr"]
    assert list(tests) == ["bm25", "bm25+q", "stage 1 only"]
    raw = [one["hits@1"].randomisation for one in tests.values()]
    assert [one["hits@1"].randomisation_holm for one in tests.values()] == holm(raw)
    assert tests["stage 1 only"]["mrr@10"].difference == pytest.approx(0.375 - 0.875)
    lines = report.table().splitlines()
    assert lines[0].endswith(
        "p hits@1, dogr | p mrr@10, dogr | p hits@1, bm25+q | p mrr@10, bm25+q |"
    )
    assert lines[4].startswith("| dogr | **0.875** ± 0.177 | ") and "| 1.5 | – | – |" in lines[4]
    assert lines[6].startswith("| docids rq (failed) | – |") and set(lines[6][22:]) == set(" |–")
    assert len({line.count("|") for line in lines}) == 1
    assert "- docids rq, seed 0: too few documents" in report.markdown()
    found = list(csv.DictReader(io.StringIO(report.csv())))
    assert [line["variant"] for line in found] == list(rows)
    assert float(found[2]["mrr@10 seed 1"]) == 1.0 and found[4]["failed"] == "too few documents"
    assert float(found[3]["hits@1 difference bm25+q"]) == pytest.approx(0.375 - 0.5)
    report.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)
    assert json.loads((tmp_path / "ablation.json").read_text()) == report.to_dict()


def test_one_seed_has_no_spread_and_all_may_fail(tmp_path):
    assert "±" not in made(seeds=(0,)).table() and "one seed" in made(seeds=(0,)).markdown()
    rows = [Row(row.entry, (), {"0": "no"}) for row in made().rows]
    report = Report(tuple(rows), "invented", "test", 4, (0,), None, "atomic")
    assert report.best_baseline == "" and report.tests == {}
    report.write(tmp_path)
    assert (tmp_path / "ablation.md").read_text().count("(failed)") == 5


def test_variants_that_would_repeat_another_are_left_out():
    def kept(*bindings, minutes=None):
        recipe = load_recipe("dogr", bindings=["DocidConfig.kind = 'keywords'", *bindings])
        found = without_repetition(chosen_variants(None, ["rq", "keywords"]), recipe, minutes)
        return {variant.name for variant in found}

    losses, views = (
        {"without prefix loss", "without retrieval loss"},
        {"one view", "no query views"},
    )
    usual = kept()
    assert losses | views <= usual and "docids keywords" not in usual
    assert kept(minutes=5.0) - usual == {"stage 1 all the time"}
    atomic = kept("DocidConfig.kind = 'atomic'")
    assert usual - atomic == losses
    assert atomic - usual == {"docids keywords", *(f"docids rq {loss}" for loss in losses)}
    no_queries = "ContrastiveConfig.queries = 0"
    assert usual - kept(no_queries) == {"no query views"}, "one view is still fewer"
    assert usual - kept(no_queries, "ContrastiveConfig.pieces = 1") == views


@pytest.mark.parametrize("kind", ["hierarchical", "rq", "keywords"])
def test_a_method_with_prefixes_has_its_own_loss_rows(kind):
    recipe = load_recipe("dogr", bindings=[f"DocidConfig.kind = {kind!r}"])
    found = without_repetition(chosen_variants(None, [kind, "pq", "title"]), recipe, None)
    names = [variant.name for variant in found]
    assert {"without prefix loss", "without retrieval loss"} < set(names)
    assert names[-2:] == ["docids pq", "docids title"]


@pytest.mark.parametrize("gone", ["prefix", "retrieval"])
def test_a_loss_that_has_no_weight_cannot_be_left_out_beside_docids_either(gone):
    recipe = load_recipe("dogr", bindings=[f"ContrastiveConfig.{gone} = 0.0"])
    assert recipe.docids.kind == "atomic"
    with pytest.raises(UserError, match=f"makes no sense where ContrastiveConfig.{gone} is 0"):
        without_repetition(chosen_variants(None, ["rq"]), recipe, None)


@pytest.mark.parametrize(("name", "most"), [("one view", 1), ("no query views", 16)])
def test_fewer_views_are_a_matter_of_the_recipe(name, most):
    (variant,) = (v for v in chosen_variants([name], []) if v.name == name)
    config = load_recipe("dogr", bindings=variant.bindings).contrastive
    assert (config.pieces, config.queries) == (most, 0)
