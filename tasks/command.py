"""What the programs of this folder have in common."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from genret_jax.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Runs a program; a user's mistake is one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)
