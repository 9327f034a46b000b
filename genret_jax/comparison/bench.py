"""The cells of a comparison, and how each is done: trained where need be, searched, measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genret_jax.comparison.methods import Method
from genret_jax.corpus import Corpus, Qrels, Run
from genret_jax.errors import UserError
from genret_jax.evaluation import DEFAULT_METRICS, per_query
from genret_jax.harness.jobs import Job, Ledger, digest_of
from genret_jax.harness.measuring import DEPTH, Asked, index_bytes, rank
from genret_jax.harness.parallel import Child, corpus_argument, fit_options
from genret_jax.harness.rows import Measured
from genret_jax.harness.trainings import Trainings
from genret_jax.hybrid import fit_weights, reciprocal_ranks, weighted
from genret_jax.indexing import documents_digest
from genret_jax.pseudo_queries import read_pseudo_queries
from genret_jax.recipe import Recipe, load_recipe
from genret_jax.searchers import fit_method, takes_pseudo_queries
from genret_jax.training.budget import with_steps

DEV = "dev"


@dataclasses.dataclass(frozen=True)
class Cell(Job):
    """A method with a seed, on a split.

    Attributes:
      method: the entry, once more.
      recipe, folder: of its fit; None for a hybrid.
      parts: what a hybrid fuses, on this split.
      dev: the same on dev, where the weights are fitted there.
      drawn: so many queries of the split are searched; 0 where all are.
    """

    method: Method
    recipe: Recipe | None = None
    folder: Path | None = None
    parts: tuple[Cell, ...] = ()
    dev: tuple[Cell, ...] = ()
    drawn: int = 0

    @property
    def place(self) -> str:
        split = f"{self.split}-{self.drawn}-queries" if self.drawn else self.split
        return f"{split}/{super().place}"

    def shares(self) -> dict[Path, float]:
        if self.folder is None:
            return {}
        return {self.folder: 1.0 if self.method.trained else 0.0}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all methods of a comparison are given alike.

    Attributes:
      minutes, steps: the budget of a training, one of them or none: then the recipes' steps.
      queries: asked of a split, dev included, at most; None for all.
      size, gin_files, bindings: as `load_recipe` takes them.
      pseudo_queries: file of them, for the methods that learn from such.
    """

    minutes: float | None = None
    steps: int | None = None
    queries: int | None = None
    size: str | None = None
    gin_files: tuple[str, ...] = ()
    bindings: tuple[str, ...] = ()
    pseudo_queries: str | None = None

    def recipe(self, method: str, seed: int) -> Recipe:
        lines = [*self.bindings, _seed(seed)]
        recipe = load_recipe(method, size=self.size, gin_files=self.gin_files, bindings=lines)
        return with_steps(recipe, self.steps)

    def command(self, method: str, seed: int) -> tuple[str, ...]:
        """The options of `genret fit` that make `recipe` and give it the budget."""
        pseudo = self.pseudo_of(self.recipe(method, seed))
        given = {"--minutes": self.minutes, "--steps": self.steps, "--pseudo-queries": pseudo}
        lines = (*self.bindings, _seed(seed))
        return (
            *fit_options(method, size=self.size, gin_files=self.gin_files, bindings=lines),
            *(f"{name}={value}" for name, value in given.items() if value is not None),
        )

    def pseudo_of(self, recipe: Recipe) -> str | None:
        """The file of pseudo-queries, where a method learns from them."""
        takes = self.pseudo_queries and takes_pseudo_queries(recipe)
        return self.pseudo_queries if takes else None

    def learners(self, methods: Sequence[Method]) -> list[str]:
        """Those that are given the pseudo-queries."""
        alone = [m.name for m in methods if not m.parts and self.pseudo_queries]
        return [name for name in alone if self.pseudo_of(self.recipe(name, 0))]

    def text(self, methods: Sequence[Method]) -> str:
        """The budget, for people, and what else some of the methods are given."""
        found = f"{self.minutes:g} min a training" if self.minutes else "the recipes' steps"
        if self.steps is not None:
            found = f"{self.steps} steps a training"
        learners = ", ".join(self.learners(methods))
        return f"{found}, pseudo-queries for {learners}" if learners else found


