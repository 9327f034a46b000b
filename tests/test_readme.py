"""The README's commands run, on the tiny collection in place of `my_corpus`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from tiny import FAST, tiny_corpus

from genret_jax.cli import _parser, main
from genret_jax.corpus import write_corpus
from genret_jax.docids.build import KINDS
from genret_jax.recipe import methods, sizes

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def _commands() -> list[list[str]]:
    lines = [line for block in _blocks("sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("genret ")]


def test_there_are_commands_of_every_verb():
    assert {c[0] for c in _commands()} >= {"fit", "search", "evaluate"}


@pytest.mark.parametrize("command", _commands(), ids=" ".join)
def test_every_command_parses(command):
    arguments = _parser().parse_args(command)
    assert arguments.run.__name__ == command[0].replace("-", "_")
    assert getattr(arguments, "method", "dsi") in methods()
    for name in getattr(arguments, "methods", ()):
        assert set(name.removeprefix("rrf:").removeprefix("weighted:").split(":")) <= set(methods())


def test_the_first_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_corpus(tiny_corpus(), tmp_path / "my_corpus")
    ran = 0
    for command in _commands():
        if command[0] == "fit" and command[1] == "my_corpus":
            command = [part for part in command if part not in ("--minutes", "15")]
            command += [part for binding in FAST for part in ("--gin", binding)]
        elif not any("runs/mine" in part for part in command):
            continue
        assert main(command) == 0, command
        ran += 1
    assert ran >= 2
    assert "hits@1" in capsys.readouterr().out


def test_python_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_corpus(tiny_corpus(), tmp_path / "my_corpus")
    for block in _blocks("python"):
        block = block.replace("minutes=15", f"bindings={list(FAST)!r}")
        exec(compile(block, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_names_in_the_readme_exist():
    for kind in KINDS:
        assert f"`{kind}`" in README, kind
    for size in sizes():
        assert f"`{size}`" in README, size
    for method in methods():
        assert f"`{method}`" in README or method == "quickstart", method
