"""The documents' semantic vectors on disk: computed once after training, read by position."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Int

from genret_jax.errors import UserError

STORES = ("float32", "bfloat16", "int8")
_FILE, _SCALES = "vectors.npy", "vectors.scales.npy"


@dataclasses.dataclass(frozen=True, eq=False)
class DocumentVectors:
    """One vector a document.

    Attributes:
      values: float32[documents, embed]; or int16, the bits of bfloat16; or int8, to be multiplied
        by `scales`.
      scales: float32[documents], for int8; None otherwise.
    """

    values: np.ndarray
    scales: np.ndarray | None = None

    @classmethod
    def of(cls, vectors: Float32[np.ndarray, "documents embed"], *, store: str) -> DocumentVectors:
        """Vectors in the type that they are to be kept in.

        Args:
          vectors: as they are compared: of length one where similarity is the cosine.
          store: "float32"; "bfloat16", half the bytes at 3 digits; or "int8", a quarter, each
            vector with a scale of its own (largest value = 127).
        """
        if store not in STORES:
            raise ValueError(f"store must be one of {STORES}, found {store!r}")
        if store == "float32":
            return cls(np.asarray(vectors, np.float32))
        if store == "bfloat16":  # .npy files know no bfloat16: its bits are kept
            return cls(vectors.astype(ml_dtypes.bfloat16).view(np.int16))
        scales = np.maximum(np.abs(vectors).max(axis=1), 1e-12) / 127
        return cls(np.round(vectors / scales[:, None]).astype(np.int8), scales.astype(np.float32))

    def __len__(self) -> int:
        return len(self.values)

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def store(self) -> str:
        return {"f": "float32", "i": "bfloat16" if self.scales is None else "int8"}[
            self.values.dtype.kind
        ]

    def __getitem__(self, positions: Int[np.ndarray, " n"]) -> Float32[np.ndarray, "n embed"]:
        """The vectors of some documents, as float32."""
        rows = np.asarray(self.values[positions])
        if self.scales is not None:
            return rows.astype(np.float32) * self.scales[positions][:, None]
        if rows.dtype == np.int16:
            return rows.view(ml_dtypes.bfloat16).astype(np.float32)
        return rows

    def save(self, folder: str | Path) -> None:
        """Writes one or two .npy files into an existing folder."""
        np.save(Path(folder) / _FILE, self.values, allow_pickle=False)
        if self.scales is not None:
            np.save(Path(folder) / _SCALES, self.scales, allow_pickle=False)

    @classmethod
    def load(
        cls, folder: str | Path, *, documents: int, width: int | None = None
    ) -> DocumentVectors:
        """Opens saved vectors, memory-mapped.

        Args:
          folder: where `save` wrote them.
          documents: how many vectors there must be.
          width: numbers of each; any by default.

        Raises:
          UserError: when they are missing, or not so many of that width.
        """
        folder = Path(folder)
        try:
            values = np.load(folder / _FILE, mmap_mode="r", allow_pickle=False)
            scales = None
            if values.dtype == np.int8:
                scales = np.load(folder / _SCALES, mmap_mode="r", allow_pickle=False)
            if values.dtype not in (np.float32, np.int16, np.int8):
                raise ValueError(f"{_FILE} is {values.dtype}")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"{folder}: no whole document vectors here ({error}); run `genret fit` again"
            ) from None
        for name, array, rank in ((_FILE, values, 2), (_SCALES, scales, 1)):
            if array is not None and (array.ndim != rank or len(array) != documents):
                raise UserError(
                    f"{folder / name}: shape {array.shape}, but the retriever has {documents} "
                    "documents; run `genret fit` again"
                )
        if width is not None and values.shape[1] != width:
            raise UserError(
                f"{folder / _FILE}: vectors of {values.shape[1]} numbers, but the network has "
                f"{width}; run `genret fit` again"
            )
        return cls(values, scales)