def _seed(seed: int) -> str:
    return f"TrainConfig.seed = {seed}"


class Bench:
    """The corpus, the folder, and how a cell is done."""

    def __init__(self, given: str | Path | Corpus, corpus: Corpus, out: Path, settings: Settings):
        # Fits get what the user gave: a retriever remembers where its corpus is.
        self._given, self._corpus, self._out = given, corpus, out
        self._settings, self._minutes = settings, settings.minutes
        self._digest = digest_of(documents_digest(corpus.documents), corpus.queries, corpus.qrels)
        file = settings.pseudo_queries
        self._pseudo = digest_of(read_pseudo_queries(file, corpus)) if file else ""
        self._trainings = Trainings(settings.minutes)
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
            drawn = parts[0].drawn
            return Cell(method, seed, split, digest, method, parts=parts, dev=dev, drawn=drawn)
        minutes = self._minutes if method.trained else None
        about: Any = recipe.to_dict()
        if not method.trained:  # no seed and no size of a network makes another index
            about = about["searcher"]
        pseudo = [self._pseudo] if self._settings.pseudo_of(recipe) else []
        digest = digest_of(about, self._digest, minutes, *pseudo)
        name = method.slug if seed is None else f"{method.slug}-seed-{seed}"
        folder = self._out / "runs" / f"{name}-{digest[:10]}"
        asked = list(self.asked(split))
        drawn = len(asked) if len(asked) < len(self._corpus.qrels[split]) else 0
        digest = digest_of(digest, split, DEPTH, *([asked] if drawn else []))
        return Cell(method, seed, split, digest, method, recipe, folder, drawn=drawn)

    def asked(self, split: str) -> dict[str, str]:
        """Query id -> text of those that are searched: all of a split, or every so many-th."""
        queries, most = self._corpus.split_queries(split), self._settings.queries
        if most is None or len(queries) <= most:
            return queries
        names = list(queries)
        drawn = np.linspace(0, len(names) - 1, most).round().astype(int)
        return {names[i]: queries[names[i]] for i in drawn}

    def _judgements(self, split: str) -> Qrels:
        """Those of the queries that are searched."""
        qrels = self._corpus.qrels[split]
        return {query: qrels[query] for query in self.asked(split)}

    def trainings(self, cells: Sequence[Cell]) -> dict[Path, Child]:
        """The trainings that cells need and that are not there yet: folder -> how to do it.

        Raises:
          UserError: the corpus is in memory, where no other process finds it.
        """
        corpus = corpus_argument(self._given)
        found: dict[Path, Child] = {}
        for cell in cells:
            if cell.folder is None or not cell.method.trained or self._ledger.kept(cell):
                continue
            if not self._trainings.there(cell.folder):
                options = self._settings.command(cell.method.name, cell.seed or 0)
                command = ("fit", corpus, f"--out={cell.folder}", *options)
                log = self._out / "logs" / f"{cell.folder.name}.log"
                found[cell.folder] = Child(f"{self._corpus.name}, {cell.title}", command, log)
        return found

    def gave_up(self, folder: Path, why: str) -> None:
        """Notes that a training failed elsewhere."""
        self._trainings.gave_up(folder, why)

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
            lambda: fit_method(
                self._given,
                recipe=recipe,
                out=folder,
                minutes=minutes,
                pseudo_queries=self._settings.pseudo_of(recipe),
            ),
        )
        searcher = self._trainings.opened(folder)
        found = rank(
            Asked(searcher), self.asked(cell.split), self._judgements(cell.split), latency=True
        )
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
            first = fit_weights(dev[0], dev[1], self._judgements(DEV)).first
            run = weighted(runs, [first, 1 - first], k=DEPTH)
            figures["weight"] = first
        speeds = [1 / one.figures["queries_per_second"] for one in measured]
        figures["queries_per_second"] = 1 / sum(speeds)
        figures["index_bytes"] = sum(one.figures["index_bytes"] for one in measured)
        values = per_query(run, self._judgements(cell.split), DEFAULT_METRICS)
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
