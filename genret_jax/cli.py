"""The command line: one function a verb. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genret_jax import __version__
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
    _quiet()
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


class _Stderr(logging.StreamHandler):
    """Writes to what stderr is now: whoever called `main` may have replaced it since."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _quiet() -> None:
    """Our own log lines to stderr; those of the libraries only when something is wrong."""
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.getLogger("absl").setLevel(logging.ERROR)


def _print(arguments: argparse.Namespace, value: dict[str, Any], text: str) -> None:
    print(json.dumps(value) if arguments.json else text)


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

    retriever = fit_method(
        arguments.corpus,
        recipe=_recipe(arguments),
        out=arguments.out,
        minutes=arguments.minutes,
        started=arguments.started,
        stage=arguments.stage,
        from_t5x=arguments.from_t5x,
        profile=arguments.profile,
        peak_flops=arguments.peak_flops,
        pseudo_queries=arguments.pseudo_queries,
    )
    if not processes.is_first():
        return
    about = retriever.about
    dev = ", ".join(f"{name} {value:.3f}" for name, value in about["dev"].items())
    _print(
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
        f"{_lines_of(report)}\nNext: genret fit {arguments.corpus} --out RUN "
        f"--pseudo-queries {arguments.out}"
    )
    _print(arguments, {"out": str(arguments.out), **report}, text)


def search(arguments: argparse.Namespace) -> None:
    import dataclasses

    from genret_jax.searchers import FittedSearcher, open_searcher

    retriever = open_searcher(arguments.run_folder)
    options = _ranking_options(retriever, arguments)
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
    _print(arguments, value, "\n".join(lines))


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
            found += _names(text)
    return found


def evaluate(arguments: argparse.Namespace) -> None:
    from genret_jax.comparison.searchers import compare_searchers
    from genret_jax.corpus import write_run
    from genret_jax.harness.measuring import Asked, baseline
    from genret_jax.retriever import find_retriever
    from genret_jax.searchers import open_searcher

    retriever = open_searcher(arguments.run_folder)
    options = _ranking_options(retriever, arguments)
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
    paths = comparison.write(folder)
    _add_metrics(folder / "metrics.json", arguments.split, comparison.methods[retriever.name])
    _print(
        arguments,
        comparison.to_dict(),
        f"{comparison.text()}\n\nwritten: {', '.join(map(str, paths))}",
    )
    if arguments.run_file:
        write_run(comparison.runs[retriever.name], arguments.run_file, tag=retriever.name)


def _ranking_options(retriever: Opened, arguments: argparse.Namespace) -> dict[str, Any]:
    """--beam and --scoring for what has them."""
    from genret_jax.retriever import DEFAULT_BEAM, Retriever

    beam, scoring = arguments.beam, arguments.scoring
    if isinstance(retriever, Retriever):
        return {"beam": DEFAULT_BEAM if beam is None else beam, "scoring": scoring}
    if beam is not None or scoring is not None:
        option = "--scoring" if beam is None else "--beam"
        raise UserError(
            f"{option} is for methods that generate docids; {arguments.run_folder} is of method "
            f"{retriever.name}: leave it out"
        )
    return {}


def _add_metrics(path: Path, split: str, values: dict[str, float]) -> None:
    from genret_jax.files import replace_on_success

    metrics = {**json.loads(path.read_text()), split: values}
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
        size=arguments.size,
        gin_files=arguments.gin_file,
        bindings=arguments.gin,
    )
    return _report(arguments, report, FILES)


def compare(arguments: argparse.Namespace) -> int:
    from genret_jax.comparison.run import compare_methods

    report = compare_methods(
        arguments.corpus,
        out=arguments.out,
        methods=arguments.methods,
        seeds=arguments.seeds,
        splits=arguments.splits,
        minutes=arguments.minutes,
        size=arguments.size,
        gin_files=arguments.gin_file,
        bindings=arguments.gin,
    )
    return _report(arguments, report, report.files)


