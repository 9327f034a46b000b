"""The comparison itself: fits what is not there yet, measures, and goes on where it stopped.

DIR/
  comparison.md, .json, .csv, .html, pictures/*.png   the result
  runs/METHOD-seed-S-DIGEST/                          one folder a fit, as `genret fit` makes it
  logs/METHOD-seed-S-DIGEST.log                       of fits that ran side by side
  results/SPLIT/METHOD-seed-S.json                    what was measured, query by query
  trec/SPLIT/METHOD-seed-S.trec                       the rankings

With `queries` the last two have folders SPLIT-N-queries.

Of several collections each has such a folder, DIR/NAME; DIR/collections.* is of them all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from genret_jax.comparison.bench import DEV, Bench, Cell, Settings
from genret_jax.comparison.collections import MARKDOWN as COLLECTIONS
from genret_jax.comparison.collections import Collections
from genret_jax.comparison.methods import Method, chosen_methods
from genret_jax.comparison.report import MARKDOWN, Report
from genret_jax.corpus import Corpus, read_corpus
from genret_jax.errors import UserError
from genret_jax.harness.jobs import Ledger, check_folder, check_settings, in_use, run_jobs
from genret_jax.harness.parallel import check_jobs, run_side_by_side
from genret_jax.training.budget import check_budget

_OURS = ("results", MARKDOWN)  # by which a folder is known as a comparison's


def compare_methods(
    corpus: str | Path | Corpus,
    *,
    out: str | Path,
    methods: Sequence[str],
    seeds: Sequence[int] = (0,),
    splits: Sequence[str] = ("test",),
    minutes: float | None = None,
    steps: int | None = None,
    queries: int | None = None,
    against: str | None = None,
    jobs: int | None = None,
    size: str | None = None,
    gin_files: Sequence[str | Path] = (),
    bindings: Sequence[str] = (),
    pseudo_queries: str | Path | None = None,
) -> Report:
    """Fits methods under one budget and measures them on the same queries, or goes on doing so.

    Args:
      corpus: a BEIR folder, or a Corpus.
      out: folder of the comparison; what was measured there of the same recipe, corpus and budget
        is kept.
      methods: names of gin files in gin_configs/methods; "rrf:A:B" and "weighted:A:B" fuse the
        rankings of two of them, which are then rows too.
      seeds: what is trained is trained with each.
      splits: whose queries are searched, a table each.
      minutes: that a method may take to be trained.
      steps: instead, that it is trained for, all its stages together; the recipe's without either.
      queries: searched of each split, and of dev where weights are fitted there, at most: every so
        many-th in the order of the qrels, the same for all methods.
      against: one of `methods` that all others are also tested against, besides the best baseline.
      jobs: trainings at a time, each a process of its own whose log is in `out`/logs, so that one
        that is killed is a row that failed; what is measured is measured when all have ended, one
        after the other. By default this process does everything, one after the other.
      size, gin_files, bindings: of all methods, as `load_recipe` takes them.
      pseudo_queries: file of `genret pseudo-queries`, for all methods that learn from such; what
        was measured without them, or with others, is not kept for these.

    Returns:
      The report, written to `out` too. A method that fails is in it with its reason, and does not
      lose the others.

    Raises:
      UserError: a mistake in what is given, found before anything is trained.
      Interrupted: after SIGTERM or Ctrl-C, once checkpoints are written.
    """
    settings = _settings(
        seeds, minutes, steps, queries, jobs, size, gin_files, bindings, pseudo_queries
    )
    read = corpus if isinstance(corpus, Corpus) else read_corpus(corpus)
    planned = _planned(corpus, read, Path(out), methods, seeds, splits, settings, against)
    with in_use(planned.out):
        _train([planned], jobs)
        return planned.report()


def compare_collections(
    corpora: Sequence[str | Path],
    *,
    out: str | Path,
    methods: Sequence[str],
    seeds: Sequence[int] = (0,),
    splits: Sequence[str] = ("test",),
    minutes: float | None = None,
    steps: int | None = None,
    queries: int | None = None,
    against: str | None = None,
    jobs: int | None = None,
    size: str | None = None,
    gin_files: Sequence[str | Path] = (),
    bindings: Sequence[str] = (),
) -> Collections:
    """The same over several collections, with one table of them all.

    Args:
      corpora: BEIR folders, each of a name of its own.
      splits: each collection has at least one of them, and is searched with those that it has.
      out, methods, seeds, minutes, steps, queries, against, jobs, size, gin_files, bindings: as of
        `compare_methods`.

    Raises:
      UserError, Interrupted: as `compare_methods` does.
    """
    settings = _settings(seeds, minutes, steps, queries, jobs, size, gin_files, bindings)
    out = Path(out)
    read = [read_corpus(corpus) for corpus in corpora]
    names = [Path(corpus).resolve().name for corpus in corpora]
    if len(set(names)) < len(names):
        raise UserError(f"collections {', '.join(names)}: two of one name; rename one's folder")
    check_folder(out, (*names, COLLECTIONS), "a comparison of several collections")
    missing = [split for split in splits if not any(one.qrels.get(split) for one in read)]
    if missing:
        raise UserError(f"no collection has a split {missing[0]!r}; choose other --splits")
    plans = []
    for corpus, one, name in zip(corpora, read, names, strict=True):
        here = [split for split in splits if one.qrels.get(split)]
        if not here:
            raise UserError(
                f"{corpus}: has none of the splits {', '.join(splits)}; there are "
                f"{', '.join(one.splits)}"
            )
        plans.append(_planned(corpus, one, out / name, methods, seeds, here, settings, against))
    with in_use(*(planned.out for planned in plans)):
        _train(plans, jobs)
        found = Collections(
            {name: planned.report() for name, planned in zip(names, plans, strict=True)}
        )
        found.write(out)
    return found


def _settings(
    seeds: Sequence[int],
    minutes: float | None,
    steps: int | None,
    queries: int | None,
    jobs: int | None,
    size: str | None,
    gin_files: Sequence[str | Path],
    bindings: Sequence[str],
    pseudo_queries: str | Path | None = None,
) -> Settings:
    check_budget(steps, minutes)
    check_settings(seeds, minutes)
    check_jobs(jobs)
    if queries is not None and (type(queries) is not int or queries < 1):
        raise UserError(f"queries of a split must be a whole number from 1, found {queries}")
    files, lines = tuple(map(str, gin_files)), tuple(bindings)
    pseudo = str(pseudo_queries) if pseudo_queries else None
    return Settings(minutes, steps, queries, size, files, lines, pseudo)


@dataclasses.dataclass(frozen=True)
class _Planned:
    """A comparison over one collection, whose settings were found to be in order.

    Attributes:
      corpus, out, seeds, splits, settings, against: as given.
      chosen: the rows.
      bench: does cells.
      cells: in the order in which they are done.
    """

    corpus: Corpus
    out: Path
    seeds: tuple[int, ...]
    splits: tuple[str, ...]
    settings: Settings
    against: str | None
    chosen: list[Method]
    bench: Bench
    cells: list[Cell]

    def report(self) -> Report:
        """Does what is not done, and writes the report."""
        rows = run_jobs(self.cells, Ledger(self.out), self.bench.measure, self.bench.left)
        report = Report(
            tables={s: tuple(rows[s, method.name] for method in self.chosen) for s in self.splits},
            corpus=self.corpus.name,
            documents=len(self.corpus.documents),
            queries={split: len(self.bench.asked(split)) for split in self.splits},
            judged={split: len(self.corpus.qrels[split]) for split in self.splits},
            seeds=self.seeds,
            budget=self.settings.text(self.chosen),
            against=self.against,
            also_failed={
                f"{row.name}, {split}": why
                for (split, _), row in rows.items()
                if split not in self.splits
                for why in row.failures.values()
            },
        )
        report.write(self.out)
        return report


def _planned(
    given: str | Path | Corpus,
    corpus: Corpus,
    out: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    splits: Sequence[str],
    settings: Settings,
    against: str | None,
) -> _Planned:
    check_folder(out, _OURS, "a comparison")
    splits = tuple(dict.fromkeys(splits))
    for split in splits:
        if not corpus.split_queries(split):
            raise UserError(f"split {split!r} has no queries; choose other --splits")
    if not splits:
        raise UserError(f"no --splits; there are {', '.join(corpus.splits)}")
    chosen = chosen_methods(methods, lambda name: settings.recipe(name, seeds[0]))
    if against is not None and against not in (method.name for method in chosen):
        raise UserError(f"--against {against!r} is not among --methods; name it there, too")
    if any(m.rule == "weighted" for m in chosen) and not corpus.qrels.get(DEV):
        # Train queries will not do: some methods have them all in their index, held out or not.
        raise UserError(
            "weighted:A:B fits its weights on dev, and there is no qrels/dev.tsv; move lines of "
            "qrels/train.tsv there, or take rrf:A:B, which has no weights"
        )
    if settings.pseudo_queries and not settings.learners(chosen):
        raise UserError("--pseudo-queries: none of --methods learns from them; leave it out")
    bench = Bench(given, corpus, out, settings)
    by_name = {method.name: method for method in chosen}
    cells: dict[tuple[str, int | None, str], Cell] = {}

    def cell(method: Method, seed: int | None, split: str) -> Cell:
        """The one cell of its kind; its parts are made first."""
        seed = seed if method.trained else None
        key = (method.name, seed, split)
        if key not in cells:
            parts = [by_name[part] for part in method.parts]
            here = tuple(cell(part, seed, split) for part in parts)
            dev = tuple(cell(p, seed, DEV) for p in parts if method.rule == "weighted")
            made = None if parts else settings.recipe(method.name, seed or 0)
            cells[key] = bench.cell(method, seed, split, made, here, dev)
        return cells[key]

    for method in chosen:
        for seed in seeds if method.trained else (None,):
            for split in splits:
                cell(method, seed, split)
    every = list(cells.values())
    return _Planned(corpus, out, tuple(seeds), splits, settings, against, chosen, bench, every)


def _train(plans: Sequence[_Planned], jobs: int | None) -> None:
    """Trains in other processes, where that is wanted; else each is trained when it is measured."""
    if jobs is None:
        return
    found = [
        (planned, folder, child)
        for planned in plans
        for folder, child in planned.bench.trainings(planned.cells).items()
    ]
    failed = run_side_by_side([child for _, _, child in found], jobs=jobs)
    for planned, folder, child in found:
        if child.title in failed:
            planned.bench.gave_up(folder, failed[child.title])
