"""The report of a comparison: invented numbers whose table is known, names in pictures, words."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from genret_jax.comparison.collections import Collections
from genret_jax.comparison.labels import label_points
from genret_jax.comparison.methods import Method, chosen_methods
from genret_jax.comparison.report import Report, costs, latency_of, size
from genret_jax.evaluation import DEFAULT_METRICS
from genret_jax.harness.rows import Measured, Row
from genret_jax.recipe import load_recipe
from genret_jax.significance import against


def made() -> Report:
    """A report of invented numbers over four queries."""
    values = {
        ("bm25", "lexical", ""): {None: [0, 0, 0, 1]},
        ("dense", "dense", ""): {0: [0, 1, 0, 1], 1: [0, 1, 1, 1]},
        ("dogr", "generative", "rq"): {0: [1, 1, 0, 1], 1: [1, 1, 1, 1]},
        ("genre", "generative", "title"): {},
    }
    rows = []
    for (name, group, docids), seeds in values.items():
        measured = tuple(
            Measured(
                seed,
                {metric: np.array(hits, np.float64) for metric in DEFAULT_METRICS},
                f"runs/{name}",
                seconds=60.0 * (1 + (seed or 0)),
                figures={"queries_per_second": 1000.0, "index_bytes": 12_345_678.0},
                latencies=(1.0, 2.0, 10.0),
            )
            for seed, hits in seeds.items()
        )
        method = Method(name, f"what {name} <is>", group, docids)
        rows.append(Row(method, measured, {} if measured else {"0": "too few titles"}))
    return Report({"test": tuple(rows)}, "invented", 9, {"test": 4}, (0, 1), "5 min a training")


def test_report_by_hand(tmp_path):
    report = made()
    assert report.best_baseline("test") == "dense", "the best of what writes no docids"
    rows = {row.name: row for row in report.tables["test"]}
    tests = report.tests["test"]["dense"]
    values = {name: row.per_query for name, row in rows.items() if row.measured}
    others = {name: one for name, one in values.items() if name != "dense"}
    assert tests == against(values["dense"], others)
    assert tests["dogr"]["mrr@10"].difference == pytest.approx(0.875 - 0.625)
    # The percentiles of 1, 2 and 10 lie between them linearly: 2, and 2 + 0.9 * 8.
    assert latency_of(rows["dogr"]) == pytest.approx({"p50_ms": 2.0, "p95_ms": 9.2})
    assert costs(rows["dogr"])["minutes"] == 1.5 and costs(rows["genre"]) == {}
    head, lines = report.head("test"), report.lines("test")
    assert head[-2:] == ["p hits@1, dense", "p mrr@10, dense"]
    assert lines[2][:2] == ["dogr", "**0.875** ± 0.177"]
    assert lines[2][6:11] == ["12.3 MB", "1.5", "1,000", "2.0", "9.2"]
    assert lines[3][0] == "genre (failed)" and set(lines[3][1:]) == {"–"}
    assert {len(line) for line in lines} == {len(head)}
    assert report.failures == {"genre, seed 0": "too few titles"}
    report.write(tmp_path)
    page = (tmp_path / "comparison.html").read_text()
    assert "what dogr &lt;is&gt;" in page and "<is>" not in page
    assert json.loads((tmp_path / "comparison.json").read_text()) == report.to_dict()
    names = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert names == set(report.files)
    assert "pictures/identifiers.png" not in names, "one kind alone was measured"


def test_a_row_may_be_tested_against_besides_the_best_baseline():
    report = dataclasses.replace(made(), against="dogr")
    assert "(each" in made().notes()[1] and "against dogr" not in made().notes()[1]
    assert "lexical and dense methods and against dogr (each" in report.notes()[1]
    assert list(report.tests["test"]) == ["dense", "dogr"]
    assert report.tests["test"]["dense"] == made().tests["test"]["dense"], "as without it"
    values = {row.name: row.per_query for row in report.tables["test"] if row.measured}
    others = {name: one for name, one in values.items() if name != "dogr"}
    assert report.tests["test"]["dogr"] == against(values["dogr"], others)
    found = report.to_dict()["splits"]["test"]["rows"]
    assert set(found["bm25"]["against"]) == {"dense", "dogr"}
    assert set(found["dogr"]["against"]) == {"dense"}
    assert report.head("test")[-2:] == ["p hits@1, dogr", "p mrr@10, dogr"]
    assert {len(line) for line in report.lines("test")} == {len(report.head("test"))}
    same = dataclasses.replace(made(), against="dense")
    assert same.tests == made().tests and same.head("test") == made().head("test")


def test_a_draw_is_told_of_every_collection_and_split():
    report = made()
    whole = Collections({"one": report}).notes()
    assert len(whole) == 1 and report.heading("test") == "test: 4 queries"
    tables = {"seen": report.tables["test"], "unseen": report.tables["test"]}
    queries, judged = {"seen": 4, "unseen": 4}, {"seen": 9, "unseen": 4}
    drawn = dataclasses.replace(report, tables=tables, queries=queries, judged=judged)
    assert drawn.heading("unseen") == "unseen: 4 queries"
    both = dataclasses.replace(drawn, judged={"seen": 9, "unseen": 8})
    (_, note) = Collections({"one": report, "two": drawn, "three": both}).notes()
    assert note == (
        "Not all queries were searched: two seen: 4 of 9 queries; three seen: 4 of 9 queries; "
        "three unseen: 4 of 8 queries."
    )


def test_all_may_fail(tmp_path):
    rows = tuple(Row(row.entry, (), {"0": "no"}) for row in made().tables["test"])
    report = Report({"test": rows}, "invented", 9, {"test": 4}, (0,), "the recipes' steps")
    report.write(tmp_path)
    assert report.best_baseline("test") == "" and not (tmp_path / "pictures").exists()
    assert (tmp_path / "comparison.md").read_text().count("(failed)") == 4


@pytest.mark.parametrize("seed", range(3))
def test_names_of_many_points_cover_neither_one_another_nor_points(seed):
    """Eighteen points, most of them in one heap, as methods of like cost are."""
    rng = np.random.default_rng(seed)
    figure = Figure(figsize=(7.5, 6), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = [(*rng.normal(0.5, 0.1, 2), f"method-{i}") for i in range(16)]
    points += [(-1.0, 0.1, "far"), (1.5, 0.9, "away")]
    axes.set(xlim=(-1.2, 2.0), ylim=(0, 1))
    made = label_points(axes, points)
    figure.draw_without_rendering()
    assert [text.get_text() for text in made] == [name for _, _, name in points]
    boxes = [Text.get_window_extent(text) for text in made]  # without its line
    shared = [
        min(a.x1, b.x1) - max(a.x0, b.x0)
        for i, a in enumerate(boxes)
        for b in boxes[:i]
        if min(a.x1, b.x1) > max(a.x0, b.x0) + 1 and min(a.y1, b.y1) > max(a.y0, b.y0) + 1
    ]
    assert not shared
    places = axes.transData.transform([(x, y) for x, y, _ in points])
    assert not any(box.contains(*place) for box in boxes for place in places)
    assert all(axes.get_window_extent().contains(box.x0, box.y0) for box in boxes)


def test_sizes_in_words():
    assert [size(n) for n in (7, 999, 1000, 12_345, 999_600, 5.5e9, 2e12)] == [
        "7 B",
        "999 B",
        "1 kB",
        "12.3 kB",
        "1 MB",
        "5.5 GB",
        "2,000 GB",
    ]


def test_groups_of_methods():
    chosen = chosen_methods(["bm25+q", "dsi-pq", "genre"], load_recipe)
    found = [(m.name, m.group, m.trained, m.docids) for m in chosen]
    assert found == [
        ("bm25+q", "lexical", False, ""),
        ("dsi-pq", "generative", True, "pq"),
        ("genre", "generative", True, "title"),
    ]
    assert chosen[0].what == "BM25 over the documents and the train queries that they answer"
