"""The documents of a retriever on disk: read one by one, never all."""

from __future__ import annotations

import functools
import json
import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from genret_jax.corpus import Document
from genret_jax.errors import UserError

DOCUMENT_FILES = ("documents.jsonl", "documents.offsets.npy", "documents.order.npy")


class DocumentStore:
    """Documents by position, from a memory-mapped JSON-lines file.

    Args:
      folder: holds documents.jsonl, documents.offsets.npy (int64[documents + 1]) and
        documents.order.npy (int32[documents]).

    Attributes:
      order: int32[documents], the place of each document among all ids in descending order.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        try:
            self._offsets = np.load(folder / "documents.offsets.npy", mmap_mode="r")
            self.order = np.load(folder / "documents.order.npy", mmap_mode="r")
            with open(folder / "documents.jsonl", "rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{folder}: no document store here ({error}); make it again with `genret fit`"
            ) from None

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def positions(self, ids: Iterable[str]) -> np.ndarray:
        """int64[n]: positions of documents by id, found by halving in the order of all ids.

        Raises:
          UserError: for an id that no document has.
        """
        return np.array([self._position(one) for one in ids], np.int64)

    @functools.cached_property
    def _descending(self) -> np.ndarray:
        """int64[documents]: positions in descending order of id."""
        return np.argsort(self.order)

    def _position(self, wanted: str) -> int:
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            position = int(self._descending[middle])
            found = self[position].id
            if found == wanted:
                return position
            low, high = (middle + 1, high) if found > wanted else (low, middle)
        raise UserError(f"no document has the id {wanted!r}; ids are those of corpus.jsonl")

    def __getitem__(self, position: int) -> Document:
        line = self._bytes[self._offsets[position] : self._offsets[position + 1]]
        record = json.loads(line)
        return Document(record["_id"], record["title"], record["text"])

    def find(self, document: str) -> Document:
        """A document by its id.

        Raises:
          UserError: no document has it.
        """
        return self[self._position(document)]


def write_documents(documents: Iterable[Document], folder: str | Path) -> None:
    """Writes the three files of a DocumentStore into an existing folder; BEIR's field names."""
    folder = Path(folder)
    offsets, ids = [0], []
    with open(folder / "documents.jsonl", "wb") as file:
        for document in documents:
            record = {"_id": document.id, "title": document.title, "text": document.text}
            line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
            offsets.append(offsets[-1] + file.write(line))
            ids.append(document.id)
    np.save(folder / "documents.offsets.npy", np.asarray(offsets, np.int64))
    np.save(folder / "documents.order.npy", descending(ids))


def descending(ids: Sequence[str]) -> np.ndarray:
    """int32[documents]: the place of each document among all ids in descending order."""
    order = np.empty(len(ids), np.int32)
    order[sorted(range(len(ids)), key=ids.__getitem__, reverse=True)] = np.arange(len(ids))
    return order
