"""The ablation itself: trains what is not there yet, measures, and goes on where it stopped.

DIR/
  ablation.md, .json, .csv, .png   the result
  runs/NAME-seed-S-DIGEST/         one folder a training, as `genret fit` makes it
  logs/NAME-seed-S-DIGEST.log      of trainings that ran side by side
  results/ROW-seed-S.json          what was measured, value by value of each query
  trec/ROW-seed-S.trec             the rankings

Variants that differ in stage 2 alone begin with one and the same stage 1, trained once a seed and
kind of identifiers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genret_jax.ablation.report import Report
from genret_jax.ablation.variants import (
    BASELINES,
    DOCIDS,
    FULL,
    Variant,
    chosen_variants,
    without_repetition,
)
from genret_jax.corpus import Corpus, Run, read_corpus
from genret_jax.errors import UserError
from genret_jax.fit import fit
from genret_jax.harness.jobs import (
    Job,
    Ledger,
    check_folder,
    check_settings,
    digest_of,
    in_use,
    run_jobs,
)
from genret_jax.harness.measuring import DEPTH, Asked, baseline, rank
from genret_jax.harness.parallel import (
    Child,
    check_jobs,
    corpus_argument,
    fit_options,
    run_side_by_side,
)
from genret_jax.harness.rows import Measured, Row
from genret_jax.harness.trainings import Trainings
from genret_jax.indexing import documents_digest
from genret_jax.recipe import Recipe, load_recipe
from genret_jax.searchers import Opened

_OURS = ("results", "ablation.json")  # by which a folder is known as an ablation's


@dataclasses.dataclass(frozen=True)
class Trained(Job):
    """A variant with a seed.

    Attributes:
      variant: the entry, once more.
      recipe: of its training.
      folder: of its training.
      stage_one: folder of the stage 1 that it begins with.
      first: the recipe of that.
      options: of `genret fit`, which make `recipe`; those that make `first` in `first_options`.
    """

    variant: Variant
    recipe: Recipe
    folder: Path
    stage_one: Path
    first: Recipe
    options: tuple[str, ...] = ()
    first_options: tuple[str, ...] = ()

    def shares(self) -> dict[Path, float]:
        second = self.recipe.contrastive.share
        shares = {self.stage_one: 1 - second}
        return shares if self.folder == self.stage_one else {**shares, self.folder: second}


def ablate(
    corpus: str | Path | Corpus,
    *,
    out: str | Path,
    variants: Sequence[str] | None = None,
    docids: Sequence[str] = DOCIDS,
    seeds: Sequence[int] = (0,),
    split: str = "test",
    minutes: float | None = None,
    jobs: int | None = None,
    size: str | None = None,
    gin_files: Sequence[str | Path] = (),
    bindings: Sequence[str] = (),
) -> Report:
    """Takes DOGR apart over a corpus, or goes on where an interrupted ablation stopped.

    Args:
      corpus: a BEIR folder, or a Corpus.
      out: folder of the ablation; what was measured there of the same recipe, corpus and minutes
        is kept.
      variants: names of `VARIANTS`; all by default. The full method is always among them.
      docids: kinds of identifiers to train the full method with.
      seeds: every variant is trained with each.
      split: whose queries are searched.
      minutes: of a run, both its stages and what is between them; the recipe's steps without it.
      jobs: trainings at a time, each a process of its own whose log is in `out`/logs, so that one
        that is killed is a row that failed; what is measured is measured when all have ended, one
        after the other. By default this process does everything, one after the other.
      size, gin_files, bindings: of all variants, as `load_recipe` takes them.

    Returns:
      The report, written to `out` too. A variant that fails is in it with its reason, and does
      not lose the others.

    Raises:
      UserError: a mistake in what is given, found before anything is trained.
      Interrupted: after SIGTERM or Ctrl-C, once a checkpoint is written.
    """
    out = Path(out)
    check_settings(seeds, minutes)
    check_jobs(jobs)
    check_folder(out, _OURS, "an ablation")
    read = corpus if isinstance(corpus, Corpus) else read_corpus(corpus)
    if not read.split_queries(split):
        raise UserError(f"split {split!r} has no queries; choose another --split")

    def lines(variant: Variant, seed: int) -> list[str]:
        return [*bindings, *variant.bindings, f"TrainConfig.seed = {seed}"]

    def recipe(variant: Variant, seed: int) -> Recipe:
        files = [*variant.usual, *gin_files]
        return load_recipe(FULL, size=size, gin_files=files, bindings=lines(variant, seed))

    def options(variant: Variant, seed: int) -> tuple[str, ...]:
        files = [*variant.usual, *gin_files]
        return fit_options(FULL, size=size, gin_files=files, bindings=lines(variant, seed))

    wanted = chosen_variants(variants, docids)
    full = {seed: recipe(wanted[0], seed) for seed in seeds}
    wanted = without_repetition(wanted, full[seeds[0]], minutes)
    bench = _Bench(corpus, read, out, split, minutes)
    baselines = [v for v in BASELINES if v.name != "bm25+q" or read.qrels.get("train")]
    cells: list[Job] = [bench.baseline(variant) for variant in baselines]
    named = {variant.name: variant for variant in wanted}
    for seed in seeds:
        for variant in wanted:
            own = named[variant.begins or FULL]
            cells.append(
                dataclasses.replace(
                    bench.job(variant, seed, recipe(variant, seed), full[seed]),
                    options=options(variant, seed),
                    first_options=options(variant if variant.stage == 1 else own, seed),
                )
            )
    with in_use(out):
        if jobs is not None:
            bench.train_side_by_side(cells, jobs)
        rows = bench.run(cells)
        report = Report(
            rows=tuple(rows[variant.name] for variant in (*baselines, *wanted)),
            corpus=read.name,
            split=split,
            queries=len(read.qrels[split]),
            seeds=tuple(seeds),
            minutes=minutes,
            docids=full[seeds[0]].docids.kind,
        )
        report.write(out)
    return report


class _Bench:
    """The corpus, the folder, and what has been done and has failed so far."""

    def __init__(
        self,
        given: str | Path | Corpus,
        corpus: Corpus,
        out: Path,
        split: str,
        minutes: float | None,
    ):
        # Trainings get what the user gave: a retriever remembers where its corpus is.
        self._given, self._corpus, self._out = given, corpus, out
        self._split, self._minutes = split, minutes
        self._corpus_digest = digest_of(
            documents_digest(corpus.documents), corpus.queries, corpus.qrels
        )
        self._trainings = Trainings(minutes)

    def train_side_by_side(self, cells: Sequence[Job], jobs: int) -> None:
        """Trains what is not there: first every stage 1, then what goes on from one.

        Raises:
          UserError: the corpus is in memory, where no other process finds it.
        """
        corpus = corpus_argument(self._given)
        ledger = Ledger(self._out)
        todo = [c for c in cells if isinstance(c, Trained) and not ledger.kept(c)]
        share = {c.stage_one: 1 - c.first.contrastive.share for c in todo}
        firsts = {c.stage_one: (*c.first_options, "--stage=1") for c in todo}
        minutes = {f: self._minutes and self._minutes * share[f] for f in firsts}
        self._wave(corpus, firsts, minutes, jobs)
        seconds = {
            c.folder: (*c.options, f"--stage-one={c.stage_one}")
            for c in todo
            if c.folder != c.stage_one and self._trainings.there(c.stage_one)
        }
        self._wave(corpus, seconds, dict.fromkeys(seconds, self._minutes), jobs)

    def _wave(
        self,
        corpus: str,
        options: dict[Path, tuple[str, ...]],
        minutes: dict[Path, float | None],
        jobs: int,
    ) -> None:
        children = {}
        for folder, given in options.items():
            if not self._trainings.there(folder):
                budget = () if minutes[folder] is None else (f"--minutes={minutes[folder]}",)
                command = ("fit", corpus, f"--out={folder}", *given, *budget)
                log = self._out / "logs" / f"{folder.name}.log"
                children[folder] = Child(folder.name, command, log)
        failed = run_side_by_side(list(children.values()), jobs=jobs)
        for folder in children:
            if folder.name in failed:
                self._trainings.gave_up(folder, failed[folder.name])

    def baseline(self, variant: Variant) -> Job:
        digest = digest_of(variant.name, self._corpus_digest, self._split, DEPTH)
        return Job(variant, None, self._split, digest)

    def job(self, variant: Variant, seed: int, recipe: Recipe, full: Recipe) -> Trained:
        """A variant with a seed; `full` is the recipe of the full method with that seed."""
        first = recipe
        if variant.stage == 2:  # stage 1 is one for all that differ in stage 2 alone
            first = dataclasses.replace(recipe, contrastive=full.contrastive)
        begins = f"stage 1 {variant.begins}".strip().replace(" ", "-")
        stage_one = self._folder(begins, seed, first, 1)
        folder = stage_one
        if variant.stage == 2:
            folder = self._folder(variant.training, seed, recipe, 2)
        digest = digest_of(folder.name, variant.scoring, self._split, DEPTH)
        return Trained(
            variant, seed, self._split, digest, variant, recipe, folder, stage_one, first
        )

    def _folder(self, name: str, seed: int, recipe: Recipe, stage: int) -> Path:
        """One a training: with other settings or minutes it is another folder."""
        digest = digest_of(recipe.to_dict(), self._corpus_digest, self._minutes, stage)
        return self._out / "runs" / f"{name}-seed-{seed}-{digest[:10]}"

    def run(self, jobs: Sequence[Job]) -> dict[str, Row]:
        """Does what is not there yet.

        Returns:
          Name of a variant -> its row, whole or with the reason why not.
        """
        rows = run_jobs(jobs, Ledger(self._out), self._measure, self._left)
        return {name: row for (_, name), row in rows.items()}

    def _left(self, jobs: Sequence[Job]) -> str:
        shares = {folder: share for job in jobs for folder, share in job.shares().items()}
        return self._trainings.left(shares)

    def _measure(self, job: Job) -> tuple[Measured, Run]:
        about: dict[str, Any] = {}
        if isinstance(job, Trained):
            retriever = self._retriever(job)
            searcher: Any = Asked(retriever, scoring=job.variant.scoring)
            training = retriever.about["training"]
            about = {
                "run": str(job.folder.relative_to(self._out)),
                "steps": training["steps"],
                "seconds": training["seconds"],
            }
        else:
            searcher = baseline(job.entry.name, self._corpus)
        queries, qrels = self._corpus.split_queries(self._split), self._corpus.qrels[self._split]
        found = rank(searcher, queries, qrels, warm_up=False)
        return Measured(seed=job.seed, per_query=found.per_query, **about), found.run

    def _retriever(self, job: Trained) -> Opened:
        """The trained retriever of a job; it and its stage 1 are trained now if need be."""
        share = 1 - job.first.contrastive.share
        minutes = self._minutes and self._minutes * share
        self._train(job.stage_one, share, recipe=job.first, minutes=minutes, stage=1)
        if job.folder != job.stage_one:
            self._train(
                job.folder,
                1 - share,
                recipe=job.recipe,
                minutes=self._minutes,
                stage_one=job.stage_one,
            )
        return self._trainings.opened(job.folder)

    def _train(self, folder: Path, share: float, **settings: Any) -> None:
        self._trainings.train(folder, share, lambda: fit(self._given, out=folder, **settings))
