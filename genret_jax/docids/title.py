"""Title identifiers: a document is named by its title, in sub-word pieces (as GENRE does)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from genret_jax.docids import collisions as collisions_lib
from genret_jax.docids.progress import progress
from genret_jax.docids.table import EOS_LABEL, PAD_LABEL, DocidTable
from genret_jax.errors import UserError

if TYPE_CHECKING:
    from genret_jax.corpus import Document


def title_docids(
    documents: Sequence[Document],
    *,
    pieces: Callable[[str], list[str]],
    max_length: int = 32,
    first_words: int = 8,
    collisions: collisions_lib.Collisions = "resolve",
) -> DocidTable:
    """Names each document by the pieces of its title.

    White space in a title counts as one blank. A document without a title takes the first words of
    its text, and one without both is named "<none>". Of documents with equal pieces the second and
    later ones get a number.

    Args:
      documents: in corpus order.
      pieces: cuts a text into sub-word pieces, for example a vocabulary's tokenizer.
      max_length: pieces kept of a title; a number comes on top.
      first_words: words of the text that stand in for a missing title.
      collisions: "resolve" or "keep".

    Returns:
      One row a document.

    Raises:
      UserError: a setting out of range.

    Example:
      >>> title_docids([Document("7", "Seam welder", "")], pieces=str.split).text(0)
      'Seam · welder'
    """
    for name, value in (("max_length", max_length), ("first_words", first_words)):
        if value < 1:
            raise UserError(f"{name} = {value}: give 1 or more")
    collisions_lib.check_collisions(collisions)
    index: dict[str, int] = {}
    spelled: list[list[int]] = []
    for document in progress(documents, description="cut titles"):
        title = " ".join(document.title.split())
        if not title:
            title = " ".join(document.text.split(maxsplit=first_words)[:first_words])
        found = pieces(title)[:max_length] if title else []
        labels = [collisions_lib.plain_label(piece) for piece in found]
        spelled.append(
            [index.setdefault(label, len(index)) for label in labels or [collisions_lib.NO_TERM]]
        )

    longest = max(map(len, spelled), default=0)
    ranked = np.full((len(spelled), longest), -1, np.int32)
    for row, ids in enumerate(spelled):
        ranked[row, : len(ids)] = ids
    lengths = (ranked >= 0).sum(axis=1)
    tokens, used = collisions_lib.label_ids(ranked, lengths)
    names = list(index)
    table_labels = [PAD_LABEL, EOS_LABEL, *(names[position] for position in used)]
    numbers: list[str] = []
    if collisions == "resolve":
        tokens, lengths, numbers = collisions_lib.append_numbers(
            tokens, lengths, collisions_lib.places_of(tokens), vocab_size=len(table_labels)
        )
    return DocidTable.from_array(
        tokens,
        lengths,
        np.arange(len(tokens)),
        [*table_labels, *numbers],
        "title",
        {"max_length": max_length, "first_words": first_words, "collisions": collisions},
    )
