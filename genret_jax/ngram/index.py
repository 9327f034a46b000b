"""All n-grams of a token stream up to a length, as a trie over sorted windows.

A window is what stands at one position of the stream: `length` tokens, or fewer and the end of
sequence where the text ends before. Sorted, they are a suffix array cut at `length`: an n-gram is a
prefix of windows, so its occurrences are one range of rows, and a state of the trie. What the trie
calls the documents of a row are here positions in the stream, which know their document. So one
structure constrains the decoding, counts, and locates.

A suffix array proper would keep the positions alone (4 bytes a token, besides the stream) and find
the children of a state by halving in it; an FM-index (SEAL) less still. The trie has them at hand
for all hypotheses at once, and pays with its windows and states: `NgramIndex.report` tells.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int, UInt

from genret_jax.errors import UserError
from genret_jax.trie import Trie, lexicographic_order, token_type, trie_of_sorted
from genret_jax.vocabularies import EOS, PAD, UNK

if TYPE_CHECKING:  # what searches needs nothing of training
    from genret_jax.data.examples import Ragged

_ABOUT, _FORMAT = "ngrams.json", 1


@dataclasses.dataclass(frozen=True)
class NgramIndex:
    """The n-grams of the texts of one view, and where they stand.

    Attributes:
      trie: of the windows; the "documents" of its rows are positions in the stream.
      offsets: int64[texts + 1], where each text begins in the stream.
      owners: int32[texts], the document of each text.
      whole: whether a text is one window, so that only all of it identifies.
    """

    trie: Trie
    offsets: Int[np.ndarray, " texts+1"]
    owners: Int[np.ndarray, " texts"]
    whole: bool = False

    @classmethod
    def of(
        cls,
        texts: Ragged,
        owners: Int[np.ndarray, " texts"],
        *,
        length: int,
        vocab_size: int,
        whole: bool = False,
    ) -> NgramIndex:
        """Makes the index.

        Args:
          texts: token ids from 3 up; the unknown piece, 2, stands in no n-gram.
          owners: the document of each text; one may have several texts.
          length: tokens of an n-gram, at most.
          vocab_size: token ids.
          whole: one window a text, at its beginning; longer texts are cut to `length`.

        Raises:
          UserError: for texts without a token.
        """
        stream = texts.values.astype(token_type(vocab_size))
        windows, positions = _windows(stream, texts.offsets, length, whole=whole)
        if not len(positions):
            raise UserError("there is no n-gram in these texts; give documents with words")
        order = lexicographic_order(windows, vocab_size)
        if order is not None:
            windows, positions = windows[order], positions[order]
        trie = trie_of_sorted(windows, positions, vocab_size)
        return cls(trie, texts.offsets, owners.astype(np.int32), whole)

    @property
    def tokens(self) -> int:
        """Tokens of the stream."""
        return int(self.offsets[-1])

    def ngram(self, row: int, length: int) -> tuple[int, ...]:
        """The first tokens of a row, without the end of sequence."""
        tokens = self.trie.rows[row, :length].tolist()
        return tuple(t for t in tokens if t > EOS)

    @functools.cached_property
    def unigrams(
        self,
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """The tokens that occur, and the rows begin .. end - 1 of each."""
        tokens, begin = np.unique(np.asarray(self.trie.rows[:, 0]), return_index=True)
        return tokens.astype(np.int32), begin, np.append(begin[1:], len(self.trie.rows))

    def count(
        self, begin: Int[np.ndarray, " n"], end: Int[np.ndarray, " n"]
    ) -> Int[np.ndarray, " n"]:
        """How often the n-grams occur that the rows begin .. end - 1 begin with."""
        return np.asarray(self.trie.row_offsets[end] - self.trie.row_offsets[begin])

    def positions(self, begin: int, end: int) -> Int[np.ndarray, " n"]:
        """Where in the stream they begin."""
        offsets = self.trie.row_offsets
        return np.asarray(self.trie.row_documents[offsets[begin] : offsets[end]])

    def documents(self, positions: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The documents that positions of the stream belong to."""
        return self.owners[self.texts(positions)]

    def texts(self, positions: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The texts that positions of the stream belong to."""
        return np.searchsorted(self.offsets, positions, side="right") - 1

    def report(self) -> dict[str, Any]:
        """Sizes; `suffix_array_bytes` is what positions and stream alone would take."""
        item = self.trie.rows.dtype.itemsize
        texts = self.offsets.nbytes + self.owners.nbytes
        return {
            "length": self.trie.max_length,
            "tokens": self.tokens,
            "windows": len(self.trie.rows),
            "states": self.trie.num_states,
            "bytes": self.trie.num_bytes + texts,
            "suffix_array_bytes": (4 + item) * self.tokens + texts,
        }

    def save(self, folder: Path) -> None:
        """Writes the index into a folder that is there."""
        self.trie.save(folder / "trie")
        np.save(folder / "offsets.npy", self.offsets)
        np.save(folder / "owners.npy", self.owners)
        about = {"format": _FORMAT, "whole": self.whole, **self.report()}
        (folder / _ABOUT).write_text(json.dumps(about))

    @classmethod
    def load(cls, folder: Path) -> NgramIndex:
        """Opens what `save` wrote.

        Raises:
          UserError: it is not whole, or of another version.
        """
        try:
            about = json.loads((folder / _ABOUT).read_text("utf-8"))
            if about["format"] != _FORMAT:
                raise ValueError(f"format {about['format']}, not {_FORMAT}")
            offsets, owners = (
                np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("offsets", "owners")
            )
            return cls(Trie.load(folder / "trie"), offsets, owners, bool(about["whole"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}: no whole index of n-grams ({error}); fit again") from None


def _windows(
    stream: UInt[np.ndarray, " tokens"],
    offsets: Int[np.ndarray, " texts+1"],
    length: int,
    *,
    whole: bool,
) -> tuple[UInt[np.ndarray, "windows length"], Int[np.ndarray, " windows"]]:
    """What begins at each position: `length` tokens, or those before the text ends and EOS."""
    size = len(stream)
    # Where the text ends that a position is in; an unknown piece ends it, too.
    stop = np.full(size + 1, size, np.int64)
    stop[offsets[1:-1]] = offsets[1:-1]
    unknown = np.flatnonzero(stream == UNK)
    stop[unknown] = unknown
    after = np.minimum.accumulate(stop[::-1])[::-1][1:]  # from the next position on
    begins = np.zeros(size, bool)
    begins[offsets[:-1][np.diff(offsets) > 0] if whole else slice(None)] = True
    begins[unknown] = False
    positions = np.flatnonzero(begins)
    after = after[positions]
    windows = np.full((len(positions), length), PAD, stream.dtype)
    for column in range(length):
        place = positions + column
        inside = place < after
        windows[inside, column] = stream[place[inside]]
        windows[place == after, column] = EOS
    return windows, positions.astype(np.int32)
