"""What lexical searchers read of a text: stemmed words, and the train queries of a document."""

from __future__ import annotations

import re
import threading

from genret_jax.corpus import Corpus

# So many that indexing hardly forgets any, few enough that a server's memory has an end.
_STEMS_KEPT = 1 << 20
# The token pattern of bm25s.tokenize: words of two characters or more.
_WORD = re.compile(r"(?u)\b\w\w+\b")


class Words:
    """Text -> stemmed words without stop words; stems are remembered, for stemming is the cost."""

    def __init__(self) -> None:
        import Stemmer
        from bm25s.stopwords import STOPWORDS_EN

        self._stop_words = frozenset(STOPWORDS_EN)
        self._stems: dict[str, str] = {}
        self._stemmer = Stemmer.Stemmer("english")
        self._lock = threading.Lock()

    def __call__(self, text: str) -> list[str]:
        stems = []
        for word in _WORD.findall(text.lower()):
            if word in self._stop_words:
                continue
            stem = self._stems.get(word)
            if stem is None:
                stem = self._remember(word)
            stems.append(stem)
        return stems

    def _remember(self, word: str) -> str:
        with self._lock:  # A Snowball stemmer is not made for several threads; a server has them.
            if len(self._stems) >= _STEMS_KEPT:
                self._stems.clear()
            stem: str = self._stemmer.stemWord(word)
            self._stems[word] = stem
        return stem


def train_queries(corpus: Corpus) -> dict[int, list[str]]:
    """Document position -> the queries of the split "train" that it is relevant to.

    Raises:
      UserError: there is no such split.
    """
    queries: dict[int, list[str]] = {}
    for query, position in corpus.pairs("train"):
        queries.setdefault(position, []).append(query)
    return queries
