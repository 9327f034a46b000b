"""What one decoding step must move and compute, against what this machine can do.

    python benchmarks/roofline.py --beams 10,100 --batch 1,8

Counts bytes and floating point operations of a step of the decoder (weights read once, keys and
values of query and hypotheses, logits of the docid block, the trie), measures the bandwidth of
memory and the peak of a large matrix product here, and the step itself. The bound is the larger of
bytes / bandwidth and operations / peak; efficiency is bound / measured time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from problem import SHAPES, Problem  # noqa: E402

from genret_jax.modeling.network import T5, empty_cache  # noqa: E402
from genret_jax.trie import build_trie  # noqa: E402

REPEATS = 15


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """The best of REPEATS runs: what a bound is held against is the undisturbed one."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return min(times)


def bandwidth() -> float:
    """Bytes a second of reading an array far larger than any cache."""
    array = jnp.ones(1 << 27, jnp.float32)
    return array.nbytes / seconds(jax.jit(jnp.sum), array)


def peak() -> float:
    """Floating point operations a second of a square float32 product."""
    size = 2048
    square = jnp.ones((size, size), jnp.float32)
    return 2 * size**3 / seconds(jax.jit(jnp.dot), square, square)


def counts(problem: Problem, beam: int, position: int, slots: int) -> dict[str, float]:
    """Bytes and operations of one step, by part; float32."""
    c, rows = problem.config, problem.batch * beam
    joined = c.num_heads * c.head_dim
    weights = c.num_decoder_layers * (6 * c.embed_dim * joined + 3 * c.embed_dim * c.mlp_dim)
    docids = c.embed_dim * problem.vocab
    cross = c.num_decoder_layers * 2 * problem.batch * problem.query_length * joined
    past = c.num_decoder_layers * 2 * rows * (position + 1) * joined
    attention = c.num_decoder_layers * 4 * rows * joined * (problem.query_length + position + 1)
    return {
        "weight_bytes": 4.0 * weights,
        "docid_bytes": 4.0 * (docids + rows * problem.vocab),
        "cross_bytes": 4.0 * cross,
        "cache_bytes": 4.0 * 3 * past,  # read by attention; read and written to follow a parent
        "trie_bytes": problem.batch * slots * (2 + 4 + 4.0),  # token, logit, score
        "flops": 2.0 * rows * (weights + docids) + attention,
    }


def row(problem: Problem, beam: int, rates: tuple[float, float]) -> dict[str, Any]:
    """One step at position 3, counted and measured: decoder, logits and cache."""
    model, position = problem.model, 3
    slots = build_trie(problem.table).on_device().candidates(beam, 2)
    params = jax.device_put(problem.params)
    cross = jax.jit(lambda p, q: model.network.apply({"params": p}, q, method=T5.start))(
        params, problem.queries(0)
    )
    cache = empty_cache(model.config, problem.batch, beam, problem.length)
    tokens = jnp.ones((problem.batch, beam), jnp.int32)

    def step(params: Any, cache: Any, cross: Any) -> Any:
        states, cache = model.network.apply(
            {"params": params}, tokens, jnp.int32(position), cache, cross, method=T5.step
        )
        parent = jnp.argsort(tokens, axis=1)
        cache = jax.tree.map(lambda x: jax.vmap(lambda r, i: r[i])(x, parent), cache)
        return model.docid_logits(params, states), cache

    took = seconds(jax.jit(step), params, cache, cross)
    found = counts(problem, beam, position, slots)
    moved = sum(value for name, value in found.items() if name.endswith("bytes"))
    bound = max(moved / rates[0], found["flops"] / rates[1])
    return {
        "shape": problem.shape,
        "beam": beam,
        "batch": problem.batch,
        "MB": round(moved / 1e6, 1),
        "GFLOP": round(found["flops"] / 1e9, 2),
        "limit": "memory" if moved / rates[0] > found["flops"] / rates[1] else "arithmetic",
        "bound_ms": round(1e3 * bound, 2),
        "step_ms": round(1e3 * took, 2),
        "efficiency": round(bound / took, 2),
        "trie_share": round(found["trie_bytes"] / moved, 5),
        "cache_share": round(found["cache_bytes"] / moved, 3),
    }


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
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    rates = bandwidth(), peak()
    rows = []
    for batch in arguments.batch:
        for beam in arguments.beams:
            problem = Problem(ids=int(arguments.ids), shape=arguments.shape, batch=batch)
            rows.append(row(problem, beam, rates))
    machine = {"bandwidth_GB_s": round(rates[0] / 1e9, 1), "peak_GFLOP_s": round(rates[1] / 1e9)}
    if arguments.json:
        print(json.dumps({**machine, "rows": rows}))
        return
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for one in rows:
        print(f"| {' | '.join(str(value) for value in one.values())} |")


if __name__ == "__main__":
    main()
