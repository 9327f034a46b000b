"""Checkpoints of a training run, through Orbax v1.

Two series stand in the folder:

- latest/: the whole training state, every so many steps, where the loop stops (on SIGTERM, see
  `interruption`; Orbax's own policy for that would number the steps of each stage anew), and at the
  end; the newest two are kept. Training goes on from here.
- best/: the parameters with the best dev metric so far; one is kept. The retriever is made from
  these.

Restore rules, in this order:

1. A run whose `latest/` holds a checkpoint goes on from the newest whole one. Orbax writes beside
   and renames, so one that was cut off while it was written does not count.
2. Otherwise the run starts fresh from its seed.

The arrays are restored into the shardings of this run, whatever those of the writer were.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

_saving = ocp.training.save_decision_policies
_keeping = ocp.training.preservation_policies


class Checkpoints:
    """The two series of one run. A context manager: leaving it waits for writes to end.

    Args:
      folder: holds latest/ and best/; made when missing.
      every: steps between checkpoints of latest/.
    """

    def __init__(self, folder: str | Path, *, every: int):
        folder = Path(folder).absolute()
        self._latest = ocp.training.Checkpointer(
            folder / "latest",
            save_decision_policy=_saving.FixedIntervalPolicy(every),
            preservation_policy=_keeping.LatestN(2),
            cleanup_tmp_directories=True,
        )
        self._best = ocp.training.Checkpointer(
            folder / "best", preservation_policy=_keeping.LatestN(1), cleanup_tmp_directories=True
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: Any) -> None:
        self._latest.close()
        self._best.close()

    @property
    def latest_step(self) -> int | None:
        return self._latest.latest.step if self._latest.latest else None

    @property
    def best_step(self) -> int | None:
        return self._best.latest.step if self._best.latest else None

    def save(self, step: int, state: Any, *, force: bool = False) -> bool:
        """Saves the training state where the policies, or `force`, ask for it."""
        if self.latest_step == step:
            return False
        return self._latest.save(step, state, force=force)

    def should_save(self, step: int) -> bool:
        return self._latest.should_save(step)

    def save_best(self, step: int, params: Any) -> None:
        if self.best_step != step:
            self._best.save(step, params, force=True)

    def restore(self, like: Any) -> Any:
        """The newest training state, with the shapes and shardings of `like`."""
        return self._latest.load(None, _abstract(like))

    def restore_best(self, like: Any) -> Any:
        return self._best.load(None, _abstract(like))


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
