"""Several processes that train one model: who is first, waiting for one another, sharing results.

JAX runs one process a host (or a device), all with the same program. Each has its rows of a batch;
what else differs over them goes through here. In one process everything here does nothing.

All processes must make the same calls in the same order. The run's folder must be on a file system
that all of them see.
"""

from __future__ import annotations

import itertools
import os
import pickle
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from genret_jax.errors import UserError

T = TypeVar("T")
A = TypeVar("A")
AUTO = "auto"
_PATIENCE_MS = 7 * 24 * 3600 * 1000  # the first process may build an index for long
_BLOCK = 2**26  # bytes on a device while results are gathered
_SMALLEST = 2**10
_VISIBLE_SECONDS = 90.0  # NFS remembers for up to a minute that a file was not there
_barriers = itertools.count()
_steps = itertools.count(1)


def start(
    *,
    coordinator: str | None = None,
    processes: str | int | None = None,
    process: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Joins the processes of this job, before anything else asks JAX for a device.

    Without arguments the environment decides: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, or a cluster of several processes that `jax.distributed.initialize` knows
    (Slurm, Open MPI, TPU pods on GKE). Where none of them is there, this is one process alone.

    Args:
      coordinator: HOST:PORT of process 0, free there and within reach of all.
      processes: how many; "auto" asks the cluster, as TPU VMs need, which show no variables.
      process: which one this is, from 0.
      environment: variables.

    Raises:
      UserError: where some of the three are missing, or make no sense.
    """
    if jax.distributed.is_initialized():
        return
    coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS") or None
    processes = processes if processes is not None else environment.get("JAX_NUM_PROCESSES")
    number = process if process is not None else environment.get("JAX_PROCESS_ID")
    nothing = processes is None and coordinator is None and number is None
    if processes == AUTO or (nothing and _in_cluster(environment)):
        _initialize(coordinator_address=coordinator)
        return
    given = {"coordinator": coordinator, "processes": processes, "process": number}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        return
    if missing:
        raise UserError(
            f"several processes need all of --coordinator, --processes and --process; missing: "
            f"{', '.join('--' + name for name in missing)} (or --processes auto on a cluster)"
        )
    try:
        count, index = int(str(processes)), int(str(number))
    except ValueError:
        raise UserError(
            f"--processes {processes} and --process {number} must be whole numbers"
        ) from None
    if not 0 <= index < count:
        raise UserError(f"--process {index} must be at least 0 and below --processes {count}")
    if not str(coordinator).rpartition(":")[2].isdecimal() or ":" not in str(coordinator):
        raise UserError(f"--coordinator {coordinator} must be HOST:PORT of process 0")
    if count > 1:
        _initialize(coordinator_address=coordinator, num_processes=count, process_id=index)


def _in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX knows has started several processes."""
    slurm = ("SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environment for name in slurm) and environment.get("SLURM_NTASKS", "1") != "1":
        return True
    if environment.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        return True
    if environment.get("MEGASCALE_NUM_SLICES", "1") != "1":
        return True
    return "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def _initialize(**arguments: Any) -> None:
    try:
        jax.distributed.initialize(**arguments)
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise UserError(
            f"the processes of this job do not find one another ({reason}); give --coordinator "
            "HOST:PORT, --processes N and --process I to each"
        ) from None


def count() -> int:
    return jax.process_count()


def is_first() -> bool:
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here; for as long as one of them works."""
    if count() == 1:
        return
    from orbax.checkpoint import multihost

    key = f"genret/{next(_barriers)}/{name}"
    multihost.get_barrier_sync_fn()(key=key, timeout_ms=_PATIENCE_MS)


def gather(value: T) -> list[T]:
    """What every process gives, in their order, on every process.

    Args:
      value: anything that can be pickled; it travels in blocks of bounded size.
    """
    if count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value, protocol=5), np.uint8)
    barrier("gather")
    size = np.frombuffer(len(data).to_bytes(8, "little"), np.uint8)
    sizes = [int.from_bytes(row, "little") for row in multihost_utils.process_allgather(size)]
    parts = [bytearray() for _ in sizes]
    begin, most = 0, max(sizes)
    while begin < most:
        # Powers of two, so that few programs serve every size.
        width = min(1 << (most - begin - 1).bit_length(), max(_SMALLEST, _BLOCK // count()))
        block = np.zeros(max(width, _SMALLEST), np.uint8)
        here = data[begin : begin + len(block)]
        block[: len(here)] = here
        for part, row in zip(parts, multihost_utils.process_allgather(block), strict=True):
            part += row.tobytes()
        begin += len(block)
    return [pickle.loads(bytes(part[:n])) for part, n in zip(parts, sizes, strict=True)]


def broadcast(value: T) -> T:
    """What the first process gives; the others may give anything."""
    return gather(value if is_first() else None)[0]  # type: ignore[return-value]


def broadcast_arrays(tree: T) -> T:
    """The arrays of the first process; the others give arrays of the same shapes.

    Args:
      tree: on the host.
    """
    if count() == 1:
        return tree
    barrier("arrays")
    return multihost_utils.broadcast_one_to_all(tree)


def spread(work: Callable[[list[A]], Iterable[T]], items: Sequence[A]) -> list[T]:
    """`work(items)`, each process doing its share.

    Args:
      work: items -> one result each, which can be pickled.
      items: the same on every process, which takes every n-th of them.

    Returns:
      The results in the order of the items.
    """
    everything = list(items)
    if count() == 1:
        return list(work(everything))
    out: list[Any] = [None] * len(everything)
    mine = everything[jax.process_index() :: count()]
    for process, part in enumerate(_gathered(lambda: list(work(mine)))):
        out[process :: count()] = part
    return out


def fill(
    work: Callable[[list[np.ndarray]], None],
    parts: Sequence[np.ndarray],
    *,
    read: Callable[[np.ndarray], T],
    write: Callable[[np.ndarray, T], None],
) -> None:
    """Fills a table that every process has, each process working for its share of the rows.

    Args:
      work: fills the rows of some parts.
      parts: int[rows] each, the same on every process.
      read, write: rows -> what stands there, and back.
    """
    mine = list(parts[jax.process_index() :: count()])
    if count() == 1:
        work(mine)
        return

    def filled() -> tuple[np.ndarray, T]:
        work(mine)
        rows = np.concatenate([np.zeros(0, np.int64), *mine])
        return rows, read(rows)

    for process, (rows, there) in enumerate(_gathered(filled)):
        if process != jax.process_index():
            write(rows, there)


def _gathered(work: Callable[[], T]) -> list[T]:
    """The result of every process; an error of one is raised on all."""
    value, error = _outcome(work)
    found = gather((value, None if error is None else _Failure.of(error)))
    _raise([failure for _, failure in found], error)
    return [value for value, _ in found]  # type: ignore[misc]


def everywhere(work: Callable[[], T]) -> T:
    """Every process does the work and has its own result; an error of one is raised on all."""
    if count() == 1:
        return work()
    value, error = _outcome(work)
    _raise(gather(None if error is None else _Failure.of(error)), error)
    return value  # type: ignore[return-value]


def on_first(work: Callable[[], T]) -> T:
    """The first process alone does the work; all have its result, or its error."""
    if count() == 1:
        return work()
    value, error = _outcome(work) if is_first() else (None, None)
    value, failure = broadcast((value, None if error is None else _Failure.of(error)))
    _raise([failure], error)
    return value  # type: ignore[return-value]


def first_then_others(work: Callable[[], T], *, sees: Path) -> T:
    """The first process does the work, then the others, which find `sees` on disk already."""
    if count() == 1:
        return work()
    value, error = _outcome(work) if is_first() else (None, None)
    _raise([broadcast(None if error is None else _Failure.of(error))], error)
    see(sees)
    if is_first():
        return everywhere(lambda: value)  # type: ignore[return-value]
    return everywhere(work)


def see(path: Path) -> None:
    """Waits until every process sees what the first has written.

    Raises:
      UserError: one of them does not.
    """

    def wait() -> None:
        end = time.monotonic() + _VISIBLE_SECONDS
        while not path.exists():
            if time.monotonic() > end:
                raise UserError(
                    f"{path}: written by process 0, but not seen here; give an --out on a file "
                    "system that all processes share"
                )
            time.sleep(0.2)

    if count() > 1:
        everywhere(wait)


def reached_stop() -> bool:
    """Whether SIGTERM has reached any of the processes; the answer is the same at the same call.

    JAX's own protocol: between calls it costs nothing. Calls are numbered over the life of the
    process, because stages begin their steps anew.
    """
    return bool(multihost_utils.reached_preemption_sync_point(next(_steps)))


class _Failure:
    """An error as it travels."""

    def __init__(self, message: str, mendable: bool):
        self.message, self.mendable = message, mendable

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        mendable = isinstance(error, UserError)
        return cls(str(error) if mendable else repr(error), mendable)


def _outcome(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def _raise(failures: Sequence[_Failure | None], own: Exception | None) -> None:
    """Raises this process's error, or else that of the first process that had one."""
    if own is not None:
        raise own
    for process, failure in enumerate(failures):
        if failure is not None:
            message = f"process {process}: {failure.message}"
            raise UserError(message) if failure.mendable else RuntimeError(message)
