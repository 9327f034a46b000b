"""Results stand whole or not at all, and what was there before survives a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from genret_jax.errors import UserError
from genret_jax.files import held, replace_on_success


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def fill(folder: Path, **contents: str) -> None:
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_text(content)


def test_a_new_file_appears_only_after_the_block(tmp_path):
    target = tmp_path / "out.json"
    with replace_on_success(target) as temporary:
        temporary.write_text("{}")
        assert temporary.parent == target.parent  # the same file system, so renaming is one step
        assert not target.exists()
    assert target.read_text() == "{}"
    assert names(tmp_path) == ["out.json"]


def test_a_file_is_replaced_and_the_old_one_is_read_until_then(tmp_path):
    target = tmp_path / "out.json"
    target.write_text("old")
    with replace_on_success(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert names(tmp_path) == ["out.json"]


def test_a_folder_is_replaced_whole(tmp_path):
    """Files of the old folder must not shine through in the new one."""
    target = tmp_path / "index"
    fill(target, a="old", b="old")
    with replace_on_success(target) as temporary:
        fill(temporary, b="new", c="new")
        assert names(target) == ["a", "b"]
    assert names(target) == ["b", "c"]
    assert (target / "b").read_text() == "new"
    assert names(tmp_path) == ["index"]


def test_a_file_replaces_a_folder(tmp_path):
    target = tmp_path / "index"
    fill(target, a="old")
    with replace_on_success(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert names(tmp_path) == ["index"]


def test_missing_parents_are_made_and_strings_are_paths(tmp_path):
    target = tmp_path / "a" / "b" / "out.txt"
    with replace_on_success(os.fspath(target)) as temporary:
        temporary.write_text("x")
    assert target.read_text() == "x"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", ["nothing", "file", "folder"])
@pytest.mark.parametrize("writes", ["file", "folder"])
def test_after_an_exception_everything_is_as_it_was(tmp_path, error, before, writes):
    target = tmp_path / "out"
    if before == "file":
        target.write_text("old")
    elif before == "folder":
        fill(target, a="old")
    with pytest.raises(error), replace_on_success(target) as temporary:
        if writes == "file":
            temporary.write_text("half")
        else:
            fill(temporary, a="half")
        raise error("stop")
    if before == "nothing":
        assert names(tmp_path) == []
        return
    assert names(tmp_path) == ["out"]
    assert (target if before == "file" else target / "a").read_text() == "old"


@pytest.mark.parametrize("before", ["file", "folder"])
def test_a_block_that_writes_nothing_fails_and_loses_nothing(tmp_path, before):
    target = tmp_path / "out"
    if before == "file":
        target.write_text("old")
    else:
        fill(target, a="old")
    with pytest.raises(OSError), replace_on_success(target):
        pass
    assert names(tmp_path) == ["out"]
    assert (target if before == "file" else target / "a").read_text() == "old"


def test_remains_of_a_killed_run_do_not_mix_in(tmp_path):
    """A process id comes again: a temporary folder may be there already."""
    target = tmp_path / "index"
    with replace_on_success(target) as temporary:
        left_behind = temporary
        temporary.mkdir()
    fill(left_behind, ghost="boo")
    with replace_on_success(target) as temporary:
        assert temporary == left_behind
        fill(temporary, a="new")
    assert names(target) == ["a"]
    assert names(tmp_path) == ["index"]


def test_two_targets_at_once_do_not_meet(tmp_path):
    with (
        replace_on_success(tmp_path / "a") as one,
        replace_on_success(tmp_path / "b") as other,
    ):
        one.write_text("1")
        other.write_text("2")
    assert [(tmp_path / n).read_text() for n in names(tmp_path)] == ["1", "2"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_behind_a_symbolic_link(tmp_path, kind):
    """An index folder is often a link to a larger disk: writing there must work."""
    target = tmp_path / "link"
    if kind == "file":
        (tmp_path / "real").write_text("old")
    else:
        fill(tmp_path / "real", a="old")
    target.symlink_to(tmp_path / "real")
    with replace_on_success(target) as temporary:
        if kind == "file":
            temporary.write_text("new")
        else:
            fill(temporary, a="new")
    assert (target if kind == "file" else target / "a").read_text() == "new"
    assert names(tmp_path) == ["link", "real"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    """Killed, a process leaves its temporary path; the next writer of the same path goes on."""
    write = (
        "import os, signal, sys\n"
        "from genret_jax.files import replace_on_success\n"
        "with replace_on_success(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    target = tmp_path / "out.json"
    assert subprocess.run([sys.executable, "-c", write, str(target)]).returncode == -9
    assert len(list(tmp_path.glob(".out.json.tmp-*"))) == 1
    other = tmp_path / ".out.json.tmp-elsewhere-1"
    other.write_text("another machine's")
    with replace_on_success(target) as temporary:
        temporary.write_text("whole")
    assert target.read_text() == "whole"
    assert list(tmp_path.glob(".*")) == [other]


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    """A lock is of an open file: a second one in this process is kept out like another process."""
    kept_out = pytest.raises(UserError, match="another process is at work in it")
    with held(tmp_path), kept_out, held(tmp_path):
        pytest.fail("both hold it")
    with pytest.raises(KeyError), held(tmp_path):
        raise KeyError
    code = (
        "import sys, time; from pathlib import Path; from genret_jax.files import held\n"
        "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process"), held(tmp_path):
            pytest.fail("both hold it")
    finally:
        other.kill()
        other.wait()
    with held(tmp_path):  # a lock ends with its process, however that ended
        pass
