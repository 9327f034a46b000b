"""A SeqIO mixture -> batches of numpy arrays, whose position is one number.

Each task of the mixture is run through SeqIO and its feature converter into memory, tasks with
random preprocessing several times over, so that they keep many versions of an example. Training
then walks *rounds*: a round holds every example of the first pool once and as many of the others
as their rates ask for, in an order drawn from (seed, round). So batch number n is a function of
(seed, n): resuming needs no iterator state, and any number of processes cuts the same global
batches.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf
from tqdm import tqdm

from genret_jax.errors import UserError

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Pool:
    """The examples of one task: every array is [examples, ...].

    Attributes:
      arrays: model features, padded.
      rate: of the task in its mixture.
      name: of the task.
    """

    arrays: Arrays
    rate: float
    name: str = ""

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))


def materialise(
    mixture: str,
    *,
    lengths: Mapping[str, int],
    passes: Mapping[str, int],
    seed: int,
    converter: seqio.FeatureConverter | None = None,
) -> list[Pool]:
    """Runs every task of a mixture into memory.

    Args:
      mixture: name of a registered mixture or task.
      lengths: {"inputs": encoder tokens, "targets": docid tokens}.
      passes: times to run a task, by the end of its name ("indexing"); 1 where none is given.
      seed: of random preprocessing.
      converter: SeqIO feature converter, encoder-decoder without packing by default.

    Returns:
      One pool a task, in order of their names.
    """
    provider = seqio.get_mixture_or_task(mixture)
    tasks = seqio.get_subtasks(provider)
    pools = []
    for task in tasks:
        repeats = next((n for end, n in passes.items() if task.name.endswith(end)), 1)
        dataset = seqio.get_dataset(
            task.name,
            task_feature_lengths=lengths,
            feature_converter=converter or seqio.EncDecFeatureConverter(pack=False),
            dataset_split="train",
            shuffle=False,
            num_epochs=repeats,
            seed=seed,
            verbose=False,
        )
        reader = dataset.batch(1024).prefetch(tf.data.AUTOTUNE).as_numpy_iterator()
        name = f"reading {task.name}"
        chunks = list(tqdm(reader, desc=name, unit_scale=1024, unit="example", disable=None))
        arrays = {k: _model_dtype(np.concatenate([c[k] for c in chunks])) for k in chunks[0]}
        rate = provider.get_rate(task) if isinstance(provider, seqio.Mixture) else 1.0
        pools.append(Pool(arrays, rate, task.name))
    return pools


def _model_dtype(array: np.ndarray) -> np.ndarray:
    return array.astype(np.int32) if array.dtype.kind in "iu" else array.astype(np.float32)


class Batches:
    """Batch number n, for any n >= 0.

    A batch holds examples of one length bucket and is cut to it, so that short queries are not
    padded to the longest one: on collections of short queries that is most of the arithmetic.

    Args:
      pools: from `materialise`.
      batch_size: examples of a global batch.
      seed: of order and mixing.
      buckets: encoder lengths of batches, ascending, the last one holding every example.
      shard: which share of a batch's rows this process has, and of how many; batch_size must
        divide by the latter.

    Example:
      >>> batches = Batches(pools, batch_size=256, seed=0, buckets=(8, 16))  # doctest: +SKIP
      >>> batches[7]["encoder_input_tokens"].shape  # doctest: +SKIP
      (256, 8)
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        *,
        batch_size: int,
        seed: int,
        buckets: Sequence[int],
        shard: tuple[int, int] = (0, 1),
    ):
        if batch_size % shard[1]:
            raise UserError(
                f"batch size {batch_size} does not divide by {shard[1]} processes; choose a "
                "multiple (TrainConfig.batch_size, ContrastiveConfig.batch_size)"
            )
        self._pools = list(pools)
        self._batch_size = batch_size
        self._seed = seed
        self._buckets = tuple(buckets)
        rows = batch_size // shard[1]
        self.rows = slice(shard[0] * rows, (shard[0] + 1) * rows)
        used = [(p.arrays["encoder_input_tokens"] > 0).sum(1) for p in self._pools]
        if max(int(u.max()) for u in used) > self._buckets[-1]:
            raise ValueError(f"an example is longer than the last bucket of {self._buckets}")
        self._bucket = [np.searchsorted(self._buckets, u) for u in used]

    @functools.cached_property
    def round_size(self) -> int:
        """Batches of a round, at most; every round is as long."""
        examples = sum(self._per_round())
        return -(-examples // self._batch_size)

    def __getitem__(self, n: int) -> Arrays:
        """This process's rows."""
        return self._batch(n, self.rows)

    def whole(self, n: int) -> Arrays:
        """The rows of all processes."""
        return self._batch(n, slice(None))

    def _batch(self, n: int, rows: slice) -> Arrays:
        which, length = self._round(n // self.round_size)[n % self.round_size]
        which = which[rows]
        out: Arrays = {}
        for name, first in self._pools[0].arrays.items():
            out[name] = np.empty((len(which), *first.shape[1:]), first.dtype)
        for i, pool in enumerate(self._pools):
            here = which[:, 0] == i
            for name, array in pool.arrays.items():
                out[name][here] = array[which[here, 1]]
        out["encoder_input_tokens"] = out["encoder_input_tokens"][:, :length]
        return out

    def shapes(self) -> list[Arrays]:
        """An empty batch of every shape there is: what to compile for."""
        rows = self.rows.stop - self.rows.start
        arrays = self._pools[0].arrays.items()
        full = {k: np.zeros((rows, *v.shape[1:]), v.dtype) for k, v in arrays}
        tokens = full["encoder_input_tokens"]
        return [{**full, "encoder_input_tokens": tokens[:, :n]} for n in self._buckets]

    def _per_round(self) -> list[int]:
        first = self._pools[0]
        return [max(1, round(len(first) * p.rate / first.rate)) for p in self._pools]

    @functools.lru_cache(maxsize=2)  # noqa: B019 (a run holds one instance, to its end)
    def _round(self, number: int) -> list[tuple[np.ndarray, int]]:
        """The batches of a round: (int64[batch, 2] of (pool, example), encoder length)."""
        rng = np.random.default_rng([self._seed, number])
        drawn = []
        for i, (pool, count) in enumerate(zip(self._pools, self._per_round(), strict=True)):
            times = -(-count // len(pool))
            order = np.concatenate([rng.permutation(len(pool)) for _ in range(times)])[:count]
            drawn.append(np.stack([np.full(count, i), order], axis=1))
        examples = rng.permutation(np.concatenate(drawn))
        batches = self._cut(examples, rng)
        return [batches[i] for i in rng.permutation(len(batches))]

    def _cut(self, examples: np.ndarray, rng: np.random.Generator) -> list[tuple[np.ndarray, int]]:
        """Cuts a round into full batches, bucket by bucket; what is left over moves one up."""
        size, left, batches = self._batch_size, examples[:0], []
        bucket = np.empty(len(examples), np.int64)
        for i, of_pool in enumerate(self._bucket):
            here = examples[:, 0] == i
            bucket[here] = of_pool[examples[here, 1]]
        for b, length in enumerate(self._buckets):
            here = np.concatenate([left, examples[bucket == b]])
            full = len(here) // size * size
            batches += [(here[i : i + size], length) for i in range(0, full, size)]
            left = here[full:]
        if len(left):  # the last batch is filled up, so that no example is ever left out
            more = rng.choice(len(examples), size - len(left))
            batches.append((np.concatenate([left, examples[more]]), self._buckets[-1]))
        return batches


def length_buckets(lengths: np.ndarray, most: int, *, multiple: int = 4) -> tuple[int, ...]:
    """Up to three encoder lengths that hold 60 %, 90 % and all of the inputs.

    Args:
      lengths: int[any], tokens of the inputs, EOS included.
      most: the last bucket.
      multiple: buckets are multiples of it.
    """
    cuts = [most]
    if len(lengths):
        for share in (0.9, 0.6):
            cut = int(np.quantile(lengths, share, method="higher"))
            cuts.append(min(most, -(-cut // multiple) * multiple))
    return tuple(sorted(set(cuts)))
