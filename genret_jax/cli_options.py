"""The options of the command line's verbs."""

from __future__ import annotations

import argparse


def add_fit_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", required=True, help="folder of the run; made, or gone on with")
    command.add_argument("--minutes", type=float, help="end within so many minutes, all included")
    command.add_argument(
        "--steps", type=int, help="instead: train for so many, all stages together"
    )
    command.add_argument(
        "--stage", type=int, help="1: docids alone; 2: go on from there (default: all)"
    )
    command.add_argument(
        "--stage-one",
        metavar="RUN",
        help="begin stage 2 with the stage 1 of that run, of the same recipe but for it",
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
    _add_pseudo_queries(command, "learn from these, too")
    add_recipe_options(command)
    add_process_options(command)


def _add_pseudo_queries(command: argparse.ArgumentParser, what: str) -> None:
    help = f"{what}; `genret pseudo-queries` makes them"
    command.add_argument("--pseudo-queries", metavar="FILE", help=help)


def add_search_options(command: argparse.ArgumentParser) -> None:
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
    add_ranking_options(command)


def add_evaluate_options(command: argparse.ArgumentParser) -> None:
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
    add_ranking_options(command)
    command.add_argument("--run-file", help="write the ranking as a TREC run")
    command.add_argument("--corpus", help="where the corpus is now, if it was moved")


def add_ranking_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--beam", type=int, help="hypotheses (default 100)")
    command.add_argument(
        "--scoring",
        help="fused, generation or semantic (default fused, where the retriever has vectors)",
    )
    command.add_argument(
        "--look-ahead",
        type=float,
        metavar="W",
        help="steer the beam by W nats a unit of similarity, too (default 0; needs vectors)",
    )
    command.add_argument(
        "--weights", help="float32, bfloat16 or int8, on the device (default float32)"
    )


def add_recipe_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("corpus", help="BEIR folder, or a corpus.jsonl[.gz]")
    command.add_argument("--method", default="dogr", help="what to train (default dogr)")
    command.add_argument("--docids", help="kind of identifiers, instead of the method's own")
    command.add_argument(
        "--init",
        metavar="T5",
        help="begin with a pretrained T5: a Hugging Face folder, or a name such as "
        "google/flan-t5-small",
    )
    add_gin_options(command)


def add_process_options(command: argparse.ArgumentParser) -> None:
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


def add_pseudo_query_options(command: argparse.ArgumentParser) -> None:
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
    add_gin_options(command)


def add_ablate_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("corpus", help="BEIR folder with train queries and the split")
    command.add_argument("--out", required=True, help="folder of the ablation; gone on with")
    command.add_argument(
        "--minutes", type=float, help="of each run; variants share stage 1, which counts for each"
    )
    _add_jobs(command)
    _add_seeds(command, "every variant is trained with each")
    command.add_argument("--split", default="test", help="which queries (default test)")
    command.add_argument(
        "--variants",
        type=names,
        metavar="A,B",
        help="of generation-only, semantic-only, stage-1-only, stage-1-all-the-time, "
        "without-prefix-loss, without-retrieval-loss, one-view, no-query-views (default all); "
        "dogr itself is always there",
    )
    command.add_argument(
        "--docids",
        type=names,
        default=("keywords", "title", "hierarchical", "rq"),
        metavar="A,B",
        help="kinds of identifiers, a row each (default keywords,title,hierarchical,rq; '': none)",
    )
    add_gin_options(command)


def add_compare_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "corpus", nargs="+", help="BEIR folder with the splits; of several there is one table, too"
    )
    command.add_argument("--out", required=True, help="folder of the comparison; gone on with")
    command.add_argument(
        "--methods",
        type=names,
        required=True,
        metavar="A,B",
        help="names of gin files in gin_configs/methods, such as bm25+q, tfidf, dense, dsi, "
        "genre, dogr; rrf:A:B and weighted:A:B fuse the rankings of two of them",
    )
    command.add_argument("--minutes", type=float, help="that each method may take to be trained")
    command.add_argument(
        "--steps",
        type=int,
        help="instead: that each is trained for, all its stages together; without either, those of "
        "its gin file, which take hours on a CPU",
    )
    _add_jobs(command)
    _add_seeds(command, "every method that is trained is trained with each")
    command.add_argument(
        "--splits",
        type=names,
        default=("test",),
        metavar="A,B",
        help="whose queries are searched (default test); with several, such as seen and unseen "
        "ones, a table each; of several collections each is asked those that it has",
    )
    command.add_argument(
        "--queries",
        type=int,
        metavar="N",
        help="search at most N queries of each split (and of dev, for weighted:A:B): every so "
        "many-th, the same for all methods; without it all",
    )
    command.add_argument(
        "--against",
        metavar="A",
        help="one of --methods that all others are tested against, besides the best baseline",
    )
    _add_pseudo_queries(command, "of one collection: methods that can learn from these, too")
    add_gin_options(command)


def _add_jobs(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="trainings at a time, each a process with its own log in OUT/logs; by default this "
        "process trains them all, one after another",
    )


def _add_seeds(command: argparse.ArgumentParser, what: str) -> None:
    help = f"{what} (default 0)"
    command.add_argument("--seeds", type=_seeds, default=(0,), metavar="0,1", help=help)


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} are no whole numbers with commas between them, such as 0,1"
        ) from None


def add_gin_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--size", help="size of the network, instead of the method's own")
    command.add_argument("--gin_file", action="append", default=[], help="further gin file")
    command.add_argument(
        "--gin",
        action="append",
        default=[],
        metavar="BINDING",
        help="such as 'TrainConfig.steps = 500'; comes last",
    )
