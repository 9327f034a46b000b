"""Sub-word identifiers of one length: the pieces of a text that weigh most (GLEN, Lee et al. 2023).

Where words (`keywords`) are for people to read, pieces of the encoder's own vocabulary are what a
method wants that learns its identifiers further: few kinds of tokens, and as many in every
identifier.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from genret_jax.docids import collisions as collisions_lib
from genret_jax.docids import terms as terms_lib
from genret_jax.docids.progress import progress
from genret_jax.docids.table import EOS_LABEL, PAD_LABEL, DocidTable
from genret_jax.errors import UserError

_WORD_MARK = "\u2581"  # before a piece that begins a word


def subword_docids(
    texts: Sequence[str],
    *,
    pieces: Callable[[str], list[str]],
    terms: int = 3,
    tokens: int = 156,
    k1: float = 100.0,
    b: float = 0.75,
    collisions: collisions_lib.Collisions = "resolve",
) -> DocidTable:
    """Names each text by the pieces of highest BM25 weight, heaviest first.

    Pieces that are not letters alone are counted but not chosen; function words may be. Every
    identifier has `terms` pieces: a text with fewer repeats its own in turn, and one without any is
    named "<none>". Where texts have equal pieces, every identifier gets a number besides.

    Args:
      texts: one for each document, in corpus order.
      pieces: cuts a text into sub-word pieces, for example a vocabulary's tokenizer.
      terms: pieces of an identifier. GLEN has 3 for NQ320k and 7 for MS MARCO.
      tokens: pieces of a text that are looked at, the first ones.
      k1, b: of BM25, see `genret_jax.docids.terms.bm25_weights`.
      collisions: "resolve" or "keep"; GLEN keeps them.

    Returns:
      One row a text, all of one length.

    Raises:
      UserError: a setting out of range.

    Example:
      >>> subword_docids(["red car", "red red bus 7"], pieces=str.split, terms=2).text(1)
      'bus · red'
    """
    for name, value, low, high in (
        ("terms", terms, 1, 64),
        ("tokens", tokens, 1, 1 << 20),
        ("k1", k1, 0, float("inf")),
        ("b", b, 0, 1),
    ):
        if not low <= value <= high:
            raise UserError(f"{name} = {value}: give a value from {low} to {high}")
    collisions_lib.check_collisions(collisions)
    counts = count_pieces(texts, pieces, tokens)
    letters = np.array([p.lstrip(_WORD_MARK).isalpha() for p in counts.vocabulary], bool)
    weights = terms_lib.bm25_weights(counts, k1=k1, b=b)
    ranked = terms_lib.ranked_terms(counts, weights, depth=terms, allowed=letters)
    available = (ranked >= 0).sum(1)
    turn = np.arange(terms) % np.maximum(available, 1)[:, None]
    filled = np.take_along_axis(ranked, turn, axis=1)
    filled = np.where(available[:, None] > 0, filled, len(counts.vocabulary)).astype(np.int32)
    lengths = np.full(len(filled), terms, np.int64)
    rows, used = collisions_lib.label_ids(filled, lengths)
    known = [*map(collisions_lib.plain_label, counts.vocabulary), collisions_lib.NO_TERM]
    labels = [PAD_LABEL, EOS_LABEL, *(known[position] for position in used)]
    if collisions == "resolve":
        rows, lengths, numbers = collisions_lib.append_numbers(
            rows,
            lengths,
            collisions_lib.places_of(rows),
            vocab_size=len(labels),
            every_row=True,
        )
        labels += numbers
    settings = {"terms": terms, "tokens": tokens, "k1": k1, "b": b, "collisions": collisions}
    return DocidTable.from_array(rows, lengths, np.arange(len(rows)), labels, "subwords", settings)


def count_pieces(
    texts: Sequence[str], pieces: Callable[[str], list[str]], tokens: int
) -> terms_lib.TermCounts:
    """How often the first `tokens` pieces of every text have each piece."""
    index: dict[str, int] = {}
    offsets: list[int] = [0]
    found: list[int] = []
    times: list[int] = []
    for text in progress(texts, description="count pieces"):
        counted = Counter(pieces(text)[:tokens])  # in order of first appearance
        found += [index.setdefault(piece, len(index)) for piece in counted]
        times += counted.values()
        offsets.append(len(found))
    return terms_lib.TermCounts(
        vocabulary=tuple(index),
        offsets=np.array(offsets, np.int64),
        terms=np.array(found, np.int32),
        counts=np.array(times, np.int32),
    )
