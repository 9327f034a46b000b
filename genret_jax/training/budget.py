"""How many steps a run has: those of its recipe, or those that fit into its time."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator

import numpy as np

from genret_jax.errors import UserError
from genret_jax.indexing import NO_DOCIDS
from genret_jax.recipe import Recipe

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Plan:
    """Where a run stands in its schedule; saved with every checkpoint.

    `progress` moves by (1 - progress) / (steps left) a step. With a fixed number of steps that is
    step / total; when the total is planned anew, the learning rate goes on from where it was.

    Attributes:
      step: steps done.
      total: steps in all; 0 while a time budget is still measuring.
      progress: float32 in [0, 1]; in float32, so that a restored run counts as this one does.
      elapsed: float32 seconds of the time budget used, over all sessions of the run.
      best: float32, the best dev metric so far.
    """

    step: int = 0
    total: int = 0
    progress: np.float32 = np.float32(0)
    elapsed: np.float32 = np.float32(0)
    best: np.float32 = np.float32(-1)

    @property
    def done(self) -> bool:
        return 0 < self.total <= self.step

    def advance(self) -> None:
        if self.total:
            left = max(1, self.total - self.step)
            self.progress = np.float32(self.progress + (np.float32(1) - self.progress) / left)
        self.step += 1


class Clock:
    """The time budget of a whole `fit`: everything since the process began its work.

    Args:
      seconds: the budget; None for a run by steps.
      started: `time.monotonic()` at the start.
      reserve: seconds kept for what follows the training (writing the retriever).
    """

    def __init__(
        self,
        seconds: float | None,
        *,
        started: float | None = None,
        reserve: float = 0.0,
        now: Callable[[], float] = time.monotonic,
    ):
        self._now = now
        self._started = now() if started is None else started
        self._before = 0.0
        self.seconds = seconds
        self.reserve = reserve

    def resume(self, elapsed: float | np.floating) -> None:
        """Counts the time that earlier sessions of this run have used."""
        self._before = float(elapsed)

    @property
    def elapsed(self) -> float:
        return self._before + self._now() - self._started

    def keep(self, seconds: float, what: str) -> None:
        """Keeps more for what follows the training, and warns where that is more than is left.

        Args:
          seconds: that it takes.
          what: it is, and what makes it less, for the warning.
        """
        self.reserve += seconds
        if self.seconds is not None and self.elapsed + self.reserve > self.seconds:
            log.warning(
                "%.0f s are kept for %s: more than is left; give more minutes, or the budget "
                "will be overrun",
                seconds,
                what,
            )

    @contextlib.contextmanager
    def without(self, share: float) -> Iterator[None]:
        """Ends a budget earlier by a share of it while the block runs, for a stage that follows."""
        whole = self.seconds
        if whole:
            self.seconds = whole * (1 - share)
        try:
            yield
        finally:
            self.seconds = whole

    def check_left(self, what: str, *, elapsed: float | None = None) -> None:
        """UserError where nothing of a budget is left for a stage.

        Args:
          what: the stage, for the message.
          elapsed: by the clock that counts; this one by default.
        """
        used = self.elapsed if elapsed is None else elapsed
        if self.seconds and used > self.seconds - self.reserve:
            raise UserError(
                f"{used / 60:.1f} of {self.seconds / 60:g} minutes are used, and nothing is left "
                f"for {what}; raise --minutes"
            )

    def plan(self, plan: Plan, *, step_seconds: float, other_seconds: float) -> None:
        """Sets `plan.total` so that the run ends within the budget.

        Args:
          plan: changed in place; at least one more step is always planned.
          step_seconds: measured time of a step.
          other_seconds: what evaluations and checkpoints will still take.
        """
        if self.seconds is None:
            return
        left = self.seconds - self.reserve - self.elapsed - other_seconds
        plan.total = plan.step + max(1, int(left / step_seconds))


def check_minutes(minutes: float | None) -> None:
    """UserError unless it is a time budget, or none."""
    if minutes is not None and not 0 < minutes < float("inf"):
        raise UserError(f"minutes must be a number above 0, found {minutes}")


def with_steps(recipe: Recipe, steps: int | None) -> Recipe:
    """The recipe of a run that has so many steps, all stages together.

    Of a method in two stages, ContrastiveConfig.share says which part of them is the second's, as
    it does of a time budget.

    Args:
      recipe: of any method.
      steps: of the run; None for those of the recipe.

    Raises:
      UserError: fewer than there are stages.
    """
    if steps is None:
        return recipe
    first = second = steps
    config = recipe.contrastive
    # Without docids, contrasting is all of a method, and ranking is a stage behind another one.
    if config.rank or (config.wanted and recipe.docids.kind != NO_DOCIDS):
        second = min(max(1, round(steps * recipe.contrastive.share)), steps - 1)
        first = steps - second
    if min(first, second) < 1:
        raise UserError(f"steps must be at least 1 a stage, found {steps} in all; give more")
    return dataclasses.replace(
        recipe,
        train=dataclasses.replace(recipe.train, steps=first),
        contrastive=dataclasses.replace(recipe.contrastive, steps=second),
    )


def check_budget(steps: int | None, minutes: float | None) -> None:
    """UserError unless a budget is one of steps, or of time, or none."""
    if steps is not None and minutes is not None:
        raise UserError("both steps and minutes are given; leave one of them out")
    if steps is not None and steps < 1:
        raise UserError(f"steps must be a whole number from 1, found {steps}")
    check_minutes(minutes)
