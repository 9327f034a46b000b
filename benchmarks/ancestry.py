"""A search whose cache keeps keys and values in their slots, against one that copies them.

    python benchmarks/ancestry.py --beams 10,100 --batch 1,8

The same weights, queries and identifiers, both programs in turns in one process; the ratio is the
median over turns of the CPU seconds with copies over those with an ancestry.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import jax  # noqa: E402
import numpy as np  # noqa: E402
from problem import SHAPES, Problem  # noqa: E402

from genret_jax.modeling import model as searching  # noqa: E402
from genret_jax.modeling.network import empty_cache  # noqa: E402
from genret_jax.trie import build_trie  # noqa: E402


def program(problem: Problem, beam: int, *, ancestry: bool) -> Any:
    """The compiled search; what makes its cache is exchanged while it is traced."""

    def cache(*arguments: Any, slots: int) -> Any:
        return empty_cache(*arguments, slots=slots if ancestry else None)

    def search(params: Any, queries: Any, trie: Any) -> Any:
        searching.empty_cache = cache  # type: ignore[assignment]
        try:
            return problem.model.search(params, queries, trie, beam=beam)
        finally:
            searching.empty_cache = empty_cache

    return jax.jit(search)


def row(problem: Problem, beam: int, turns: int) -> dict[str, Any]:
    trie, params = build_trie(problem.table).on_device(), problem.device_params()
    sides = {
        name: program(problem, beam, ancestry=name == "ancestry") for name in ("copies", "ancestry")
    }
    found = {name: run(params, problem.queries(0), trie) for name, run in sides.items()}
    same = np.asarray(found["copies"].row == found["ancestry"].row)
    if same.mean() < 0.99:  # sums in another order may turn two that are nearly equal
        raise ValueError(f"{1 - same.mean():.1%} of the identifiers differ")
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns):
        queries = problem.queries(1 + turn)
        for name, run in sides.items():
            began = time.process_time()
            jax.block_until_ready(run(params, queries, trie))
            cpu[name].append(time.process_time() - began)
    ratios = [a / b for a, b in zip(cpu["copies"], cpu["ancestry"], strict=True)]
    return {
        "beam": beam,
        "batch": problem.batch,
        "ratio": round(statistics.median(ratios), 3),
        **{f"{name}_ms": round(1e3 * statistics.median(cpu[name]), 1) for name in sides},
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
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--length", type=int, default=8)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    for number, (batch, beam) in enumerate(
        (batch, beam) for batch in arguments.batch for beam in arguments.beams
    ):
        problem = Problem(
            ids=int(arguments.ids),
            vocab=arguments.vocab,
            length=arguments.length,
            shape=arguments.shape,
            batch=batch,
        )
        one = row(problem, beam, arguments.turns)
        if not number:
            print(f"| {' | '.join(one)} |\n|{'---|' * len(one)}")
        print(f"| {' | '.join(map(str, one.values()))} |", flush=True)


if __name__ == "__main__":
    main()
