"""The comparison itself: fits what is not there yet, measures, and goes on where it stopped.

DIR/
  comparison.md, .json, .csv, .html, pictures/*.png   the result
  runs/METHOD-seed-S-DIGEST/                          one folder a fit, as `genret fit` makes it
  results/SPLIT/METHOD-seed-S.json                    what was measured, query by query
  trec/SPLIT/METHOD-seed-S.trec                       the rankings
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genret_jax.comparison.methods import Method, chosen_methods
from genret_jax.comparison.report import MARKDOWN, Report
from genret_jax.corpus import Corpus, Run, read_corpus
from genret_jax.errors import UserError
from genret_jax.evaluation import DEFAULT_METRICS, per_query
from genret_jax.harness.jobs import (
    Job,
    Ledger,
    check_folder,
    check_settings,
    digest_of,
    run_jobs,
)
from genret_jax.harness.measuring import DEPTH, Asked, index_bytes, rank
from genret_jax.harness.rows import Measured
from genret_jax.harness.trainings import Trainings
from genret_jax.hybrid import fit_weights, reciprocal_ranks, weighted
from genret_jax.indexing import documents_digest
from genret_jax.recipe import Recipe, load_recipe
from genret_jax.searchers import fit_method

_DEV = "dev"
_OURS = ("results", MARKDOWN)  # by which a folder is known as a comparison's


@dataclasses.dataclass(frozen=True)
class Cell(Job):
    """A method with a seed, on a split.

    Attributes:
      method: the entry, once more.
      recipe, folder: of its fit; None for a hybrid.
      parts: what a hybrid fuses, on this split.
      dev: the same on dev, where the weights are fitted there.
    """

    method: Method
    recipe: Recipe | None = None
    folder: Path | None = None
    parts: tuple[Cell, ...] = ()
    dev: tuple[Cell, ...] = ()

    @property
    def place(self) -> str:
        return f"{self.split}/{super().place}"

    def shares(self) -> dict[Path, float]:
        if self.folder is None:
            return {}
        return {self.folder: 1.0 if self.method.trained else 0.0}


def compare_methods(
    corpus: str | Path | Corpus,
    *,
    out: str | Path,
    methods: Sequence[str],
    seeds: Sequence[int] = (0,),
    splits: Sequence[str] = ("test",),
    minutes: float | None = None,
    size: str | None = None,
    gin_files: Sequence[str | Path] = (),
    bindings: Sequence[str] = (),
) -> Report:
    """Fits methods under one budget and measures them on the same queries, or goes on doing so.

    Args:
      corpus: a BEIR folder, or a Corpus.
      out: folder of the comparison; what was measured there of the same recipe, corpus and minutes
        is kept.
      methods: names of gin files in gin_configs/methods; "rrf:A:B" and "weighted:A:B" fuse the
        rankings of two of them, which are then rows too.
      seeds: what is trained is trained with each.
      splits: whose queries are searched, a table each.
      minutes: that a method may take to be trained; the recipe's steps without it.
      size, gin_files, bindings: of all methods, as `load_recipe` takes them.

    Returns:
      The report, written to `out` too. A method that fails is in it with its reason, and does not
      lose the others.

    Raises:
      UserError: a mistake in what is given, found before anything is trained.
      Interrupted: after SIGTERM or Ctrl-C, once a checkpoint is written.
    """
    out = Path(out)
    check_settings(seeds, minutes)
    check_folder(out, _OURS, "a comparison")
    read = corpus if isinstance(corpus, Corpus) else read_corpus(corpus)
    splits = tuple(dict.fromkeys(splits))
    for split in splits:
        if not read.split_queries(split):
            raise UserError(f"split {split!r} has no queries; choose other --splits")
    if not splits:
        raise UserError(f"no --splits; there are {', '.join(read.splits)}")

    def recipe(name: str, seed: int = seeds[0]) -> Recipe:
        lines = [*bindings, f"TrainConfig.seed = {seed}"]
        return load_recipe(name, size=size, gin_files=gin_files, bindings=lines)

    chosen = chosen_methods(methods, recipe)
    if any(m.rule == "weighted" for m in chosen) and not read.qrels.get(_DEV):
        raise UserError("weighted:A:B fits its weights on dev, and there is no qrels/dev.tsv")
    (out / "results").mkdir(parents=True, exist_ok=True)
    bench = _Bench(corpus, read, out, minutes)
    cells: dict[tuple[str, int | None, str], Cell] = {}

    def cell(method: Method, seed: int | None, split: str) -> Cell:
        """The one cell of its kind; its parts are made first."""
        seed = seed if method.trained else None
        key = (method.name, seed, split)
        if key not in cells:
            by_name = {m.name: m for m in chosen}
            parts = [by_name[part] for part in method.parts]
            here = tuple(cell(part, seed, split) for part in parts)
            dev = tuple(cell(p, seed, _DEV) for p in parts if method.rule == "weighted")
            made = None if parts else recipe(method.name, seed or 0)
            cells[key] = bench.cell(method, seed, split, made, here, dev)
        return cells[key]

    for method in chosen:
        for seed in seeds if method.trained else (None,):
            for split in splits:
                cell(method, seed, split)
    rows = run_jobs(list(cells.values()), Ledger(out), bench.measure, bench.left)
    report = Report(
        tables={s: tuple(rows[s, method.name] for method in chosen) for s in splits},
        corpus=read.name,
        documents=len(read.documents),
        queries={split: len(read.qrels[split]) for split in splits},
        seeds=tuple(seeds),
        minutes=minutes,
        also_failed={
            f"{row.name}, {split}": why
            for (split, _), row in rows.items()
            if split not in splits
            for why in row.failures.values()
        },
    )
    report.write(out)
    return report


class _Bench:
    """The corpus, the folder, and how a cell is done."""

    def __init__(
        self, given: str | Path | Corpus, corpus: Corpus, out: Path, minutes: float | None
    ):
        # Fits get what the user gave: a retriever remembers where its corpus is.
        self._given, self._corpus, self._out, self._minutes = given, corpus, out, minutes
        self._digest = digest_of(documents_digest(corpus.documents), corpus.queries, corpus.qrels)
        self._trainings = Trainings(minutes)
        self._ledger = Ledger(out)

    def cell(
        self,
        method: Method,
        seed: int | None,
        split: str,
        recipe: Recipe | None,
        parts: tuple[Cell, ...],
        dev: tuple[Cell, ...],
    ) -> Cell:
        if recipe is None:
            of = [part.digest for part in (*parts, *dev)]
            digest = digest_of(method.rule, of)
            return Cell(method, seed, split, digest, method, parts=parts, dev=dev)
        minutes = self._minutes if method.trained else None
        about: Any = recipe.to_dict()
        if not method.trained:  # no seed and no size of a network makes another index
            about = about["searcher"]
        digest = digest_of(about, self._digest, minutes)
        name = method.slug if seed is None else f"{method.slug}-seed-{seed}"
        folder = self._out / "runs" / f"{name}-{digest[:10]}"
        return Cell(method, seed, split, digest_of(digest, split, DEPTH), method, recipe, folder)

    def left(self, cells: Sequence[Cell]) -> str:
        shares = {folder: share for cell in cells for folder, share in cell.shares().items()}
        return self._trainings.left({f: share for f, share in shares.items() if share})

    def measure(self, cell: Cell) -> tuple[Measured, Run]:
        return self._fused(cell) if cell.parts else self._searched(cell)

    def _searched(self, cell: Cell) -> tuple[Measured, Run]:
        folder, recipe = cell.folder, cell.recipe
        assert folder is not None and recipe is not None
        minutes = self._minutes if cell.method.trained else None
        self._trainings.train(
            folder,
            cell.shares()[folder],
            lambda: fit_method(self._given, recipe=recipe, out=folder, minutes=minutes),
        )
        searcher = self._trainings.opened(folder)
        queries, qrels = self._corpus.split_queries(cell.split), self._corpus.qrels[cell.split]
        found = rank(Asked(searcher), queries, qrels, latency=True)
        training = searcher.about["training"]
        measured = Measured(
            seed=cell.seed,
            per_query=found.per_query,
            run=str(folder.relative_to(self._out)),
            steps=training["steps"],
            seconds=training["seconds"],
            figures={
                "queries_per_second": found.queries_per_second,
                "index_bytes": float(index_bytes(searcher.folder)),
            },
            latencies=found.latencies,
        )
        return measured, found.run

    def _fused(self, cell: Cell) -> tuple[Measured, Run]:
        """From the rankings of its parts, one after the other on one machine."""
        measured = [self._done(part) for part in cell.parts]
        runs = [self._ledger.run_of(part) for part in cell.parts]
        figures: dict[str, float] = {}
        if cell.method.rule == "rrf":
            run = reciprocal_ranks(runs, k=DEPTH)
        else:
            for part in cell.dev:
                self._done(part)
            dev = [self._ledger.run_of(part) for part in cell.dev]
            first = fit_weights(dev[0], dev[1], self._corpus.qrels[_DEV]).first
            run = weighted(runs, [first, 1 - first], k=DEPTH)
            figures["weight"] = first
        speeds = [1 / one.figures["queries_per_second"] for one in measured]
        figures["queries_per_second"] = 1 / sum(speeds)
        figures["index_bytes"] = sum(one.figures["index_bytes"] for one in measured)
        values = per_query(run, self._corpus.qrels[cell.split], DEFAULT_METRICS)
        # Both were asked the same queries alone, until their time was up.
        together = zip(*(one.latencies for one in measured), strict=False)
        found = Measured(
            seed=cell.seed,
            per_query=values,
            run="+".join(one.run for one in measured),
            steps=sum(one.steps for one in measured),
            seconds=sum(one.seconds for one in measured),
            figures=figures,
            latencies=tuple(sum(times) for times in together),
        )
        return found, run

    def _done(self, part: Cell) -> Measured:
        found = self._ledger.kept(part)
        if found is None:
            raise UserError(f"{part.title} on {part.split} failed, and there is nothing to fuse")
        return found
