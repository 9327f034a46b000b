"""Trainings side by side: each is a `genret fit` in a process of its own, with a log of its own.

A process writes to its log and nowhere else, so that no pipe can fill and stop it, and a line of
one never stands in the middle of another's. What it is and was can be read there: the log begins
with the command, which may be run again by hand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from genret_jax.corpus import Corpus
from genret_jax.errors import UserError
from genret_jax.training.interruption import Interrupted

log = logging.getLogger(__name__)
_POLL_SECONDS = 0.2
_PATIENCE = 120.0  # seconds in which a process that was asked to stop writes its checkpoint
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclasses.dataclass(frozen=True)
class Child:
    """A command line of genret.

    Attributes:
      title: for people; no two have the same.
      arguments: verb and options.
      log: what it prints goes here.
    """

    title: str
    arguments: tuple[str, ...]
    log: Path


@dataclasses.dataclass(frozen=True)
class _Running:
    child: Child
    process: subprocess.Popen[bytes]
    began: float


def fit_options(
    method: str, *, size: str | None, gin_files: Sequence[str | Path], bindings: Sequence[str]
) -> tuple[str, ...]:
    """The options of `genret fit` that make the recipe which `load_recipe` makes of the same."""
    given = [f"--method={method}", *([] if size is None else [f"--size={size}"])]
    given += [f"--gin_file={file}" for file in gin_files]
    return (*given, *(f"--gin={line}" for line in bindings))


def corpus_argument(given: str | Path | Corpus) -> str:
    """Where other processes find the corpus.

    Raises:
      UserError: it is in memory.
    """
    if isinstance(given, Corpus):
        raise UserError(
            "processes of their own read the corpus from a folder; give that, or leave jobs out"
        )
    return str(given)


def run_side_by_side(children: Sequence[Child], *, jobs: int) -> dict[str, str]:
    """Runs all, so many at a time.

    This process must not have touched a device before: it would keep an accelerator's memory.

    Args:
      children: in the order in which they begin.
      jobs: processes at a time.

    Returns:
      Title of each that failed -> why.

    Raises:
      Interrupted: after SIGTERM or Ctrl-C, once all have stopped; each has written a checkpoint.
    """
    waiting, running = list(children), list[_Running]()
    failed: dict[str, str] = {}
    with _asked_to_stop() as signals:
        try:
            while True:
                while waiting and len(running) < jobs and not signals:
                    running.append(_start(waiting.pop(0), jobs))
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    why = _told(one, len(running), len(waiting))
                    failed |= {one.child.title: why} if why else {}
                if signals:
                    stopped = len(running) + len(waiting)
                    _stop(running)
                    raise Interrupted(
                        f"{stopped} trainings stopped; run the same command to go on",
                        128 + signals[0],
                    )
                if not waiting and not running:
                    return failed
                time.sleep(_POLL_SECONDS)
        finally:  # whatever happens here, none is left alone
            for one in running:
                one.process.kill()
                one.process.wait()


def environment(jobs: int) -> dict[str, str]:
    """What a process finds around it: that of this one, and room for the others.

    JAX would take three quarters of an accelerator's memory for each; and BLAS a thread a core.
    What the user has set stays.
    """
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    room = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **dict.fromkeys(_THREADS, threads)}
    path = os.pathsep.join(part or os.getcwd() for part in sys.path)
    return {**room, **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _start(child: Child, jobs: int) -> _Running:
    child.log.parent.mkdir(parents=True, exist_ok=True)
    with open(child.log, "ab") as file:
        file.write(f"$ genret {shlex.join(child.arguments)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "genret_jax", *child.arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(jobs),
            start_new_session=True,  # Ctrl-C comes to this process alone, and goes on from here
        )
    log.info("%s: begins; its log is %s", child.title, child.log)
    return _Running(child, process, time.monotonic())


def _told(one: _Running, running: int, waiting: int) -> str:
    """Logs the end of a process; gives why it failed, or ""."""
    minutes = (time.monotonic() - one.began) / 60
    left = f"{running} running, {waiting} waiting"
    code = one.process.returncode
    if code == 0:
        log.info("%s: done in %.1f minutes; %s", one.child.title, minutes, left)
        return ""
    why = _last_line(one.child.log) if code > 0 else f"killed by {signal.Signals(-code).name}"
    log.error("%s failed: %s; its log is %s; %s", one.child.title, why, one.child.log, left)
    return why


def _last_line(path: Path) -> str:
    """Where the command line, or Python, says what went wrong."""
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if not lines or lines[-1].startswith("$ genret "):  # nothing stands behind the command
        return "it printed nothing"
    return lines[-1].removeprefix("genret: ")


def _stop(running: list[_Running]) -> None:
    """Asks all to stop, and waits until they have."""
    log.info("waiting for the checkpoints of %d trainings", len(running))
    for one in running:
        one.process.terminate()
    end = time.monotonic() + _PATIENCE
    for one in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.process.wait(max(0.0, end - time.monotonic()))


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Signals that have come: SIGTERM, Ctrl-C; a second Ctrl-C interrupts at once."""
    found: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if found and number == signal.SIGINT:
            raise KeyboardInterrupt
        found.append(number)

    if threading.current_thread() is not threading.main_thread():  # Python allows no handlers
        yield found
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_jobs(jobs: int | None) -> None:
    """UserError unless it is a number of processes, or none."""
    if jobs is not None and jobs < 1:
        raise UserError(f"jobs must be a whole number from 1, found {jobs}")
