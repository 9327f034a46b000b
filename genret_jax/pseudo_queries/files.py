"""The file of pseudo-queries: JSON lines like BEIR's queries, each with the document it is about.

    {"_id": "pseudo-0", "text": "join two sheets", "document": "d1", "log_p": -7.31}

It is a file of queries for every reader of BEIR's, which passes over the other fields.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from genret_jax.corpus import Corpus
from genret_jax.errors import UserError
from genret_jax.lines import Notices, place, shown, write_lines
from genret_jax.records import Ids, read_records


@dataclass(frozen=True, slots=True)
class PseudoQuery:
    """Attributes:
    document: id of the document it was generated from.
    text: of the query.
    log_p: log p(query | passage of the document) by the generator.
    """

    document: str
    text: str
    log_p: float


def write_pseudo_queries(queries: Iterable[PseudoQuery], path: str | os.PathLike[str]) -> int:
    """Writes the file, whole or not at all, gzip when the name ends in `.gz`.

    Returns:
      How many were written.
    """
    count = 0

    def lines() -> Iterator[str]:
        nonlocal count
        for query in queries:
            record = {
                "_id": f"pseudo-{count}",
                "text": query.text,
                "document": query.document,
                "log_p": round(query.log_p, 4),
            }
            count += 1
            yield json.dumps(record, ensure_ascii=False)

    write_lines(path, lines())
    return count


def read_pseudo_queries(path: str | os.PathLike[str], corpus: Corpus) -> list[tuple[str, int]]:
    """(query, position of its document) of every line; see `Corpus.pairs`.

    Raises:
      UserError: naming file and line: what `read_records` raises, an id given twice, no field
        "document", a document that the corpus lacks, or a query without words; or a file without
        queries.
    """
    path = Path(path)
    ids, pairs = Ids(), []
    for line, record in read_records(path, notices=Notices()):
        ids.add(record["_id"], path=path, line=line)
        document = record.get("document")
        if not isinstance(document, str):
            raise UserError(
                f"{place(path, line)}: no field 'document' with the id of a document; each line "
                "needs _id, text and document, as `genret pseudo-queries` writes them"
            )
        if document not in corpus.index:
            raise UserError(
                f"{place(path, line)}: document {shown(document)} is not in corpus "
                f"{corpus.name!r}; give the pseudo-queries of this corpus"
            )
        if not record["text"].strip():
            raise UserError(f"{place(path, line)}: the query has no words; leave the line out")
        pairs.append((record["text"], corpus.index[document]))
    if not pairs:
        raise UserError(f"{path}: no pseudo-queries in it; make some, or leave it out")
    return pairs
