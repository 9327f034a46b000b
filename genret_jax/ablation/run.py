"""The ablation itself: trains what is not there yet, measures, and goes on where it stopped.

DIR/
  ablation.md, .json, .csv, .png   the result
  runs/NAME-seed-S-DIGEST/         one folder a training, as `genret fit` makes it
  results/ROW-seed-S.json          what was measured, value by value of each query
  trec/ROW-seed-S.trec             the rankings

Variants that differ in stage 2 alone begin with one and the same stage 1, trained once a seed and
kind of identifiers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genret_jax.ablation.report import Measured, Report, Row
from genret_jax.ablation.variants import (
    BASELINES,
    DOCIDS,
    FULL,
    Variant,
    chosen_variants,
    without_repetition,
)
from genret_jax.comparison import Asked, baseline
from genret_jax.corpus import Corpus, read_corpus, write_run
from genret_jax.errors import UserError
from genret_jax.evaluation import DEFAULT_METRICS, per_query, run_of
from genret_jax.files import replace_on_success
from genret_jax.fit import fit
from genret_jax.indexing import documents_digest
from genret_jax.recipe import Recipe, load_recipe
from genret_jax.retriever import Retriever

log = logging.getLogger(__name__)
_DEPTH = 100  # documents a query, for recall@100
_OURS = ("results", "ablation.json")  # by which a folder is known as an ablation's


@dataclasses.dataclass(frozen=True)
class Job:
    """One cell of the ablation: a variant with a seed.

    Attributes:
      variant: the row.
      seed: None for a baseline.
      recipe: None for a baseline.
      folder: of its training; None for a baseline.
      stage_one: folder of the stage 1 that it begins with.
      first: the recipe of that.
      digest: of everything that the result depends on.
    """

    variant: Variant
    seed: int | None
    digest: str
    recipe: Recipe | None = None
    folder: Path | None = None
    stage_one: Path | None = None
    first: Recipe | None = None

    @property
    def title(self) -> str:
        """For people."""
        name = self.variant.name
        return name if self.seed is None else f"{name}, seed {self.seed}"

    @property
    def name(self) -> str:
        """For files."""
        return self.variant.slug if self.seed is None else f"{self.variant.slug}-seed-{self.seed}"

    def shares(self) -> dict[Path, float]:
        """Folder of each training it needs -> its share of the time of a whole run."""
        if not (self.recipe and self.folder and self.stage_one):
            return {}
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
      size, gin_files, bindings: of all variants, as `load_recipe` takes them.

    Returns:
      The report, written to `out` too. A variant that fails is in it with its reason, and does
      not lose the others.

    Raises:
      UserError: a mistake in what is given, found before anything is trained.
      Interrupted: after SIGTERM or Ctrl-C, once a checkpoint is written.
    """
    out = Path(out)
    _check(out, seeds, minutes)
    read = corpus if isinstance(corpus, Corpus) else read_corpus(corpus)
    if not read.split_queries(split):
        raise UserError(f"split {split!r} has no queries; choose another --split")

    def recipe(variant: Variant, seed: int) -> Recipe:
        lines = [*bindings, *variant.bindings, f"TrainConfig.seed = {seed}"]
        return load_recipe(FULL, size=size, gin_files=gin_files, bindings=lines)

    wanted = chosen_variants(variants, docids)
    full = {seed: recipe(wanted[0], seed) for seed in seeds}
    wanted = without_repetition(wanted, full[seeds[0]], minutes)
    bench = _Bench(corpus, read, out, split, minutes)
    baselines = [v for v in BASELINES if v.name != "bm25+q" or read.qrels.get("train")]
    jobs = [bench.baseline(variant) for variant in baselines]
    for seed in seeds:
        jobs += [bench.job(v, seed, recipe(v, seed), full[seed]) for v in wanted]
    rows = bench.run(jobs)
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


