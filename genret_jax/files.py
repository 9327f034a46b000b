"""Writing without half-written results: everything is made beside its place and renamed."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from genret_jax.errors import UserError

_HOST = re.sub(r"[^A-Za-z0-9.]", "_", platform.node()) or "localhost"


@contextlib.contextmanager
def replace_on_success(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the same folder and renames it to `path` when the block succeeds.

    Works for a file or a folder: the block creates whichever it wants at the yielded path. After
    an exception the temporary path is removed and `path` is as it was; what a process that was
    killed on this machine has left is removed by the next one. An existing folder at
    `path` is moved aside, replaced, and only then deleted: what a reader finds at `path` is whole.

    Args:
      path: where the result is to stand; its parent is created.

    Example:
      >>> with replace_on_success("out.json") as temporary:
      ...     temporary.write_text("{}")
    """
    target = Path(path).resolve()  # so that what a symbolic link names is replaced, not the link
    target.parent.mkdir(parents=True, exist_ok=True)
    _reclaim(target)
    temporary = target.with_name(f".{target.name}.tmp-{_HOST}-{os.getpid()}")
    _remove(temporary)
    try:
        yield temporary
        if target.is_dir():
            _replace_folder(temporary, target)
        else:
            os.replace(temporary, target)
    finally:
        _remove(temporary)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder that is there, by a lock that ends with the process.

    Where the file system knows no locks, nobody is kept out.

    Raises:
      UserError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is at work in it; wait until it has ended, or choose "
                "another --out"
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def _reclaim(target: Path) -> None:
    """Removes temporary paths of dead processes; those of other machines may be alive."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.tmp-{_HOST}-*"):
        number = left.name.rpartition("-")[2]
        if number.isdecimal() and int(number) != os.getpid() and not _alive(int(number)):
            _remove(left)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _replace_folder(temporary: Path, target: Path) -> None:
    """Renames over an existing folder, which goes back to its place if that fails."""
    if not temporary.exists():
        raise FileNotFoundError(f"nothing was written to {temporary}; {target} is as it was")
    aside = target.with_name(f".{target.name}.old-{os.getpid()}")
    _remove(aside)
    os.replace(target, aside)
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(aside, target)
        raise
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
