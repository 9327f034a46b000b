"""What happens to documents that would get the same identifier.

The rule, for every family: a document whose identifier is shared is first told apart by more of its
own content (further terms, where the family has any), and only what is still equal gets a number.
The first document of such a group stays as it is, the second gets <#2>, the third <#3>. With
"keep" the group stays one identifier, and whoever ranks must separate its members by other means.
"""

from __future__ import annotations

import re
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Int32, Int64

from genret_jax.docids.table import EOS_LABEL, FIRST_ID, PAD_LABEL
from genret_jax.errors import UserError

Collisions: TypeAlias = Literal["resolve", "keep"]

# Numbers are spelled in this base, so that a million equal documents need a thousand tokens.
_BASE = 1000
NO_TERM = "<none>"
_RESERVED = re.compile(
    r"\\*(?:" + "|".join([PAD_LABEL, EOS_LABEL, NO_TERM, r"<#\d+>"]) + r")", re.DOTALL
)


def check_collisions(collisions: str) -> None:
    """Raises UserError unless `collisions` is "resolve" or "keep"."""
    if collisions not in ("resolve", "keep"):
        raise UserError(f"collisions = {collisions!r}: give 'resolve' or 'keep'")


def plain_label(text: str) -> str:
    """The label of a token that comes from the corpus: never one of the reserved labels.

    A text that looks like a reserved label gets a backslash before it, so distinct texts keep
    distinct labels.

    Example:
      >>> plain_label("torch"), plain_label("<#2>")
      ('torch', '\\\\<#2>')
    """
    return "\\" + text if _RESERVED.fullmatch(text) else text


def text_of_label(label: str) -> str:
    """The text that `plain_label` made a label of; "" for a reserved label.

    Example:
      >>> text_of_label("torch"), text_of_label("\\\\<#2>"), text_of_label("<#2>")
      ('torch', '<#2>', '')
    """
    if not _RESERVED.fullmatch(label):
        return label
    return label[1:] if label.startswith("\\") else ""


def row_groups(matrix: np.ndarray) -> Int64[np.ndarray, " rows"]:
    """int64[rows]: a number that two rows of int[rows, columns] share exactly if they are equal."""
    groups = np.zeros(len(matrix), np.int64)
    for column in matrix.T:
        groups = _refine(groups, column)
    return groups


def _refine(groups: np.ndarray, column: np.ndarray) -> np.ndarray:
    low, high = (int(column.min()), int(column.max())) if len(column) else (0, 0)
    keys = groups * np.int64(high - low + 1) + (column.astype(np.int64) - low)
    return np.unique(keys, return_inverse=True)[1]


def own_lengths(
    ranked: Int32[np.ndarray, "rows depth"], *, base: int
) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"]]:
    """How many of its ranked tokens each row needs to stand alone.

    Rows are cut to `base` tokens. Where several are then equal, each takes the fewest further
    tokens after which only those remain beside it that stay equal to the very end (duplicates gain
    nothing from a longer identifier, so they do not get one).

    Args:
      ranked: int32[rows, depth], tokens by rank, padded with −1.
      base: tokens taken at first.

    Returns:
      lengths: int64[rows], tokens to take, at most those that the row has.
      places: int64[rows], 0 for the first of each set of rows that stay equal, 1 for the next, ...

    Example:
      >>> lengths, places = own_lengths(np.array([[5, 7], [5, 8], [6, 7], [6, 7]]), base=1)
      >>> lengths.tolist(), places.tolist()
      ([2, 2, 1, 1], [0, 0, 0, 1])
    """
    rows, depth = ranked.shape
    base = min(base, depth)
    available = (ranked >= 0).sum(axis=1)
    lengths = np.minimum(available, base)
    places = np.zeros(rows, np.int64)
    at_base = row_groups(ranked[:, :base])
    shared = np.flatnonzero(np.bincount(at_base, minlength=1)[at_base] > 1)
    if not len(shared):
        return lengths, places

    groups = np.unique(at_base[shared], return_inverse=True)[1]
    sizes = [np.bincount(groups)[groups]]
    for level in range(base, depth):
        groups = _refine(groups, ranked[shared, level])
        sizes.append(np.bincount(groups)[groups])
    alone = np.array(sizes) == sizes[-1]  # [levels, shared]; sets only shrink, so size decides
    lengths[shared] = np.minimum(available[shared], base + alone.argmax(axis=0))
    places[shared] = _places(groups)
    return lengths, places


