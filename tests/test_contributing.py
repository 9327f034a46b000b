"""The method that CONTRIBUTING.md adds is added, and its commands run, on the tiny collection."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
from tiny import FAST, tiny_corpus

from genret_jax import cli, recipe
from genret_jax.baselines.words import Words
from genret_jax.cli import main
from genret_jax.corpus import write_corpus
from genret_jax.searchers import open_searcher

pytestmark = pytest.mark.usefixtures("one_device")

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The files of the text where they belong: names stand in their first lines."""
    gin = tmp_path / "gin_configs"
    shutil.copytree(recipe.gin_folder(), gin)
    for block in (*_blocks("gin"), *_blocks("python")):
        name, _, content = block.partition("\n")
        path = tmp_path / name.removeprefix("# ")
        assert not path.exists() and path.parent.is_dir(), path
        path.write_text(content)
    monkeypatch.setattr(recipe, "gin_folder", lambda: gin)
    monkeypatch.setattr(cli, "log_to_stderr", lambda: None)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    write_corpus(tiny_corpus(), tmp_path / "my_corpus")
    yield
    sys.modules.pop("likelihood", None)


def test_the_commands_run_and_the_method_is_what_it_says(added, capsys):
    lines = [shlex.split(line)[1:] for block in _blocks("sh") for line in block.splitlines()]
    assert [line[0] for line in lines] == ["fit", "evaluate", "compare"]
    for line in lines:
        line = [part for part in line if part not in ("--minutes", "5")]
        if line[0] == "compare":
            bindings = [*FAST, "TrainConfig.start = 'random'", "TrainConfig.steps = 2"]
            line += [part for binding in bindings for part in ("--gin", binding)]
            line += ["--gin", "TrainConfig.evaluations = 1"]
        assert main(line) == 0, line
    table = json.loads(Path("runs/table/comparison.json").read_text())["splits"]["test"]["rows"]
    assert list(table) == ["bm25", "likelihood", "dsi-short"]
    what = "Query likelihood with Dirichlet smoothing (Zhai and Lafferty 2001)"
    assert table["likelihood"]["what"] == what and table["likelihood"]["group"] == "lexical"
    assert table["dsi-short"]["group"] == "generative"
    words = Words()
    counts = {d.id: Counter(words(d.whole)) for d in tiny_corpus().documents}
    everywhere = sum(counts.values(), Counter())
    for hit in open_searcher("runs/likelihood").search("honey and wax", k=8):
        count, expected = counts[hit.document], 0.0
        for word in ("honey", "wax"):
            prior = 100.0 * everywhere[word] / everywhere.total()
            expected += math.log((count[word] + prior) / (count.total() + 100.0))
        assert hit.score == pytest.approx(expected) and hit.document == "bees"
