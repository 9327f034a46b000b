"""Jobs one after another: what was measured before is kept, and one failure loses no other.

DIR/
  results/NAME.json   what was measured, value by value of each query
  trec/NAME.trec      the rankings
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from genret_jax.corpus import Run, read_run, write_run
from genret_jax.errors import UserError
from genret_jax.files import held, replace_on_success
from genret_jax.harness.rows import Entry, Measured, Row
from genret_jax.training.budget import check_minutes

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
    """One cell: an entry with a seed, on a split.

    Attributes:
      entry: the row.
      seed: None where nothing is random.
      split: whose queries are searched.
      digest: of everything that the result depends on.
    """

    entry: Entry
    seed: int | None
    split: str
    digest: str

    @property
    def title(self) -> str:
        """For people."""
        return self.entry.name if self.seed is None else f"{self.entry.name}, seed {self.seed}"

    @property
    def place(self) -> str:
        """For files."""
        return self.entry.slug if self.seed is None else f"{self.entry.slug}-seed-{self.seed}"

    def shares(self) -> dict[Path, float]:
        """Folder of each training it needs -> its share of the time of a whole run."""
        return {}


AnyJob = TypeVar("AnyJob", bound=Job)


@contextlib.contextmanager
def in_use(*folders: Path) -> Iterator[None]:
    """Makes the folders of comparisons or ablations, and keeps other calls out of them.

    Raises:
      UserError: another process is at work in one.
    """
    with contextlib.ExitStack() as stack:
        for out in folders:
            # What was begun here is known as ours by this folder, whatever happens.
            (out / "results").mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(out))
        yield


class Ledger:
    """The results in a folder."""

    def __init__(self, out: Path):
        self._out = out

    def kept(self, job: Job) -> Measured | None:
        """The result of an earlier call, where it is of the same things."""
        path, trec = self._paths(job)
        if not path.is_file() or not trec.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return Measured.of(found) if found["digest"] == job.digest else None
        except (ValueError, KeyError, TypeError, AttributeError):
            log.warning("%s: damaged; measured again", path)
            return None

    def write(self, job: Job, measured: Measured, run: Run) -> None:
        """The result last, so that where it is, all is."""
        path, trec = self._paths(job)
        path.unlink(missing_ok=True)  # an older result would stand beside the new ranking
        write_run(run, trec, tag=job.entry.slug)
        content = {"digest": job.digest, "row": job.entry.name, **measured.to_dict()}
        with replace_on_success(path) as temporary:
            temporary.write_text(json.dumps(content))

    def run_of(self, job: Job) -> Run:
        """The ranking of a job that is done."""
        return read_run(self._paths(job)[1])

    def _paths(self, job: Job) -> tuple[Path, Path]:
        return (
            self._out / "results" / f"{job.place}.json",
            self._out / "trec" / f"{job.place}.trec",
        )


def run_jobs(
    jobs: Sequence[AnyJob],
    ledger: Ledger,
    measure: Callable[[AnyJob], tuple[Measured, Run]],
    left: Callable[[Sequence[AnyJob]], str],
) -> dict[tuple[str, str], Row]:
    """Does what is not there yet.

    Args:
      jobs: those of one training stand together.
      ledger: where results are kept.
      measure: does one job; what it raises is the job's failure.
      left: what the given jobs, which are not done, will take; for people.

    Returns:
      (split, name of the entry) -> its row, whole or with the reason why not.
    """
    measured: dict[tuple[str, str], list[Measured]] = {(j.split, j.entry.name): [] for j in jobs}
    failures: dict[tuple[str, str], dict[str, str]] = {row: {} for row in measured}
    kept = [ledger.kept(job) for job in jobs]
    splits = len({job.split for job in jobs})
    for number, job in enumerate(jobs):
        title = f"[{number + 1}/{len(jobs)}] {job.title}"
        title += f", {job.split}" if splits > 1 else ""
        row, result = (job.split, job.entry.name), kept[number]
        todo = [j for j, there in zip(jobs[number:], kept[number:], strict=True) if not there]
        log.info("%s: %s", title, "is there" if result else left(todo))
        try:
            if not result:
                result, run = measure(job)
                ledger.write(job, result, run)
            measured[row].append(result)
        except Exception as error:  # of one job; the others go on
            failures[row]["" if job.seed is None else str(job.seed)] = reason(error)
            trace = not isinstance(error, UserError)
            log.error("%s failed: %s", title, reason(error), exc_info=trace)
    entries = {(job.split, job.entry.name): job.entry for job in jobs}
    return {row: Row(entry, tuple(measured[row]), failures[row]) for row, entry in entries.items()}


def check_folder(out: Path, ours: Sequence[str], what: str) -> None:
    """UserError where a folder is somebody else's.

    Args:
      out: it need not be there.
      ours: names by which one of ours is known.
      what: it must be, for the message.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose another --out")
    there = [path.name for path in out.iterdir()] if out.is_dir() else []
    if there and not any(name in ours for name in there):
        raise UserError(f"{out}: exists and is not {what} of genret_jax; choose another --out")


def check_settings(seeds: Sequence[int], minutes: float | None) -> None:
    """UserError for seeds that are none, or a time budget that is none."""
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(
            f"seeds {', '.join(map(str, seeds)) or 'none'}: give different whole numbers from 0"
        )
    check_minutes(minutes)


def reason(error: Exception) -> str:
    """Why something failed, in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def digest_of(*content: Any) -> str:
    """SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
