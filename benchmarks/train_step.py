"""Time of a training step: the native runner, T5X over the same model, and T5X over its own.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --sizes 256 --steps 20 --json

T5X's own network scores its whole vocabulary at every position, as it stands; ours the docids.
Peers take turns in one process, so that what slows the machine slows all of them, and in a new
order every round, so that none is always behind the one that leaves caches and memory in disorder;
T5X's rows are left out where it is not installed. A ratio is a peer's median step over the native
runner's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genret_jax.configs import TrainConfig
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.model import RetrievalModel
from genret_jax.training.optimizers import optimizer_at
from genret_jax.training.partitioning import make_mesh
from genret_jax.training.trainer import Stepper
from genret_jax.vocabularies import DocidSpace

TEXT, DOCIDS = 4000, 2048  # pieces and docid tokens
BATCH, INPUT, DOCID = 64, 32, 8
Step = Callable[[], None]


class _Batches:
    """One batch, for `Stepper.compile`."""

    def __init__(self, batch: dict[str, np.ndarray]):
        self._batch = batch

    def __getitem__(self, n: int) -> dict[str, np.ndarray]:
        return self._batch

    def shapes(self) -> list[dict[str, np.ndarray]]:
        return [self._batch]


def random_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    targets = rng.integers(TEXT, TEXT + DOCIDS, (BATCH, DOCID)).astype(np.int32)
    return {
        "encoder_input_tokens": rng.integers(3, TEXT, (BATCH, INPUT)).astype(np.int32),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": np.ones((BATCH, DOCID), np.float32),
    }


def our_model(size: int) -> RetrievalModel:
    """128 ("tiny": 2 + 2 layers) or any other multiple of 32, with the same number of layers."""
    config = T5Config(
        vocab_size=TEXT + DOCIDS,
        embed_dim=size,
        num_heads=size // 32,
        head_dim=32,
        mlp_dim=2 * size,
        num_encoder_layers=2,
        num_decoder_layers=2,
        dropout_rate=0.1,
    )
    return RetrievalModel(config, DocidSpace(start=TEXT, size=DOCIDS + 2))


def native(size: int, batch: dict[str, np.ndarray]) -> Step:
    stepper = Stepper(our_model(size), TrainConfig(batch_size=BATCH), make_mesh())
    state = stepper.init(jax.random.key(0))
    stepper.compile(state, _Batches(batch))
    kept = [state]

    def step() -> None:
        kept[0], metrics = stepper(kept[0], batch, 1e-3)
        jax.block_until_ready((kept[0].params, metrics))

    return step


def t5x_ours(size: int, batch: dict[str, np.ndarray]) -> Step:
    """T5X's trainer over our model, as gin_configs/recipes have it."""
    from genret_jax.t5x.models import T5XModel

    model = our_model(size)
    wrapped = T5XModel.__new__(T5XModel)  # the loss alone: no index stands behind it
    wrapped.trainable, wrapped.model, wrapped.optimizer_def = model, model, _optimizer()
    return _t5x_step(wrapped, batch)


def t5x_own(size: int, batch: dict[str, np.ndarray]) -> Step:
    """T5X's trainer over T5X's network and loss."""
    import seqio
    from t5x import models
    from t5x.examples.t5 import network

    ours = our_model(size).config
    config = network.T5Config(
        vocab_size=ours.vocab_size,
        emb_dim=size,
        num_heads=ours.num_heads,
        num_encoder_layers=2,
        num_decoder_layers=2,
        head_dim=32,
        mlp_dim=ours.mlp_dim,
        mlp_activations=("gelu", "linear"),
        dropout_rate=0.1,
    )
    vocabulary = seqio.PassThroughVocabulary(ours.vocab_size, eos_id=1)
    model = models.EncoderDecoderModel(
        network.Transformer(config), vocabulary, vocabulary, optimizer_def=_optimizer()
    )
    return _t5x_step(model, batch)


def _optimizer() -> Any:
    from t5x import optimizers

    return optimizers.OptaxWrapper(optimizer_at("adamw", 1e-3, weight_decay=0.01, clip_norm=1.0))


def _t5x_step(model: Any, batch: dict[str, np.ndarray]) -> Step:
    from t5x import partitioning, trainer, utils

    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    initializer = utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes={k: v.shape for k, v in batch.items()},
        input_types={k: v.dtype for k, v in batch.items()},
        partitioner=partitioner,
    )
    runner = trainer.Trainer(
        model=model,
        train_state=initializer.from_scratch(jax.random.PRNGKey(0)),
        partitioner=partitioner,
        eval_names=[],
        summary_dir=None,
        train_state_axes=initializer.train_state_axes,
        rng=jax.random.PRNGKey(0),
        learning_rate_fn=lambda step: jnp.float32(1e-3),
        num_microbatches=None,
    )
    arrays = jax.tree.map(jnp.asarray, batch)
    runner.compile_train(arrays)

    def step() -> None:
        # From the host every time, as both trainers do.
        here = jax.tree.map(jnp.asarray, batch)
        runner.train_state, metrics = runner._compiled_train_step(runner.train_state, here)
        jax.block_until_ready((runner.train_state.params, metrics))

    return step


def measure(size: int, steps: int) -> list[dict[str, Any]]:
    batch = random_batch()
    makers = {"native": native}
    if importlib.util.find_spec("t5x"):
        makers |= {"t5x, our model": t5x_ours, "t5x, its own model": t5x_own}
    peers = {name: make(size, batch) for name, make in makers.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in peers}
    turns, rng = list(peers), random.Random(0)
    for round_ in range(steps + 2):
        rng.shuffle(turns)
        for name in turns:
            begin, cpu = time.perf_counter(), time.process_time()
            peers[name]()
            if round_ >= 2:
                times[name].append((time.perf_counter() - begin, time.process_time() - cpu))
    medians = {
        name: [statistics.median(column) for column in zip(*values, strict=True)]
        for name, values in times.items()
    }
    wall, cpu = medians["native"]
    return [
        {
            "width": size,
            "peer": name,
            "step_ms": round(1000 * its_wall, 2),
            "ratio": round(its_wall / wall, 3),
            "cpu_ratio": round(its_cpu / cpu, 3),
        }
        for name, (its_wall, its_cpu) in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="128,256", help="embed_dim, separated by commas")
    parser.add_argument("--steps", type=int, default=30, help="steps timed of each peer")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    rows = [row for s in arguments.sizes.split(",") for row in measure(int(s), arguments.steps)]
    if arguments.json:
        print(json.dumps({"device": jax.devices()[0].device_kind, "rows": rows}))
        return
    print(
        f"batch {BATCH}, {INPUT} encoder tokens, {DOCID} docid tokens, {TEXT} + {DOCIDS} pieces\n"
    )
    print("| width | runner | step, ms | of the native runner's | of its CPU seconds |")
    print("| ---: | --- | ---: | ---: | ---: |")
    for row in rows:
        cells = (row[name] for name in ("width", "peer", "step_ms", "ratio", "cpu_ratio"))
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
