"""Text files read and written line by line: UTF-8, gzip, byte order marks, places for messages."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from tqdm import tqdm

from genret_jax.errors import UserError
from genret_jax.files import replace_on_success

_GZIP_MAGIC = b"\x1f\x8b"
_BYTE_ORDER_MARK = "\ufeff"
_LINES_A_TICK = 4096


class Notices:
    """What was odd but harmless in the files read, counted, each kind with the first place seen.

    Example:
      >>> notices = Notices()
      >>> notices.add("blank lines, skipped", path="corpus.jsonl", line=3)
      >>> notices.add("blank lines, skipped", path="corpus.jsonl", line=9)
      >>> notices.messages()
      ('corpus.jsonl:3: blank lines, skipped: 2, this is the first',)
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], int] = {}
        self._firsts: dict[tuple[str, str], str] = {}

    def add(self, what: str, *, path: str | os.PathLike[str], line: int = 0) -> None:
        """Counts one more `what` in `path`; `line` counts from 1, 0 stands for the whole file."""
        key = (os.fspath(path), what)
        self._counts[key] = self._counts.get(key, 0) + 1
        self._firsts.setdefault(key, place(path, line))

    def messages(self) -> tuple[str, ...]:
        """One line a kind and file, in the order in which they first appeared."""
        return tuple(
            f"{self._firsts[key]}: {key[1]}"
            + (f": {count}, this is the first" if count > 1 else "")
            for key, count in self._counts.items()
        )


def place(path: str | os.PathLike[str], line: int = 0) -> str:
    """`path:line`, the form that editors and terminals make clickable."""
    return f"{os.fspath(path)}:{line}" if line else os.fspath(path)


def shown(value: object, *, limit: int = 60) -> str:
    """`repr` of a value from a foreign file, cut so that a message stays one readable line."""
    text = repr(value[:limit] if isinstance(value, (str, bytes)) else value)
    too_long = len(text) > limit + 2 or (isinstance(value, (str, bytes)) and len(value) > limit)
    return text[:limit] + "..." if too_long else text


def read_lines(path: str | os.PathLike[str], *, notices: Notices) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, text without its line end) of every line that is not blank.

    Plain and gzip files are told apart by their first bytes, whatever their names say. Only a
    line feed ends a line: other separators of Unicode may stand inside a text. A byte order mark
    at the start is taken off, and it and blank lines are counted in `notices`.

    Raises:
      UserError: the file is missing, unreadable, damaged gzip, or not UTF-8.
    """
    path = Path(path)
    try:
        with path.open("rb") as raw, _progress(path) as bar:
            packed = raw.peek(2)[:2] == _GZIP_MAGIC
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if packed else raw
            for number, data in enumerate(stream, start=1):
                if number % _LINES_A_TICK == 0:
                    bar.update(raw.tell() - bar.n)
                text = _decoded(data, path=path, line=number).rstrip("\r\n")
                if number == 1 and text.startswith(_BYTE_ORDER_MARK):
                    notices.add("byte order mark, taken off", path=path, line=1)
                    text = text.removeprefix(_BYTE_ORDER_MARK)
                if not text or text.isspace():
                    notices.add("blank lines, skipped", path=path, line=number)
                    continue
                yield number, text
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"{path}: damaged gzip file ({error}); fetch or compress it again"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); give a readable file"
        ) from error


def write_lines(path: str | os.PathLike[str], lines: Iterable[str]) -> None:
    """Writes UTF-8 lines, gzip when the name ends in `.gz`; `path` is whole or as it was before.

    Args:
      path: the file; its folder is created.
      lines: texts without line ends.

    Raises:
      UserError: the place cannot be written, or a text is no Unicode (half a surrogate pair).
    """
    path = Path(path)
    try:
        with replace_on_success(path) as temporary, temporary.open("wb") as raw:
            if path.suffix == ".gz":
                # No name and no time in the header: equal contents give equal files.
                with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
                    packed.writelines(f"{line}\n".encode() for line in lines)
            else:
                raw.writelines(f"{line}\n".encode() for line in lines)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); give another place"
        ) from error
    except UnicodeEncodeError as error:
        part = error.object[max(0, error.start - 30) : error.end]
        raise UserError(
            f"{path}: cannot be written: half a surrogate pair after {ascii(part)}; remove it"
        ) from error


def _decoded(data: bytes, *, path: Path, line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place(path, line)}: byte {error.start + 1} of the line (0x{data[error.start]:02x}) "
            "is not UTF-8; save the file as UTF-8"
        ) from error


def _progress(path: Path) -> tqdm:
    """A bar over the bytes of the file as stored; silent for two seconds and off a terminal."""
    return tqdm(
        total=path.stat().st_size,
        desc=path.name,
        unit="B",
        unit_scale=True,
        delay=2,
        leave=False,
        disable=None,
    )
