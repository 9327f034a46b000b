"""How fast constrained beam search is, against other ways to do it, after checking that they agree.

    python benchmarks/decoding.py --peers hf,unconstrained --ids 100000 --beams 10 --batch 1,8
    python benchmarks/decoding.py --part step --peers static --ids 1e4,1e6 --sets random,skewed
    python benchmarks/decoding.py --growth growth.png
    python benchmarks/decoding.py --device gpu --peers hf,unconstrained --json rows.json

A peer whose package does not import is left out and named. Each side runs in a process of its own
with as many threads; the sides take turns, so that other work on the machine slows both, and a
ratio is the median over turns of the peer's time over ours: our queries a second over its.

On a GPU the processes share the card and take turns as well. float32 is float32 on both sides (no
TF32), and a time ends when the result is there. Seconds of CPU are then those of the host.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from peers import PEERS, missing  # noqa: E402
from problem import SETS, SHAPES, Problem  # noqa: E402

CHECKED = 2  # batches whose results are compared before anything is timed
TOLERANCE = 2e-3  # nats, of sums of eight float32 log-probabilities
TURN_SECONDS = 0.15  # a turn has as many runs as this takes, and RUNS at most
RUNS = 20
LEAST_TURNS = 3


class Worker:
    """A peer in its process."""

    def __init__(self, peer: str, threads: int, device: str = "cpu", dtype: str = "float32"):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
            ),
            "OMP_NUM_THREADS": str(threads),
            # A thread that waits sleeps: while it is the other side's turn, and between operations
            # where there are more processes than cores.
            "OMP_WAIT_POLICY": "PASSIVE",
            "JAX_PLATFORMS": "cuda" if device == "gpu" and peer != "hf" else "cpu",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the other side needs the card, too
        }
        if dtype == "float32":
            environment["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
        self.peer = peer
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), peer, str(threads), device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Raises ValueError with the worker's reason when it cannot do what is asked."""
        assert self._process.stdin and self._process.stdout
        print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.peer}: its process ended ({self._process.wait()})")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer

    def close(self) -> None:
        self._process.communicate()


