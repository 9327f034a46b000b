"""Layers one by one against stacked layers (`NetworkConfig.scan_layers`): compiling and running.

    python benchmarks/scan_layers.py
    python benchmarks/scan_layers.py --layers 8 --width 512 --remat --dtype bfloat16 --json

A training step (batch 16, 32 encoder tokens, 8 docid tokens, AdamW) and a constrained beam search
(batch 8, beam 10, 10,000 random identifiers) of a network with as many layers on either side.
Compilation is timed once, tracing included, in CPU seconds of all threads, which other work on the
machine changes little; runs of the two forms take turns, and their median counts. Both forms have
the same parameters.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parent))

from problem import Problem  # noqa: E402
from train_step import DOCIDS, TEXT, _Batches, random_batch  # noqa: E402

from genret_jax.configs import TrainConfig  # noqa: E402
from genret_jax.modeling.layers import T5Config  # noqa: E402
from genret_jax.modeling.model import RetrievalModel  # noqa: E402
from genret_jax.modeling.stacking import unstack_layers  # noqa: E402
from genret_jax.training.partitioning import make_mesh  # noqa: E402
from genret_jax.training.trainer import Stepper, TrainState  # noqa: E402
from genret_jax.trie import build_trie  # noqa: E402
from genret_jax.vocabularies import DocidSpace  # noqa: E402

BATCH, QUERIES, BEAM, IDS = 16, 8, 10, 10_000
Run = Callable[[], None]


@dataclasses.dataclass
class Form:
    """One form of the network: how long each program took to compile, and how to run it."""

    compile_s: dict[str, float]
    run: dict[str, Run]


def config_of(arguments: argparse.Namespace) -> T5Config:
    """A network of T5 1.1's proportions."""
    return T5Config(
        vocab_size=TEXT + DOCIDS,
        embed_dim=arguments.width,
        num_heads=max(1, arguments.width // 64),
        head_dim=64,
        mlp_dim=5 * arguments.width // 2,
        num_encoder_layers=arguments.layers,
        num_decoder_layers=arguments.layers,
        dtype=arguments.dtype,
        remat=arguments.remat,
    )


def form(config: T5Config, params: Any) -> Form:
    """Compiles the step and the search of one form."""
    model = RetrievalModel(config, DocidSpace(start=TEXT, size=DOCIDS + 2))
    batch = {name: value[:BATCH] for name, value in random_batch().items()}
    stepper = Stepper(model, TrainConfig(batch_size=BATCH), make_mesh(devices=jax.devices()[:1]))
    here = jax.device_put(params)
    moments = stepper._optimizer.init(here)
    kept = [jax.tree.map(jnp.copy, TrainState(here, moments, jnp.int32(0)))]  # a step donates it
    began = time.process_time()
    stepper.compile(kept[0], _Batches(batch))
    seconds = {"training step": time.process_time() - began}
    print(f"compiled the step in {seconds['training step']:.1f} CPU s", file=sys.stderr)

    def step() -> None:
        kept[0], metrics = stepper(kept[0], batch, 1e-4)
        jax.block_until_ready((kept[0].params, metrics))

    queries = jnp.asarray(batch["encoder_input_tokens"][:QUERIES])
    trie = build_trie(Problem(ids=IDS, vocab=DOCIDS + 2).table).on_device()
    search = jax.jit(functools.partial(model.search, beam=BEAM))
    began = time.process_time()
    compiled = search.lower(here, queries, trie).compile()
    seconds["search"] = time.process_time() - began
    print(f"compiled the search in {seconds['search']:.1f} CPU s", file=sys.stderr)
    return Form(
        seconds,
        {
            "training step": step,
            "search": lambda: jax.block_until_ready(compiled(here, queries, trie)),
        },
    )


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    config = config_of(arguments)
    scanned = dataclasses.replace(config, scan_layers=True)
    model = RetrievalModel(scanned, DocidSpace(start=TEXT, size=DOCIDS + 2))
    params = jax.device_get(jax.jit(lambda: model.init(jax.random.key(0))[0])())
    forms = {"stacked": form(scanned, params), "one by one": form(config, unstack_layers(params))}
    rows = []
    for program in ("training step", "search"):
        times: dict[str, list[float]] = {name: [] for name in forms}
        for round_ in range(arguments.runs + 2):
            for name, made in forms.items():
                began = time.perf_counter()
                made.run[program]()
                if round_ >= 2:
                    times[name].append(time.perf_counter() - began)
        rows += [
            {
                "program": program,
                "layers": name,
                "compile_cpu_s": round(made.compile_s[program], 2),
                "run_ms": round(1000 * statistics.median(times[name]), 2),
            }
            for name, made in forms.items()
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24, help="of either side")
    parser.add_argument("--width", type=int, default=64, help="embed_dim, a multiple of 64")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--remat", action="store_true", help="recompute layers, as large sizes do")
    parser.add_argument("--runs", type=int, default=10, help="runs timed of each program")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    rows = measure(arguments)
    if arguments.json:
        print(json.dumps({"device": jax.devices()[0].device_kind, "rows": rows}))
        return
    print(f"{arguments.layers} + {arguments.layers} layers of width {arguments.width}\n")
    print("| program | layers | compile, CPU s | run, ms |\n| --- | --- | ---: | ---: |")
    for row in rows:
        print(f"| {row['program']} | {row['layers']} | {row['compile_cpu_s']} | {row['run_ms']} |")


if __name__ == "__main__":
    main()
