"""What a run writes down while it trains: metrics.jsonl, TensorBoard events, curves.png."""

from __future__ import annotations

import json
import time
from pathlib import Path

import jax
from clu import metric_writers

from genret_jax.files import replace_on_success
from genret_jax.training.budget import Plan
from genret_jax.training.curves import draw_curves

_REDRAWN = 10.0  # seconds between two drawings of the curves, at least

Record = dict[str, float | int | str]


class Journal:
    """The metrics of one run, over all its sessions; only the first process writes.

    Args:
      folder: metrics.jsonl, curves.png and tensorboard/ are in it.
      after_step: where this session goes on. Lines of later steps, written after the last
        checkpoint by a session that was cut off, are dropped: they will be written again.
    """

    def __init__(self, folder: Path, *, after_step: int):
        self._folder = folder
        self._writes = jax.process_index() == 0
        self._drawn = time.monotonic()  # the first seconds have nothing to show yet
        self.records = read_records(folder / "metrics.jsonl", up_to=after_step)
        if not self._writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with replace_on_success(folder / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in self.records))
        self._tensorboard = metric_writers.SummaryWriter(str(folder / "tensorboard"))

    def write(self, kind: str, plan: Plan, values: dict[str, float]) -> None:
        """Adds one record.

        Args:
          kind: "train" or "dev"; a dev record also redraws the curves, every ten seconds at most.
          plan: where the run stands.
          values: numbers by name.
        """
        record: Record = {"kind": kind, "step": plan.step, "steps": plan.total, **values}
        self.records.append(record)
        if not self._writes:
            return
        with open(self._folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._tensorboard.write_scalars(plan.step, {f"{kind}/{k}": v for k, v in values.items()})
        if kind == "dev":
            self._tensorboard.flush()
            if time.monotonic() - self._drawn > _REDRAWN:
                draw_curves(self.records, self._folder / "curves.png")
                self._drawn = time.monotonic()

    def close(self) -> None:
        """Draws the curves once more, and ends the TensorBoard file."""
        if self._writes:
            draw_curves(self.records, self._folder / "curves.png")
            self._tensorboard.close()

    def dev_at(self, step: int) -> dict[str, float]:
        """The dev metrics of a step; empty where it was not evaluated."""
        found = [r for r in self.records if r["kind"] == "dev" and r["step"] == step]
        skip = ("kind", "step", "steps")
        return {k: float(v) for k, v in found[-1].items() if k not in skip} if found else {}


def read_records(path: Path, *, up_to: int) -> list[Record]:
    """The records of steps up to `up_to`; a torn last line is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= up_to:
            records.append(record)
    return records
