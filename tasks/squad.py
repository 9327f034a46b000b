"""SQuAD 1.1 from TensorFlow Datasets as a retrieval collection: question -> paragraph.

    python -m tasks.squad squad_v11          # downloads, writes a BEIR folder
    genret fit squad_v11 --out runs/squad

The official validation split shares no article with the training split, so a retriever that must
write identifiers it was trained on cannot be measured on it. As in other work on paragraphs of
SQuAD, the questions of the documents are split instead, by a hash of their id.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from genret_jax.corpus import Corpus, Document, Qrels, write_corpus
from tasks.command import run


def corpus_of(records: Iterable[Mapping[str, Any]], *, name: str = "squad") -> Corpus:
    """A corpus from TFDS's records with "id", "title", "context" and "question" (bytes).

    Equal paragraphs become one document; ids are TITLE#NUMBER in order of appearance. Of the
    questions one in ten goes to test and one in ten to dev.
    """
    documents: dict[tuple[str, str], Document] = {}
    numbers: dict[str, int] = {}
    queries: dict[str, str] = {}
    qrels: dict[str, Qrels] = {"train": {}, "dev": {}, "test": {}}
    for record in records:
        title, context = _text(record["title"]), _text(record["context"])
        if (title, context) not in documents:
            number = numbers.get(title, 0)
            numbers[title] = number + 1
            documents[title, context] = Document(
                f"{title}#{number}", title.replace("_", " "), context
            )
        query = _text(record["id"])
        queries[query] = _text(record["question"])
        fold = int(hashlib.sha256(query.encode()).hexdigest(), 16) % 10
        split = {0: "test", 1: "dev"}.get(fold, "train")
        qrels[split][query] = {documents[title, context].id: 1}
    return Corpus(tuple(documents.values()), queries, qrels, name=name)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def main() -> None:
    import tensorflow_datasets as tfds

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="BEIR folder to write")
    parser.add_argument("--split", default="train", help="TFDS split (train or validation)")
    arguments = parser.parse_args()
    records = tfds.as_numpy(tfds.load("squad/v1.1", split=arguments.split))
    write_corpus(corpus_of(records, name=f"squad-{arguments.split}"), arguments.out)


if __name__ == "__main__":
    run(main)
