"""Training data: examples in memory, SeqIO tasks over them, feature converters, batches.

This room imports TensorFlow and SeqIO; nothing on the search path imports it.
"""

from __future__ import annotations

import contextlib
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _import_quietly() -> None:
    """Imports TensorFlow without what its C++ side writes to stderr before it reads log levels.

    It reads data and nothing else: an accelerator's memory is JAX's.
    """
    kept = os.dup(2)
    with open(os.devnull, "wb") as null:
        try:
            sys.stderr.flush()
            os.dup2(null.fileno(), 2)
            import tensorflow
            import tensorflow_text  # noqa: F401

            with contextlib.suppress(RuntimeError):  # somebody else has set TensorFlow up already
                tensorflow.config.set_visible_devices([], "GPU")
        finally:
            os.dup2(kept, 2)
            os.close(kept)


if "tensorflow" not in sys.modules:
    _import_quietly()