def _places(groups: np.ndarray) -> np.ndarray:
    """The place of each row among the rows of its group, in row order."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    starts = np.searchsorted(ordered, ordered, side="left")
    places = np.empty(len(groups), np.int64)
    places[order] = np.arange(len(groups)) - starts
    return places


def append_numbers(
    tokens: Int32[np.ndarray, "rows length"],
    lengths: Int64[np.ndarray, " rows"],
    places: Int64[np.ndarray, " rows"],
    *,
    vocab_size: int,
    every_row: bool = False,
) -> tuple[Int32[np.ndarray, "rows longer"], Int64[np.ndarray, " rows"], list[str]]:
    """Appends a number to the rows that share their tokens with an earlier row.

    Args:
      tokens: int32[rows, length], local ids; what lies beyond a row's length is ignored.
      lengths: int64[rows].
      places: int64[rows], from `own_lengths` or `places_of`: 0 for the first of its equals.
      vocab_size: local ids in use, the number tokens come after them.
      every_row: number all rows with equally many tokens if any row needs one, so that identifiers
        of one length keep one length.

    Returns:
      The longer rows, their lengths, and the labels of the number tokens.
    """
    most = int(places.max(initial=0)) + 1
    if most == 1:
        return tokens, lengths, []
    columns = 1
    while _BASE**columns <= most:
        columns += 1
    numbers = places + 1
    digits = numbers[:, None] // _BASE ** np.arange(columns)[::-1] % _BASE
    if every_row:
        used = np.full(len(numbers), columns)
    else:
        used = 1 + sum(numbers >= _BASE**power for power in range(1, columns))
        used = np.where(places > 0, used, 0)

    rows, length = tokens.shape
    out = np.zeros((rows, length + columns), np.int32)
    out[:, :length] = tokens
    present = np.unique(digits[np.arange(columns) >= columns - used[:, None]])
    for column in range(columns):
        wanted = np.flatnonzero(column >= columns - used)
        place = lengths[wanted] + column - (columns - used[wanted])
        value = np.searchsorted(present, digits[wanted, column])
        out[wanted, place] = vocab_size + value
    return out, lengths + used, [f"<#{value}>" for value in present]


def places_of(tokens: Int32[np.ndarray, "rows length"]) -> Int64[np.ndarray, " rows"]:
    """int64[rows]: 0 for the first of each set of equal rows, 1 for the second, and so on."""
    return _places(row_groups(tokens))


def label_ids(
    ranked: Int32[np.ndarray, "rows depth"],
    lengths: Int64[np.ndarray, " rows"],
) -> tuple[Int32[np.ndarray, "rows depth"], Int64[np.ndarray, " used"]]:
    """Turns vocabulary positions into local ids, the most used token first.

    Args:
      ranked: int32[rows, depth], positions in some vocabulary.
      lengths: int64[rows], how many of a row's positions are taken.

    Returns:
      tokens: int32[rows, longest], local ids, 0 beyond a row's length.
      used: int64[used], the vocabulary position of local ids 2, 3, ...
    """
    longest = int(lengths.max(initial=0))
    inside = np.arange(longest) < lengths[:, None]
    taken = ranked[:, :longest][inside]
    used, inverse, times = np.unique(taken, return_inverse=True, return_counts=True)
    order = np.argsort(-times, kind="stable")
    rank = np.empty(len(used), np.int32)
    rank[order] = np.arange(len(used))
    tokens = np.zeros((len(ranked), longest), np.int32)
    tokens[inside] = FIRST_ID + rank[inverse]
    return tokens, used[order].astype(np.int64)
