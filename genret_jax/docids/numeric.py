"""Numbers as identifiers: one token a document, or the digits of the document's number.

They say nothing about the document, so a model can only learn them by heart: the baselines of DSI.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from genret_jax.docids.collisions import plain_label
from genret_jax.docids.table import EOS_LABEL, FIRST_ID, PAD_LABEL, DocidTable

if TYPE_CHECKING:
    from genret_jax.corpus import Document


def atomic_docids(documents: Sequence[Document]) -> DocidTable:
    """Gives each document a token of its own, labelled with the document's id.

    Args:
      documents: in corpus order, with distinct ids.

    Returns:
      One row of length 1 a document.
    """
    count = len(documents)
    return DocidTable.from_array(
        np.arange(FIRST_ID, FIRST_ID + count)[:, None],
        np.ones(count, np.int32),
        np.arange(count),
        [PAD_LABEL, EOS_LABEL, *(plain_label(document.id) for document in documents)],
        "atomic",
        {},
    )


def naive_docids(
    documents: Sequence[Document], *, shuffle: bool = False, seed: int = 0
) -> DocidTable:
    """Spells each document's number in decimal digits, one token a digit.

    All numbers have as many digits as the largest, with zeros in front. That keeps identifiers
    prefix-free without an end of sequence (a decoding step saved), and a digit at one place always
    weighs the same.

    Args:
      documents: in corpus order.
      shuffle: number the documents at random. A corpus sorted by subject gives neighbours like
        numbers, which makes this identifier less naive than its name.
      seed: of the shuffling.

    Returns:
      One row a document.
    """
    count = len(documents)
    numbers = np.random.default_rng(seed).permutation(count) if shuffle else np.arange(count)
    width = len(str(max(count - 1, 0)))
    digits = numbers[:, None] // 10 ** np.arange(width)[::-1] % 10
    return DocidTable.from_array(
        FIRST_ID + digits,
        np.full(count, width, np.int32),
        np.arange(count),
        [PAD_LABEL, EOS_LABEL, *map(str, range(10))],
        "naive",
        {"shuffle": shuffle, "seed": seed},
    )
