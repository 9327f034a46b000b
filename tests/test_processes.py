"""Several processes: two real ones train, are stopped and killed, and go on; shares and errors."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny import FAST

from genret_jax import UserError
from genret_jax.fit import fit
from genret_jax.recipe import load_recipe
from genret_jax.training import partitioning, processes
from genret_jax.training.journal import read_records
from genret_jax.vectors import DocumentVectors
from genret_jax.weights import load_weights

BINDINGS = (
    *FAST,
    "TrainConfig.learning_rate = 1e-2",
    "ContrastiveConfig.learning_rate = 1e-2",
    "ContrastiveConfig.refresh_every = 12",
    "DataConfig.input_length = 8",
    "DocidConfig.kind = 'rq'",
    "DocidConfig.settings = {'codebooks': 2, 'codes': 4}",
)
OPTIONS = [part for binding in BINDINGS for part in ("--gin", binding)]

# Each process fits with the command line: SIGTERM reaches one of them in stage 1, the same command
# goes on, and in stage 2 both are killed. In between, what they tell one another is looked at.
WORKER = """
import os, signal, sys, time
import numpy as np
from genret_jax import UserError
from genret_jax.cli import main
from genret_jax.data.batches import Batches
from genret_jax.data.contrastive import ContrastiveBatches
from genret_jax.training import processes

arguments, index = sys.argv[1:], int(sys.argv[-1])
plain, plain_2, sent = Batches.__getitem__, ContrastiveBatches.__getitem__, []

def item(self, n):
    if n == 3 and index == 1 and not sent:
        sent.append(os.kill(os.getpid(), signal.SIGTERM))
    time.sleep(0.25 if not stopped and n >= 3 else 0)  # the word goes round while steps are made
    return plain(self, n)

def item_2(self, n):
    if n == 14:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain_2(self, n)

def fail(message):
    raise UserError(message)

def error_of(work):
    try:
        work()
    except UserError as error:
        return str(error)

def talk():
    processes._BLOCK = 4096  # several blocks, the last of them shorter
    assert processes.gather("x" * (9000 * index)) == ["", "x" * 9000]
    assert processes.broadcast(index + 5) == 5
    for n in (0, 1, 5):
        assert processes.spread(lambda some: [x * x for x in some], range(n)) == [
            x * x for x in range(n)
        ]
    table, parts = np.zeros(5), [np.array([4, 0]), np.array([1]), np.array([2, 3])]
    def work(mine):
        for part in mine:
            table[part] = 10 * part + index
    processes.fill(work, parts, read=table.__getitem__, write=table.__setitem__)
    assert table.tolist() == [0, 11, 20, 30, 40], table
    arrays = processes.broadcast_arrays({"a": np.full(3, index + 1, np.float32)})
    assert arrays["a"].tolist() == [1, 1, 1]
    whose = error_of(lambda: processes.everywhere(lambda: index == 1 and fail("no")))
    assert whose == ("no" if index == 1 else "process 1: no"), whose
    ran = []
    assert processes.on_first(lambda: ran.append(1) or "first") == "first"
    assert ran == [1] * (1 - index)
    assert error_of(lambda: processes.on_first(lambda: fail("no"))) == (
        "process 0: no" if index else "no"
    )

Batches.__getitem__, ContrastiveBatches.__getitem__, stopped = item, item_2, []
code = main(arguments)
print("stopped with", code, flush=True)
assert code == 128 + signal.SIGTERM, code
talk()
stopped.append(code)
main(arguments)
"""


def _free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _pair(command, arguments):
    """Two processes of one device each; their exit codes and what they printed."""
    port = _free_port()
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    environment = {
        **os.environ,
        "XLA_FLAGS": flags,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # the second pair compiles nothing
    }
    common = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process"]
    started = [
        subprocess.Popen(
            [sys.executable, *command, *arguments, *common, str(i)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        printed = [process.communicate(timeout=900)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], printed


@pytest.fixture(scope="module")
def alone(collection, tmp_path_factory):
    """An uninterrupted run of one process with two devices."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    with pytest.MonkeyPatch.context() as patch:
        two = functools.partial(partitioning.make_mesh, devices=jax.devices()[:2])
        patch.setattr(partitioning, "make_mesh", two)
        fit(collection, recipe=load_recipe("dogr", bindings=BINDINGS), out=out)
    return out


@pytest.fixture(scope="module")
def together(collection, tmp_path_factory):
    """The same run by two processes, stopped in stage 1, killed in stage 2, gone on with twice."""
    out = tmp_path_factory.mktemp("runs") / "together"
    arguments = ["fit", str(collection), "--out", str(out), *OPTIONS]
    codes, printed = _pair(["-c", WORKER], arguments)
    assert codes == [-signal.SIGKILL] * 2, "\n".join(printed)
    stops = [[x for x in text.splitlines() if "training stopped at step" in x] for text in printed]
    assert len(stops[0]) == 1 and stops[0] == stops[1], "both at one step"
    assert all(f"stopped with {128 + signal.SIGTERM}" in text for text in printed)
    assert not (out / "retriever").exists()
    codes, printed = _pair(["-m", "genret_jax"], arguments)
    assert codes == [0, 0], "\n".join(printed)
    assert "going on from step 10 of 20" in printed[0]
    assert "50 steps" in printed[0] and "50 steps" not in printed[1], "the first one reports"
    return out


