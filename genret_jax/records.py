"""JSON-lines files whose objects have an `_id` and a `text`: documents and queries."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genret_jax.errors import UserError
from genret_jax.lines import Notices, place, read_lines, shown


class Ids:
    """Ids in file order with their lines; says where the first was when one comes again."""

    def __init__(self) -> None:
        self.positions: dict[str, int] = {}
        self.lines = array("Q")

    def add(self, value: str, *, path: Path, line: int) -> None:
        first = self.positions.setdefault(value, len(self.lines))
        if first != len(self.lines):
            raise UserError(
                f"{place(path, line)}: the _id {shown(value)} is also at line {self.lines[first]}; "
                "give each its own or remove one"
            )
        self.lines.append(line)


def read_records(path: Path, *, notices: Notices) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line, object) with `_id` and `text`, and `title` if there, checked to be usable.

    Raises:
      UserError: naming file and line: broken JSON, no object, a field that is missing, no string
        or half a surrogate pair, or an `_id` that qrels cannot carry; and all of `read_lines`.
    """
    for line, text in read_lines(path, notices=notices):
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            at = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise UserError(
                f"{place(path, line)}: broken JSON{at} ({reason}); give one object a line"
            ) from error
        if not isinstance(record, dict):
            raise UserError(
                f"{place(path, line)}: JSON {shown(record)} is no object; give one object a line, "
                'such as {"_id": "d1", "text": "..."}'
            )
        for field in ("_id", "text", "title"):
            _check_field(record, field, path=path, line=line, escapes="\\u" in text)
        yield line, record


def _check_field(
    record: dict[str, Any], field: str, *, path: Path, line: int, escapes: bool
) -> None:
    if field not in record:
        if field == "title":
            return
        there = shown(", ".join(record))
        raise UserError(
            f"{place(path, line)}: no field {field!r} (there: {there}); "
            "each line needs _id and text"
        )
    value = record[field]
    if not isinstance(value, str):
        raise UserError(
            f"{place(path, line)}: the field {field!r} is {shown(json.dumps(value))}, not a "
            "string; put it in double quotes" + ("" if field == "_id" else ', or give ""')
        )
    if field == "_id" and (not value.strip() or any(mark in value for mark in "\t\r\n")):
        raise UserError(
            f"{place(path, line)}: the _id {shown(value)} is blank or has a tab or line break, "
            "which qrels cannot carry; rename it"
        )
    if escapes:
        # JSON may escape half of a surrogate pair: no text, and it would break every later writer.
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{place(path, line)}: the field {field!r} has half a surrogate pair "
                f"(\\u{ord(value[error.start]):04x}) at character {error.start + 1}; remove it"
            ) from error