def disagreement(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """What is wrong with the peer's results, or None.

    Both must find the same identifiers, but for those that score within TOLERANCE of the last one.
    """
    for query, (our_tokens, their_tokens, scores) in enumerate(
        zip(ours["tokens"], theirs["tokens"], ours["scores"], strict=True)
    ):
        kept = [s for s in scores if np.isfinite(s)]
        score = dict(zip(map(tuple, our_tokens), kept, strict=False))
        found = [tuple(row) for row in their_tokens]
        lost = [i for i in score if i not in set(found) and score[i] > kept[-1] + TOLERANCE]
        if lost:
            return f"query {query}: {len(lost)} of {len(score)} identifiers are not found"
        if theirs["scores"] is None:
            continue
        for identifier, value in zip(found, theirs["scores"][query], strict=True):
            if identifier in score and abs(score[identifier] - value) > TOLERANCE:
                return f"query {query}: scores differ by {abs(score[identifier] - value):.2g}"
    return None


def overlap(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The share of our identifiers that the peer found, too."""
    found = [
        len({*map(tuple, a)} & {*map(tuple, b)}) / len({*map(tuple, a)})
        for a, b in zip(ours["tokens"], theirs["tokens"], strict=True)
    ]
    return statistics.mean(found)


def agreement(ours: Worker, peer: Worker, dtype: str) -> str:
    """What the results have in common.

    Raises:
      ValueError: when they differ, where they must not.
    """
    if peer.peer == "unconstrained":
        return "different by nature"
    shares = []
    for number in range(CHECKED):
        found = [side.ask(do="find", number=number) for side in (ours, peer)]
        shares.append(overlap(*found))
        wrong = disagreement(*found) if dtype == "float32" else None
        if wrong:
            raise ValueError(f"results differ, {wrong}")
    if dtype != "float32":  # each side rounds in its own places
        return f"{statistics.mean(shares):.2f} of the documents"
    return "documents" if found[1]["scores"] is None else "yes"


def take_turns(ours: Worker, peer: Worker, turns: int, seconds: float) -> list[list[Any]]:
    """Times of both sides: at most `turns` each, fewer (LEAST_TURNS) after so many seconds."""
    times: list[list[dict[str, float]]] = [[], []]
    runs = [1, 1]
    began = time.monotonic()
    for turn in range(turns + 1):
        for side, worker in enumerate((ours, peer)):
            answer = worker.ask(do="time", number=CHECKED + turn, runs=runs[side])
            if turn:
                times[side].append(answer)
            else:  # the first turn warms up
                runs[side] = max(1, min(RUNS, round(TURN_SECONDS / answer["seconds"])))
        if len(times[0]) >= LEAST_TURNS and time.monotonic() - began > seconds:
            break
    return times


def measure(
    ours: Worker,
    peer: Worker,
    problem: Problem,
    beam: int,
    about_ours: dict[str, Any],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """One row of the table; our side is prepared already."""
    part = arguments.part
    request = {"problem": dataclasses.asdict(problem), "beam": beam, "part": part}
    about = [about_ours, peer.ask(do="prepare", **request)]
    agree = agreement(ours, peer, problem.dtype)
    times = take_turns(ours, peer, arguments.repeats, arguments.cell_seconds)

    def median(key: str, side: int) -> float:
        return statistics.median(t[key] for t in times[side])

    def ratio(key: str) -> float:
        return statistics.median(b[key] / a[key] for a, b in zip(*times, strict=True))

    return {
        "part": part,
        "peer": peer.peer,
        "device": arguments.device,
        "dtype": problem.dtype if part == "search" else "float32",
        "shape": problem.shape if part == "search" else "-",
        "set": problem.kind,
        "ids": len(problem.tokens),
        "beam": beam,
        "batch": problem.batch,
        "ratio": round(ratio("seconds"), 3),
        "cpu_ratio": round(ratio("cpu_seconds"), 3),
        "ours_ms": round(1e3 * median("seconds", 0), 2),
        "peer_ms": round(1e3 * median("seconds", 1), 2),
        "ours_cpu_ms": round(1e3 * median("cpu_seconds", 0), 2),
        "peer_cpu_ms": round(1e3 * median("cpu_seconds", 1), 2),
        "agree": agree,
        "repeats": len(times[0]),
        **{f"{key}_ours": _short(about[0][key]) for key in ("build_s", "bytes", "first_run_s")},
        **{f"{key}_peer": _short(about[1][key]) for key in ("build_s", "bytes", "first_run_s")},
        "memory_ours": about[0]["memory"],
        "memory_peer": about[1]["memory"],
        "normaliser_ours": about[0]["normaliser"],
        "normaliser_peer": about[1]["normaliser"],
    }


def _short(value: float) -> float:
    return value if isinstance(value, int) else round(value, 3)


def grid(arguments: argparse.Namespace) -> Iterator[tuple[Problem, int]]:
    for shape, kind, ids, batch, beam in itertools.product(
        arguments.shapes, arguments.sets, arguments.ids, arguments.batch, arguments.beams
    ):
        problem = Problem(
            ids=ids,
            kind=kind,
            shape=shape,
            batch=batch,
            vocab=arguments.vocab,
            length=arguments.length,
            dtype=arguments.dtype,
            normaliser=arguments.normaliser,
        )
        yield problem, beam


def compare(
    arguments: argparse.Namespace, keep: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """The rows of all peers. `keep` is called with all that there are, as soon as one is there."""
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(line(row), file=sys.stderr, flush=True)
        keep(rows)

    began = time.monotonic()
    make = functools.partial(
        Worker, threads=arguments.threads, device=arguments.device, dtype=arguments.dtype
    )
    peers = []
    for name in arguments.peers:
        absent = missing(name)
        if absent:
            print(f"{name}: left out, {', '.join(absent)} not installed", file=sys.stderr)
        else:
            peers.append(make(name))
    ours = make("ours")
    for problem, beam in grid(arguments):
        asked = [p for p in peers if p.peer != "hf" or problem.ids <= arguments.hf_ids]
        if arguments.time_limit and time.monotonic() - began > 60 * arguments.time_limit:
            print("the time limit is over; what follows was not measured", file=sys.stderr)
            break
        if not asked:
            continue
        request = {"problem": dataclasses.asdict(problem), "beam": beam, "part": arguments.part}
        failed = {"set": problem.kind, "ids": problem.ids, "beam": beam, "batch": problem.batch}
        failed["part"] = arguments.part
        try:
            about = ours.ask(do="prepare", **request)
        except ValueError as error:  # such as a full device; smaller problems may fit
            add({**failed, "peer": "ours", "error": str(error)})
            continue
        for peer in asked:
            try:
                add(measure(ours, peer, problem, beam, about, arguments))
            except (ValueError, RuntimeError) as error:
                add({**failed, "peer": peer.peer, "error": str(error)})
                if isinstance(error, RuntimeError):  # its process ended; the others go on
                    peers.remove(peer)
    for worker in (ours, *peers):
        worker.close()
    return rows


COLUMNS = (
    *("part", "peer", "device", "dtype", "shape", "set", "ids", "beam", "batch"),
    *("ratio", "cpu_ratio"),
    *("ours_ms", "peer_ms", "agree", "build_s_ours", "build_s_peer", "bytes_ours", "bytes_peer"),
    *("first_run_s_ours", "first_run_s_peer", "memory_ours", "memory_peer"),
)


def line(row: dict[str, Any]) -> str:
    if "error" in row:
        where = ", ".join(f"{k} {row[k]}" for k in ("set", "ids", "beam", "batch"))
        return f"| {row['part']} | {row['peer']} | {where}: {row['error']} |"
    cells = [f"{row[c]:,}" if isinstance(row[c], int) else str(row[c]) for c in COLUMNS]
    return f"| {' | '.join(cells)} |"


def table(rows: Sequence[dict[str, Any]]) -> str:
    head = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    return "\n".join([*head, *map(line, rows)])


def growth(
    arguments: argparse.Namespace, keep: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Time of our search over the number of identifiers, at every beam; with a picture."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    worker = Worker("ours", arguments.threads, arguments.device, arguments.dtype)
    clock = "cpu_seconds" if arguments.device == "cpu" else "seconds"
    rows: list[dict[str, Any]] = []
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for beam in arguments.beams:
        times = []
        for ids in arguments.ids:
            problem = Problem(
                ids=ids,
                vocab=arguments.vocab,
                shape=arguments.shapes[0],
                batch=arguments.batch[0],
                dtype=arguments.dtype,
                normaliser=arguments.normaliser,
            )
            request = {"problem": dataclasses.asdict(problem), "beam": beam}
            worker.ask(do="prepare", part=arguments.part, **request)
            runs = [worker.ask(do="time", number=n) for n in range(arguments.repeats + 1)][1:]
            times.append(1e3 * statistics.median(run[clock] for run in runs))
            row = {"part": arguments.part, "ids": ids, "beam": beam}
            row |= {clock.replace("seconds", "ms"): round(times[-1], 3)}
            rows.append(row)
            keep(rows)
            print(json.dumps(row), file=sys.stderr, flush=True)
        axes.plot(arguments.ids, times, marker="o", label=f"beam {beam}")
    worker.close()
    what = "ms of CPU a search" if clock == "cpu_seconds" else "ms a search"
    axes.set(xscale="log", xlabel="identifiers", ylabel=what, ylim=(0, None))
    axes.legend()
    figure.savefig(arguments.growth, dpi=120, bbox_inches="tight")
    return rows


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(float(part)) for part in text.split(",")]

    def among(names: Sequence[str]) -> Any:
        def names_of(text: str) -> list[str]:
            found = text.split(",")
            unknown = sorted(set(found) - set(names))
            if unknown:
                raise argparse.ArgumentTypeError(f"{unknown[0]!r}: give some of {', '.join(names)}")
            return found

        return names_of

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    others = [name for name in PEERS if name != "ours"]
    parser.add_argument("--part", choices=("search", "step"), default="search")
    parser.add_argument("--peers", type=among(others), default=["hf", "unconstrained"])
    parser.add_argument("--ids", type=numbers, default=[100_000])
    parser.add_argument("--beams", type=numbers, default=[10])
    parser.add_argument("--batch", type=numbers, default=[1])
    parser.add_argument("--sets", type=among(SETS), default=["random"])
    parser.add_argument("--shapes", type=among(list(SHAPES)), default=["small"])
    parser.add_argument("--vocab", type=int, default=2048, help="docid tokens, and two")
    parser.add_argument("--length", type=int, default=8, help="tokens of an identifier")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each side")
    parser.add_argument(
        "--cell-seconds", type=float, default=600, help="fewer turns of a row after so long"
    )
    parser.add_argument(
        "--time-limit", type=float, metavar="MINUTES", help="no row is begun after so long"
    )
    parser.add_argument(
        "--hf-ids", type=lambda text: int(float(text)), default=10**6, help="at most, with hf"
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--normaliser",
        choices=("vocabulary", "children"),
        default="vocabulary",
        help="what probabilities sum to one over: as the model was trained",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--growth", metavar="PNG", help="time over --ids instead, and its picture")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help='{"rows": [...]} on stdout, or in a file that is written after each row',
    )
    arguments = parser.parse_args()

    def keep(rows: list[dict[str, Any]]) -> None:
        if arguments.json and arguments.json != "-":
            Path(arguments.json).write_text(json.dumps({"rows": rows}, indent=1))

    rows = growth(arguments, keep) if arguments.growth else compare(arguments, keep)
    if arguments.json == "-":
        print(json.dumps({"rows": rows}))
    elif not arguments.growth:
        print(table(rows))


if __name__ == "__main__":
    main()
