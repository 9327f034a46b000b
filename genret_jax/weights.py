"""Parameters in a safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from genret_jax.errors import UserError


def save_weights(params: Any, path: str | Path) -> None:
    """Writes a parameter tree; names are the tree's paths joined by "/"."""
    flat = traverse_util.flatten_dict(params, sep="/")
    save_file({k: np.asarray(v, order="C") for k, v in flat.items()}, str(path))


def load_weights(path: str | Path) -> Any:
    """The parameter tree that `save_weights` wrote, as numpy arrays."""
    try:
        return traverse_util.unflatten_dict(load_file(str(path)), sep="/")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: no whole weights here ({error}); run `genret fit` again"
        ) from None
