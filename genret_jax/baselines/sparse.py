"""BM25 over title and text, through the bm25s library (Lù 2024: scores are made when indexing).

The formula of the default method "lucene" (Kamphuis et al. 2020), for a query of words w (a word
given twice counts twice), a document d of |d| words, N documents of which n(w) hold w:

    score(q, d) = sum_w  log(1 + (N - n(w) + 0.5) / (n(w) + 0.5))
                         * tf(w, d) / (tf(w, d) + k1 * (1 - b + b * |d| / mean |d|))
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from genret_jax.baselines.protocol import Hit, best_hits
from genret_jax.baselines.words import Words, train_queries
from genret_jax.corpus import Corpus, Document
from genret_jax.documents import descending
from genret_jax.errors import UserError
from genret_jax.files import replace_on_success

_METHODS = ("lucene", "robertson", "atire", "bm25l", "bm25+")
_FORMAT = 1
_SETTINGS_FILE = "bm25.json"
_IDS_FILE = "ids.json"
_ORDER_FILE = "order.npy"

TRAINED = False  # see `genret_jax.searchers`


class BM25:
    """A BM25 index; make one with `BM25.index`, `BM25.load` or `bm25_for`.

    Example:
      >>> index = BM25.index([Document("d1", "Seam", "where sheets meet"),
      ...                     Document("d2", "Torch", "burns gas")])
      >>> [hit.document for hit in index.search(["meeting sheets"], k=10)[0]]
      ['d1']
    """

    def __init__(
        self, engine: Any, ids: Sequence[str], order: npt.NDArray[np.int32], *, name: str
    ) -> None:
        """From parts that `index` and `load` make.

        Args:
          engine: an indexed bm25s.BM25.
          ids: document ids by position.
          order: int32[documents], place of each document among all ids in descending order.
          name: for tables.
        """
        self._engine = engine
        self._ids = ids
        self._order = order
        self._word = Words()
        self.name = name

    @classmethod
    def index(
        cls,
        documents: Sequence[Document],
        *,
        extra_texts: Mapping[int, Sequence[str]] | None = None,
        k1: float = 0.9,
        b: float = 0.4,
        method: str = "lucene",
        name: str = "BM25",
        progress: bool = False,
    ) -> BM25:
        """Indexes title and text of the documents: English stop words out, Snowball stems.

        Args:
          documents: at least one of them with a word to index.
          extra_texts: document position -> texts to append before indexing, such as its training
            queries.
          k1: how slowly repetitions of a word saturate, from 0.
          b: how far long documents are held back, 0 to 1.
          method: lucene, robertson, atire, bm25l or bm25+, as in bm25s.
          progress: whether to show progress bars.

        Raises:
          UserError: no documents, no word in any of them, or a setting out of its range.
        """
        _check_settings(k1=k1, b=b, method=method)
        extra = extra_texts or {}
        outside = [position for position in extra if not 0 <= position < len(documents)]
        if outside:
            raise UserError(
                f"BM25: an extra text for position {outside[0]}, but there are {len(documents)} "
                "documents; count positions from 0"
            )
        words = Words()
        numbers: dict[str, int] = {}
        tokens = [
            [
                numbers.setdefault(word, len(numbers))
                for text in (document.title, document.text, *extra.get(position, ()))
                for word in words(text)
            ]
            for position, document in enumerate(
                tqdm(documents, desc="words", disable=not progress, leave=False)
            )
        ]
        if not numbers:
            raise UserError(
                f"BM25: none of the {len(documents)} documents has a word to index (stop words "
                "and single letters are none); give documents with text"
            )
        engine = _bm25s().BM25(k1=k1, b=b, method=method)
        engine.index((tokens, numbers), create_empty_token=False, show_progress=progress)
        ids = [document.id for document in documents]
        return cls(engine, ids, descending(ids), name=name)

    def search(self, queries: Sequence[str], *, k: int, progress: bool = False) -> list[list[Hit]]:
        """At most `k` documents a query that share a word with it, best first.

        Documents of equal score are ordered by id descending, as trec_eval does, so that the cut
        at k does not depend on the order of the corpus. A query without any known word has no hits.

        Args:
          progress: whether to show a progress bar.

        Raises:
          UserError: k below 1.
        """
        if k < 1:
            raise UserError(f"BM25: k = {k}; give 1 or more")
        bar = tqdm(queries, desc=self.name, disable=not progress, leave=False)
        return [self._search_one(query, k=k) for query in bar]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the index as a folder, whole or not at all; an earlier index there is replaced.

        Raises:
          UserError: something else than a BM25 index is there, or the place cannot be written.
        """
        folder = Path(folder)
        if (
            folder.exists()
            and not (folder / _SETTINGS_FILE).exists()
            and (not folder.is_dir() or any(folder.iterdir()))
        ):
            raise UserError(f"{folder}: exists and is no BM25 index; give a new folder")
        try:
            with replace_on_success(folder) as temporary:
                self._engine.save(temporary, show_progress=False)
                np.save(temporary / _ORDER_FILE, self._order)
                _write_json(temporary / _IDS_FILE, list(self._ids))
                settings = {"format": _FORMAT, "name": self.name, "documents": len(self._ids)}
                _write_json(temporary / _SETTINGS_FILE, settings)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written ({error.strerror or error}); give another place"
            ) from error

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> BM25:
        """Opens a saved index; its arrays stay on disk (memory-mapped) and are read as needed.

        Raises:
          UserError: no BM25 index is there, or it is damaged or of another version.
        """
        folder = Path(folder)
        if not (folder / _SETTINGS_FILE).is_file():
            raise UserError(f"{folder}: no BM25 index ({_SETTINGS_FILE} is missing); save one")
        try:
            settings = json.loads((folder / _SETTINGS_FILE).read_text(encoding="utf-8"))
            if settings["format"] != _FORMAT:
                raise UserError(
                    f"{folder}: a BM25 index of format {settings['format']}, this program reads "
                    f"{_FORMAT}; index the documents again"
                )
            engine = _bm25s().BM25.load(folder, mmap=True, show_progress=False)
            ids = json.loads((folder / _IDS_FILE).read_text(encoding="utf-8"))
            order = np.load(folder / _ORDER_FILE, mmap_mode="r")
            if not len(ids) == len(order) == engine.scores["num_docs"] == settings["documents"]:
                raise ValueError("its files are of different indexes")
            return cls(engine, ids, order, name=settings["name"])
        except UserError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
            raise UserError(
                f"{folder}: damaged BM25 index ({error}); index the documents again"
            ) from error

    def _search_one(self, query: str, *, k: int) -> list[Hit]:
        tokens = self._engine.get_tokens_ids(self._word(query))
        if not tokens:
            return []
        scores = self._engine.get_scores_from_ids(tokens)
        # bm25l and bm25+ give every document the same score for the words that it lacks.
        absent = self._engine.nonoccurrence_array
        floor = 0 if absent is None else absent[np.asarray(tokens)].sum()
        return best_hits(scores, np.flatnonzero(scores > floor), self._ids, self._order, k=k)


