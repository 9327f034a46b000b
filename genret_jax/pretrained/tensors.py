"""Tensors of a folder: in one safetensors file, in several that an index lists, or of PyTorch.

Many older uploads (T5 1.1 and mT5 among them) have pytorch_model.bin and nothing else. It is read
where torch is installed; nothing else here needs torch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from genret_jax.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_WEIGHTS, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class Tensors(Protocol):
    """Tensors by name, read one at a time.

    Attributes:
      names: of all tensors.
      files: that hold them.
    """

    names: frozenset[str]
    files: tuple[Path, ...]

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the numbers."""
        ...

    def read(self, name: str) -> np.ndarray:
        """float32, whatever it is stored as."""
        ...


def open_tensors(folder: Path) -> Tensors:
    """The weights of a folder; safetensors where it has both kinds.

    Raises:
      UserError: there are none that can be read, or not all that an index lists.
    """
    if (folder / WEIGHTS).is_file():
        with _opened(folder / WEIGHTS) as file:
            return SafeTensors(dict.fromkeys(file.keys(), folder / WEIGHTS))
    if (folder / INDEX).is_file():
        return SafeTensors(_listed(folder / INDEX))
    if not has_weights(folder):
        raise UserError(
            f"{folder}: no {WEIGHTS}; put {WEIGHTS} there, or {INDEX} with the files that it lists"
        )
    if not can_read_torch():
        raise UserError(
            f"{folder}: no {WEIGHTS}, but a {TORCH_WEIGHTS}, which needs torch to be read; "
            "`pip install torch`, or save it again with save_pretrained of transformers"
        )
    if (folder / TORCH_WEIGHTS).is_file():
        return TorchTensors([folder / TORCH_WEIGHTS])
    return TorchTensors(sorted(set(_listed(folder / TORCH_INDEX).values())))


def has_weights(folder: Path, names: tuple[str, ...] = (TORCH_WEIGHTS, TORCH_INDEX)) -> bool:
    """Whether one of these files is there."""
    return any((folder / name).is_file() for name in (WEIGHTS, INDEX, *names))


def can_read_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


class SafeTensors:
    """See `Tensors`; `files` by tensor."""

    def __init__(self, file_of: Mapping[str, Path]):
        self._file_of = file_of
        self.names = frozenset(file_of)
        self.files = tuple(sorted(set(file_of.values())))
        for path in self.files:
            with _opened(path) as file:
                here = set(file.keys())
            lost = sorted(n for n, place in file_of.items() if place == path and n not in here)
            if lost:
                raise UserError(
                    f"{path}: holds no {lost[0]}, but {INDEX} says so; fetch both again"
                )

    def shape(self, name: str) -> tuple[int, ...]:
        with _opened(self._file_of[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        with _opened(self._file_of[name]) as file:
            return file.get_tensor(name).astype(np.float32)


class TorchTensors:
    """See `Tensors`; only numbers are unpickled, and mapped into memory where the format allows."""

    def __init__(self, files: list[Path]):
        import torch

        self.files = tuple(files)
        self._tensors: dict[str, Any] = {}
        for path in files:
            try:
                mapped = zipfile.is_zipfile(path)  # not before PyTorch 1.6
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
                self._tensors |= found
            except Exception as error:  # whatever unpickling meets in a damaged file
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise UserError(f"{path}: no whole weights of PyTorch ({reason})") from None
        self.names = frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name].float().numpy().copy()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """`safe_open`, with an error that names the file."""
    try:
        file = safe_open(str(path), framework="numpy")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: no whole safetensors file ({error}); fetch it again") from None
    with file:
        yield file


def _listed(index: Path) -> Mapping[str, Path]:
    """Tensor -> its file, by an index.

    Raises:
      UserError: it is no index, or a file that it lists is not there.
    """
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: index.parent / Path(file).name for name, file in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: no index of weights ({error!r}); fetch it again") from None
    if gone := sorted(path for path in set(files.values()) if not path.is_file()):
        raise UserError(f"{gone[0]}: is missing, but {index.name} lists it; put it there")
    return files
