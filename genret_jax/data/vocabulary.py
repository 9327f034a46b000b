"""The vocabulary as SeqIO and T5X take it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import seqio
import tensorflow as tf
import tensorflow_text as tf_text

from genret_jax import vocabularies


class SeqioVocabulary(seqio.Vocabulary):
    """`genret_jax.vocabularies.Vocabulary` behind SeqIO's interface.

    Text is encoded to text pieces. Docid tokens are never made from text: tasks carry them as
    integers; decoding writes them as `<docid:N>` with their local id, so that a log line shows
    what was generated.
    """

    def __init__(self, vocabulary: vocabularies.Vocabulary):
        super().__init__()
        self.vocabulary = vocabulary

    @classmethod
    def load(cls, folder: str | Path) -> SeqioVocabulary:
        """Opens the vocabulary of a retriever folder: the constructor for gin files."""
        return cls(vocabularies.Vocabulary.load(folder))

    @functools.cached_property
    def _tokenizer(self) -> tf_text.SentencepieceTokenizer:
        return tf_text.SentencepieceTokenizer(model=self.vocabulary.model)

    @property
    def bos_id(self) -> int | None:
        return vocabularies.PAD  # T5's decoder starts from padding

    @property
    def eos_id(self) -> int | None:
        return vocabularies.EOS

    @property
    def unk_id(self) -> int | None:
        return vocabularies.UNK

    @property
    def _base_vocab_size(self) -> int:
        return self.vocabulary.size

    def _encode(self, s: str) -> Sequence[int]:
        return self.vocabulary.encode(s)

    def _decode(self, ids: Iterable[int]) -> str:
        words, run = [], []
        for i in [*(int(i) for i in ids), None]:
            if i is not None and i < self.vocabulary.docids.start:
                run.append(i)
                continue
            if run:
                words.append(self.vocabulary.decode(run))
                run = []
            if i is not None:
                words.append(f"<docid:{self.vocabulary.docids.to_local(np.int32(i))}>")
        return " ".join(word for word in words if word)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        return self._tokenizer.tokenize(s)

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        """What `_decode` gives, for int32[..., length]: T5X decodes beams of an inference this way.

        A sequence is all docid tokens or all text pieces here, as targets and inputs are.
        """
        size = self.vocabulary.text_size
        start = self.vocabulary.docids.start
        names = tf.strings.join(["<docid:", tf.strings.as_string(ids - start + 2), ">"])
        names = tf.where(ids < size, "", names)
        docid = tf.strings.strip(tf.strings.reduce_join(names, axis=-1, separator=" "))
        text = self._tokenizer.detokenize(tf.where(ids < size, ids, vocabularies.PAD))
        return tf.where(tf.reduce_any(ids >= size, axis=-1), docid, text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SeqioVocabulary) and self.vocabulary == other.vocabulary

    def __hash__(self) -> int:
        return hash(self.vocabulary)
