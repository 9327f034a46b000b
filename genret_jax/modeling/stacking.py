"""Layers one by one, or stacked and run by one `scan`: the same numbers, compiled once a stack.

Layer by layer, parameters of a side are `layers_0`, `layers_1`, ... and a program grows with each.
Stacked, they are one subtree `layers`, every array of which has a leading axis, logically named
"layers" as in T5X; the program holds one layer, and a loop.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.linen import partitioning

from genret_jax.errors import UserError

Params = Any
AXIS = "layers"  # the subtree of stacked layers, and the logical name of their leading axis
_ONE = re.compile(AXIS + r"_(\d+)")


def through_layers(
    layers: nn.Module | Sequence[nn.Module],
    body: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    each: Any = None,
    *,
    length: int,
) -> tuple[Any, Any]:
    """Passes `carry` through layers, the first one first.

    Args:
      layers: several modules, or the one whose parameters are stacked.
      body: (layer, carry, its part of `each`) -> (carry, what it gives).
      carry: a pytree; of the same shapes all along where layers are stacked.
      each: layer by layer a sequence with one entry a layer; stacked a pytree whose arrays have a
        leading axis of layers; None for nothing.
      length: number of layers.

    Returns:
      The last carry, and what the layers gave: a tuple, or stacked arrays.
    """
    if isinstance(layers, nn.Module):
        scan = partitioning.scan_with_axes(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=length,
            axis_name=AXIS,
        )
        return scan(layers, carry, each)
    given = []
    for layer, part in zip(layers, [None] * length if each is None else each, strict=True):
        carry, gives = body(layer, carry, part)
        given.append(gives)
    return carry, tuple(given)


def layer_rank(path: Sequence[Any], leaf: Any) -> int:
    """Axes of a parameter in one layer: 2 for a matrix, whether layers are stacked or not.

    Args:
      path: of the parameter, as `jax.tree_util.tree_map_with_path` gives it.
      leaf: the parameter.
    """
    return leaf.ndim - is_in_stack(path)


def is_in_stack(path: Sequence[Any]) -> bool:
    """Whether the parameter at a path of `tree_map_with_path` has a leading axis of layers."""
    return any(getattr(key, "key", None) == AXIS for key in path)


def is_stacked(params: Params) -> bool:
    """Whether a parameter tree holds stacked layers."""
    return any(is_in_stack(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))


def stack_layers(params: Params) -> Params:
    """`layers_0` ... -> `layers`, wherever they are in the tree; a stacked tree as it is.

    Raises:
      UserError: numbers are missing between, or layers differ in shape.
    """
    if not isinstance(params, dict):
        return params
    numbers = sorted(int(match[1]) for name in params if (match := _ONE.fullmatch(name)))
    rest = {k: stack_layers(v) for k, v in params.items() if not _ONE.fullmatch(k)}
    if not numbers:
        return rest
    layers = [params[f"{AXIS}_{n}"] for n in numbers]
    shapes = [jax.tree.map(np.shape, layer) for layer in layers]
    if numbers != list(range(len(numbers))) or any(shape != shapes[0] for shape in shapes):
        raise UserError(
            f"layers {numbers} are not {len(numbers)} layers of equal shapes from 0 on; give "
            "the weights of one network"
        )
    return {**rest, AXIS: jax.tree.map(lambda *leaves: _array_of(leaves[0]).stack(leaves), *layers)}


def unstack_layers(params: Params) -> Params:
    """`layers` -> `layers_0` ...; a tree that is not stacked as it is. The inverse."""
    if not isinstance(params, dict):
        return params
    rest = {k: unstack_layers(v) for k, v in params.items() if k != AXIS}
    if AXIS not in params:
        return rest
    stacked = params[AXIS]
    length = len(jax.tree.leaves(stacked)[0])
    layers = {f"{AXIS}_{n}": jax.tree.map(lambda x, n=n: x[n], stacked) for n in range(length)}
    return {**rest, **layers}


def with_layers(params: Params, *, stacked: bool) -> Params:
    """Parameters in the form that a network has: `T5Config.scan_layers`."""
    return stack_layers(params) if stacked else unstack_layers(params)


def _array_of(leaf: Any) -> Any:
    """NumPy for arrays on the host, else jax.numpy."""
    return jax.numpy if isinstance(leaf, jax.Array) else np
