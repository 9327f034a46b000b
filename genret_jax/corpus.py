"""Documents, queries and judgements: BEIR folders in and out, with every mistake named by its line.

A BEIR folder:

    corpus.jsonl       {"_id": "d1", "title": "Seam", "text": "Where two sheets meet."}
    queries.jsonl      {"_id": "q1", "text": "join two sheets"}
    qrels/train.tsv    query-id <tab> corpus-id <tab> score, one file a split

Each file may be gzip (`corpus.jsonl.gz`). TREC qrels and runs are in `genret_jax.trec`; their
readers and writers are offered here too.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from genret_jax.errors import UserError
from genret_jax.files import replace_on_success
from genret_jax.lines import Notices, place, shown, write_lines
from genret_jax.records import Ids, read_records
from genret_jax.trec import (
    Qrels,
    Run,
    add_judgement,
    check_id,
    judgements,
    read_qrels,
    read_run,
    write_qrels,
    write_run,
)

__all__ = [
    "Corpus",
    "Document",
    "Qrels",
    "Run",
    "read_corpus",
    "read_qrels",
    "read_run",
    "write_corpus",
    "write_qrels",
    "write_run",
]

# A stray document that left a large collection is normal; more means that the files do not belong
# together. Known collections stay far below this share of a split's judgements.
_FEW_UNKNOWN = 0.01


@dataclass(frozen=True, slots=True)
class Document:
    """One document; `title` and `text` may be empty."""

    id: str
    title: str
    text: str

    @property
    def whole(self) -> str:
        """Title and text in one, as models and vocabularies read them."""
        return f"{self.title}. {self.text}" if self.title else self.text


@dataclass(frozen=True)
class Corpus:
    """A collection with its queries and judgements.

    Attributes:
      documents: in file order; a document's place in it is its *position* everywhere else.
      queries: query id -> text, of all splits.
      qrels: split -> query id -> document id -> grade, in file order. It is the file unabridged: it
        may name a few documents that the corpus lacks (`warnings` tells), as published judgements
        do; they count as relevant and not found, so that scores agree with those of other tools.
      warnings: one line each: what was odd but bearable, how often, and where first.
      name: for tables and messages.
    """

    documents: tuple[Document, ...]
    queries: dict[str, str]
    qrels: dict[str, Qrels]
    warnings: tuple[str, ...] = ()
    name: str = "corpus"

    @functools.cached_property
    def index(self) -> dict[str, int]:
        """Document id -> position."""
        return {document.id: position for position, document in enumerate(self.documents)}

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, such as ("dev", "test", "train")."""
        return tuple(self.qrels)

    def split_queries(self, split: str) -> dict[str, str]:
        """Query id -> text of the queries judged in `split`, in the order of its qrels.

        The order is that of `evaluation.per_query`, so that texts and scores stand side by side.

        Raises:
          UserError: there is no such split.
        """
        return {query: self.queries[query] for query in self._judged(split)}

    def pairs(self, split: str) -> list[tuple[str, int]]:
        """(query text, document position) for every judgement of `split` with a grade above 0.

        Judged documents that the corpus lacks are left out.

        Raises:
          UserError: there is no such split.
        """
        return [
            (self.queries[query], self.index[document])
            for query, judged in self._judged(split).items()
            for document, grade in judged.items()
            if grade > 0 and document in self.index
        ]

    def _judged(self, split: str) -> Qrels:
        if split not in self.qrels:
            raise UserError(
                f"corpus {self.name!r} has no split {split!r}; {_remedy(split, self.qrels)}"
            )
        return self.qrels[split]


