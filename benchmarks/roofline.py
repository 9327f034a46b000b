"""What one decoding step must move and compute, against what this machine can do.

    python benchmarks/roofline.py --beams 10,100 --batch 1,8
    python benchmarks/roofline.py --device gpu --dtype bfloat16 --beams 10,100 --batch 1,8,32

Counts bytes and floating point operations of a step of the decoder (weights read once, keys and
values of query and hypotheses, logits of the docid block, the trie), measures the bandwidth of
memory and the peak of a large matrix product here, and the step itself, in a loop as the search has
it. The bound is the larger of bytes / bandwidth and operations / peak; efficiency is bound /
measured time, and bandwidth_share the bytes a second of the step over the measured bandwidth.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # read when JAX is imported

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from problem import SHAPES, Problem  # noqa: E402

from genret_jax.modeling.network import T5, empty_cache  # noqa: E402
from genret_jax.trie import build_trie  # noqa: E402

REPEATS = 15
STEPS = 16  # of the loop that is timed
POSITION = 3


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """The best of REPEATS runs: what a bound is held against is the undisturbed one."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return min(times)


def bandwidths() -> dict[str, float]:
    """Bytes a second of reading, and of reading and writing, an array larger than any cache."""
    array = jnp.ones(1 << 27, jnp.float32)
    return {
        "read": array.nbytes / seconds(jax.jit(jnp.sum), array),
        "copy": 2 * array.nbytes / seconds(jax.jit(lambda x: x + 1), array),
    }


def peak(dtype: str, size: int) -> float:
    """Floating point operations a second of a square product."""
    square = jnp.ones((size, size), dtype)
    return 2 * size**3 / seconds(jax.jit(jnp.dot), square, square)


def counts(problem: Problem, beam: int, position: int, slots: int) -> dict[str, float]:
    """Bytes and operations of one step, by part."""
    c, rows = problem.config, problem.batch * beam
    wide = jnp.dtype(problem.dtype).itemsize
    joined = c.num_heads * c.head_dim
    weights = c.num_decoder_layers * (6 * c.embed_dim * joined + 3 * c.embed_dim * c.mlp_dim)
    docids = c.embed_dim * problem.vocab
    cross = c.num_decoder_layers * 2 * problem.batch * problem.query_length * joined
    past = c.num_decoder_layers * 2 * rows * (position + 1) * joined
    attention = c.num_decoder_layers * 4 * rows * joined * (problem.query_length + position + 1)
    return {
        "weight_bytes": float(wide * weights),
        "docid_bytes": wide * docids + 4.0 * rows * problem.vocab,  # logits are float32
        "cross_bytes": float(wide * cross),
        "cache_bytes": float(wide * past),
        "trie_bytes": problem.batch * slots * (2 + 4 + 4.0),  # token, logit, score
        "flops": 2.0 * rows * (weights + docids) + attention,
    }


def step_seconds(problem: Problem, beam: int) -> float:
    """Time of one step at POSITION: decoder, logits, and hypotheses that go on with others."""
    model = problem.model
    params = problem.device_params()
    cross = jax.jit(lambda p, q: model.network.apply({"params": p}, q, method=T5.start))(
        params, problem.queries(0)
    )
    cache = empty_cache(model.config, problem.batch, beam, problem.length, slots=beam)
    tokens = jnp.ones((problem.batch, beam), jnp.int32)
    logits = jnp.zeros((problem.batch, beam, problem.vocab), jnp.float32)

    def steps(params: Any, carry: Any, cross: Any) -> Any:
        def step(_: Any, carry: Any) -> Any:
            tokens, cache, _ = carry
            states, cache = model.network.apply(
                {"params": params}, tokens, jnp.int32(POSITION), cache, cross, method=T5.step
            )
            parent = jnp.argsort(tokens, axis=1)
            return tokens + 1, cache.of_parents(parent), model.docid_logits(params, states)

        return jax.lax.fori_loop(0, STEPS, step, carry)

    return seconds(jax.jit(steps), params, (tokens, cache, logits), cross) / STEPS


def row(problem: Problem, beam: int, rates: tuple[float, float]) -> dict[str, Any]:
    """One step, counted and measured."""
    slots = build_trie(problem.table).on_device().candidates(beam, 2)
    took = step_seconds(problem, beam)
    found = counts(problem, beam, POSITION, slots)
    moved = sum(value for name, value in found.items() if name.endswith("bytes"))
    bound = max(moved / rates[0], found["flops"] / rates[1])
    return {
        "shape": problem.shape,
        "dtype": problem.dtype,
        "beam": beam,
        "batch": problem.batch,
        "MB": round(moved / 1e6, 1),
        "GFLOP": round(found["flops"] / 1e9, 2),
        "limit": "memory" if moved / rates[0] > found["flops"] / rates[1] else "arithmetic",
        "bound_ms": round(1e3 * bound, 4),
        "step_ms": round(1e3 * took, 4),
        "efficiency": round(bound / took, 3),
        "bandwidth_share": round(moved / took / rates[0], 3),
        "trie_share": round(found["trie_bytes"] / moved, 5),
        "cache_share": round(found["cache_bytes"] / moved, 3),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The machine and the rows; written to --json after each."""
    size = 2048 if arguments.device == "cpu" else 8192
    bandwidth = bandwidths()
    peaks = {dtype: peak(dtype, size) for dtype in {"float32", arguments.dtype}}
    rates = max(bandwidth.values()), peaks[arguments.dtype]
    found: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        **{f"{name}_GB_s": round(value / 1e9, 1) for name, value in bandwidth.items()},
        **{f"{name}_GFLOP_s": round(value / 1e9) for name, value in sorted(peaks.items())},
        "rows": [],
    }
    for batch in arguments.batch:
        for beam in arguments.beams:
            problem = Problem(
                ids=int(arguments.ids), shape=arguments.shape, batch=batch, dtype=arguments.dtype
            )
            found["rows"].append(row(problem, beam, rates))
            print(found["rows"][-1], file=sys.stderr, flush=True)
            if arguments.json and arguments.json != "-":
                Path(arguments.json).write_text(json.dumps(found, indent=1))
    return found


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beams", type=numbers, default=[10, 100])
    parser.add_argument("--batch", type=numbers, default=[1, 8])
    parser.add_argument("--ids", type=float, default=1e5)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="one JSON object on stdout, or in a file that is written after each row",
    )
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[arguments.device])
    if arguments.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")  # no TF32
    found = measure(arguments)
    if arguments.json == "-":
        print(json.dumps(found))
        return
    print(", ".join(f"{name} {value}" for name, value in found.items() if name != "rows"))
    print(f"| {' | '.join(found['rows'][0])} |\n|{'---|' * len(found['rows'][0])}")
    for one in found["rows"]:
        print(f"| {' | '.join(str(value) for value in one.values())} |")


if __name__ == "__main__":
    main()
