"""Quantised vectors as identifiers: product quantisation and residual quantisation.

Both replace a vector by a few codes, one from each of several codebooks. Product quantisation cuts
the vector into slices and codes each by itself (Jégou et al. 2011; Ultron). Residual quantisation
codes the whole vector, then what the first code left over, and so on, so that identifiers run from
coarse to fine (RIPOR).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float32, Int32

from genret_jax.docids import collisions as collisions_lib
from genret_jax.docids.features import document_features
from genret_jax.docids.kmeans import fit_centroids, nearest
from genret_jax.docids.progress import progress
from genret_jax.docids.table import EOS_LABEL, PAD_LABEL, DocidTable, Setting
from genret_jax.errors import UserError

Scheme: TypeAlias = Literal["pq", "rq"]


@dataclasses.dataclass(frozen=True, eq=False)
class Quantiser:
    """Fitted codebooks.

    Attributes:
      scheme: "pq" or "rq".
      codebooks: one float32[codes, embed] for each position of an identifier; under "pq" embed is
        the width of that position's slice.
    """

    scheme: Scheme
    codebooks: tuple[Float32[np.ndarray, "codes embed"], ...]

    def encode(
        self, vectors: Float32[np.ndarray, "docs embed"]
    ) -> Int32[np.ndarray, "docs codebooks"]:
        """int32[docs, codebooks]: the code of each vector in each codebook."""
        codes = np.empty((len(vectors), len(self.codebooks)), np.int32)
        parts = _slices(vectors, len(self.codebooks)) if self.scheme == "pq" else None
        residual = np.array(vectors, np.float32)
        for position, codebook in enumerate(self.codebooks):
            codes[:, position] = nearest(parts[position] if parts else residual, codebook)
            if parts is None:
                residual -= codebook[codes[:, position]]
        return codes

    def decode(
        self, codes: Int32[np.ndarray, "docs codebooks"]
    ) -> Float32[np.ndarray, "docs embed"]:
        """float32[docs, embed]: the vectors that the codes stand for."""
        parts = [book[codes[:, position]] for position, book in enumerate(self.codebooks)]
        if self.scheme == "pq":
            return np.concatenate(parts, axis=1)
        return np.asarray(np.sum(parts, axis=0), np.float32)


def fit_quantiser(
    vectors: Float32[np.ndarray, "docs embed"],
    scheme: Scheme,
    *,
    codebooks: int,
    codes: int,
    seed: int = 0,
) -> Quantiser:
    """Fits one codebook after another by k-means.

    Args:
      vectors: float32[docs, embed].
      scheme: "pq" or "rq".
      codebooks: positions of an identifier; under "pq" at most embed.
      codes: centroids in a codebook; fewer where there are fewer distinct vectors.
      seed: of k-means.

    Raises:
      UserError: a setting out of range.
    """
    for name, value in (("codebooks", codebooks), ("codes", codes)):
        if value < 1:
            raise UserError(f"{name} = {value}: give 1 or more")
    if scheme == "pq" and codebooks > vectors.shape[1]:
        raise UserError(
            f"codebooks = {codebooks} for vectors of {vectors.shape[1]} dimensions: product"
            " quantisation needs a dimension for each; give fewer codebooks or more dimensions"
        )
    books: list[np.ndarray] = []
    parts = _slices(vectors, codebooks) if scheme == "pq" else None
    residual = np.array(vectors, np.float32)
    for position in progress(range(codebooks), description="codebooks", unit="book"):
        part = parts[position] if parts else residual
        book = fit_centroids(part, clusters=codes, seed=seed + position)
        books.append(book)
        if parts is None:
            residual -= book[nearest(residual, book)]
    return Quantiser(scheme, tuple(books))


def _slices(vectors: np.ndarray, count: int) -> list[np.ndarray]:
    return [np.ascontiguousarray(part) for part in np.array_split(vectors, count, axis=1)]


def pq_docids(
    texts: Sequence[str],
    *,
    codebooks: int = 4,
    codes: int = 0,
    collisions: collisions_lib.Collisions = "resolve",
    features: str = "tfidf",
    dimensions: int = 128,
    seed: int = 0,
) -> DocidTable:
    """Names each text by the product-quantisation codes of its vector.

    TF-IDF vectors carry the most in their first dimensions, and are not rotated: so the first codes
    of an identifier settle the subject and the later ones the detail.

    Args:
      texts: one for each document, in corpus order.
      codebooks: codes in an identifier; each has its own tokens.
      codes: centroids in a codebook; 0 takes the power of two next to twice the square root of the
        number of texts, from 8 to 256 (which published systems have). More would give small corpora
        a centroid for almost every text, and later codes nothing to tell.
      collisions: "resolve" appends a number to every identifier if any two are equal (all keep one
        length); "keep" leaves them equal.
      features: see `genret_jax.docids.features.document_features`.
      dimensions: of the vectors.
      seed: of the vectors and the codebooks.

    Returns:
      One row a text, all of one length. Labels are "position:code".

    Raises:
      UserError: a setting out of range.
    """
    settings: dict[str, Setting] = {name: v for name, v in locals().items() if name != "texts"}
    return _quantised_docids(texts, "pq", settings)


def rq_docids(
    texts: Sequence[str],
    *,
    codebooks: int = 4,
    codes: int = 0,
    collisions: collisions_lib.Collisions = "resolve",
    features: str = "tfidf",
    dimensions: int = 128,
    seed: int = 0,
) -> DocidTable:
    """Names each text by the residual-quantisation codes of its vector, coarse to fine.

    Arguments, result and errors are those of `pq_docids`.
    """
    settings: dict[str, Setting] = {name: v for name, v in locals().items() if name != "texts"}
    return _quantised_docids(texts, "rq", settings)


def _quantised_docids(
    texts: Sequence[str], scheme: Scheme, settings: dict[str, Setting]
) -> DocidTable:
    """The table of either scheme; settings as `pq_docids` takes them, `codes` is filled in."""
    collisions_lib.check_collisions(str(settings["collisions"]))
    seed, codebooks = int(settings["seed"]), int(settings["codebooks"])
    if settings["codes"] == 0:
        settings["codes"] = 2 ** min(8, max(3, round(math.log2(2 * math.sqrt(len(texts))))))
    vectors = document_features(
        texts,
        features=str(settings["features"]),
        dimensions=int(settings["dimensions"]),
        seed=seed,
    )
    if scheme == "pq" and vectors.shape[1] < codebooks <= int(settings["dimensions"]):
        # A corpus of two documents has two dimensions; its identifiers keep their length.
        vectors = np.pad(vectors, ((0, 0), (0, codebooks - vectors.shape[1])))
    quantiser = fit_quantiser(
        vectors, scheme, codebooks=codebooks, codes=int(settings["codes"]), seed=seed
    )
    codes = quantiser.encode(vectors)
    labels = [PAD_LABEL, EOS_LABEL]
    tokens = np.empty_like(codes)
    for position, book in enumerate(quantiser.codebooks):
        tokens[:, position] = len(labels) + codes[:, position]
        labels += [f"{position + 1}:{code}" for code in range(len(book))]
    lengths = np.full(len(tokens), codebooks, np.int64)
    numbers: list[str] = []
    if settings["collisions"] == "resolve":
        tokens, lengths, numbers = collisions_lib.append_numbers(
            tokens,
            lengths,
            collisions_lib.places_of(tokens),
            vocab_size=len(labels),
            every_row=True,
        )
    return DocidTable.from_array(
        tokens, lengths, np.arange(len(tokens)), [*labels, *numbers], scheme, settings
    )
