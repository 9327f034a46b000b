"""Tensors of a safetensors file, or of several that an index lists."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from genret_jax.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OF_TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class TensorFolder:
    """The tensors of a folder, read one at a time.

    Attributes:
      files: the files that hold them.
    """

    def __init__(self, folder: Path):
        self._file_of = _places(folder)
        self.files = sorted(set(self._file_of.values()))

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the numbers."""
        with _opened(self._file_of[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """A tensor as float32, whatever it is stored as."""
        with _opened(self._file_of[name]) as file:
            return file.get_tensor(name).astype(np.float32)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """`safe_open`, with an error that names the file."""
    try:
        file = safe_open(str(path), framework="numpy")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: no whole safetensors file ({error}); fetch it again") from None
    with file:
        yield file


def _places(folder: Path) -> Mapping[str, Path]:
    """Tensor -> its file.

    Raises:
      UserError: there are no weights, or not all that the index lists.
    """
    whole, index = folder / WEIGHTS, folder / INDEX
    if whole.is_file():
        with _opened(whole) as file:
            return {name: whole for name in file.keys()}  # noqa: SIM118 (not a dict)
    if not index.is_file():
        found = next((name for name in OF_TORCH if (folder / name).is_file()), None)
        remedy = (
            f"; it has {found}: load it with transformers and save it again with "
            "save_pretrained(..., safe_serialization=True)"
            if found
            else f"; put {WEIGHTS} there, or {INDEX} with the files that it lists"
        )
        raise UserError(f"{folder}: no {WEIGHTS}{remedy}")
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: folder / Path(file).name for name, file in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: no index of safetensors files ({error!r})") from None
    distinct = sorted(set(files.values()))
    if gone := [path for path in distinct if not path.is_file()]:
        raise UserError(f"{gone[0]}: is missing, but {INDEX} lists it; put it there")
    for path in distinct:
        with _opened(path) as file:
            here = set(file.keys())
        lost = sorted(name for name, place in files.items() if place == path and name not in here)
        if lost:
            raise UserError(f"{path}: holds no {lost[0]}, but {INDEX} says so; fetch both again")
    return files
