"""The parameters that T5X begins with, where MODEL_DIR holds no checkpoint: for gin files."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
from jax.experimental import multihost_utils
from t5x import utils

from genret_jax.errors import UserError
from genret_jax.indexing import read_json
from genret_jax.modeling.model import Params
from genret_jax.modeling.stacking import is_stacked, with_layers
from genret_jax.training import processes
from genret_jax.weights import load_weights

Start = Callable[[Params], Params]


class StartingState(utils.TrainStateInitializer):
    """T5X's initialiser of training states, with `start` applied to fresh parameters.

    Args:
      start: fresh parameters on the host -> those to begin with.
      *others, **named: of T5X's class.
    """

    def __init__(self, *others: Any, start: Start, **named: Any):
        super().__init__(*others, **named)
        self._start = start

    def from_scratch(self, init_rng: jax.Array) -> Any:
        state = super().from_scratch(init_rng)
        fresh = flax.core.unfreeze(state.params)
        fresh = multihost_utils.process_allgather(fresh, tiled=True)
        # The first process's, for the last bits of others' may differ.
        begun = processes.broadcast_arrays(processes.everywhere(lambda: self._start(fresh)))
        flat, tree = jax.tree.flatten(state.params)
        new = jax.tree.leaves(begun)
        found, wanted = jax.tree.structure(begun), jax.tree.structure(fresh)
        if found != wanted:  # type: ignore[operator]
            raise UserError("the start has other parameters than the model; give the run's recipe")
        put = [
            jax.make_array_from_callback(old.shape, old.sharding, functools.partial(_part, x))
            for old, x in zip(flat, new, strict=True)
        ]
        return state.replace_params(jax.tree.unflatten(tree, put))


def _part(whole: Any, index: Any) -> Any:
    return whole[index]


def from_retriever(run: str) -> Start:
    """The parameters of a run's retriever, such as that of stage 1: for gin files."""

    def start(fresh: Params) -> Params:
        folder = Path(run) / "retriever"
        if not folder.is_dir():
            raise UserError(
                f"{folder}: no retriever there, and stage 2 begins with one; make it with "
                "`genret fit --stage 1`, with --from-t5x where T5X trained it"
            )
        about = read_json(folder / "retriever.json", what="retriever")
        if "second_stage" in about:
            raise UserError(
                f"{folder}: stage 2 is done there, and it begins with stage 1; give another RUN"
            )
        params = load_weights(folder / "model.safetensors")
        params = with_layers(params, stacked=is_stacked(fresh))
        shapes = [jax.tree.map(lambda x: x.shape, tree) for tree in (params, fresh)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{folder}: weights of another network; give the recipe of that run")
        return params

    return start
