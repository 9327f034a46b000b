"""The tables of negatives as a folder, and what a batch draws from them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int32

from genret_jax.errors import UserError
from genret_jax.files import replace_on_success
from genret_jax.negatives.prefix import Depth

_FORMAT = 1
_ARRAYS = ("prefix", "retrieved")
_ABOUT = "negatives.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Negatives:
    """Both tables and how they were made.

    Attributes:
      prefix: int32[documents, P], of `prefix_negatives`.
      retrieved: int32[queries, R], of `mine`, one row a query of `known_positives`.
      digest: of all they were made from, as the caller makes it.
      source: name of the search behind `retrieved`.
      depth: of `prefix`.
    """

    prefix: Int32[np.ndarray, "documents P"]
    retrieved: Int32[np.ndarray, "queries R"]
    digest: str
    source: str
    depth: Depth

    def report(self) -> dict[str, Any]:
        """Of each table: rows, mean number of negatives, share of rows without any, bytes."""
        return {"source": self.source, "depth": self.depth} | {
            name: _counts(getattr(self, name)) for name in _ARRAYS
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a folder, whole or not at all; an earlier one there is replaced."""
        with replace_on_success(folder) as temporary:
            temporary.mkdir()
            for name in _ARRAYS:
                np.save(temporary / f"{name}.npy", getattr(self, name), allow_pickle=False)
            about = {"format": _FORMAT, "digest": self.digest, **self.report()}
            (temporary / _ABOUT).write_text(json.dumps(about), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Negatives:
        """Opens what `save` wrote, memory-mapped.

        Raises:
          UserError: the folder is incomplete, damaged or of another format.
        """
        folder = Path(folder)
        names = [*(f"{name}.npy" for name in _ARRAYS), _ABOUT]
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"{folder}: no whole negatives here ({', '.join(missing)} missing); delete the "
                "folder and make them again"
            )
        try:
            about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
            if about["format"] != _FORMAT:
                raise ValueError(f"format {about['format']}, this version reads {_FORMAT}")
            return cls(
                prefix=_open(folder / "prefix.npy"),
                retrieved=_open(folder / "retrieved.npy"),
                digest=about["digest"],
                source=about["source"],
                depth=about["depth"],
            )
        except (OSError, ValueError, LookupError, TypeError, EOFError) as error:
            raise UserError(
                f"{folder}: cannot read negatives ({error}); delete the folder and make them again"
            ) from error


def _open(path: Path) -> np.ndarray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype != np.int32 or array.ndim != 2:
        raise ValueError(f"{path.name} is {array.dtype} of rank {array.ndim}, not int32 of rank 2")
    return array


def _counts(table: np.ndarray) -> dict[str, Any]:
    found = (table >= 0).sum(axis=1)
    return {
        "rows": len(table),
        "mean": round(float(found.mean()), 2) if len(found) else 0.0,
        "without": round(float((found == 0).mean()), 4) if len(found) else 0.0,
        "bytes": table.nbytes,
    }


def draw(
    table: Int[np.ndarray, "rows most"], count: int, rng: np.random.Generator
) -> Int32[np.ndarray, "rows count"]:
    """`count` entries of each row at random without replacement; padding where there are too few.

    Args:
      table: positions, -1 for padding, such as rows of `Negatives.prefix`.
      count: entries of a row.

    Returns:
      int32[rows, count], padding last.
    """
    keys = np.where(table >= 0, rng.random(table.shape), 2.0)
    chosen = np.take_along_axis(table, np.argsort(keys, axis=1)[:, :count], axis=1)
    out = np.full((len(table), count), -1, np.int32)
    out[:, : chosen.shape[1]] = np.maximum(chosen, -1)
    return out
