"""Words of texts, how often each text has them, and how much they weigh.

Shared by everything that looks at words: keyword docids and TF-IDF features. Counting runs in
chunks through numpy (over a million words a second on one core), so that a million documents take
minutes and the words themselves are held once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import sys
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int32, Int64

from genret_jax.docids.progress import progress

# Function words only. The usual longer lists also drop words such as "bill", "fire", "system" or
# "computer", which are the very words that name some documents.
STOP_WORDS = frozenset(
    """
    a about above across after again against all almost also although always am among an and
    another any anybody anyone anything are aren as at away be became because become becomes been
    before behind being below between both but by can cannot could couldn did didn do does doesn
    doing don done down during each either else enough etc even ever every everybody everyone
    everything except few for from further had hadn has hasn have haven having he hence her here
    hers herself him himself his how however if in indeed instead into is isn it its itself just
    ll may maybe me might mine more moreover most much must my myself neither never nevertheless no
    nobody none nor not nothing now of off often on once one only onto or other others otherwise our
    ours ourselves out over own per perhaps quite rather re really same shall she should shouldn
    since so some somebody someone something sometimes still such than that the their theirs them
    themselves then there thereby therefore these they this those though through throughout thus to
    together too toward towards under unless until up upon us ve very was wasn we well were weren
    what whatever when whenever where whereas whether which while who whoever whole whom whose why
    will with within without won would wouldn yet you your yours yourself yourselves
    """.split()  # noqa: SIM905
)

_CHUNK = 1 << 21  # words counted at a time: 16 MB of keys
# Numbers keep their commas and points: half of "3,000" is a word that says nothing.
_NUMBER = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)+|"
_ASCII_WORD = re.compile(_NUMBER + r"[A-Za-z0-9_]{2,}")
_ASCII_CHARACTER = re.compile(r"[A-Za-z0-9_]")
_WORD, _CHARACTER = re.compile(_NUMBER + r"\w{2,}"), re.compile(r"\w")
# From the first combining mark up, less punctuation and symbols (dashes and quotes are everywhere).
_MAY_BE_MARK = re.compile("[\u0300-\u1fff\u2c00-\U0010ffff]")


def words(text: str) -> list[str]:
    """The words of a text: lower-cased runs of two or more letters, digits, marks or underscores.

    Numbers such as 3,000 and 2.5 are one word. A text that has no such word (for example "C")
    yields its single characters instead.

    Example:
      >>> words("The B-52's: Löwenzahn, 3,000 seeds")
      ['the', '52', 'löwenzahn', '3,000', 'seeds']
    """
    lowered = text.lower()
    if lowered.isascii():
        return _ASCII_WORD.findall(lowered) or _ASCII_CHARACTER.findall(lowered)
    if not _MAY_BE_MARK.search(lowered):
        return _WORD.findall(lowered) or _CHARACTER.findall(lowered)
    # One form for accented letters, whether the corpus composes them or not.
    lowered = unicodedata.normalize("NFC", lowered)
    several, single = _marked_patterns()
    return several.findall(lowered) or single.findall(lowered)


@functools.cache
def _marked_patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    r"""Patterns for words that may hold combining marks.

    Python's \w leaves out the marks that carry the vowels of Hindi, Thai and many other scripts, so
    \w alone cuts their words to pieces. Several times slower than \w, so kept for texts with marks.
    """
    marks = [c for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)) in ("Mn", "Mc")]
    ranges = []
    for _, run in itertools.groupby(enumerate(marks), lambda pair: pair[1] - pair[0]):
        members = [code for _, code in run]
        ranges.append(f"{chr(members[0])}-{chr(members[-1])}")
    word_class = r"[\w" + "".join(ranges) + "]"
    return re.compile(_NUMBER + word_class + "{2,}"), re.compile(word_class)


@dataclasses.dataclass(frozen=True, eq=False)
class TermCounts:
    """How often every text has every term; a sparse matrix in row order.

    Attributes:
      vocabulary: the distinct words; some may be stop words, which no text counts.
      offsets: int64[texts + 1], text i owns entries offsets[i]:offsets[i + 1].
      terms: int32[entries], positions in `vocabulary`; within a text in order of first appearance.
      counts: int32[entries].
    """

    vocabulary: tuple[str, ...]
    offsets: Int64[np.ndarray, " texts_and_one"]
    terms: Int32[np.ndarray, " entries"]
    counts: Int32[np.ndarray, " entries"]

    @property
    def texts(self) -> int:
        """Number of texts."""
        return len(self.offsets) - 1

    @functools.cached_property
    def document_frequency(self) -> Int64[np.ndarray, " vocabulary"]:
        """int64[vocabulary]: the texts that have each term."""
        return np.bincount(self.terms, minlength=len(self.vocabulary))

    @functools.cached_property
    def lengths(self) -> Int64[np.ndarray, " texts"]:
        """int64[texts]: the words counted in each text."""
        totals = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])
        return totals[self.offsets[1:]] - totals[self.offsets[:-1]]


def count_terms(texts: Sequence[str], *, stop_words: bool = True) -> TermCounts:
    """Counts the words of each text.

    Args:
      texts: the texts.
      stop_words: leave `STOP_WORDS` out, except in a text that has no other word ("The Who").

    Returns:
      The counts; a text without any word has no entries.
    """
    index: defaultdict[str, int] = defaultdict()
    index.default_factory = index.__len__
    for word in sorted(STOP_WORDS):
        index[word]  # noqa: B018  (stop words take the first positions)
    stops = len(index) if stop_words else 0

    chunks: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    found, sizes = array("i"), array("q")
    for text in progress(texts, description="count words"):
        before = len(found)
        found.extend(map(index.__getitem__, words(text)))
        sizes.append(len(found) - before)
        if len(found) >= _CHUNK:
            chunks.append(_count_chunk(found, sizes, len(index), stops))
            found, sizes = array("i"), array("q")
    chunks.append(_count_chunk(found, sizes, len(index), stops))
    per_text, terms, counts = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    return TermCounts(
        vocabulary=tuple(index),
        offsets=np.concatenate([[0], np.cumsum(per_text, dtype=np.int64)]),
        terms=terms,
        counts=counts,
    )


def _count_chunk(
    found: array[int], sizes: array[int], vocabulary: int, stops: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entries per text, terms and counts of a run of texts; the first `stops` terms are dropped."""
    word = np.frombuffer(found, np.int32) if len(found) else np.zeros(0, np.int32)
    texts = len(sizes)
    text = np.repeat(np.arange(texts), np.frombuffer(sizes, np.int64) if texts else [])
    content = word >= stops
    has_content = np.bincount(text[content], minlength=texts) > 0
    kept = content | ~has_content[text]
    keys = text[kept] * np.int64(vocabulary) + word[kept]
    unique, first, counts = np.unique(keys, return_index=True, return_counts=True)
    order = np.argsort(first)
    owner, terms = np.divmod(unique[order], vocabulary)
    return (
        np.bincount(owner, minlength=texts),
        terms.astype(np.int32),
        counts[order].astype(np.int32),
    )