def read_corpus(path: str | os.PathLike[str], *, splits: Sequence[str] | None = None) -> Corpus:
    """Reads a BEIR folder, or a lone corpus file without queries.

    Documents need the fields `_id` and `text`, queries too; `title` may be missing and other
    fields are not looked at. Document order is file order.

    Args:
      path: the folder, or a `.jsonl` / `.jsonl.gz` file of documents.
      splits: which qrels to read, in this order; all there are, by name, when None.

    Raises:
      UserError: naming file and line: broken JSON, bytes that are not UTF-8, missing fields or
        fields that are no strings, an id given twice, judgements of unknown queries or of many
        unknown documents, bad grades; or files that are missing, ambiguous, damaged or empty.
    """
    path = Path(path)
    notices = Notices()
    if path.is_dir():
        return _read_folder(path, splits=splits, notices=notices)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a BEIR folder or a corpus.jsonl")
    if splits:
        raise UserError(f"{path}: a lone file has no splits; give the folder that has qrels/")
    documents, index = _read_documents(path, notices=notices)
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
    name = path.resolve().parent.name if stem == "corpus" else stem
    return _corpus(documents, index, {}, {}, notices=notices, name=name)


def write_corpus(corpus: Corpus, path: str | os.PathLike[str]) -> None:
    """Writes a BEIR folder, whole or not at all; an earlier one at `path` is replaced.

    Raises:
      UserError: `path` is a file, or a folder that holds anything but a BEIR collection, which
        replacing would destroy; or an id or judgement cannot be written.
    """
    path = Path(path)
    _check_replaceable(path)
    try:
        with replace_on_success(path) as temporary:
            write_lines(temporary / "corpus.jsonl", _document_lines(corpus.documents, path=path))
            if corpus.queries:
                write_lines(temporary / "queries.jsonl", _query_lines(corpus.queries, path=path))
            for split, qrels in corpus.qrels.items():
                write_qrels(qrels, temporary / "qrels" / f"{split}.tsv")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); give another place"
        ) from error


def _read_folder(path: Path, *, splits: Sequence[str] | None, notices: Notices) -> Corpus:
    corpus_file = _one_of(path, "corpus.jsonl")
    if corpus_file is None:
        there = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise UserError(f"{path}: no corpus.jsonl or corpus.jsonl.gz (there: {there}); add it")
    split_files = _split_files(path, splits=splits, notices=notices)
    queries_file = _one_of(path, "queries.jsonl")
    if queries_file is None and split_files:
        raise UserError(f"{path}: has qrels but no queries.jsonl or queries.jsonl.gz; add it")

    documents, index = _read_documents(corpus_file, notices=notices)
    queries: dict[str, str] = {}
    query_ids = Ids()
    if queries_file is not None:
        queries, query_ids = _read_queries(queries_file, notices=notices)
    qrels = {
        split: _read_split(file, index=index, queries=queries, notices=notices)
        for split, file in split_files.items()
    }
    if splits is None and queries_file is not None:
        # With chosen splits the queries of the others are unjudged by the caller's own wish.
        judged = set().union(*qrels.values())
        for query, position in query_ids.positions.items():
            if query not in judged:
                notices.add(
                    "queries without judgements, kept and never evaluated",
                    path=queries_file,
                    line=query_ids.lines[position],
                )
    return _corpus(
        documents, index, queries, qrels, notices=notices, name=path.resolve().name or "corpus"
    )


def _corpus(
    documents: tuple[Document, ...],
    index: dict[str, int],
    queries: dict[str, str],
    qrels: dict[str, Qrels],
    *,
    notices: Notices,
    name: str,
) -> Corpus:
    corpus = Corpus(documents, queries, qrels, warnings=notices.messages(), name=name)
    # The reader made the index to find repeated ids; keeping it saves building it again.
    corpus.__dict__["index"] = index
    return corpus


def _one_of(folder: Path, name: str) -> Path | None:
    found = [file for file in (folder / name, folder / f"{name}.gz") if file.exists()]
    if len(found) == 2:
        raise UserError(f"{folder}: both {name} and {name}.gz; remove one of them")
    return found[0] if found else None


