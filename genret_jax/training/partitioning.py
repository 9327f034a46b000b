"""Devices -> mesh, and logical axis names -> shardings, from one table of rules."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from genret_jax.errors import UserError

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
    "layers": None,
}


def make_mesh(*, model_parallel: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with axes ("data", "model") over all devices.

    Args:
      model_parallel: devices that share one copy of the parameters.
      devices: all devices of the job by default.

    Raises:
      UserError: when the number of devices does not divide by `model_parallel`.
    """
    devices = devices or jax.devices()
    if len(devices) % model_parallel:
        raise UserError(
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
    return jax.make_array_from_process_local_data(batch_sharding(mesh), batch)


def check_rows(mesh: Mesh, rows: int, name: str) -> None:
    """UserError where the devices of a mesh cannot share so many rows; `name` is the setting."""
    sharing = mesh.shape["data"]
    if rows % sharing:
        raise UserError(
            f"{name} {rows} does not divide by the {sharing} devices that share a batch; choose a "
            "multiple"
        )


def share_of_batch(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """Which share of a batch's rows the devices of a process hold, and of how many.

    Processes whose devices share one copy of the parameters hold the same rows.

    Args:
      mesh: with the axes ("data", "model").
      process: this one by default.
    """
    owners = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    return share_of_rows(owners, jax.process_index() if process is None else process)


def share_of_rows(owners: Int[np.ndarray, "data model"], process: int) -> tuple[int, int]:
    """The same, from the process that owns each device of the mesh.

    Raises:
      UserError: where two processes share some of their rows only.
    """
    rows = {p: tuple(np.flatnonzero((owners == p).any(axis=1)).tolist()) for p in np.unique(owners)}
    shares = sorted(set(rows.values()))
    if sum(map(len, shares)) != len(owners) or len(set(map(len, shares))) != 1:
        raise UserError(
            f"the devices of {len(rows)} processes do not share a batch evenly; choose a "
            "TrainConfig.model_parallel that divides the devices of one process, or is a multiple"
        )
    return shares.index(rows[process]), len(shares)


def put(tree: Any, shardings: Any) -> Any:
    """Arrays on the host, the same in every process -> arrays over the mesh."""

    def one(array: Any, sharding: NamedSharding) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(one, tree, shardings)


def on_host(tree: Any) -> Any:
    """Whole arrays on the host, in every process."""

    def one(array: Any) -> np.ndarray:
        if isinstance(array, jax.Array) and not (
            array.is_fully_addressable or array.is_fully_replicated
        ):
            whole = NamedSharding(array.sharding.mesh, PartitionSpec())  # type: ignore[attr-defined]
            array = jax.jit(_same, out_shardings=whole)(array)
        return np.asarray(array)

    return jax.tree.map(one, tree)


def on_own_devices(tree: Any) -> Any:
    """Parameters with which this process can work by itself; as they are where it is alone.

    Replicated arrays are taken from its first device as they lie there; others are spread over its
    own devices as they were over the mesh.
    """
    if jax.process_count() == 1:
        return tree
    leaves = jax.tree.leaves(tree)
    if all(x.is_fully_replicated for x in leaves):
        return jax.tree.map(lambda x: x.addressable_data(0), tree)
    own, model = jax.local_devices(), leaves[0].sharding.mesh.shape["model"]
    mesh = make_mesh(model_parallel=math.gcd(model, len(own)), devices=own)
    return jax.tree.map(
        lambda x, y: put(x, NamedSharding(mesh, y.sharding.spec)), on_host(tree), tree
    )


def _same(array: jax.Array) -> jax.Array:
    return array
