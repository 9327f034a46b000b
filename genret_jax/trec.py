"""Judgements and runs on disk: TREC columns and BEIR tables."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from genret_jax.errors import UserError
from genret_jax.lines import Notices, place, read_lines, shown, write_lines

Qrels = dict[str, dict[str, int]]
"""Query id -> document id -> grade; 0 is "judged and not relevant"."""

Run = dict[str, dict[str, float]]
"""Query id -> document id -> score; higher is better, the order of the entries means nothing."""

_BEIR_HEADER = ("query-id", "corpus-id", "score")
_GRADE_TITLES = frozenset({"score", "grade", "rel", "relevance", "label"})
# "1.0" is what table programs make of 1 and loses nothing; "0.5" and "1e3" are somebody's mistake.
_GRADE = re.compile(r"([0-9]{1,9})(\.0+)?", re.ASCII)


class Judgement(NamedTuple):
    """One line of a qrels file; `line` counts from 1."""

    line: int
    query: str
    document: str
    grade: int


def read_qrels(path: str | os.PathLike[str]) -> Qrels:
    """Reads judgements, in file order.

    Two forms are understood and told apart by the first line: TREC (query, iteration, document,
    grade; any white space) and BEIR (query, document, grade; tabs, usually under a header line).
    Either may be gzip.

    Raises:
      UserError: naming file and line: wrong number of columns, a grade that is no whole number
        from 0, one pair judged twice with different grades, a missing or damaged file.

    Warns:
      UserWarning: blank lines, a byte order mark, repeated equal judgements, an empty file.
    """
    notices = Notices()
    qrels: Qrels = {}
    for judgement in judgements(path, notices=notices):
        add_judgement(qrels, judgement, path=path, notices=notices)
    if not qrels:
        notices.add("no judgements in the file", path=path)
    _warn(notices)
    return qrels


def judgements(path: str | os.PathLike[str], *, notices: Notices) -> Iterator[Judgement]:
    """Yields the lines of a qrels file, parsed; `read_qrels` says which forms and errors."""
    is_table: bool | None = None
    for line, text in read_lines(path, notices=notices):
        cells = text.split("\t")
        if is_table is None:
            is_table = len(cells) == len(_BEIR_HEADER)
            if is_table and cells[2].strip().lower() in _GRADE_TITLES:
                continue
        if is_table:
            if len(cells) != 3:
                raise UserError(
                    f"{place(path, line)}: {len(cells)} columns between tabs where the lines above "
                    "have 3; give query-id, corpus-id, score"
                )
            query, document, grade = cells
        else:
            cells = text.split()
            if len(cells) != 4:
                raise UserError(
                    f"{place(path, line)}: {len(cells)} columns; give 4 (query, 0, document, "
                    "grade) or 3 with tabs between them (query, document, grade)"
                )
            query, _, document, grade = cells
        if not query or not document:
            raise UserError(
                f"{place(path, line)}: the {'document' if query else 'query'} id is empty; "
                "give one or remove the line"
            )
        yield Judgement(line, query, document, _grade(grade, path=path, line=line))


def add_judgement(
    qrels: Qrels, judgement: Judgement, *, path: str | os.PathLike[str], notices: Notices
) -> None:
    """Puts one judgement into `qrels`; a repetition is counted, a contradiction is an error."""
    line, query, document, grade = judgement
    judged = qrels.setdefault(query, {})
    before = judged.get(document)
    if before is None:
        judged[document] = grade
    elif before != grade:
        raise UserError(
            f"{place(path, line)}: query {shown(query)} and document {shown(document)} have grade "
            f"{grade} here and {before} above; keep one of the lines"
        )
    else:
        notices.add("judgements given twice, counted once", path=path, line=line)


def write_qrels(qrels: Qrels, path: str | os.PathLike[str]) -> None:
    """Writes judgements: a BEIR table to a name ending in `.tsv` or `.tsv.gz`, else TREC columns.

    Raises:
      UserError: a grade that is no whole number from 0, an id that the form cannot carry, or a
        query without judgements, which neither form can express.
    """
    name = Path(path).name
    is_table = name.endswith((".tsv", ".tsv.gz"))

    def lines() -> Iterator[str]:
        if is_table:
            yield "\t".join(_BEIR_HEADER)
        for query, judged in qrels.items():
            if not judged:
                raise UserError(
                    f"{path}: query {shown(query)} has no judgements and cannot be written; "
                    "take it out of the qrels"
                )
            check_id(query, path=path, white_space=is_table)
            for document, grade in judged.items():
                check_id(document, path=path, white_space=is_table)
                if grade < 0 or grade != int(grade):
                    raise UserError(
                        f"{path}: grade {grade} of query {shown(query)}, document "
                        f"{shown(document)} is no whole number from 0; write 0 for not relevant"
                    )
                if is_table:
                    yield f"{query}\t{document}\t{int(grade)}"
                else:
                    yield f"{query} 0 {document} {int(grade)}"

    write_lines(path, lines())


def read_run(path: str | os.PathLike[str]) -> Run:
    """Reads a TREC run (query, Q0, document, rank, score, tag; any white space; may be gzip).

    As in trec_eval the score alone gives the order: the rank column is not looked at, nor is
    anything after the tag.

    Raises:
      UserError: naming file and line: fewer than 6 columns, a score that is no number, a document
        twice for one query, a missing or damaged file.

    Warns:
      UserWarning: blank lines, a byte order mark, an empty file.
    """
    notices = Notices()
    run: Run = {}
    for line, text in read_lines(path, notices=notices):
        cells = text.split(maxsplit=6)
        if len(cells) < 6:
            raise UserError(
                f"{place(path, line)}: {len(cells)} columns; give 6: "
                "query, Q0, document, rank, score, tag"
            )
        query, _, document, _, score = cells[:5]
        results = run.setdefault(query, {})
        if document in results:
            raise UserError(
                f"{place(path, line)}: document {shown(document)} a second time for query "
                f"{shown(query)}; keep one of the lines"
            )
        results[document] = _score(score, path=path, line=line)
    if not run:
        notices.add("no results in the file", path=path)
    _warn(notices)
    return run


def write_run(run: Run, path: str | os.PathLike[str], *, tag: str = "genret_jax") -> None:
    """Writes a TREC run, best first, ranks from 1, in the order in which trec_eval reads it.

    Scores are written so that reading gives back the same float64. A query without results has
    no line, which every evaluation counts as 0.

    Args:
      tag: name of the run in the sixth column, without white space.

    Raises:
      UserError: an id or tag that is empty or has white space, or a score that is not a number.
    """
    if not tag or len(tag.split()) != 1 or tag != tag.strip():
        raise UserError(f"run tag {shown(tag)}: give one word, without white space")

    def lines() -> Iterator[str]:
        for query, results in run.items():
            check_id(query, path=path, white_space=False)
            for rank, (document, score) in enumerate(ranked(results, query=query), start=1):
                check_id(document, path=path, white_space=False)
                yield f"{query} Q0 {document} {rank} {float(score)!r} {tag}"

    write_lines(path, lines())


def ranked(results: dict[str, float], *, query: str) -> list[tuple[str, float]]:
    """The results in trec_eval's order: score descending, equal scores by document id descending.

    Raises:
      UserError: a score is not a number, so that there is no order.
    """
    if any(math.isnan(score) for score in results.values()):
        document = next(document for document, score in results.items() if math.isnan(score))
        raise UserError(
            f"run: the score of document {shown(document)} for query {shown(query)} is not a "
            "number (nan); mend the scoring or leave the document out"
        )
    return sorted(results.items(), key=lambda item: (item[1], item[0]), reverse=True)


def check_id(value: str, *, path: str | os.PathLike[str], white_space: bool) -> None:
    """UserError where a column of the file at `path` cannot carry the id.

    Args:
      white_space: whether blanks are allowed (tables between tabs) or not (TREC columns).
    """
    bad = any(mark in value for mark in "\t\r\n") if white_space else len(value.split()) != 1
    if not value or bad or (not white_space and value != value.strip()):
        what = "a tab or line break" if white_space else "white space"
        raise UserError(
            f"{path}: the id {shown(value)} is empty or has {what}, which the file cannot carry; "
            "rename it" + ("" if white_space else " (a qrels file ending in .tsv may have blanks)")
        )


def _grade(cell: str, *, path: str | os.PathLike[str], line: int) -> int:
    match = _GRADE.fullmatch(cell.strip())
    if match is None:
        raise UserError(
            f"{place(path, line)}: grade {shown(cell)} is no whole number from 0; write 0 for not "
            "relevant, 1 or more for relevant"
        )
    return int(match[1])


def _score(cell: str, *, path: str | os.PathLike[str], line: int) -> float:
    try:
        score = float(cell)
    except ValueError:
        score = math.nan
    if math.isnan(score):
        raise UserError(
            f"{place(path, line)}: score {shown(cell)} is no number; column 5 is the score"
        )
    return score


def _warn(notices: Notices) -> None:
    for message in notices.messages():
        # Seen from here: _warn, the reader, the caller whose file it is.
        warnings.warn(message, stacklevel=3)
