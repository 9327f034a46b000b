"""TF-IDF over title and text: cosine of vectors in the space of words.

With tf(w, x) how often text x holds word w, N documents of which n(w) hold w (the smoothed form of
scikit-learn, whose sparse matrices this rests on):

    weight(w, x) = (1 + log tf(w, x)) * (1 + log((1 + N) / (1 + n(w))))
    score(q, d)  = sum_w weight(w, q) * weight(w, d) / (|weights of q| * |weights of d|)

A word of a query that no document holds has no weight, and none in the query's length either.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from jaxtyping import Float32, Int
from tqdm import tqdm

from genret_jax.baselines.protocol import Hit, best_hits
from genret_jax.baselines.words import Words, train_queries
from genret_jax.corpus import Corpus, Document
from genret_jax.documents import descending
from genret_jax.errors import UserError
from genret_jax.files import replace_on_success

_MATRIX, _ABOUT = "matrix.npz", "tfidf.json"
_IDF, _ORDER = "idf.npy", "order.npy"

TRAINED = False  # see `genret_jax.searchers`


class TfIdf:
    """A TF-IDF index; make one with `TfIdf.index` or `TfIdf.load`.

    Args:
      matrix: float32[words, documents], CSR; columns have length one.
      idf: float32[words].
      words: word -> its row.
      ids: document ids by position.
      order: place of each document among all ids in descending order.
      name: for tables.

    Example:
      >>> index = TfIdf.index([Document("d1", "Seam", "where sheets meet"),
      ...                      Document("d2", "Torch", "burns gas")])
      >>> [hit.document for hit in index.search(["meeting sheets"], k=10)[0]]
      ['d1']
    """

    def __init__(
        self,
        matrix: scipy.sparse.csr_matrix,
        idf: Float32[np.ndarray, " words"],
        words: Mapping[str, int],
        ids: Sequence[str],
        order: Int[np.ndarray, " documents"],
        *,
        name: str,
    ) -> None:
        self._matrix, self._idf, self._words = matrix, idf, words
        self._ids, self._order, self.name = ids, order, name
        self._cut = Words()

    @classmethod
    def index(
        cls,
        documents: Sequence[Document],
        *,
        extra_texts: Mapping[int, Sequence[str]] | None = None,
        name: str = "TF-IDF",
        progress: bool = False,
    ) -> TfIdf:
        """Indexes title and text of the documents: English stop words out, Snowball stems.

        Args:
          documents: at least one of them with a word to index.
          extra_texts: document position -> texts to append, such as its train queries.
          name: for tables.
          progress: whether to show a progress bar.

        Raises:
          UserError: no word in any document.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer

        cut, extra = Words(), extra_texts or {}
        texts = (
            " ".join([document.title, document.text, *extra.get(position, ())])
            for position, document in enumerate(
                tqdm(documents, desc="words", disable=not progress, leave=False)
            )
        )
        vectorizer = TfidfVectorizer(analyzer=cut, sublinear_tf=True, dtype=np.float32)
        try:
            matrix = vectorizer.fit_transform(texts)
        except ValueError:
            raise UserError(
                f"TF-IDF: none of the {len(documents)} documents has a word to index (stop words "
                "and single letters are none); give documents with text"
            ) from None
        ids = [document.id for document in documents]
        words = {word: int(row) for word, row in vectorizer.vocabulary_.items()}
        idf = vectorizer.idf_.astype(np.float32)
        return cls(matrix.T.tocsr(), idf, words, ids, descending(ids), name=name)

    def search(self, queries: Sequence[str], *, k: int) -> list[list[Hit]]:
        """At most `k` documents a query that share a word with it, best first.

        Equal scores are ordered by id descending. A query without any known word has no hits.

        Raises:
          UserError: k below 1.
        """
        if k < 1:
            raise UserError(f"TF-IDF: k = {k}; give 1 or more")
        return [self._search_one(query, k) for query in queries]

    def _search_one(self, query: str, k: int) -> list[Hit]:
        counts = collections.Counter(w for w in self._cut(query) if w in self._words)
        if not counts:
            return []
        rows = np.array([self._words[word] for word in counts])
        weights = (1 + np.log(np.array(list(counts.values()), np.float32))) * self._idf[rows]
        weights /= np.linalg.norm(weights)
        scores = np.zeros(len(self._ids), np.float32)
        found = np.zeros(len(self._ids), bool)
        for row, weight in zip(rows.tolist(), weights, strict=True):
            part = slice(self._matrix.indptr[row], self._matrix.indptr[row + 1])
            scores[self._matrix.indices[part]] += weight * self._matrix.data[part]
            found[self._matrix.indices[part]] = True
        return best_hits(scores, np.flatnonzero(found), self._ids, self._order, k=k)

    def save(self, folder: Path) -> None:
        """Writes the index as a folder, whole or not at all."""
        with replace_on_success(folder) as temporary:
            temporary.mkdir()
            scipy.sparse.save_npz(temporary / _MATRIX, self._matrix, compressed=False)
            np.save(temporary / _IDF, self._idf)
            np.save(temporary / _ORDER, self._order)
            about = {"name": self.name, "words": list(self._words.items()), "ids": list(self._ids)}
            (temporary / _ABOUT).write_text(json.dumps(about, ensure_ascii=False), "utf-8")

    @classmethod
    def load(cls, folder: Path) -> TfIdf:
        """Opens a saved index.

        Raises:
          UserError: none is there, or it is damaged.
        """
        try:
            about = json.loads((folder / _ABOUT).read_text("utf-8"))
            matrix = scipy.sparse.load_npz(folder / _MATRIX).tocsr()
            idf, order = np.load(folder / _IDF), np.load(folder / _ORDER)
            words, ids = dict(about["words"]), about["ids"]
            if matrix.shape != (len(words), len(ids)) or not len(ids) == len(order):
                raise ValueError("its files are of different indexes")
            return cls(matrix, idf, words, ids, order, name=about["name"])
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise UserError(
                f"{folder}: no whole TF-IDF index here ({error}); index the documents again"
            ) from None


def tfidf_for(corpus: Corpus, *, with_train_queries: bool, progress: bool = False) -> TfIdf:
    """TF-IDF over a corpus, with the train queries appended to their documents where asked.

    Raises:
      UserError: there is no split "train", or what `TfIdf.index` raises.
    """
    extra = train_queries(corpus) if with_train_queries else None
    name = "TF-IDF+q" if with_train_queries else "TF-IDF"
    return TfIdf.index(corpus.documents, extra_texts=extra, name=name, progress=progress)


def fit(corpus: Corpus, folder: Path, work: Any) -> dict[str, Any]:
    """Method `tfidf`: indexes into `folder`; see `genret_jax.searchers`."""
    tfidf_for(corpus, **{"with_train_queries": False, **work.settings}).save(folder / "tfidf")
    return {}


def load(folder: Path) -> TfIdf:
    """Opens what `fit` left."""
    return TfIdf.load(folder / "tfidf")
