"""T5X's checkpoints -> parameters, read through Orbax: T5X need not be installed."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from genret_jax.errors import UserError
from genret_jax.modeling.stacking import is_stacked, with_layers


def latest(folder: str | Path) -> Path:
    """The checkpoint itself, or that of the highest step in a MODEL_DIR.

    Raises:
      UserError: there is none.
    """
    folder = Path(folder).absolute()
    if re.fullmatch(r"checkpoint_\d+", folder.name) and folder.is_dir():
        return folder
    found = [path for path in folder.glob("checkpoint_*") if step_of(path) >= 0]
    if not found:
        raise UserError(f"{folder}: no checkpoint_STEP there; give T5X's MODEL_DIR")
    return max(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name; -1 where there is none."""
    number = checkpoint.name.removeprefix("checkpoint_")
    return int(number) if number.isdecimal() else -1


def load_params(checkpoint: Path, like: Any) -> Any:
    """Parameters of a checkpoint, on the host.

    Args:
      checkpoint: checkpoint_STEP of a MODEL_DIR.
      like: parameters of the same shapes; layers may be stacked in one and not in the other.

    Raises:
      UserError: it is no checkpoint, or one of another network.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sharding info not provided")
            params = ocp.load(checkpoint)["target"]
    except Exception as error:  # Orbax has no common class for what may be wrong
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{checkpoint}: no whole checkpoint of T5X ({reason})") from None
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    params = with_layers(params, stacked=is_stacked(like))
    found, wanted = (jax.tree.map(lambda x: tuple(x.shape), tree) for tree in (params, like))
    if found != wanted:
        different = _first_difference(found, wanted)
        raise UserError(f"{checkpoint}: of another network ({different}); give its recipe")
    return params


def _first_difference(found: Any, wanted: Any) -> str:
    flat = [
        dict(jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_shape))
        for tree in (found, wanted)
    ]
    for path in dict.fromkeys([*flat[1], *flat[0]]):
        there, here = (tree.get(path) for tree in flat)
        if there != here:
            name = "/".join(str(key.key) for key in path)
            return f"{name} is {there or 'missing'}, the recipe has {here or 'none'}"
    return "its tree differs"


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple)
