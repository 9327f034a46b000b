"""Progress on stderr for the steps that take longer than two seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def progress(
    items: Iterable[Any] | None = None,
    *,
    description: str,
    total: int | None = None,
    unit: str = "doc",
) -> tqdm[Any]:
    """A tqdm bar on stderr that shows itself after two seconds.

    In a log file a bar is a line, so there it is renewed every ten seconds only.

    Args:
      items: what is iterated over; None for a bar moved by hand with `update`.
      description: what is being done.
      total: number of items, where `items` does not know its length.
      unit: what one item is.
    """
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(
        items,
        desc=description,
        total=total,
        unit=unit,
        unit_scale=True,
        delay=2.0,
        mininterval=interval,
        file=sys.stderr,
        leave=False,
    )