def _report(arguments: argparse.Namespace, report: Any, files: Sequence[str]) -> int:
    """Prints what a comparison or an ablation found, and where it is; 1 where a part failed."""
    written = [str(Path(arguments.out) / name) for name in files]
    text = f"{report.markdown()}\nwritten: {', '.join(written)}"
    _print(arguments, {"out": arguments.out, **report.to_dict(), "written": written}, text)
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
    _print(arguments, about, _lines_of(about))


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
            _print(arguments, about, _lines_of(about))
            return
    retriever = open_searcher(folder)
    about = {k: v for k, v in retriever.about.items() if k != "recipe"}
    if isinstance(retriever, Retriever):
        about["index"] = retriever.index.about["report"]
    about["bytes"] = {
        p.name: p.stat().st_size for p in sorted(retriever.folder.iterdir()) if p.is_file()
    }
    _print(arguments, about, _lines_of(about))


def export(arguments: argparse.Namespace) -> None:
    from genret_jax.export import export_retriever
    from genret_jax.retriever import Retriever

    about = export_retriever(Retriever.load(arguments.run_folder), arguments.out)
    _print(arguments, about, _lines_of(about))


def quickstart(arguments: argparse.Namespace) -> None:
    from genret_jax.quickstart.run import run_quickstart

    value, text = run_quickstart(Path(arguments.out), started=arguments.started)
    _print(arguments, value, text)


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


def _lines_of(value: dict[str, Any], indent: str = "") -> str:
    """A nested dict as aligned lines."""
    lines = []
    width = max((len(str(key)) for key in value), default=0)
    for key, item in value.items():
        if isinstance(item, dict) and item:
            lines += [f"{indent}{key}", _lines_of(item, indent + "  ")]
        else:
            lines.append(f"{indent}{str(key):<{width}}  {item}")
    return "\n".join(lines)


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
    command.add_argument("--out", required=True, help="folder of the run; made, or gone on with")
    command.add_argument("--minutes", type=float, help="end within so many minutes, all included")
    command.add_argument(
        "--stage", type=int, help="1: docids alone; 2: go on from there (default: all)"
    )
    command.add_argument(
        "--from-t5x",
        metavar="MODEL_DIR",
        help="take this stage's parameters from T5X's training instead of training it here",
    )
    command.add_argument(
        "--profile", action="store_true", help="trace a few steps of each stage to RUN/profile"
    )
    command.add_argument(
        "--peak-flops",
        type=float,
        help="FLOP/s of a device, for its utilisation in metrics.jsonl (default: of its kind)",
    )
    command.add_argument(
        "--pseudo-queries",
        metavar="FILE",
        help="learn from these, too; `genret pseudo-queries` makes them",
    )
    _add_recipe_options(command)
    _add_process_options(command)

    command = verb(
        pseudo_queries,
        "train a generator on the train queries and write queries of every document",
        "genret pseudo-queries my_corpus --out runs/pseudo_queries.jsonl --minutes 10",
    )
    _add_pseudo_query_options(command)

    command = verb(search, "search a retriever", 'genret search runs/mine "who fixes lifts?" -k 5')
    command.add_argument("run_folder", metavar="RUN", help="folder of a fit, or a retriever folder")
    command.add_argument("query")
    command.add_argument("-k", type=int, default=10, help="documents (default 10)")
    for name, what in (("--only", "search these documents alone"), ("--without", "never these")):
        command.add_argument(
            name,
            action="append",
            metavar="ID,ID|@FILE",
            help=f"{what}: ids, or a file with one a line; may be repeated",
        )
    _add_ranking_options(command)

    command = verb(
        evaluate,
        "measure a retriever on a split of its corpus",
        "genret evaluate runs/mine --split test --baseline bm25 --baseline bm25+q",
    )
    command.add_argument("run_folder", metavar="RUN", help="folder of a fit, or a retriever folder")
    command.add_argument("--split", default="test", help="which queries (default test)")
    command.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="NAME",
        help="measure bm25, tfidf, bm25+q or tfidf+q (train queries appended to documents) too; "
        "may be repeated",
    )
    _add_ranking_options(command)
    command.add_argument("--run-file", help="write the ranking as a TREC run")
    command.add_argument("--corpus", help="where the corpus is now, if it was moved")

    command = verb(
        ablate,
        "what each part of DOGR is worth: without one loss, stage, score or kind of docid each",
        "genret ablate my_corpus --out runs/ablation --minutes 10 --seeds 0,1,2",
    )
    _add_ablate_options(command)

    command = verb(
        compare,
        "methods against one another under the same budget, on the same queries",
        "genret compare my_corpus --methods bm25,bm25+q,dense,dogr --minutes 10 --out runs/table",
    )
    _add_compare_options(command)

    command = verb(
        index,
        "make identifiers and trie alone, and report on them",
        "genret index my_corpus --docids keywords --out runs/mine",
    )
    command.add_argument("--out", required=True, help="folder of the run")
    _add_recipe_options(command)

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


