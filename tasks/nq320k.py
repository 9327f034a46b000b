"""NQ320k from the files of Natural Questions 1.0: question -> Wikipedia article.

    python -m tasks.nq320k --train simplified-nq-train.jsonl.gz --dev nq-dev-all.jsonl.gz \
        --bert-vocab vocab.txt --out nq320k --expect published
    genret fit nq320k --out runs/nq320k

The files are those of https://ai.google.com/research/NaturalQuestions/download (v1.0-simplified),
plain or gzip; vocab.txt is the WordPiece vocabulary of bert-base-uncased.

NQ320k is a protocol, not a file: NCI (Wang et al. 2022) made it and GenRet, GLEN and others repeat
it. Its steps, each of which moves counts or texts where it is done otherwise:

1. Train rows have `document_text`, tokens with spaces and HTML tags between them. Dev rows have
   `document_tokens`; their texts are put together in the same way.
2. The title of a train row is what stands in its first <H1>, none where there is no <H1>; that of a
   dev row is its `document_title`. So one article may have two titles, and then is two documents.
3. The abstract is what stands between the first <P> and the first </P>, as it is. The content
   follows it, up to the last but one </Ul>, or the last where there is one, or the end; tags are
   taken out of it, then line feeds, and runs of spaces become one.
   Where there is no <P>, the abstract is empty and the content begins at the place where that of
   the row before began: so the published texts were made, and so it is done here.
4. The text is title, abstract and content, one after the other with nothing between them.
5. Titles are compared as bert-base-uncased writes them: tokenised and put together again. Rows
   without title are all one document.
6. Train rows, then dev rows: the first row of a title decides the text of its document, and the
   order of the documents is that of these rows.
7. Every question is kept, answered or not, and has one relevant document: that of its title.
8. Dev is the test set. `test_seen` are its questions about documents that train questions are
   about, `test_unseen` the others; all documents are in the collection.

Documents are written as they are read; what is kept in memory are titles and ids. `_id` of a
document is its number, `title` the compared title, `text` the whole text of step 4.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from genret_jax.errors import UserError
from genret_jax.lines import Notices, place, read_lines
from tasks.command import run
from tasks.writing import FolderWriter, beir_folder, differences

REPORT = "nq320k.json"
# The number of documents is in the code that NCI published, those of questions are the files'; seen
# and unseen are as GenRet and GLEN have them.
PUBLISHED = {
    "train_questions": 307_373,
    "test_questions": 7_830,
    "documents": 109_739,
    "test_seen": 6_075,
    "test_unseen": 1_755,
}
_TAG = re.compile(r"<[^<]+?>")
_SPACES = re.compile(" +")
_AT_ONCE = 256  # titles normalised together
_SPLITS = ("train", "test", "test_seen", "test_unseen")
# What putting tokens together takes back of the spaces between them, in this order.
_JOINS = {
    " .": ".",
    " ?": "?",
    " !": "!",
    " ,": ",",
    " ' ": "'",
    " n't": "n't",
    " 'm": "'m",
    " 's": "'s",
    " 've": "'ve",
    " 're": "'re",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a raw file.

    Attributes:
      id: of the example; question: its text.
      title: as it stands in the file.
      text: title, abstract and content.
    """

    id: str
    question: str
    title: str
    text: str


@dataclasses.dataclass
class Texts:
    """Document text -> abstract and content, by step 3.

    Attributes:
      end: where the abstract of the last row that had one ended.
      counts: rows without <P>, without </Ul>, and with one.
    """

    end: int = -len("</P>")
    counts: dict[str, int] = dataclasses.field(
        default_factory=lambda: {"without_p": 0, "without_ul": 0, "one_ul": 0}
    )

    def __call__(self, text: str) -> tuple[str, str]:
        """(abstract, content).

        Raises:
          ValueError: a <P>, but no </P>.
        """
        abstract = ""
        if (begin := text.find("<P>")) >= 0:
            self.end = text.index("</P>")
            abstract = text[begin + len("<P>") : self.end]
        else:
            self.counts["without_p"] += 1
        last = text.rfind("</Ul>")
        before = text.rfind("</Ul>", 0, last) if last >= 0 else -1
        if before < 0:
            self.counts["without_ul" if last < 0 else "one_ul"] += 1
        stop = before if before >= 0 else last if last >= 0 else len(text)
        content = _TAG.sub("", text[self.end + len("</P>") : stop]).replace("\n", "").strip()
        return abstract, _SPACES.sub(" ", content)