def _split_files(
    folder: Path, *, splits: Sequence[str] | None, notices: Notices
) -> dict[str, Path]:
    """Split -> its file, for the wanted splits in the wanted order."""
    there: dict[str, Path] = {}
    qrels = folder / "qrels"
    if qrels.exists() and not qrels.is_dir():
        raise UserError(f"{qrels}: is a file; make it a folder with one SPLIT.tsv a split")
    for file in sorted(qrels.iterdir()) if qrels.exists() else ():
        split = file.name.removesuffix(".gz").removesuffix(".tsv")
        if not file.name.endswith((".tsv", ".tsv.gz")) or not split:
            if not file.name.startswith("."):
                notices.add("not a .tsv or .tsv.gz file, left unread", path=file)
        elif split in there:
            raise UserError(f"{qrels}: both {split}.tsv and {split}.tsv.gz; remove one of them")
        else:
            there[split] = file
    if splits is None:
        return there
    wanted = [splits] if isinstance(splits, str) else list(splits)
    for split in wanted:
        if split not in there:
            raise UserError(f"{qrels}: no split {split!r}; {_remedy(split, there)}")
    return {split: there[split] for split in wanted}


def _remedy(split: str, there: Iterable[str]) -> str:
    """For a split that is not there."""
    names = ", ".join(map(repr, there))
    return f"name one of {names}, or add qrels/{split}.tsv" if names else f"add qrels/{split}.tsv"


def _read_documents(path: Path, *, notices: Notices) -> tuple[tuple[Document, ...], dict[str, int]]:
    ids = Ids()
    documents: list[Document] = []
    for line, record in read_records(path, notices=notices):
        document = Document(record["_id"], record.get("title", ""), record["text"])
        ids.add(document.id, path=path, line=line)
        if not document.text.strip() and not document.title.strip():
            notices.add("documents without title and text, kept", path=path, line=line)
        documents.append(document)
    if not documents:
        raise UserError(f"{path}: no documents; give at least one line with _id and text")
    return tuple(documents), ids.positions


def _read_queries(path: Path, *, notices: Notices) -> tuple[dict[str, str], Ids]:
    ids = Ids()
    queries: dict[str, str] = {}
    for line, record in read_records(path, notices=notices):
        ids.add(record["_id"], path=path, line=line)
        if not record["text"].strip():
            notices.add("queries without text, kept", path=path, line=line)
        queries[record["_id"]] = record["text"]
    return queries, ids


def _read_split(
    path: Path, *, index: dict[str, int], queries: dict[str, str], notices: Notices
) -> Qrels:
    qrels: Qrels = {}
    count = 0
    unknown: list[tuple[int, str]] = []
    for judgement in judgements(path, notices=notices):
        if judgement.query not in queries:
            raise UserError(
                f"{place(path, judgement.line)}: query {shown(judgement.query)} is not in the "
                "queries file; add it there or remove the line"
            )
        count += 1
        if judgement.document not in index:
            unknown.append((judgement.line, judgement.document))
        add_judgement(qrels, judgement, path=path, notices=notices)
    if len(unknown) > count * _FEW_UNKNOWN:
        line, document = unknown[0]
        raise UserError(
            f"{place(path, line)}: document {shown(document)} is not in the corpus, like "
            f"{len(unknown)} of {count} judgements; give the corpus that was judged or remove them"
        )
    for line, _ in unknown:
        notices.add(
            "judgements of documents that the corpus lacks, kept and never found",
            path=path,
            line=line,
        )
    if not qrels:
        notices.add("no judgements in the file", path=path)
    return qrels


def _check_replaceable(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; give a folder for the corpus")
    ours = {"corpus.jsonl", "corpus.jsonl.gz", "queries.jsonl", "queries.jsonl.gz", "qrels"}
    foreign = sorted({entry.name for entry in path.iterdir()} - ours) if path.exists() else []
    if foreign:
        raise UserError(
            f"{path}: holds other files ({', '.join(foreign[:4])}) that writing would remove; "
            "give a new folder"
        )


def _document_lines(documents: Iterable[Document], *, path: Path) -> Iterator[str]:
    for document in documents:
        check_id(document.id, path=path, white_space=True)
        record = {"_id": document.id, "title": document.title, "text": document.text}
        yield json.dumps(record, ensure_ascii=False)


def _query_lines(queries: dict[str, str], *, path: Path) -> Iterator[str]:
    for query, text in queries.items():
        check_id(query, path=path, white_space=True)
        yield json.dumps({"_id": query, "text": text}, ensure_ascii=False)