def bm25_for(
    corpus: Corpus, *, with_train_queries: bool, progress: bool = False, **settings: Any
) -> BM25:
    """BM25 over a corpus; with train queries, over what a generative retriever is trained on.

    Args:
      with_train_queries: whether each document gets the queries of the split "train" that it is
        relevant to appended ("BM25+q").
      **settings: of `BM25.index`.

    Raises:
      UserError: there is no split "train", or what `BM25.index` raises.
    """
    extra = train_queries(corpus) if with_train_queries else None
    settings = {"name": "BM25+q" if with_train_queries else "BM25", **settings}
    return BM25.index(corpus.documents, extra_texts=extra, progress=progress, **settings)


def fit(corpus: Corpus, folder: Path, work: Any) -> dict[str, Any]:
    """Method `bm25`: indexes into `folder`; see `genret_jax.searchers`."""
    bm25_for(corpus, **{"with_train_queries": False, **work.settings}).save(folder / "bm25")
    return {}


def load(folder: Path) -> BM25:
    """Opens what `fit` left."""
    return BM25.load(folder / "bm25")


def _bm25s() -> Any:
    # Imported when first needed: importing it starts a JAX device where JAX is installed.
    import bm25s

    logger = logging.getLogger("bm25s")
    if logger.level == logging.DEBUG:
        # It sets this level itself, and so prints into every program that has any log handler.
        logger.setLevel(logging.NOTSET)
    return bm25s


def _check_settings(*, k1: float, b: float, method: str) -> None:
    if not 0 <= k1 < float("inf"):
        raise UserError(f"BM25: k1 = {k1}; give a number from 0, usually 0.9 to 2")
    if not 0 <= b <= 1:
        raise UserError(f"BM25: b = {b}; give a number from 0 to 1")
    if method not in _METHODS:
        raise UserError(f"BM25: method {method!r}; give one of {', '.join(_METHODS)}")


def _write_json(path: Path, value: dict[str, Any] | Iterable[str]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
