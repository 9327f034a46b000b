"""What the command line prints: results to stdout, log lines to stderr."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from typing import Any


class _Stderr(logging.StreamHandler):
    """Writes to what stderr is now: whoever called `main` may have replaced it since."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def log_to_stderr() -> None:
    """Our own log lines to stderr; those of the libraries only when something is wrong."""
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("genret_jax")
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.getLogger("absl").setLevel(logging.ERROR)


def show(arguments: argparse.Namespace, value: dict[str, Any], text: str) -> None:
    """The result of a verb on stdout: one JSON object where --json was given, else its text."""
    print(json.dumps(value) if arguments.json else text)


def lines_of(value: dict[str, Any], indent: str = "") -> str:
    """A nested dict as aligned lines."""
    lines = []
    width = max((len(str(key)) for key in value), default=0)
    for key, item in value.items():
        if isinstance(item, dict) and item:
            lines += [f"{indent}{key}", lines_of(item, indent + "  ")]
        else:
            lines.append(f"{indent}{str(key):<{width}}  {item}")
    return "\n".join(lines)