def bm25_weights(counts: TermCounts, *, k1: float, b: float) -> Float32[np.ndarray, " entries"]:
    """BM25 weight of each entry.

    w = idf · tf (k1 + 1) / (tf + k1 (1 − b + b · length / mean length)), with the smoothed
    idf = ln(1 + (N − df + 1/2) / (df + 1/2)) (Robertson & Zaragoza 2009; the idf never falls below
    zero).

    Args:
      counts: of N texts.
      k1: how slowly repetition saturates; the larger, the closer to raw counts.
      b: how far a long text is marked down, 0 to 1.
    """
    df = counts.document_frequency
    idf = np.log1p((counts.texts - df + 0.5) / (df + 0.5))
    mean = max(counts.lengths.mean(), 1.0) if counts.texts else 1.0
    per_text = (k1 * (1.0 - b + b * counts.lengths / mean)).astype(np.float32)
    penalty = np.repeat(per_text, np.diff(counts.offsets))
    tf = counts.counts.astype(np.float32)
    return idf.astype(np.float32)[counts.terms] * (tf * np.float32(k1 + 1.0) / (tf + penalty))


def tfidf_weights(counts: TermCounts) -> Float32[np.ndarray, " entries"]:
    """Sub-linear TF-IDF weight of each entry: (1 + ln tf) · (1 + ln((1 + N) / (1 + df)))."""
    df = counts.document_frequency
    idf = 1.0 + np.log((1.0 + counts.texts) / (1.0 + df))
    tf = 1.0 + np.log(counts.counts.astype(np.float32))
    return (idf.astype(np.float32)[counts.terms] * tf).astype(np.float32)


def ranked_terms(
    counts: TermCounts,
    weights: Float32[np.ndarray, " entries"],
    *,
    depth: int,
    allowed: np.ndarray | None = None,
) -> Int32[np.ndarray, "texts depth"]:
    """The heaviest terms of each text, heaviest first.

    Args:
      counts: the terms of the texts.
      weights: float32[entries], aligned with `counts.terms`.
      depth: terms wanted for each text.
      allowed: bool[vocabulary], the terms that may be chosen; None for all.

    Returns:
      int32[texts, depth]: positions in the vocabulary, −1 where a text has no more terms. Of two
      equally heavy terms the one that appears first in the text comes first.
    """
    out = np.full((counts.texts, depth), -1, np.int32)
    # Cut by entries, not by texts, so that memory stays bounded whatever the length of the texts.
    steps = np.arange(_CHUNK, len(counts.terms) + _CHUNK, _CHUNK)
    cuts = np.unique(np.concatenate([[0], np.searchsorted(counts.offsets, steps), [counts.texts]]))
    for start, stop in itertools.pairwise(np.minimum(cuts, counts.texts)):
        begin, end = counts.offsets[start], counts.offsets[stop]
        terms, weight = counts.terms[begin:end], weights[begin:end]
        text = np.repeat(np.arange(start, stop), np.diff(counts.offsets[start : stop + 1]))
        if allowed is not None:
            kept = allowed[terms]
            terms, weight, text = terms[kept], weight[kept], text[kept]
        order = np.lexsort((-weight, text))  # stable: ties stay in order of appearance
        text, terms = text[order], terms[order]
        rank = np.arange(len(text)) - np.searchsorted(text, text, side="left")
        top = rank < depth
        out[text[top], rank[top]] = terms[top]
    return out
