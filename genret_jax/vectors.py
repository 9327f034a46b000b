"""The semantic vectors of the documents' views on disk: computed once after training."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Int

from genret_jax.errors import UserError

STORES = ("float32", "bfloat16", "int8")
_MOST_AT_ONCE = 1 << 27  # numbers, in float32 half a GB
_QUERIES_AT_ONCE = 64
_FILE, _SCALES, _BOUNDS = "vectors.npy", "vectors.scales.npy", "vectors.bounds.npy"
_UNSEEN = "vectors.unseen.npy"


@dataclasses.dataclass(frozen=True, eq=False)
class DocumentVectors:
    """One vector a view, and whose it is.

    Attributes:
      values: float32[views, embed]; or int16, the bits of bfloat16; or int8, to be multiplied by
        `scales`.
      bounds: int64[documents + 1, 2]; see `genret_jax.data.views.Views`.
      scales: float32[views], for int8; None otherwise.
      unseen: bool[documents], those that no train query names; None where that is not told apart.
    """

    values: np.ndarray
    bounds: np.ndarray
    scales: np.ndarray | None = None
    unseen: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        vectors: Float32[np.ndarray, "views embed"],
        bounds: Int[np.ndarray, "documents+1 2"],
        *,
        store: str,
    ) -> DocumentVectors:
        """Vectors in the type that they are to be kept in.

        Args:
          vectors: as they are compared: of length one where similarity is the cosine.
          bounds: see `genret_jax.data.views.Views`.
          store: "float32"; "bfloat16", half the bytes at 3 digits; or "int8", a quarter, each
            vector with a scale of its own (largest value = 127).
        """
        if store not in STORES:
            raise ValueError(f"store must be one of {STORES}, found {store!r}")
        if store == "float32":
            return cls(np.asarray(vectors, np.float32), bounds)
        if store == "bfloat16":  # .npy files know no bfloat16: its bits are kept
            return cls(vectors.astype(ml_dtypes.bfloat16).view(np.int16), bounds)
        scales = np.maximum(np.abs(vectors).max(axis=1), 1e-12) / 127
        values = np.round(vectors / scales[:, None]).astype(np.int8)
        return cls(values, bounds, scales.astype(np.float32))

    def empty(self, views: int) -> DocumentVectors:
        """Room for so many vectors of this kind."""
        values = np.zeros((views, self.values.shape[1]), self.values.dtype)
        scales = None if self.scales is None else np.zeros(views, np.float32)
        return DocumentVectors(values, self.bounds, scales)

    def put(self, rows: Int[np.ndarray, " n"], some: DocumentVectors) -> None:
        """Copies the vectors of `some`, all of them, to these rows."""
        self.values[rows] = some.values
        if self.scales is not None and some.scales is not None:
            self.scales[rows] = some.scales

    def take(self, rows: Int[np.ndarray, " n"]) -> DocumentVectors:
        """The vectors of some rows by themselves, without bounds, as `put` takes them."""
        scales = None if self.scales is None else self.scales[rows]
        return DocumentVectors(self.values[rows], self.bounds[:0], scales)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def num_bytes(self) -> int:
        more = [x.nbytes for x in (self.scales, self.unseen) if x is not None]
        return self.values.nbytes + self.bounds.nbytes + sum(more)

    @property
    def store(self) -> str:
        return {"f": "float32", "i": "bfloat16" if self.scales is None else "int8"}[
            self.values.dtype.kind
        ]

    def similarities(
        self, positions: Int[np.ndarray, " n"], query: Float32[np.ndarray, " embed"]
    ) -> tuple[Float32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """How near a query is to documents: to the nearest view of each.

        Args:
          positions: of the documents.
          query: its vector.

        Returns:
          Inner products with the nearest piece of text, and with the nearest train query; where a
          document has no train query, the former again.
        """
        if not len(positions):
            return np.zeros(0, np.float32), np.zeros(0, np.float32)
        begin, end = self.bounds[positions, 0], self.bounds[np.asarray(positions) + 1, 0]
        pieces = self.bounds[positions, 1] - begin
        counts = end - begin
        if not pieces.all():
            raise ValueError("a document without a piece of text has no similarity")
        first = np.cumsum(counts) - counts
        rows = np.arange(counts.sum()) + np.repeat(begin - first, counts)
        scores = self.rows(rows) @ query
        is_piece = np.arange(len(rows)) - np.repeat(first, counts) < np.repeat(pieces, counts)
        text = np.maximum.reduceat(np.where(is_piece, scores, -np.inf), first)
        asked = np.maximum.reduceat(np.where(is_piece, -np.inf, scores), first)
        return text, np.where(counts > pieces, asked, text)

    def of_several(
        self,
        positions: Sequence[Int[np.ndarray, " n"]],
        queries: Sequence[Float32[np.ndarray, " embed"]],
    ) -> list[tuple[Float32[np.ndarray, " n"], Float32[np.ndarray, " n"]]]:
        """`similarities` of several queries, each with its documents.

        Where all vectors fit into memory, one matrix product with all of them takes less time than
        gathering those of a beam's documents for every query.

        Raises:
          ValueError: a document has no piece of text.
        """
        has_piece = self.bounds[:-1, 1] > self.bounds[:-1, 0]
        if not all(has_piece[some].all() for some in positions):
            raise ValueError("a document without a piece of text has no similarity")
        if self.values.size > _MOST_AT_ONCE:
            return [self.similarities(p, q) for p, q in zip(positions, queries, strict=True)]
        found = []
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            part = np.stack(queries[start : start + _QUERIES_AT_ONCE])
            text, asked = self._nearest_views(part)
            for i, chosen in enumerate(positions[start : start + _QUERIES_AT_ONCE]):
                found.append((text[i, chosen], asked[i, chosen]))
        return found

    def of_all(
        self, queries: Float32[np.ndarray, "queries embed"]
    ) -> tuple[Float32[np.ndarray, "queries documents"], Float32[np.ndarray, "queries documents"]]:
        """Both parts of `similarities` for all documents, which are taken in blocks."""
        blocks = -(-self.values.size // _MOST_AT_ONCE)
        if blocks <= 1:
            return self._nearest_views(queries)
        cuts = np.linspace(0, len(self), min(blocks, len(self)) + 1).astype(int)
        parts = [self._block(a, b)._nearest_views(queries) for a, b in itertools.pairwise(cuts)]
        text, asked = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        return text, asked

    def _block(self, begin: int, end: int) -> DocumentVectors:
        """The vectors of documents `begin` .. `end - 1`."""
        first, last = self.bounds[begin, 0], self.bounds[end, 0]
        scales = None if self.scales is None else self.scales[first:last]
        bounds = self.bounds[begin : end + 1] - first
        return DocumentVectors(self.values[first:last], bounds, scales)

    def _nearest_views(
        self, queries: Float32[np.ndarray, "queries embed"]
    ) -> tuple[Float32[np.ndarray, "queries documents"], Float32[np.ndarray, "queries documents"]]:
        """Both parts of `similarities`, for all documents; without meaning where no piece is."""
        middle, end = self.bounds[:-1, 1], self.bounds[1:, 0]
        scores = queries @ self._in_memory.T
        # One column more, so that the last document may end where its pieces end.
        scores = np.pad(scores, ((0, 0), (0, 1)), constant_values=-np.inf)
        best = np.maximum.reduceat(scores, self.bounds[:-1].reshape(-1), axis=1)
        text, asked = best[:, 0::2], best[:, 1::2]
        return text, np.where(end > middle, asked, text)

    @functools.cached_property
    def _in_memory(self) -> Float32[np.ndarray, "views embed"]:
        return self.rows(slice(None))

    def rows(self, rows: Int[np.ndarray, " n"] | slice) -> Float32[np.ndarray, "n embed"]:
        """The vectors of some views, as float32; of a slice it may be the array itself."""
        found = np.asarray(self.values[rows])
        if self.scales is not None:
            found = found.astype(np.float32)
            found *= self.scales[rows][:, None]
            return found
        if found.dtype == np.int16:
            return found.view(ml_dtypes.bfloat16).astype(np.float32)
        return found

    def save(self, folder: str | Path) -> None:
        """Writes .npy files, two to four, into an existing folder."""
        np.save(Path(folder) / _BOUNDS, self.bounds, allow_pickle=False)
        np.save(Path(folder) / _FILE, self.values, allow_pickle=False)
        if self.scales is not None:
            np.save(Path(folder) / _SCALES, self.scales, allow_pickle=False)
        if self.unseen is not None:
            np.save(Path(folder) / _UNSEEN, self.unseen, allow_pickle=False)

    @classmethod
    def load(
        cls, folder: str | Path, *, documents: int, width: int | None = None
    ) -> DocumentVectors:
        """Opens saved vectors, memory-mapped.

        Args:
          folder: where `save` wrote them.
          documents: how many there must be.
          width: numbers of each; any by default.

        Raises:
          UserError: when they are missing, or not of so many documents and that width.
        """
        folder = Path(folder)
        try:
            values = np.load(folder / _FILE, mmap_mode="r", allow_pickle=False)
            bounds = np.load(folder / _BOUNDS, allow_pickle=False)
            scales = None
            if values.dtype == np.int8:
                scales = np.load(folder / _SCALES, mmap_mode="r", allow_pickle=False)
            unseen = None
            if (folder / _UNSEEN).is_file():
                unseen = np.load(folder / _UNSEEN, allow_pickle=False)
            if values.dtype not in (np.float32, np.int16, np.int8):
                raise ValueError(f"{_FILE} is {values.dtype}")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"{folder}: no whole document vectors here ({error}); run `genret fit` again"
            ) from None
        if bounds.shape != (documents + 1, 2) or bounds.dtype.kind != "i":
            raise UserError(
                f"{folder / _BOUNDS}: {bounds.dtype}{bounds.shape}, but the retriever has "
                f"{documents} documents; run `genret fit` again"
            )
        if bounds[0, 0] or (np.diff(bounds.reshape(-1)) < 0).any():
            raise UserError(f"{folder / _BOUNDS}: damaged; run `genret fit` again")
        views = int(bounds[-1, 0])
        for name, array, rank in ((_FILE, values, 2), (_SCALES, scales, 1)):
            if array is not None and (array.ndim != rank or len(array) != views):
                raise UserError(
                    f"{folder / name}: shape {array.shape}, but the documents have {views} "
                    "views; run `genret fit` again"
                )
        if unseen is not None and (unseen.shape, unseen.dtype) != ((documents,), np.bool_):
            raise UserError(
                f"{folder / _UNSEEN}: {unseen.dtype}{unseen.shape}, but the retriever has "
                f"{documents} documents; run `genret fit` again"
            )
        if width is not None and values.shape[1] != width:
            raise UserError(
                f"{folder / _FILE}: vectors of {values.shape[1]} numbers, but the network has "
                f"{width}; run `genret fit` again"
            )
        return cls(values, bounds, scales, unseen)
