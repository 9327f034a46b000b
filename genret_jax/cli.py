"""The command line: one function a verb. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genret_jax import __version__
from genret_jax.cli_options import (
    add_ablate_options,
    add_compare_options,
    add_evaluate_options,
    add_fit_options,
    add_pseudo_query_options,
    add_recipe_options,
    add_search_options,
    names,
)
from genret_jax.cli_output import lines_of, log_to_stderr, show
from genret_jax.errors import UserError

if TYPE_CHECKING:
    from genret_jax.corpus import Corpus
    from genret_jax.recipe import Recipe
    from genret_jax.searchers import Opened

log = logging.getLogger("genret_jax")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Returns:
      The exit code: 0, 1 where a part of a comparison or an ablation failed, 2 for a user's
      mistake, 128 + n after signal n.
    """
    arguments = _parser().parse_args(argv)
    arguments.started = time.monotonic()  # a time budget counts everything from here
    log_to_stderr()
    try:
        return arguments.run(arguments) or 0
    except UserError as error:
        print(f"genret: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # an interrupted training, its checkpoint written
        print(f"genret: {getattr(stop, 'message', stop)}", file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        print("genret: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"genret: {place}{error.strerror or error}", file=sys.stderr)
        return 2


def fit(arguments: argparse.Namespace) -> None:
    from genret_jax.training import processes

    processes.start(
        coordinator=arguments.coordinator,
        processes=arguments.processes,
        process=arguments.process,
    )
    if not processes.is_first():
        log.setLevel(logging.WARNING)

    from genret_jax.searchers import fit_method
    from genret_jax.training.budget import check_budget, with_steps

    check_budget(arguments.steps, arguments.minutes)
    retriever = fit_method(
        arguments.corpus,
        recipe=with_steps(_recipe(arguments), arguments.steps),
        out=arguments.out,
        minutes=arguments.minutes,
        started=arguments.started,
        stage=arguments.stage,
        stage_one=arguments.stage_one,
        from_t5x=arguments.from_t5x,
        profile=arguments.profile,
        peak_flops=arguments.peak_flops,
        pseudo_queries=arguments.pseudo_queries,
    )
    if not processes.is_first():
        return
    about = retriever.about
    dev = ", ".join(f"{name} {value:.3f}" for name, value in about["dev"].items())
    show(
        arguments,
        {"run": str(arguments.out), **about},
        f"{arguments.out}: {about['training']['steps']} steps in "
        f"{about['training']['seconds'] / 60:.1f} minutes; dev {dev or 'not measured'}\n"
        f'Next: genret search {arguments.out} "your question"',
    )


def pseudo_queries(arguments: argparse.Namespace) -> None:
    from genret_jax.pseudo_queries.run import generate
    from genret_jax.recipe import load_generator_recipe

    report = generate(
        arguments.corpus,
        recipe=load_generator_recipe(
            size=arguments.size, gin_files=arguments.gin_file, bindings=arguments.gin
        ),
        out=arguments.out,
        per_document=arguments.per_document,
        round_trip=arguments.round_trip,
        minutes=arguments.minutes,
        started=arguments.started,
    )
    text = (
        f"{lines_of(report)}\nNext: genret fit {arguments.corpus} --out RUN "
        f"--pseudo-queries {arguments.out}"
    )
    show(arguments, {"out": str(arguments.out), **report}, text)


def search(arguments: argparse.Namespace) -> None:
    import dataclasses

    from genret_jax.searchers import FittedSearcher, open_searcher

    retriever = open_searcher(arguments.run_folder)
    retriever, options = _ranking_options(retriever, arguments)
    if arguments.only or arguments.without:
        if isinstance(retriever, FittedSearcher):
            raise UserError(
                f"method {retriever.name} takes no --only and --without; leave them out"
            )
        options |= {"only": _ids(arguments.only), "without": _ids(arguments.without) or ()}
    found = retriever.search(arguments.query, k=arguments.k, **options)
    hits = [dataclasses.asdict(hit) for hit in found]
    if isinstance(retriever, FittedSearcher):
        hits = [{**h, "title": retriever.title(one)} for h, one in zip(hits, found, strict=True)]
    lines = [
        f"{h['rank']:3d}  {h['score']:8.3f}  {h['document']}  {h['title']}"
        + (f"  [{h['docid']}]" if "docid" in h else "")
        for h in hits
    ]
    value = {"query": arguments.query, "hits": hits}
    show(arguments, value, "\n".join(lines))


def _ids(given: Sequence[str] | None) -> list[str] | None:
    """Document ids of a command line: "d1,d2", or "@FILE" with one a line; None for none given."""
    if given is None:
        return None
    found: list[str] = []
    for text in given:
        if text.startswith("@"):
            lines = Path(text[1:]).read_text(encoding="utf-8").splitlines()
            found += [line.strip() for line in lines if line.strip()]
        else:
            found += names(text)
    return found


def evaluate(arguments: argparse.Namespace) -> None:
    from genret_jax.comparison.searchers import compare_searchers
    from genret_jax.corpus import write_run
    from genret_jax.harness.measuring import Asked, baseline
    from genret_jax.retriever import find_retriever
    from genret_jax.searchers import open_searcher

    retriever = open_searcher(arguments.run_folder)
    retriever, options = _ranking_options(retriever, arguments)
    corpus = _corpus_of(retriever, arguments.corpus)
    if retriever.name in arguments.baseline:
        raise UserError(
            f"{arguments.run_folder} is of method {retriever.name} itself; leave out --baseline "
            f"{retriever.name}"
        )
    searchers: dict[str, Any] = {name: baseline(name, corpus) for name in arguments.baseline}
    searchers = {retriever.name: Asked(retriever, **options), **searchers}
    comparison = compare_searchers(searchers, corpus, split=arguments.split)
    folder = find_retriever(Path(arguments.run_folder))
    # What was asked for beyond the split has a name of its own, beside the default search's.
    search = [f"{name.replace('_', '-')}-{value}" for name, value in _given(arguments).items()]
    name = "-".join([arguments.split, *search])
    paths = comparison.write(folder, name)
    _add_metrics(folder / "metrics.json", name, comparison.methods[retriever.name])
    show(
        arguments,
        comparison.to_dict(),
        f"{comparison.text()}\n\nwritten: {', '.join(map(str, paths))}",
    )
    if arguments.run_file:
        write_run(comparison.runs[retriever.name], arguments.run_file, tag=retriever.name)


def _ranking_options(
    retriever: Opened, arguments: argparse.Namespace
) -> tuple[Opened, dict[str, Any]]:
    """--weights, and --beam, --scoring and --look-ahead, for what has them."""
    from genret_jax.retriever import DEFAULT_BEAM, Retriever

    given = _given(arguments)
    if isinstance(retriever, Retriever):
        retriever = retriever.with_weights(given.pop("weights", "float32"))
        return retriever, {"beam": DEFAULT_BEAM, **given}
    if given:
        option = next(iter(given)).replace("_", "-")
        raise UserError(
            f"--{option} is for methods that generate docids; {arguments.run_folder} is of method "
            f"{retriever.name}: leave it out"
        )
    return retriever, {}


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is said of the search, by name."""
    names = ("weights", "beam", "scoring", "look_ahead")
    given = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def _add_metrics(path: Path, name: str, values: dict[str, float]) -> None:
    from genret_jax.files import replace_on_success

    metrics = {**json.loads(path.read_text()), name: values}
    with replace_on_success(path) as temporary:
        temporary.write_text(json.dumps(metrics, indent=1))


def ablate(arguments: argparse.Namespace) -> int:
    from genret_jax.ablation import FILES
    from genret_jax.ablation import ablate as run_ablate

    report = run_ablate(
        arguments.corpus,
        out=arguments.out,
        variants=arguments.variants,
        docids=arguments.docids,
        seeds=arguments.seeds,
        split=arguments.split,
        minutes=arguments.minutes,
        jobs=arguments.jobs,
        size=arguments.size,
        gin_files=arguments.gin_file,
        bindings=arguments.gin,
    )
    return _report(arguments, report, FILES)


def compare(arguments: argparse.Namespace) -> int:
    from genret_jax.comparison.run import compare_collections, compare_methods

    several = len(arguments.corpus) > 1
    compared: Callable[..., Any] = compare_collections if several else compare_methods
    if arguments.pseudo_queries:
        if several:
            raise UserError("--pseudo-queries are of one collection; compare that one alone")
        compared = functools.partial(compared, pseudo_queries=arguments.pseudo_queries)
    report = compared(
        arguments.corpus if several else arguments.corpus[0],
        out=arguments.out,
        methods=arguments.methods,
        seeds=arguments.seeds,
        splits=arguments.splits,
        minutes=arguments.minutes,
        steps=arguments.steps,
        queries=arguments.queries,
        against=arguments.against,
        jobs=arguments.jobs,
        size=arguments.size,
        gin_files=arguments.gin_file,
        bindings=arguments.gin,
    )
    return _report(arguments, report, report.files)


def _report(arguments: argparse.Namespace, report: Any, files: Sequence[str]) -> int:
    """Prints what a comparison or an ablation found, and where it is; 1 where a part failed."""
    written = [str(Path(arguments.out) / name) for name in files]
    text = f"{report.markdown()}\nwritten: {', '.join(written)}"
    show(arguments, {"out": arguments.out, **report.to_dict(), "written": written}, text)
    for name, reason in report.failures.items():
        print(f"genret: {name} failed: {reason}", file=sys.stderr)
    return 1 if report.failures else 0


def index(arguments: argparse.Namespace) -> None:
    from genret_jax.corpus import read_corpus
    from genret_jax.indexing import build_index
    from genret_jax.splitting import split_corpus

    recipe = _recipe(arguments)
    corpus = read_corpus(arguments.corpus)
    for warning in corpus.warnings:
        log.warning("%s", warning)
    pairs = split_corpus(corpus, recipe.data, seed=recipe.train.seed).pairs
    made = build_index(
        corpus,
        Path(arguments.out) / "index",
        docids=recipe.docids,
        vocabulary=recipe.vocabulary,
        pairs=pairs,
        seed=recipe.train.seed,
    )
    about = {
        **made.about,
        "example": [made.table.text(row) for row in range(min(5, made.table.rows))],
    }
    show(arguments, about, lines_of(about))


def info(arguments: argparse.Namespace) -> None:
    from genret_jax.indexing import Index
    from genret_jax.retriever import Retriever
    from genret_jax.searchers import open_searcher

    folder = Path(arguments.run_folder)
    for place in (folder, folder / "index"):
        if (place / "index.json").is_file() and not (folder / "retriever").exists():
            if (place / "retriever.json").is_file():
                break
            about = Index.load(place).about
            show(arguments, about, lines_of(about))
            return
    retriever = open_searcher(folder)
    about = {k: v for k, v in retriever.about.items() if k != "recipe"}
    if isinstance(retriever, Retriever):
        about["index"] = retriever.index.about["report"]
    about["bytes"] = {
        p.name: p.stat().st_size for p in sorted(retriever.folder.iterdir()) if p.is_file()
    }
    show(arguments, about, lines_of(about))


def export(arguments: argparse.Namespace) -> None:
    from genret_jax.export import export_retriever
    from genret_jax.retriever import Retriever

    about = export_retriever(Retriever.load(arguments.run_folder), arguments.out)
    show(arguments, about, lines_of(about))


def quickstart(arguments: argparse.Namespace) -> None:
    from genret_jax.quickstart.run import run_quickstart

    value, text = run_quickstart(Path(arguments.out), started=arguments.started)
    show(arguments, value, text)


def _recipe(arguments: argparse.Namespace) -> Recipe:
    from genret_jax.recipe import load_recipe

    bindings = []
    if arguments.docids:
        bindings = [f"DocidConfig.kind = {arguments.docids!r}", "DocidConfig.settings = {}"]
    bindings += arguments.gin
    return load_recipe(
        arguments.method,
        size=arguments.size,
        init=arguments.init,
        gin_files=arguments.gin_file,
        bindings=bindings,
    )


def _corpus_of(retriever: Opened, given: str | None) -> Corpus:
    """The corpus with queries and judgements that a retriever was made from."""
    from genret_jax.corpus import read_corpus
    from genret_jax.indexing import documents_digest
    from genret_jax.quickstart import EMBEDDED, standard_library_corpus

    about = retriever.about["corpus"]
    path = given or about["path"]
    if not path and about["name"] == EMBEDDED:
        return standard_library_corpus()
    if not path or not Path(path).exists():
        raise UserError(
            f"the corpus of this retriever is not at {path or 'a known place'}; "
            "give --corpus FOLDER"
        )
    corpus = read_corpus(path)
    for warning in corpus.warnings:
        log.warning("%s", warning)
    if documents_digest(corpus.documents) != retriever.documents_digest:
        raise UserError(
            f"{path}: its documents are not those that the retriever was made from; "
            "give the same corpus, or fit again"
        )
    return corpus


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="genret", description="Generative retrieval: train, search and measure."
    )
    parser.add_argument("--version", action="version", version=f"genret_jax {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(run: Callable[..., int | None], help: str, example: str) -> argparse.ArgumentParser:
        command = verbs.add_parser(
            run.__name__.replace("_", "-"),
            help=help,
            description=f"{help}\n\nExample:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="one JSON object on stdout")
        return command

    command = verb(
        fit, "train a retriever over a corpus", "genret fit my_corpus --out runs/mine --minutes 15"
    )
    add_fit_options(command)

    command = verb(
        pseudo_queries,
        "train a generator on the train queries and write queries of every document",
        "genret pseudo-queries my_corpus --out runs/pseudo_queries.jsonl --minutes 10",
    )
    add_pseudo_query_options(command)

    command = verb(search, "search a retriever", 'genret search runs/mine "who fixes lifts?" -k 5')
    add_search_options(command)

    command = verb(
        evaluate,
        "measure a retriever on a split of its corpus",
        "genret evaluate runs/mine --split test --baseline bm25 --baseline bm25+q",
    )
    add_evaluate_options(command)

    command = verb(
        ablate,
        "what each part of DOGR is worth: without one loss, stage, score or kind of docid each",
        "genret ablate my_corpus --out runs/ablation --minutes 10 --seeds 0,1,2",
    )
    add_ablate_options(command)

    command = verb(
        compare,
        "methods against one another under the same budget, on the same queries",
        "genret compare my_corpus --methods bm25,bm25+q,dense,dogr --minutes 10 --out runs/table",
    )
    add_compare_options(command)

    command = verb(
        index,
        "make identifiers and trie alone, and report on them",
        "genret index my_corpus --docids keywords --out runs/mine",
    )
    command.add_argument("--out", required=True, help="folder of the run")
    add_recipe_options(command)

    command = verb(info, "say what is in a run", "genret info runs/mine")
    command.add_argument(
        "run_folder", metavar="RUN", help="folder of a fit, an index or a retriever"
    )

    command = verb(
        export,
        "write a retriever's T5 as a Hugging Face folder",
        "genret export runs/mine --out exported",
    )
    command.add_argument("run_folder", metavar="RUN", help="folder of a fit, or a retriever folder")
    command.add_argument("--out", required=True, help="the folder; made")

    command = verb(
        quickstart,
        "train on Python's own standard library and search it (3 minutes)",
        "genret quickstart",
    )
    command.add_argument("--out", default="runs/quickstart", help="folder of the run")
    return parser
