"""Trainings side by side: never more than asked for, all stopped on request, every log its own."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from genret_jax.harness import parallel
from genret_jax.training.interruption import Interrupted


@pytest.fixture
def script(tmp_path, monkeypatch):
    """In place of Python, a shell script whose text the test gives."""
    path = tmp_path / "script"

    def write(text):
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        monkeypatch.setattr(parallel.sys, "executable", str(path))

    return write


def children(tmp_path, *names):
    return [
        parallel.Child(name, ("fit", name), tmp_path / "logs" / f"{name}.log") for name in names
    ]


def test_side_by_side_never_more_than_jobs_and_every_log_its_own(script, tmp_path):
    script(f"""
        touch {tmp_path}/$5.running; ls {tmp_path} | grep -c running >> {tmp_path}/counts
        head -c 300000 /dev/zero | tr '\\0' x; echo; echo $XLA_PYTHON_CLIENT_PREALLOCATE >&2
        sleep 0.3; rm {tmp_path}/$5.running
        [ $5 = c ] && {{ echo "genret: no such corpus"; exit 2; }}
        [ $5 = d ] && kill -9 $$
        exit 0""")
    failed = parallel.run_side_by_side(children(tmp_path, *"abcdef"), jobs=2)
    assert failed == {"c": "no such corpus", "d": "killed by SIGKILL"}
    counts = [int(count) for count in (tmp_path / "counts").read_text().split()]
    assert len(counts) == 6 and max(counts) == 2, "two at a time, and never more"
    for name in "abcdef":
        first, long, told, *_ = (tmp_path / "logs" / f"{name}.log").read_text().splitlines()
        assert (first, long, told) == (f"$ genret fit {name}", "x" * 300_000, "false")


def test_side_by_side_stops_all_on_request(script, tmp_path):
    script(f"trap 'touch {tmp_path}/$5.checkpoint; exit 143' TERM\nwhile true; do sleep 0.05; done")
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Interrupted) as stopped:
        parallel.run_side_by_side(children(tmp_path, *"abc"), jobs=2)
    assert stopped.value.code == 143 and "3 trainings stopped" in stopped.value.message
    assert sorted(path.name for path in tmp_path.glob("*.checkpoint")) == [
        "a.checkpoint",
        "b.checkpoint",
    ]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_nothing_is_waited_for_when_all_have_ended(script, tmp_path, monkeypatch):
    """A signal that came in such a wait was lost."""
    script("exit 3")
    told, ended = parallel._told, []
    wait = time.sleep

    def ends(*arguments):
        ended.append(True)
        return told(*arguments)

    def waits(seconds):
        assert not ended
        wait(seconds)

    monkeypatch.setattr(parallel, "_told", ends)
    monkeypatch.setattr(parallel.time, "sleep", waits)
    failed = parallel.run_side_by_side(children(tmp_path, "a"), jobs=2)
    assert failed == {"a": "it printed nothing"}


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    found = parallel.environment(4)
    assert found["OMP_NUM_THREADS"] == "7" and found["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    assert parallel.environment(4)["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"
