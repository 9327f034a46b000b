"""Corpus -> index: vocabulary, docids, trie and document store in one folder.

The index is everything of a retriever but its weights. `genret index` stops here; `genret fit`
trains a model over it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genret_jax.configs import DocidConfig, VocabularyConfig
from genret_jax.corpus import Corpus, Document
from genret_jax.docids.build import build_docids
from genret_jax.docids.table import EOS_LABEL, FIRST_ID, PAD_LABEL, DocidTable
from genret_jax.documents import DocumentStore, write_documents
from genret_jax.errors import UserError
from genret_jax.files import replace_on_success
from genret_jax.trie import Trie, build_trie
from genret_jax.vocabularies import Vocabulary, read_text_model, train_text_model

FORMAT = 1
NO_DOCIDS = "none"  # the kind of docids in a recipe without any


@dataclasses.dataclass(frozen=True)
class Index:
    """An opened index.

    Attributes:
      vocabulary: text pieces and docid block.
      table: docids; trie: the same as transitions; documents: their texts, by position.
      about: what index.json says: format, fingerprint, kind, settings, report.
    """

    vocabulary: Vocabulary
    table: DocidTable
    trie: Trie
    documents: DocumentStore
    about: dict[str, Any]

    def normaliser(self, wanted: str) -> str:
        """`LossConfig.normaliser` as it is at work: one token is always one of the vocabulary."""
        return wanted if self.trie.max_length > 1 else "vocabulary"

    @classmethod
    def load(cls, folder: str | Path) -> Index:
        folder = Path(folder)
        about = read_json(folder / "index.json", what="index")
        table = DocidTable.load(folder / "docids")
        # A trie that an older version wrote is made again; it has nothing that the docids lack.
        older = Trie.is_older(folder / "trie")
        return cls(
            vocabulary=Vocabulary.load(folder),
            table=table,
            trie=build_trie(table) if older else Trie.load(folder / "trie"),
            documents=DocumentStore(folder),
            about=about,
        )


def read_json(path: Path, *, what: str) -> dict[str, Any]:
    """A JSON object that this package wrote, or one clear line.

    Raises:
      UserError: when the file is missing, broken, or of another format version.
    """
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        found = about["format"]
    except FileNotFoundError:
        raise UserError(
            f"{path.parent}: no {what} of genret_jax here ({path.name} is missing); "
            "make one with `genret fit CORPUS --out RUN`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not written by genret_jax ({error}); make it again") from None
    if found != FORMAT:
        raise UserError(
            f"{path}: format {found}, but this version reads format {FORMAT}; make it again"
        )
    return about


def build_index(
    corpus: Corpus,
    folder: str | Path,
    *,
    docids: DocidConfig | None,
    vocabulary: VocabularyConfig,
    pairs: Sequence[tuple[str, int]] = (),
    seed: int = 0,
    marks: Sequence[str] = ("<document>",),
) -> Index:
    """Makes the index of a corpus in `folder`, whole or not at all; opens one made before.

    Args:
      corpus: documents, all of which are indexed.
      folder: of the index; one with the same fingerprint is used as it is.
      docids: how to make them; None for none, where all documents share one.
      vocabulary: how to make it.
      pairs: train (query, position of a relevant document): the vocabulary is trained on their
        queries too, and docids may be made from them. Never dev or test queries.
      seed: of clustering.
      marks: without docids, the tokens that stand in their place in the vocabulary.

    Raises:
      UserError: when `folder` holds an index of something else.
    """
    folder = Path(folder)
    fingerprint = _fingerprint(corpus.documents, pairs, docids, vocabulary, seed)
    if (folder / "index.json").exists():
        index = Index.load(folder)
        if index.about["fingerprint"] != fingerprint:
            raise UserError(
                f"{folder}: made from another corpus or with other settings; choose another "
                "--out or delete the folder"
            )
        return index
    began = time.monotonic()
    texts = [d.whole for d in corpus.documents]
    # Queries first: SentencePiece reads a bounded number of lines.
    text_model = _text_model(vocabulary, [*(query for query, _ in pairs), *texts])
    words = Vocabulary(text_model, docid_size=2)
    if 0 < vocabulary.rows < words.text_size:
        raise UserError(
            f"VocabularyConfig.rows is {vocabulary.rows}, but {words.text_size} pieces are in "
            f"{vocabulary.model or 'the vocabulary'}; the two are not of one model"
        )
    if docids and docids.with_queries:
        for query, position in pairs:
            texts[position] += f" {query}"
    if docids is None:
        table = no_docids(len(corpus.documents), marks)
    else:
        table = build_docids(
            docids.kind,
            corpus.documents,
            pieces=words.pieces,
            texts=texts,
            seed=seed,
            **docids.settings,
        )
    trie = build_trie(table)
    about = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "corpus": corpus.name,
        "documents_digest": documents_digest(corpus.documents),
        "documents": len(corpus.documents),
        "docids": {"kind": table.kind, "settings": dict(table.settings)},
        "report": {**table.report(), "trie": trie.report()},
        "warnings": list(corpus.warnings),
        "seconds": round(time.monotonic() - began, 1),
    }
    with replace_on_success(folder) as temporary:
        temporary.mkdir()
        Vocabulary(text_model, table.vocab_size, vocabulary.rows).save(temporary)
        table.save(temporary / "docids")
        trie.save(temporary / "trie")
        write_documents(corpus.documents, temporary)
        (temporary / "index.json").write_text(json.dumps(about, indent=1))
    return Index.load(folder)


def _text_model(config: VocabularyConfig, texts: Sequence[str]) -> bytes:
    if config.model:
        return read_text_model(config.model)
    return train_text_model(texts, size=config.size, casefold=config.casefold)


def no_docids(documents: int, marks: Sequence[str] = ("<document>",)) -> DocidTable:
    """One and the same docid for all documents: it tells nothing."""
    labels = (PAD_LABEL, EOS_LABEL, *marks)
    rows = [[FIRST_ID]] * documents
    return DocidTable.from_sequences(rows, range(documents), labels, NO_DOCIDS, {})


def documents_digest(documents: Sequence[Document]) -> str:
    """SHA-256 of ids, titles and texts: whether a corpus is the one an index was made from."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.id}\0{document.title}\0{document.text}\1".encode())
    return digest.hexdigest()


def vocabulary_identity(vocabulary: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a VocabularyConfig with the digest of a given model in place of its path."""
    path = vocabulary["model"]
    if not path or not Path(path).is_file():
        return dict(vocabulary)
    return {**vocabulary, "model": hashlib.sha256(Path(path).read_bytes()).hexdigest()}


def _fingerprint(
    documents: Sequence[Document],
    pairs: Sequence[tuple[str, int]],
    docids: DocidConfig | None,
    vocabulary: VocabularyConfig,
    seed: int,
) -> str:
    named = vocabulary_identity(dataclasses.asdict(vocabulary))
    settings = [docids and dataclasses.asdict(docids), named, seed]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(documents_digest(documents).encode())
    for query, position in pairs:
        digest.update(f"{query}\0{position}\1".encode())
    return digest.hexdigest()
