"""The collection that comes with the package: search in Python's own standard library.

Documents are docstrings, read from the running interpreter, so nothing is downloaded and nothing
is copied. The questions are plain English, were written for this project, and each has one right
answer. They lie beside this file in questions.jsonl, one object of the library a line:

    {"object": "os.path.join", "train": ["...", ...], "dev": ["..."], "test": ["...", ...]}
"""

from __future__ import annotations

import builtins
import importlib
import inspect
import json
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterator
from importlib import resources
from typing import Any

from genret_jax.corpus import Corpus, Document, Qrels, write_corpus
from genret_jax.errors import UserError

__all__ = ["EMBEDDED", "standard_library_corpus", "write_standard_library_corpus"]

EMBEDDED = "python-standard-library"
_SPLITS = ("train", "dev", "test")


def standard_library_corpus() -> Corpus:
    """Docstrings of about 400 functions, classes and methods, with 12 questions each.

    Of an object's questions nine are in the split "train", one in "dev" and two in "test"; each is
    judged with grade 1 for that object alone. A document's id and title are the dotted name
    ("str.split" for builtins), its text is the docstring. Since the text is the interpreter's, it
    differs a little between Python versions.

    An object that this interpreter lacks, such as `os.sched_getaffinity` outside Linux, or that
    has no docstring, is left out with its questions and counted in `warnings` of the corpus.

    Raises:
      UserError: Python runs with -OO, which drops docstrings.

    Example:
      >>> corpus = standard_library_corpus()
      >>> corpus.splits
      ('train', 'dev', 'test')
      >>> corpus.documents[corpus.index["heapq.merge"]].title
      'heapq.merge'
    """
    if sys.flags.optimize > 1:
        raise UserError(
            "Python runs with -OO (or PYTHONOPTIMIZE=2), which drops the docstrings that are the "
            "documents; run it without"
        )
    documents: list[Document] = []
    queries: dict[str, str] = {}
    qrels: dict[str, Qrels] = {split: {} for split in _SPLITS}
    missing: list[str] = []
    for record in _records():
        name = record["object"]
        text = _docstring(name)
        if not text:
            missing.append(name)
            continue
        documents.append(Document(name, name, text))
        for split in _SPLITS:
            for number, question in enumerate(record[split], start=1):
                query = f"{name}/{split}/{number}"
                queries[query] = question
                qrels[split][query] = {name: 1}
    return Corpus(tuple(documents), queries, qrels, warnings=_warning(missing), name=EMBEDDED)


def write_standard_library_corpus(folder: str | os.PathLike[str]) -> None:
    """Writes `standard_library_corpus()` as a BEIR folder, to look at or to give to other tools.

    Raises:
      UserError: as `standard_library_corpus` and `genret_jax.corpus.write_corpus`.
    """
    write_corpus(standard_library_corpus(), folder)


def _records() -> Iterator[dict[str, Any]]:
    file = resources.files(__name__).joinpath("questions.jsonl")
    for line in file.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def _docstring(name: str) -> str:
    """Docstring of a dotted name without blanks at line ends; "" where there is none."""
    with warnings.catch_warnings():
        # Which modules a Python version deprecates is of no interest to who searches it.
        warnings.simplefilter("ignore")
        try:
            text = inspect.getdoc(_resolved(name)) or ""
        except (ImportError, AttributeError):
            return ""
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)).strip()


def _resolved(name: str) -> object:
    """The object of a dotted name: a builtin, or one in a module, which is imported if need be."""
    first, *rest = name.split(".")
    found = getattr(builtins, first, None) or importlib.import_module(first)
    path = first
    for part in rest:
        path = f"{path}.{part}"
        if inspect.ismodule(found) and not hasattr(found, part):
            importlib.import_module(path)  # Makes the submodule an attribute of its package.
        found = getattr(found, part)
    return found


def _warning(missing: list[str]) -> tuple[str, ...]:
    if not missing:
        return ()
    return (
        f"{EMBEDDED}: objects that Python {platform.python_version()} here lacks or has no "
        f"docstring of, left out with their questions: {len(missing)}, {missing[0]} is the first",
    )
