"""A mark for tests that ask transformers itself, which this project does not depend on."""

from __future__ import annotations

import importlib.util

import pytest

LIVE = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
    reason="NOT compared with transformers itself: `pip install torch transformers` to do so",
)
