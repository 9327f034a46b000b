"""The docid table: the token sequences that stand for documents, and nothing about how they arose.

Everything behind it (trie, decoding, network) works on the table's local ids: 0 is padding, 1 is
the end of sequence, 2 and up are docid tokens. The model shifts them into its own id space.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Int32

from genret_jax.docids import report as report_lib
from genret_jax.errors import UserError
from genret_jax.files import replace_on_success

PAD_ID = 0
EOS_ID = 1
FIRST_ID = 2
PAD_LABEL = "<pad>"
EOS_LABEL = "</s>"

Setting: TypeAlias = "int | float | str | bool"

_FORMAT = "genret_jax docids 1"
_ARRAYS = ("tokens", "lengths", "documents")
_DESCRIPTION = "docids.json"


@dataclasses.dataclass(frozen=True, eq=False)
class DocidTable:
    """Token sequences and the documents they stand for.

    A document may own several rows (several identifiers), and equal rows may belong to several
    documents (a collision that was kept). No row is a proper prefix of another: either all rows
    have one length, or every row ends in the end-of-sequence token.

    Attributes:
      tokens: int32[rows, length], local ids, padded with 0.
      lengths: int32[rows], tokens in each row, the end of sequence included where there is one.
      documents: int32[rows], the position in the corpus of the document each row stands for.
      labels: the text of every local id; labels[0] is "<pad>" and labels[1] is "</s>".
      kind: the family the ids belong to, a key of `genret_jax.docids.build.KINDS`.
      settings: what the ids were built with.
    """

    tokens: Int32[np.ndarray, "rows length"]
    lengths: Int32[np.ndarray, " rows"]
    documents: Int32[np.ndarray, " rows"]
    labels: tuple[str, ...]
    kind: str
    settings: Mapping[str, Setting]

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Sequence[int]],
        documents: Sequence[int] | np.ndarray,
        labels: Sequence[str],
        kind: str,
        settings: Mapping[str, Setting],
    ) -> DocidTable:
        """Makes a table of token sequences, one a row.

        The end of sequence is appended to every row, unless all rows have one length: such a set
        is prefix-free without it, and decoding saves a step.

        Args:
          sequences: local ids from 2 up, at least one in each sequence, without padding.
          documents: the document position of each sequence.
          labels: text of every local id, the two reserved ones included.
          kind: name of the family.
          settings: what the ids were built with.

        Raises:
          UserError: an empty or wrong sequence, or counts that do not match.

        Example:
          >>> table = DocidTable.from_sequences(
          ...     [[2, 3], [2]], [0, 1], ["<pad>", "</s>", "red", "car"], "keywords", {})
          >>> table.tokens.tolist(), table.text(0)
          ([[2, 3, 1], [2, 1, 0]], 'red · car')
        """
        lengths = np.fromiter(map(len, sequences), np.int32, len(sequences))
        flat = np.fromiter(
            itertools.chain.from_iterable(sequences), np.int64, int(lengths.sum(dtype=np.int64))
        )
        tokens = np.zeros((len(lengths), int(lengths.max(initial=0))), np.int64)
        tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = flat
        return cls.from_array(tokens, lengths, documents, labels, kind, settings)

    @classmethod
    def from_array(
        cls,
        tokens: np.ndarray,
        lengths: np.ndarray,
        documents: Sequence[int] | np.ndarray,
        labels: Sequence[str],
        kind: str,
        settings: Mapping[str, Setting],
    ) -> DocidTable:
        """`from_sequences` for sequences that are already rows of an array.

        Args:
          tokens: int[rows, length], local ids; what lies beyond a row's length is ignored.
          lengths: int[rows], tokens in each row, without the end of sequence.
          documents: as in `from_sequences`, like `labels`, `kind` and `settings`.

        Raises:
          UserError: as `from_sequences`.
        """
        lengths = np.asarray(lengths, np.int32)
        inside = np.arange(tokens.shape[1]) < lengths[:, None]
        given = tokens[inside]
        if len(lengths) and lengths.min() < 1:
            raise UserError(
                f"docid row {int(lengths.argmin())} is empty: give it one token or more"
            )
        if given.size and (given.min() < FIRST_ID or given.max() >= len(labels)):
            wrong = given[(given < FIRST_ID) | (given >= len(labels))][0]
            raise UserError(
                f"docid token {wrong} is outside {FIRST_ID}..{len(labels) - 1}:"
                f" there are {len(labels)} labels, and 0 and 1 are reserved"
            )
        rows, longest = len(lengths), int(lengths.max(initial=0))
        ended = rows > 0 and int(lengths.min()) != longest
        out = np.zeros((rows, longest + ended), np.int32)
        out[:, :longest][inside[:, :longest]] = given
        if ended:
            out[np.arange(rows), lengths] = EOS_ID
            lengths = lengths + np.int32(1)
        return cls(
            tokens=out,
            lengths=lengths,
            documents=np.asarray(documents, np.int32),
            labels=tuple(labels),
            kind=kind,
            settings=dict(settings),
        )

    @property
    def vocab_size(self) -> int:
        """Number of local ids, padding and end of sequence included."""
        return len(self.labels)

    @property
    def rows(self) -> int:
        """Number of token sequences."""
        return len(self.lengths)

    def text(self, row: int) -> str:
        """A readable form of one row, for example "welding · torch · seam"."""
        ids = self.tokens[row, : self.lengths[row]]
        return " · ".join(self.labels[i] for i in ids if i != EOS_ID)

    def report(self) -> dict[str, Any]:
        """Sizes, collisions and trie widths; see `genret_jax.docids.report.docid_report`."""
        return report_lib.docid_report(
            self.tokens, self.lengths, self.documents, vocab_size=self.vocab_size
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the table as a folder: `docids.json` and one .npy file an array."""
        description = {
            "format": _FORMAT,
            "kind": self.kind,
            "settings": dict(self.settings),
            "labels": self.labels,
        }
        with replace_on_success(folder) as temporary:
            temporary.mkdir()
            for name in _ARRAYS:
                np.save(temporary / f"{name}.npy", getattr(self, name))
            text = json.dumps(description, ensure_ascii=False)
            # A label may hold half of a surrogate pair (from a broken corpus): keep it, whole.
            (temporary / _DESCRIPTION).write_text(text, encoding="utf-8", errors="surrogatepass")

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, mmap: bool = True) -> DocidTable:
        """Reads what `save` wrote.

        Args:
          folder: the folder given to `save`.
          mmap: map the arrays into memory (read-only) instead of copying them.

        Raises:
          UserError: the folder is missing, incomplete, of another format or damaged.
        """
        folder = Path(folder)
        try:
            text = (folder / _DESCRIPTION).read_text(encoding="utf-8", errors="surrogatepass")
            description = json.loads(text)
            if not isinstance(description, dict) or description.get("format") != _FORMAT:
                raise UserError(
                    f"{folder / _DESCRIPTION} is not of the format {_FORMAT!r}: build the docids"
                    " anew with this version"
                )
            arrays = {
                name: np.load(folder / f"{name}.npy", mmap_mode="r" if mmap else None)
                for name in _ARRAYS
            }
            return cls(
                **arrays,
                labels=tuple(description["labels"]),
                kind=description["kind"],
                settings=description["settings"],
            )
        except UserError:
            raise
        except FileNotFoundError as error:
            raise UserError(
                f"{error.filename} does not exist: give a folder written by DocidTable.save"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise UserError(
                f"cannot read docids from {folder}: {error}; build them anew"
            ) from error


def _check(table: DocidTable) -> None:
    """Raises UserError unless shapes, types, ids, padding and labels agree."""
    tokens, lengths, documents = table.tokens, table.lengths, table.documents
    for name in _ARRAYS:
        array = getattr(table, name)
        rank = 2 if name == "tokens" else 1
        if array.dtype != np.int32 or array.ndim != rank:
            raise UserError(
                f"docid array {name} is {array.dtype} of rank {array.ndim}: give int32 of rank"
                f" {rank}"
            )
    if not len(tokens) == len(lengths) == len(documents):
        raise UserError(
            f"{len(tokens)} docid rows, {len(lengths)} lengths and {len(documents)} documents:"
            " give one of each for every row"
        )
    if table.labels[:FIRST_ID] != (PAD_LABEL, EOS_LABEL):
        raise UserError(
            f"docid labels start with {list(table.labels[:FIRST_ID])}: the first two are"
            f" {PAD_LABEL!r} and {EOS_LABEL!r}"
        )
    if len(set(table.labels)) != len(table.labels):
        twice = _first_repeated(table.labels)
        raise UserError(f"docid label {twice!r} stands for two tokens: give every token its own")
    if not len(lengths):
        return
    if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        raise UserError(
            f"docid lengths run from {lengths.min()} to {lengths.max()}: they must lie in"
            f" 1..{tokens.shape[1]}"
        )
    if tokens.min() < 0 or tokens.max() >= table.vocab_size:
        raise UserError(
            f"docid tokens run from {tokens.min()} to {tokens.max()}: they must lie in"
            f" 0..{table.vocab_size - 1}, the labels there are"
        )
    if not np.array_equal(tokens != PAD_ID, np.arange(tokens.shape[1]) < lengths[:, None]):
        raise UserError("docid tokens and lengths disagree: a row is its tokens, then zeros")
    if documents.min() < 0:
        raise UserError(f"docid documents hold {documents.min()}: positions count from 0")


def _first_repeated(labels: Sequence[str]) -> str:
    seen: set[str] = set()
    for label in labels:
        if label in seen:
            return label
        seen.add(label)
    raise AssertionError("no label is repeated")
