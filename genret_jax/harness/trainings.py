"""Trainings: each once, with failures remembered and the time that is left; the last opened."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from genret_jax.errors import UserError
from genret_jax.harness.jobs import reason
from genret_jax.searchers import Opened, open_searcher


class Trainings:
    """What was trained, what failed, and how long it took.

    Args:
      minutes: that a whole run is given; None where it has steps.
    """

    def __init__(self, minutes: float | None):
        self._minutes = minutes
        self._failed: dict[Path, str] = {}
        self._opened: tuple[Path, Opened] | None = None  # the last
        self._spent = 0.0  # seconds of trainings, and the shares of a run that they were
        self._trained = 0.0

    def train(self, folder: Path, share: float, fit: Callable[[], Any]) -> None:
        """Trains what is not there yet.

        Args:
          folder: of the training.
          share: of the time of a whole run; 0 for what takes none of the budget.
          fit: trains it.
        """
        if _done(folder):
            return
        if folder in self._failed:  # not twice: it would take as long, and fail again
            raise UserError(f"{folder.name} failed: {self._failed[folder]}")
        self._close()
        began = time.monotonic()
        try:
            fit()
        except Exception as error:
            self._failed[folder] = reason(error)
            raise
        if share:
            self._spent += time.monotonic() - began
            self._trained += share

    def there(self, folder: Path) -> bool:
        """Whether a training has ended."""
        return _done(folder)

    def gave_up(self, folder: Path, why: str) -> None:
        """Notes that a training failed in another process."""
        self._failed[folder] = why

    def opened(self, folder: Path) -> Opened:
        """What a training made; the one before is closed, so that no two take memory."""
        if self._opened is None or self._opened[0] != folder:
            self._close()
            self._opened = folder, open_searcher(folder)
        return self._opened[1]

    def left(self, shares: Mapping[Path, float]) -> str:
        """How long trainings will take, as far as can be told.

        Args:
          shares: folder of each -> its share of the time of a whole run.
        """
        left = [s for f, s in shares.items() if not _done(f) and f not in self._failed]
        if not left:
            return "nothing left to train"
        count = f"{len(left)} training{'s' if len(left) > 1 else ''} left"
        # What a run took is nearer than what it was given: a slow machine overruns short budgets.
        run = self._spent / self._trained / 60 if self._trained else self._minutes
        if run is None:
            return count
        minutes = sum(left) * run
        return f"{count}, about {f'{minutes:.0f} minutes' if minutes >= 1.5 else 'a minute'}"

    def _close(self) -> None:
        if self._opened is None:
            return
        self._opened = None
        gc.collect()  # weights and what holds them hold one another


def _done(folder: Path) -> bool:
    return (folder / "retriever" / "retriever.json").is_file()