def read_rows(path: str | Path, *, train: bool, texts: Texts) -> Iterator[Row]:
    """The rows of a raw file, in order.

    Args:
      path: JSON lines, plain or gzip.
      train: whether titles are those of <H1>, or else the field `document_title`.
      texts: of this file.

    Raises:
      UserError: naming file and line: broken JSON or a field that is missing.
    """
    path = Path(path)
    for line, raw in read_lines(path, notices=Notices()):
        try:
            record = json.loads(raw)
            text = _document_text(record)
            title = _heading(text) if train else str(record["document_title"])
            abstract, content = texts(text)
            question = record["question_text"]
            yield Row(str(record["example_id"]), question, title, title + abstract + content)
        except KeyError as error:
            raise UserError(
                f"{place(path, line)}: no field {error}; give the simplified train file and the "
                "dev file of Natural Questions 1.0"
            ) from error
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{place(path, line)}: no row of Natural Questions ({error}); fetch the file again"
            ) from error


def _document_text(record: dict[str, Any]) -> str:
    if "document_text" in record:
        return record["document_text"]
    return " ".join(token["token"] for token in record["document_tokens"])


def _heading(text: str) -> str:
    begin = text.find("<H1>")
    return text[begin + len("<H1>") : text.index("</H1>")] if begin >= 0 else ""


class BertTitles:
    """Titles as bert-base-uncased writes them: its tokens, put together again.

    Cleaning and lower case are those of BERT's own tokeniser; words are cut into pieces by
    tensorflow_text.

    Args:
      vocabulary: the file vocab.txt of bert-base-uncased.
    """

    def __init__(self, vocabulary: str | Path):
        import tensorflow as tf
        import tensorflow_text as tf_text

        notices = Notices()
        if not any(line == "[UNK]" for _, line in read_lines(vocabulary, notices=notices)):
            raise UserError(
                f"{vocabulary}: no WordPiece vocabulary ([UNK] is missing); give the vocab.txt of "
                "bert-base-uncased"
            )
        try:
            self._tokenizer = tf_text.BertTokenizer(
                str(vocabulary), token_out_type=tf.string, lower_case=False
            )
        except tf.errors.OpError as error:
            raise UserError(
                f"{vocabulary}: no WordPiece vocabulary ({error.message}); give the vocab.txt of "
                "bert-base-uncased, unpacked"
            ) from error

    def __call__(self, titles: Sequence[str]) -> list[str]:
        words = self._tokenizer.tokenize([_basic(title) for title in titles])
        return [_joined(pieces) for pieces in words.merge_dims(1, 2).to_list()]


def _joined(pieces: list[bytes]) -> str:
    text = " ".join(piece.decode() for piece in pieces).replace(" ##", "").strip()
    for spaced, joined in _JOINS.items():
        text = text.replace(spaced, joined)
    return text


def _basic(text: str) -> str:
    """BERT's cleaning: no control characters, plain spaces, lower case, no accents."""
    kept = []
    for character in text:
        if character in "\t\n\r" or unicodedata.category(character) == "Zs":
            kept.append(" ")
        elif character != "\ufffd" and not unicodedata.category(character).startswith("C"):
            kept.append(character)
    parts = unicodedata.normalize("NFD", "".join(kept).lower())
    return "".join(part for part in parts if unicodedata.category(part) != "Mn")


