"""Devices -> mesh, and logical axis names -> shardings, from one table of rules."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Logical axis -> mesh axis. The names are T5X's, and so is the choice: matrices are cut along the
# wide axis, and activations and batches along "data".
RULES: dict[str, str | None] = {
    "batch": "data",
    "vocab": "model",
    "mlp": "model",
    "heads": "model",
    "joined_kv": "model",
    "embed": None,
    "relpos_buckets": None,
}


def make_mesh(*, model_parallel: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with axes ("data", "model") over all devices.

    Args:
      model_parallel: devices that share one copy of the parameters.
      devices: all devices of the job by default.

    Raises:
      ValueError: when the number of devices does not divide by `model_parallel`.
    """
    devices = devices or jax.devices()
    if len(devices) % model_parallel:
        raise ValueError(
            f"{len(devices)} devices do not divide by model_parallel={model_parallel}; "
            "choose a divisor"
        )
    shape = (len(devices) // model_parallel, model_parallel)
    # Auto axes: Explicit ones, the default of jax.make_mesh, would type every array.
    return jax.make_mesh(shape, ("data", "model"), (AxisType.Auto, AxisType.Auto), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Every array of a batch is cut along its leading axis."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def parameter_shardings(mesh: Mesh, params: Any, params_axes: Any) -> Any:
    """One NamedSharding a parameter.

    Args:
      mesh: with the axes that RULES name.
      params: parameters or their shapes; [params] tree.
      params_axes: from the network's `params_axes` collection: `NAME_axes` beside every `NAME`.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        node = params_axes
        for key in path[:-1]:
            node = node[key.key]
        names = node[f"{path[-1].key}_axes"].names
        axes = [RULES[name] for name in names]
        fits = [
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, leaf.shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*fits))

    return jax.tree_util.tree_map_with_path(sharding, params)


def optimizer_shardings(mesh: Mesh, optimizer: Any, params: Any, shardings: Any) -> Any:
    """Shardings of the optimiser's state: a moment lies as its parameter does.

    What has another shape than its parameter (Adafactor's factored moments, counters) is
    replicated.
    """
    state = jax.eval_shape(optimizer.init, params)

    def of_moment(moment: Any, param: Any, sharding: NamedSharding) -> NamedSharding:
        same = getattr(moment, "shape", None) == param.shape
        return sharding if same else replicated(mesh)

    return optax.tree_utils.tree_map_params(
        optimizer,
        of_moment,
        state,
        params,
        shardings,
        transform_non_params=lambda _: replicated(mesh),
    )


def global_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows -> arrays of the global batch."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
