"""A trie over several devices, for one that does not fit on one of them.

Each array is cut along an axis of a mesh. A search reads them by index alone, and XLA's partitioner
has every device read what lies in its part and adds up the results, so that no array is ever put
together; `tests/test_sharded_trie.py` looks at the compiled program.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from genret_jax.device_trie import DeviceTrie

_CUT = ("first_edge", "edge_token", "row_begin", "rows", "allowed")


def shard_trie(trie: DeviceTrie, mesh: Mesh, axis: str) -> DeviceTrie:
    """The trie with each array cut over the devices along `axis`, and copied along the others.

    What a search finds is the same. Arrays are padded to a multiple of the devices; the masks of
    dense levels are small and lie on every device. A filter (`Trie.restricted`) or another trie
    (`Trie.on_device(like=...)`) is sharded again in the same way, and runs the same program.

    Args:
      trie: of `Trie.on_device`, filtered or not.
      mesh: of the devices.
      axis: name of its axis; parameters and queries may lie on the mesh as they like.
    """
    shards = mesh.shape[axis]
    cut = NamedSharding(mesh, PartitionSpec(axis))
    whole = NamedSharding(mesh, PartitionSpec())

    def part(array: Any) -> Any:
        missing = -len(array) % shards
        # As on one device: what lies beyond the end repeats it, and is not read.
        padded = jnp.pad(array, [(0, missing), *[(0, 0)] * (array.ndim - 1)], mode="edge")
        return jax.device_put(padded, cut)

    arrays = {name: getattr(trie, name) for name in _CUT}
    return dataclasses.replace(
        trie,
        **{name: part(array) for name, array in arrays.items() if array is not None},
        num_rows=jax.device_put(trie.num_rows, whole),
        dense=tuple(jax.device_put(mask, whole) for mask in trie.dense),
    )
