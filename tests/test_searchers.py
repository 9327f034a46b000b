"""Methods that write no docids: a lexical one in a folder of its own, and mistakes in a recipe."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_corpus

from genret_jax.cli import main
from genret_jax.errors import UserError
from genret_jax.recipe import load_recipe
from genret_jax.searchers import FittedSearcher, fit_method, open_searcher

pytestmark = pytest.mark.usefixtures("quiet")


def test_lexical_methods_are_fitted_searched_and_evaluated(collection, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["fit", str(collection), "--method", "bm25+q", "--out", str(out)]) == 0
    before = (out / "retriever" / "retriever.json").stat().st_mtime_ns
    assert main(["fit", str(collection), "--method", "bm25+q", "--out", str(out)]) == 0
    assert (out / "retriever" / "retriever.json").stat().st_mtime_ns == before
    capsys.readouterr()
    assert main(["search", str(out), "bake bread", "-k", "2", "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    assert hits[0]["document"] == "bread" and hits[0]["title"] == "Bakers"
    assert main(["search", str(out), "bake bread"]) == 0
    assert "bread  Bakers" in capsys.readouterr().out
    arguments = ["evaluate", str(out), "--split", "test", "--baseline", "tfidf", "--json"]
    assert main(arguments) == 0
    assert list(json.loads(capsys.readouterr().out)["methods"]) == ["bm25+q", "tfidf"]
    assert main(["info", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["searcher"] == "genret_jax.baselines.sparse"
    retriever = open_searcher(out)
    assert isinstance(retriever, FittedSearcher)
    for document in tiny_corpus().documents:
        assert retriever.documents.find(document.id) == document
    with pytest.raises(UserError, match="no document has the id 'nobody'"):
        retriever.documents.find("nobody")
    for arguments, message in (
        (["search", str(out), "bread", "--beam", "5"], "--beam is for methods that generate"),
        (["search", str(out), "bread", "--scoring", "fused"], "--scoring is for methods that"),
        (["search", str(out), " "], "the query is empty"),
        (["fit", str(collection), "--method", "bm25", "--out", str(out)], "a run of another"),
        (
            ["fit", str(collection), "--method", "bm25", "--out", "x", "--stage", "1"],
            "not trained stage",
        ),
        (
            ["fit", str(collection), "--method", "bm25", "--out", "x", "--pseudo-queries", "p"],
            "method bm25 takes no --pseudo-queries",
        ),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("SearcherConfig.module = 'no.such.module'", "cannot be imported"),
        ("SearcherConfig.module = 'json'", "has no function fit"),
        ("SearcherConfig.settings = {'k2': 1}", "k2"),
        ("SearcherConfig.settings = {'k1': -1}", "k1 = -1"),
    ],
)
def test_mistakes_in_a_searcher(binding, message, tmp_path):
    with pytest.raises(UserError, match=message):
        fit_method(
            tiny_corpus(), recipe=load_recipe("bm25", bindings=[binding]), out=tmp_path / "r"
        )
    assert not (tmp_path / "r" / "retriever").exists()
