"""MS MARCO passage ranking from its official files: question -> passage.

    python -m tasks.msmarco --collection collection.tsv \
        --queries queries.train.tsv --queries queries.dev.small.tsv \
        --qrels train=qrels.train.tsv --qrels dev_small=qrels.dev.small.tsv \
        --out msmarco --expect published
    genret fit msmarco --out runs/msmarco
    genret evaluate runs/msmarco --split dev_small

The files are those of https://microsoft.github.io/msmarco/Datasets (passage ranking), plain or
gzip. Papers on generative retrieval report on the 6,980 questions of "dev small", whose test
judgements are not public; the split keeps its name, so that `fit` does not choose parameters on it:
without a split "dev" it holds out train questions.

Lines are written as they are read; what is kept in memory are the ids of judged questions and
passages. Questions without judgement are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from genret_jax.errors import UserError
from genret_jax.lines import Notices, place, read_lines
from genret_jax.trec import judgements
from tasks.command import run
from tasks.writing import beir_folder, differences

REPORT = "msmarco.json"
PUBLISHED = {"passages": 8_841_823, "dev_small": 6_980}


def build(
    collection: str | Path,
    queries: Sequence[str | Path],
    qrels: Mapping[str, str | Path],
    out: str | Path,
) -> dict[str, Any]:
    """Writes the BEIR folder, whole or not at all.

    Args:
      collection: lines of passage id, tab, text.
      queries: files with lines of question id, tab, text.
      qrels: split -> file of judgements (question, 0, passage, grade).
      out: the folder; an earlier one of this program is replaced.

    Returns:
      The report, which stands in OUT/msmarco.json too: passages, judged questions of each split,
      questions left out, and the SHA-256 of every file.

    Raises:
      UserError: naming file and line: a line without tab, an id that comes twice, a judged question
        or passage that is in none of the files; and what `judgements` and `beir_folder` raise.
    """
    with beir_folder(out, splits=list(qrels), report=REPORT) as writer:
        asked: dict[str, str] = {}  # judged question, and passage -> where it is judged first
        wanted: dict[str, str] = {}
        counts = {}
        for split, path in qrels.items():
            here = set()
            for judgement in judgements(path, notices=Notices()):
                writer.judgement(split, judgement.query, judgement.document, judgement.grade)
                where = place(path, judgement.line)
                asked.setdefault(judgement.query, where)
                wanted.setdefault(judgement.document, where)
                here.add(judgement.query)
            counts[split] = len(here)
        left_out, missing = 0, set(asked)
        for path in queries:
            for query, text in _table(path):
                if query in missing:
                    missing.remove(query)
                    writer.query(query, text=text)
                elif query not in asked:
                    left_out += 1
        _none_missing("question", missing, asked)
        passages, unseen = 0, set(wanted)
        for passage, text in _table(collection):
            unseen.discard(passage)
            writer.document(passage, title="", text=text)
            passages += 1
        _none_missing("passage", unseen, wanted)
        writer.report |= {"passages": passages, **counts, "questions_left_out": left_out}
    return writer.report


def _table(path: str | Path) -> Iterator[tuple[str, str]]:
    """(id, text) of every line; an id that follows itself is caught, others are BEIR's readers'."""
    before = None
    for line, raw in read_lines(path, notices=Notices()):
        name, tab, text = raw.partition("\t")
        if not tab or not name.strip():
            raise UserError(
                f"{place(path, line)}: no id and text with a tab between; fetch it again"
            )
        if name == before:
            raise UserError(
                f"{place(path, line)}: {name} is also in the line above; fetch it again"
            )
        before = name
        yield name, text


def _none_missing(what: str, missing: set[str], where: Mapping[str, str]) -> None:
    if missing:
        first = next(name for name in where if name in missing)
        raise UserError(
            f"{where[first]}: {what} {first} is in none of the files, like {len(missing)} judged "
            f"{what}s; give the files that belong together"
        )


def _split(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not SPLIT=FILE, such as train=qrels.tsv")
    return name, path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--collection", required=True, help="collection.tsv[.gz]")
    parser.add_argument(
        "--queries", required=True, action="append", metavar="FILE", help="may be repeated"
    )
    parser.add_argument(
        "--qrels",
        required=True,
        action="append",
        type=_split,
        metavar="SPLIT=FILE",
        help="such as train=qrels.train.tsv; may be repeated",
    )
    parser.add_argument("--out", required=True, help="BEIR folder to write")
    parser.add_argument(
        "--expect",
        choices=["published"],
        help="fail where passages or dev_small are not as many as published",
    )
    arguments = parser.parse_args()
    qrels = dict(arguments.qrels)
    if len(qrels) < len(arguments.qrels):
        raise UserError("--qrels names a split twice; give each a name of its own")
    report = build(arguments.collection, arguments.queries, qrels, arguments.out)
    print(json.dumps(report, indent=1))
    different = differences({"dev_small": 0, **report}, PUBLISHED)
    if different and arguments.expect:
        raise UserError(f"{arguments.out}: {'; '.join(different)}")
    for line in different:
        print(line, file=sys.stderr)


if __name__ == "__main__":
    run(main)
