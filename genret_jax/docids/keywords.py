"""Keyword identifiers: a document is named by its most important words, most important first.

The default of the project. Words carry over to documents that training never saw, and a reader
can check them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float32

from genret_jax.docids import collisions as collisions_lib
from genret_jax.docids import terms as terms_lib
from genret_jax.docids.features import SentenceEncoder
from genret_jax.docids.progress import progress
from genret_jax.docids.table import EOS_LABEL, PAD_LABEL, DocidTable, Setting
from genret_jax.errors import UserError

Weight: TypeAlias = Literal["bm25", "tfidf", "encoder"]

Ranking: TypeAlias = Callable[[int, "np.ndarray | None"], np.ndarray]
"""(depth, allowed bool[vocabulary] or None) -> int32[texts, depth], terms by rank."""


def keyword_docids(
    texts: Sequence[str],
    *,
    terms: int = 4,
    weight: Weight = "bm25",
    vocabulary: int = 0,
    extra_terms: int = 4,
    collisions: collisions_lib.Collisions = "resolve",
    stop_words: bool = True,
    k1: float = 100.0,
    b: float = 0.75,
    candidates: int = 40,
    diversity: float = 0.3,
    encoder: str = "",
) -> DocidTable:
    """Names each text by its heaviest words, one docid token for each distinct word.

    A text without a usable word is named "<none>". Shared identifiers are told apart by up to
    `extra_terms` further words and then by a number; see `genret_jax.docids.collisions`.

    Args:
      texts: one for each document, in corpus order.
      terms: words in an identifier (fewer where a text has fewer).
      weight: what makes a word important. "bm25": frequent here, rare elsewhere; "tfidf": the same
        with repetition damped; "encoder": nearness of the word to the text in a sentence encoder
        (KeyBERT, with maximal marginal relevance), which needs an extra package.
      vocabulary: distinct words that identifiers may use in all, 0 for no limit. The words kept are
        those that appear in most identifiers when there is no limit.
      extra_terms: further words that may be added to tell documents apart.
      collisions: "resolve" or "keep".
      stop_words: leave function words of English out.
      k1: BM25's saturation. Small values prefer words that occur once in a single document, which
        no query can be expected to hold; 100 is what GLEN uses.
      b: BM25's penalty for long texts.
      candidates: words of a text that the encoder compares, the heaviest by BM25.
      diversity: 0 takes the words nearest to the text, 1 those least like the words already taken.
      encoder: folder of a sentence-transformers model; empty for the packaged one.

    Returns:
      One row a text.

    Raises:
      UserError: a setting out of range, or one that the chosen weight does not use.

    Example:
      >>> keyword_docids(["red car", "red red bus"], terms=2).text(1)
      'bus · red'
    """
    settings: dict[str, Setting] = {name: v for name, v in locals().items() if name != "texts"}
    _check_settings(settings)
    counts = terms_lib.count_terms(texts, stop_words=stop_words)
    if weight == "encoder":
        rank = _encoder_ranking(
            texts,
            counts,
            terms_lib.bm25_weights(counts, k1=k1, b=b),
            candidates=candidates,
            diversity=diversity,
            encoder=SentenceEncoder(encoder),
        )
    else:
        rank = _weight_ranking(
            counts,
            terms_lib.bm25_weights(counts, k1=k1, b=b)
            if weight == "bm25"
            else terms_lib.tfidf_weights(counts),
        )
    allowed = None
    if vocabulary:
        allowed = _most_used(rank(terms, None), vocabulary, len(counts.vocabulary))
    depth = terms + (extra_terms if collisions == "resolve" else 0)
    return _table(rank(depth, allowed), counts.vocabulary, settings)


def _check_settings(settings: dict[str, Setting]) -> None:
    """Raises UserError for a value out of range or one that would have no effect."""
    weight = settings["weight"]
    if weight not in ("bm25", "tfidf", "encoder"):
        raise UserError(f"weight = {weight!r}: give 'bm25', 'tfidf' or 'encoder'")
    collisions_lib.check_collisions(str(settings["collisions"]))
    for name, low, high in (
        ("terms", 1, 64),
        ("vocabulary", 0, 2**31 - 4096),
        ("extra_terms", 0, 64),
        ("k1", 0, float("inf")),
        ("b", 0, 1),
        ("candidates", 1, 10_000),
        ("diversity", 0, 1),
    ):
        if not low <= float(settings[name]) <= high:
            raise UserError(f"{name} = {settings[name]}: give a value from {low} to {high}")
    for name, used in (
        ("k1", weight != "tfidf"),
        ("b", weight != "tfidf"),
        ("candidates", weight == "encoder"),
        ("diversity", weight == "encoder"),
        ("encoder", weight == "encoder"),
        ("extra_terms", settings["collisions"] == "resolve"),
    ):
        if not used and settings[name] != _default(name):
            raise UserError(
                f"{name} = {settings[name]!r} has no effect with weight = {weight!r} and"
                f" collisions = {settings['collisions']!r}: leave it out"
            )


def _default(name: str) -> Setting:
    return inspect.signature(keyword_docids).parameters[name].default


def _weight_ranking(counts: terms_lib.TermCounts, weights: np.ndarray) -> Ranking:
    def rank(depth: int, allowed: np.ndarray | None) -> np.ndarray:
        return terms_lib.ranked_terms(counts, weights, depth=depth, allowed=allowed)

    return rank


def _encoder_ranking(
    texts: Sequence[str],
    counts: terms_lib.TermCounts,
    weights: np.ndarray,
    *,
    candidates: int,
    diversity: float,
    encoder: SentenceEncoder,
) -> Ranking:
    """Ranks by maximal marginal relevance of word and text embeddings (KeyBERT's rule)."""
    proposed = terms_lib.ranked_terms(counts, weights, depth=candidates)
    distinct = np.unique(proposed[proposed >= 0])
    word_vectors = encoder.encode([counts.vocabulary[term] for term in distinct], unit="word")
    text_vectors = encoder.encode(texts)

    def rank(depth: int, allowed: np.ndarray | None) -> np.ndarray:
        out = np.full((len(texts), depth), -1, np.int32)
        for row, own in enumerate(progress(proposed, description="rank words")):
            own = own[own >= 0]
            if allowed is not None:
                own = own[allowed[own]]
            if not len(own):
                continue
            vectors = word_vectors[np.searchsorted(distinct, own)]
            chosen = marginal_relevance(
                vectors @ text_vectors[row], vectors @ vectors.T, depth, diversity=diversity
            )
            out[row, : len(chosen)] = own[chosen]
        return out

    return rank


def marginal_relevance(
    relevance: Float32[np.ndarray, " items"],
    similarity: Float32[np.ndarray, "items items"],
    wanted: int,
    *,
    diversity: float,
) -> list[int]:
    """Picks items one after another by (1 − diversity) · relevance − diversity · redundancy.

    Redundancy is the largest similarity to an item picked before (Carbonell & Goldstein 1998).

    Args:
      relevance: float32[items].
      similarity: float32[items, items].
      wanted: items to pick; all of them where there are fewer.
      diversity: 0 sorts by relevance alone.

    Returns:
      Positions of the items, in the order they were picked.
    """
    score = (1.0 - diversity) * relevance
    redundancy = np.full(len(relevance), -np.inf, np.float32)
    chosen: list[int] = []
    for _ in range(min(wanted, len(relevance))):
        penalty = diversity * redundancy if chosen else np.float32(0.0)
        value = score - penalty
        value[chosen] = -np.inf
        best = int(value.argmax())
        chosen.append(best)
        redundancy = np.maximum(redundancy, similarity[best])
    return chosen


def _most_used(ranked: np.ndarray, wanted: int, vocabulary: int) -> np.ndarray:
    """bool[vocabulary]: the `wanted` terms that appear in most rows."""
    uses = np.bincount(ranked[ranked >= 0], minlength=vocabulary)
    kept = np.argsort(-uses, kind="stable")[:wanted]
    allowed = np.zeros(vocabulary, bool)
    allowed[kept[uses[kept] > 0]] = True
    return allowed


def _table(
    ranked: np.ndarray, vocabulary: Sequence[str], settings: dict[str, Setting]
) -> DocidTable:
    """Cuts the ranked terms to identifiers and gives the terms local ids."""
    nameless = ranked[:, 0] < 0
    if nameless.any():
        ranked = ranked.copy()
        ranked[nameless, 0] = len(vocabulary)  # one position past the words: NO_TERM
    lengths, places = collisions_lib.own_lengths(ranked, base=int(settings["terms"]))
    if settings["collisions"] == "keep":
        places = np.zeros_like(places)
    tokens, used = collisions_lib.label_ids(ranked, lengths)
    labels = [PAD_LABEL, EOS_LABEL]
    for position in used:
        known = position < len(vocabulary)
        # Words hold no "<", so none can be mistaken for a reserved label.
        labels.append(vocabulary[position] if known else collisions_lib.NO_TERM)
    tokens, lengths, numbers = collisions_lib.append_numbers(
        tokens, lengths, places, vocab_size=len(labels)
    )
    return DocidTable.from_array(
        tokens, lengths, np.arange(len(tokens)), [*labels, *numbers], "keywords", settings
    )