@pytest.mark.parametrize(("stage", "steps"), [("training", 30), ("ranking", 20)])
def test_two_processes_stopped_and_killed_equal_one_alone(alone, together, stage, steps):
    a, b = (read_records(x / stage / "metrics.jsonl", up_to=99) for x in (alone, together))
    # What is averaged between two lines differs where a session ended; dev is measured at steps.
    for name in ("hits@1", "mrr@10"):
        dev = [[(r["step"], r[name]) for r in x if r["kind"] == "dev"] for x in (a, b)]
        assert dev[0] == dev[1] and dev[0][-1][0] == steps
    losses = [{r["step"]: r["loss"] for r in x if r["kind"] == "train"} for x in (a, b)]
    assert set(losses[0]) <= set(losses[1]) and losses[0]
    same = [step for step in losses[0] if step - 5 in (0, *losses[1]) and step - 5 >= 0]
    assert len(same) >= 3
    assert [losses[1][s] for s in same[-2:]] == pytest.approx(
        [losses[0][s] for s in same[-2:]], abs=1e-5
    )


def test_the_retrievers_are_one(alone, together):
    a, b = (load_weights(x / "retriever" / "model.safetensors") for x in (alone, together))
    for one, two in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
    folders = [x / "retriever" for x in (alone, together)]
    abouts = [json.loads((folder / "retriever.json").read_text()) for folder in folders]
    for about in abouts:
        about["training"].pop("seconds")
    assert abouts[0] == abouts[1], "negatives, dev metrics, fusion, and which step was the best"
    vectors = [DocumentVectors.load(x / "retriever", documents=8) for x in (alone, together)]
    rows = np.arange(len(vectors[0].values))
    np.testing.assert_allclose(vectors[0].rows(rows), vectors[1].rows(rows), atol=0.01)
    assert not [p for p in together.rglob("*") if ".tmp-" in p.name]


# --- without a second process ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "environment", "message"),
    [
        ({"processes": "2", "process": 0}, {}, "missing: --coordinator"),
        ({"coordinator": "a:1"}, {}, "missing: --processes, --process"),
        ({}, {"JAX_NUM_PROCESSES": "2"}, "missing: --coordinator, --process"),
        ({"coordinator": "a:1", "processes": "two", "process": 0}, {}, "must be whole numbers"),
        ({"coordinator": "a:1", "processes": "2", "process": 2}, {}, "below --processes 2"),
        ({"coordinator": "a", "processes": "2", "process": 0}, {}, "must be HOST:PORT"),
    ],
)
def test_half_given_processes_are_refused(given, environment, message):
    with pytest.raises(UserError, match=message):
        processes.start(**given, environment=environment)


@pytest.mark.parametrize(
    ("given", "environment", "joined"),
    [
        ({}, {}, None),
        ({"coordinator": "a:1", "processes": "1", "process": 0}, {}, None),
        (
            {"coordinator": "a:1", "processes": "2", "process": 1},
            {"JAX_PROCESS_ID": "0"},
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1},
        ),
        (
            {},
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1},
        ),
        ({"processes": "auto"}, {}, {"coordinator_address": None}),
        ({}, {"JAX_NUM_PROCESSES": "auto"}, {"coordinator_address": None}),
        ({}, {"TPU_WORKER_HOSTNAMES": "a,b"}, {"coordinator_address": None}),
        ({}, {"TPU_WORKER_HOSTNAMES": "a"}, None),
        (
            {},
            {
                "SLURM_STEP_NODELIST": "n[1-2]",
                "SLURM_PROCID": "0",
                "SLURM_LOCALID": "0",
                "SLURM_NTASKS": "2",
            },
            {"coordinator_address": None},
        ),
        ({}, {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),  # a batch script, not its steps
        ({}, {"OMPI_COMM_WORLD_SIZE": "2"}, {"coordinator_address": None}),
    ],
)
def test_when_processes_join(given, environment, joined, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    processes.start(**given, environment=environment)
    assert calls == ([] if joined is None else [joined])


def test_one_process_does_all_itself(tmp_path):
    assert processes.is_first() and processes.count() == 1
    assert processes.gather("x") == ["x"] and processes.broadcast(3) == 3
    assert processes.spread(lambda some: [2 * x for x in some], range(5)) == [0, 2, 4, 6, 8]
    assert processes.on_first(lambda: 1) == processes.everywhere(lambda: 1) == 1
    table = np.zeros(6)

    def work(parts):
        for part in parts:
            table[part] += part

    parts = [np.array([0, 3]), np.array([1, 2, 4, 5])]
    processes.fill(work, parts, read=table.__getitem__, write=table.__setitem__)
    assert table.tolist() == list(range(6))
    processes.see(tmp_path / "never")  # what it wrote it sees
    with pytest.raises(ZeroDivisionError):
        processes.everywhere(lambda: 1 / 0)
