"""The native runner's batches in T5X's training, for comparing the two: for gin files.

    train_script.train.get_dataset_fn = @data.native_batches()

T5X compiles one shape, so all batches are padded to the longest: the same examples, the same loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from genret_jax.data.batches import Arrays
from genret_jax.recipe import configured
from genret_jax.stages.common import Materials


def native_batches(materials: Materials) -> Callable[..., tf.data.Dataset]:
    """A `get_dataset_fn` of T5X that yields `Materials.batches` of stage 1 from number 0 on.

    Args:
      materials: from `tasks.recipe.materials`.
    """

    def get_dataset(cfg: Any, shard_id: int, num_shards: int, *_: Any, **__: Any) -> Any:
        if num_shards != 1:
            raise ValueError(f"native batches are for one process, found {num_shards} shards")
        del shard_id
        size = configured().train.batch_size
        if cfg.batch_size != size:
            raise ValueError(f"BATCH_SIZE is {cfg.batch_size}, TrainConfig.batch_size {size}")
        batches = materials.batches(materials.pools, batch_size=size)
        widest = batches.shapes()[-1]

        def generate() -> Iterator[Arrays]:
            number = 0
            while True:
                yield _padded(batches[number], widest)
                number += 1

        signature = {k: tf.TensorSpec(v.shape, v.dtype) for k, v in widest.items()}
        return tf.data.Dataset.from_generator(generate, output_signature=signature)

    return get_dataset


def _padded(batch: Arrays, like: Arrays) -> Arrays:
    out = {}
    for name, array in batch.items():
        missing = [(0, b - a) for a, b in zip(array.shape, like[name].shape, strict=True)]
        out[name] = np.pad(array, missing)
    return out
