"""BEIR folders written line by line, for collections that are read line by line."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from genret_jax.errors import UserError
from genret_jax.files import replace_on_success


class FolderWriter:
    """Documents, queries and judgements on their way to disk.

    Attributes:
      report: what the folder's report says; to be filled.
    """

    def __init__(self, files: dict[str, IO[str]], splits: Sequence[str]):
        self._files = files
        self.report: dict[str, Any] = {}
        for split in splits:
            files[split].write("query-id\tcorpus-id\tscore\n")

    def document(self, document: str, *, title: str, text: str) -> None:
        self._line("corpus", {"_id": document, "title": title, "text": text})

    def query(self, query: str, *, text: str) -> None:
        self._line("queries", {"_id": query, "text": text})

    def judgement(self, split: str, query: str, document: str, grade: int = 1) -> None:
        self._files[split].write(f"{query}\t{document}\t{grade}\n")

    def _line(self, name: str, record: dict[str, str]) -> None:
        self._files[name].write(json.dumps(record, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def beir_folder(out: str | Path, *, splits: Sequence[str], report: str) -> Iterator[FolderWriter]:
    """Makes a BEIR folder, whole or not at all, with a report in it.

    Args:
      out: the folder; one that has such a report is replaced.
      splits: names of its qrels.
      report: file name of the report, by which a program knows its own folders. The writer's
        `report` and the SHA-256 of every file are in it.

    Raises:
      UserError: `out` is something else.
    """
    out = Path(out)
    if out.exists() and not (out / report).is_file():
        raise UserError(f"{out}: exists and was not made by this program; give another --out")
    with replace_on_success(out) as temporary:
        (temporary / "qrels").mkdir(parents=True)
        paths = {name: temporary / f"{name}.jsonl" for name in ("corpus", "queries")}
        paths |= {split: temporary / "qrels" / f"{split}.tsv" for split in splits}
        with contextlib.ExitStack() as stack:
            files = {
                name: stack.enter_context(path.open("w", encoding="utf-8", newline="\n"))
                for name, path in paths.items()
            }
            writer = FolderWriter(files, splits)
            yield writer
        writer.report["sha256"] = {
            path.relative_to(temporary).as_posix(): _digest(path) for path in paths.values()
        }
        text = json.dumps(writer.report, indent=1)
        (temporary / report).write_text(f"{text}\n", encoding="utf-8")


def differences(report: dict[str, Any], published: dict[str, int]) -> list[str]:
    """One line for every count that is not the published one."""
    return [
        f"{name.replace('_', ' ')}: {report[name]:,}, published are {count:,}"
        for name, count in published.items()
        if report[name] != count
    ]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