def _check(out: Path, seeds: Sequence[int], minutes: float | None) -> None:
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(
            f"seeds {', '.join(map(str, seeds)) or 'none'}: give different whole numbers from 0"
        )
    if minutes is not None and not minutes > 0:
        raise UserError(f"minutes must be above 0, found {minutes}")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose another --out")
    there = [path.name for path in out.iterdir()] if out.is_dir() else []
    if there and not any(name in _OURS for name in there):
        raise UserError(f"{out}: exists and is not an ablation of genret_jax; choose another --out")


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
        self._corpus_digest = _digest(
            documents_digest(corpus.documents), corpus.queries, corpus.qrels
        )
        self._failed: dict[Path, str] = {}
        self._opened: tuple[Path, Retriever] | None = None  # the last
        self._spent = 0.0  # seconds of trainings, and the shares of a run that they were
        self._trained = 0.0

    def baseline(self, variant: Variant) -> Job:
        digest = _digest(variant.name, self._corpus_digest, self._split, _DEPTH)
        return Job(variant, None, digest)

    def job(self, variant: Variant, seed: int, recipe: Recipe, full: Recipe) -> Job:
        """A variant with a seed; `full` is the recipe of the full method with that seed."""
        first = recipe
        if variant.stage == 2:  # stage 1 is one for all that differ in stage 2 alone
            first = dataclasses.replace(recipe, contrastive=full.contrastive)
        kind = f"-{variant.slug}" if variant.group == "docids" else ""
        stage_one = self._folder(f"stage-1{kind}", seed, first, 1)
        folder = stage_one
        if variant.stage == 2:
            folder = self._folder(variant.training, seed, recipe, 2)
        digest = _digest(folder.name, variant.scoring, self._split, _DEPTH)
        return Job(variant, seed, digest, recipe, folder, stage_one, first)

    def _folder(self, name: str, seed: int, recipe: Recipe, stage: int) -> Path:
        """One a training: with other settings or minutes it is another folder."""
        digest = _digest(recipe.to_dict(), self._corpus_digest, self._minutes, stage)
        return self._out / "runs" / f"{name}-seed-{seed}-{digest[:10]}"

    def run(self, jobs: Sequence[Job]) -> dict[str, Row]:
        """Does what is not there yet.

        Returns:
          Name of a variant -> its row, whole or with the reason why not.
        """
        (self._out / "results").mkdir(parents=True, exist_ok=True)
        measured: dict[str, list[Measured]] = {job.variant.name: [] for job in jobs}
        failures: dict[str, dict[str, str]] = {job.variant.name: {} for job in jobs}
        kept = {job.name: self._kept(job) for job in jobs}
        for number, job in enumerate(jobs):
            title = f"[{number + 1}/{len(jobs)}] {job.title}"
            result = kept[job.name]
            left = self._left([j for j in jobs[number:] if not kept[j.name]])
            log.info("%s: %s", title, "is there" if result else left)
            try:
                measured[job.variant.name].append(result or self._measure(job))
            except Exception as error:  # of one variant; the others go on
                reason = _reason(error)
                failures[job.variant.name]["" if job.seed is None else str(job.seed)] = reason
                trace = not isinstance(error, UserError)
                log.error("%s failed: %s", title, reason, exc_info=trace)
        variants = {job.variant.name: job.variant for job in jobs}
        return {
            name: Row(variant, tuple(measured[name]), failures[name])
            for name, variant in variants.items()
        }

    def _result_file(self, job: Job) -> Path:
        return self._out / "results" / f"{job.name}.json"

    def _trec_file(self, job: Job) -> Path:
        return self._out / "trec" / f"{job.name}.trec"

    def _kept(self, job: Job) -> Measured | None:
        """The result of an earlier call, where it is of the same things."""
        path = self._result_file(job)
        if not path.is_file() or not self._trec_file(job).is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return Measured.of(found) if found["digest"] == job.digest else None
        except (ValueError, KeyError, TypeError, AttributeError):
            log.warning("%s: damaged; measured again", path)
            return None

    def _measure(self, job: Job) -> Measured:
        about: dict[str, Any] = {}
        if job.folder is None:
            searcher: Any = baseline(job.variant.name, self._corpus)
        else:
            retriever = self._retriever(job)
            searcher = Asked(retriever, scoring=job.variant.scoring)
            training = retriever.about["training"]
            about = {
                "run": str(job.folder.relative_to(self._out)),
                "steps": training["steps"],
                "seconds": training["seconds"],
            }
        run = run_of(searcher, self._corpus.split_queries(self._split), _DEPTH).run
        write_run(run, self._trec_file(job), tag=job.variant.slug)
        values = per_query(run, self._corpus.qrels[self._split], DEFAULT_METRICS)
        measured = Measured(seed=job.seed, per_query=values, **about)
        path = self._result_file(job)
        with replace_on_success(path) as temporary:
            temporary.write_text(
                json.dumps({"digest": job.digest, "row": job.variant.name, **measured.to_dict()})
            )
        return measured

    def _retriever(self, job: Job) -> Retriever:
        """The trained retriever of a job; it and its stage 1 are trained now if need be."""
        assert job.recipe and job.first and job.folder and job.stage_one
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
        if self._opened is None or self._opened[0] != job.folder:
            self._opened = None  # before the next takes memory
            self._opened = job.folder, Retriever.load(job.folder)
        return self._opened[1]

    def _train(self, folder: Path, share: float, **settings: Any) -> None:
        """Trains what is not there yet.

        Args:
          folder: of the training.
          share: of the time of a whole run.
          **settings: of `fit`.
        """
        if _done(folder):
            return
        if folder in self._failed:  # not twice: it would take as long, and fail again
            raise UserError(f"{folder.name} failed: {self._failed[folder]}")
        began = time.monotonic()
        try:
            fit(self._given, out=folder, **settings)
        except Exception as error:
            self._failed[folder] = _reason(error)
            raise
        self._spent += time.monotonic() - began
        self._trained += share

    def _left(self, jobs: Sequence[Job]) -> str:
        """How long the trainings of these jobs will take, as far as can be told."""
        shares = {folder: share for job in jobs for folder, share in job.shares().items()}
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


def _reason(error: Exception) -> str:
    """One line."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _done(folder: Path) -> bool:
    return (folder / "retriever" / "retriever.json").is_file()


def _digest(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