def _add_ranking_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--beam", type=int, help="hypotheses (default 100)")
    command.add_argument(
        "--scoring",
        help="fused, generation or semantic (default fused, where the retriever has vectors)",
    )


def _add_recipe_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("corpus", help="BEIR folder, or a corpus.jsonl[.gz]")
    command.add_argument("--method", default="dogr", help="what to train (default dogr)")
    command.add_argument("--docids", help="kind of identifiers, instead of the method's own")
    command.add_argument(
        "--init",
        metavar="T5",
        help="begin with a pretrained T5: a Hugging Face folder, or a name such as "
        "google/flan-t5-small",
    )
    _add_gin_options(command)


def _add_process_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group(
        "several processes", "the same command for each; --out on a file system that all see"
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of process 0 (or JAX_COORDINATOR_ADDRESS)"
    )
    group.add_argument(
        "--processes",
        metavar="N",
        help="how many, or auto: ask the cluster (or JAX_NUM_PROCESSES)",
    )
    group.add_argument(
        "--process", type=int, metavar="I", help="which one, from 0 (or JAX_PROCESS_ID)"
    )


def _add_pseudo_query_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("corpus", help="BEIR folder with train queries")
    command.add_argument("--out", required=True, metavar="FILE", help="JSON lines; .gz packs them")
    command.add_argument("--minutes", type=float, help="end within so many minutes, all included")
    command.add_argument(
        "--per-document", type=int, default=15, help="queries sampled of a document (default 15)"
    )
    command.add_argument(
        "--round-trip",
        type=int,
        default=0,
        metavar="K",
        help="keep a query only where BM25 finds its document among the K best (default 0: all)",
    )
    _add_gin_options(command)


def _add_ablate_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("corpus", help="BEIR folder with train queries and the split")
    command.add_argument("--out", required=True, help="folder of the ablation; gone on with")
    command.add_argument(
        "--minutes", type=float, help="of each run; variants share stage 1, which counts for each"
    )
    _add_seeds(command, "every variant is trained with each")
    command.add_argument("--split", default="test", help="which queries (default test)")
    command.add_argument(
        "--variants",
        type=_names,
        metavar="A,B",
        help="of generation-only, semantic-only, stage-1-only, stage-1-all-the-time, "
        "without-prefix-loss, without-retrieval-loss, one-view, no-query-views (default all); "
        "dogr itself is always there",
    )
    command.add_argument(
        "--docids",
        type=_names,
        default=("keywords", "title", "hierarchical", "rq"),
        metavar="A,B",
        help="kinds of identifiers, a row each (default keywords,title,hierarchical,rq; '': none)",
    )
    _add_gin_options(command)


def _add_compare_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("corpus", help="BEIR folder with the splits")
    command.add_argument("--out", required=True, help="folder of the comparison; gone on with")
    command.add_argument(
        "--methods",
        type=_names,
        required=True,
        metavar="A,B",
        help="names of gin files in gin_configs/methods, such as bm25+q, tfidf, dense, dsi, "
        "genre, dogr; rrf:A:B and weighted:A:B fuse the rankings of two of them",
    )
    command.add_argument("--minutes", type=float, help="that each method may take to be trained")
    _add_seeds(command, "every method that is trained is trained with each")
    command.add_argument(
        "--splits",
        type=_names,
        default=("test",),
        metavar="A,B",
        help="whose queries are searched (default test); with several, such as seen and unseen "
        "ones, a table each",
    )
    _add_gin_options(command)


def _add_seeds(command: argparse.ArgumentParser, what: str) -> None:
    help = f"{what} (default 0)"
    command.add_argument("--seeds", type=_seeds, default=(0,), metavar="0,1", help=help)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in _names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} are no whole numbers with commas between them, such as 0,1"
        ) from None


def _add_gin_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--size", help="size of the network, instead of the method's own")
    command.add_argument("--gin_file", action="append", default=[], help="further gin file")
    command.add_argument(
        "--gin",
        action="append",
        default=[],
        metavar="BINDING",
        help="such as 'TrainConfig.steps = 500'; comes last",
    )