class _Collection:
    """What is known of the rows written so far; see the module's steps 5 to 8."""

    def __init__(self, writer: FolderWriter, normalise: Callable[[Sequence[str]], list[str]]):
        self._writer, self._normalise = writer, normalise
        self._documents: dict[str, int] = {}
        self._seen: set[int] = set()  # documents that train questions are about
        self._ids: set[str] = set()
        self.counts = dict.fromkeys(PUBLISHED, 0) | {"without_title": 0, "documents_of_train": 0}

    def add(self, rows: Iterable[Row], *, train: bool) -> None:
        """Adds the rows of one file, all of train before those of dev."""
        remaining = iter(rows)
        while some := list(itertools.islice(remaining, _AT_ONCE)):
            titles = self._normalise([row.title for row in some])
            for row, title in zip(some, titles, strict=True):
                self._question(row, self._document(row, title), train=train)
        if train:
            self.counts["documents_of_train"] = len(self._documents)
        self.counts["documents"] = len(self._documents)

    def _document(self, row: Row, title: str) -> int:
        """The number of its document, which is written when its title is new."""
        self.counts["without_title"] += not title
        if title not in self._documents:
            number = self._documents[title] = len(self._documents)
            self._writer.document(str(number), title=title, text=row.text)
        return self._documents[title]

    def _question(self, row: Row, document: int, *, train: bool) -> None:
        if row.id in self._ids:
            raise UserError(f"example {row.id} is there twice; give each file once")
        self._ids.add(row.id)
        self._writer.query(row.id, text=row.question)
        if train:
            self._seen.add(document)
            splits = ["train"]
        else:
            splits = ["test", "test_seen" if document in self._seen else "test_unseen"]
        for split in splits:
            self._writer.judgement(split, row.id, str(document))
            self.counts[split if split in self.counts else f"{split}_questions"] += 1


def build(
    train: str | Path,
    dev: str | Path,
    out: str | Path,
    *,
    normalise: Callable[[Sequence[str]], list[str]],
) -> dict[str, Any]:
    """Writes the BEIR folder, whole or not at all.

    Args:
      train, dev: the raw files.
      out: the folder; an earlier one of this program is replaced.
      normalise: titles -> what they are compared by, such as `BertTitles`.

    Returns:
      The report, which stands in OUT/nq320k.json too: counts, what the rows were like, and the
      SHA-256 of every file.

    Raises:
      UserError: what `read_rows` and `beir_folder` raise, or an example that is there twice.
    """
    with beir_folder(out, splits=_SPLITS, report=REPORT) as writer:
        collection = _Collection(writer, normalise)
        rows: dict[str, dict[str, int]] = {}
        for name, path in (("train", train), ("dev", dev)):
            texts, is_train = Texts(), name == "train"
            collection.add(read_rows(path, train=is_train, texts=texts), train=is_train)
            rows[name] = texts.counts
        writer.report |= {**collection.counts, "rows": rows}
    return writer.report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True, help="simplified-nq-train.jsonl[.gz]")
    parser.add_argument("--dev", required=True, help="nq-dev-all.jsonl[.gz]")
    parser.add_argument("--bert-vocab", required=True, help="vocab.txt of bert-base-uncased")
    parser.add_argument("--out", required=True, help="BEIR folder to write")
    parser.add_argument(
        "--expect", choices=["published"], help="fail where a count is not the published one"
    )
    arguments = parser.parse_args()
    titles = BertTitles(arguments.bert_vocab)
    report = build(arguments.train, arguments.dev, arguments.out, normalise=titles)
    print(json.dumps(report, indent=1))
    different = differences(report, PUBLISHED)
    if different and arguments.expect:
        raise UserError(f"{arguments.out}: {'; '.join(different)}")
    for line in different:
        print(line, file=sys.stderr)


if __name__ == "__main__":
    run(main)
