"""Text pieces and docid tokens in one id space.

    0 padding | 1 EOS | 2 unknown | text pieces ... | reserved rows | docid tokens ... | spare rows

The text side is a SentencePiece model, trained on the corpus or given (T5's, say). Docid tokens
stand behind it in a block of their own, so that logits are computed for that block alone. A
pretrained embedding has more rows than pieces (T5's sentinels and padding); they stay where they
are, reserved. The SeqIO face of the same space is `genret_jax.data.vocabulary`, which imports
TensorFlow; this file does not.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import sentencepiece

from genret_jax.errors import UserError

PAD, EOS, UNK = 0, 1, 2
_MULTIPLE = 128  # vocabulary rows: divisible by any model axis of a mesh in use, and by TPU lanes
_A = TypeVar("_A")


@dataclasses.dataclass(frozen=True)
class DocidSpace:
    """Where docid tokens stand among the model's token ids.

    Local ids (docid tables, tries, logits) are 0 padding, 1 EOS, 2.. docid tokens. In the model's
    id space padding and EOS are the same, and docid tokens form one block from `start`.

    Attributes:
      start: model id of local id 2.
      size: local ids in all, padding and EOS included.
    """

    start: int
    size: int

    def to_model(self, local: _A) -> _A:
        """Local ids -> model ids, for int arrays of numpy or JAX; narrow ones become int32."""
        return local + (self.start - 2) * (local >= 2).astype("int32")  # type: ignore

    def to_local(self, token: _A) -> _A:
        """Model ids -> local ids; the inverse of `to_model`."""
        return token - (self.start - 2) * (token >= 2).astype(token.dtype)  # type: ignore


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The one id space.

    Attributes:
      model: a serialised SentencePiece model with pad 0, EOS 1 and unknown 2.
      docid_size: local docid ids, padding and EOS included (`DocidTable.vocab_size`).
      text_rows: rows before the docid block; 0 for as many as there are text pieces.
    """

    model: bytes
    docid_size: int
    text_rows: int = 0

    @functools.cached_property
    def _pieces(self) -> sentencepiece.SentencePieceProcessor:
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(self.model)
        return processor

    @property
    def text_size(self) -> int:
        return self._pieces.GetPieceSize()

    @property
    def docids(self) -> DocidSpace:
        return DocidSpace(start=self.text_rows or self.text_size, size=self.docid_size)

    @property
    def size(self) -> int:
        """Rows of the embedding: all ids, rounded up to a multiple of 128."""
        used = self.docids.start + self.docid_size - 2
        return -(-used // _MULTIPLE) * _MULTIPLE

    def encode(self, text: str) -> list[int]:
        """Text pieces without EOS."""
        return self._pieces.EncodeAsIds(text)

    def pieces(self, text: str) -> list[str]:
        """The same as strings: what title docids are made of."""
        return self._pieces.EncodeAsPieces(text)

    def piece_id(self, piece: str) -> int:
        """The id of one piece by its string; that of unknown where there is no such piece."""
        return self._pieces.PieceToId(piece)

    @functools.cached_property
    def starts_word(self) -> np.ndarray:
        """bool[text pieces]: whether a piece begins a word (SentencePiece marks it)."""
        pieces = (self._pieces.IdToPiece(i) for i in range(self.text_size))
        return np.array([piece.startswith("\u2581") for piece in pieces])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of text pieces; padding, EOS and docid tokens are left out."""
        size = self.text_size
        return self._pieces.DecodeIds([int(i) for i in ids if UNK <= int(i) < size])

    def encode_batch(self, texts: Sequence[str], length: int) -> np.ndarray:
        """int32[texts, length]: pieces and EOS, cut to `length` (EOS kept) and padded with 0."""
        out = np.zeros((len(texts), length), np.int32)
        for row, ids in zip(out, self._pieces.EncodeAsIds(list(texts)), strict=True):
            ids = [*ids[: length - 1], EOS]
            row[: len(ids)] = ids
        return out

    def save(self, folder: str | Path) -> None:
        """Writes spiece.model and vocabulary.json into an existing folder."""
        folder = Path(folder)
        (folder / "spiece.model").write_bytes(self.model)
        about = {"text_size": self.text_size, "docid_size": self.docid_size, "size": self.size}
        if self.text_rows:
            about["text_rows"] = self.text_rows
        (folder / "vocabulary.json").write_text(json.dumps(about))

    @classmethod
    def load(cls, folder: str | Path) -> Vocabulary:
        folder = Path(folder)
        try:
            about = json.loads((folder / "vocabulary.json").read_text())
            model = (folder / "spiece.model").read_bytes()
            found = cls(model, int(about["docid_size"]), int(about.get("text_rows", 0)))
            found._pieces  # noqa: B018 (parses the model, so that a damaged one is found here)
            return found
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(
                f"{folder}: no vocabulary here ({error}); make it again with `genret fit`"
            ) from None


def read_text_model(path: str | Path) -> bytes:
    """A SentencePiece model made elsewhere, checked to have T5's special ids.

    Raises:
      UserError: when the file is missing, is no SentencePiece model, or numbers its special
        pieces otherwise.
    """
    try:
        model = Path(path).read_bytes()
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(model)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}: not a SentencePiece model ({reason}); give a .model file"
        ) from None
    found = processor.pad_id(), processor.eos_id(), processor.unk_id()
    if found != (PAD, EOS, UNK):
        raise UserError(
            f"{path}: pad, EOS and unknown are {found}, but T5 models need (0, 1, 2); train with "
            "pad_id=0, eos_id=1, unk_id=2, bos_id=-1"
        )
    return model


def train_text_model(texts: Iterable[str], *, size: int = 8000, casefold: bool = True) -> bytes:
    """Trains a SentencePiece unigram model, as small as the texts ask for.

    Args:
      texts: documents and train queries; never dev or test queries.
      size: pieces at most; a small corpus gets fewer, and one of many different characters
        (Chinese, say) gets a piece for each and some more.
      casefold: lower-case everything, which a model trained from scratch is better for.

    Returns:
      The serialised model.

    Raises:
      UserError: when there is no text, or `size` is below its number of characters.
    """
    texts = list(texts)
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if len(characters) + 10 > size:  # SentencePiece refuses fewer pieces than characters
        size = len(characters) + 300
    rule = "nmt_nfkc_cf" if casefold else "nmt_nfkc"
    # SentencePiece drops lines over 4,192 bytes, so long texts are given in pieces.
    lines = (line for text in texts for line in _lines(text))
    first = next(lines, None)
    if first is None:
        raise UserError("there is no text to train a vocabulary on; give documents with words")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=itertools.chain([first], lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            hard_vocab_limit=False,
            normalization_rule_name=rule,
            character_coverage=0.9999,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNK,
            bos_id=-1,
            input_sentence_size=1_000_000,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"no vocabulary of {size} pieces can be trained on these texts ({reason}); "
            "raise VocabularyConfig.size"
        ) from None
    return model.getvalue()


def _lines(text: str) -> list[str]:
    """Lines of at most 1,000 characters, cut between words where there are any."""
    words = (w[i : i + 1000] for w in text.split() for i in range(0, len(w), 1000))
    lines: list[list[str]] = [[]]
    length = 0
    for word in words:
        if length + len(word) > 1000:
            lines.append([])
            length = 0
        lines[-1].append(word)
        length += len(word) + 1
    return [" ".join(line) for line in lines if line]
