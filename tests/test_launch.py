"""What the launch scripts would run, as they print it; none of it was run on a real cluster."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
# Spaces, quotes, a backslash, what the shell and sed treat specially, and a placeholder's name.
AWKWARD = """TrainConfig.start = "random" 'x' & $HOME \\ @NAME@ `date`"""
GENRET = ["genret", "fit", "/shared/corpus", "--out", "/shared/run", "--gin", AWKWARD]
T5X = ["python", "-m", "t5x.train", "--gin_file=runs/dogr.gin", "--gin.MODEL_DIR='/shared/t5x'"]
COMMANDS = pytest.mark.parametrize("command", [GENRET, T5X], ids=["genret", "t5x"])

GKE = ["--name", "mine", "--image", "registry/genret:1"]
V5E = [*GKE, "--accelerator", "tpu-v5-lite-podslice", "--topology", "4x8"]
QUEUED = ["--name", "mine", "--zone", "us-west4-a", "--repository", "https://host/genret.git"]
SKY = ["--name", "mine", "--accelerators", "H100:8", "--bucket", "gs://mine"]
SLURM = ["--name", "mine", "--nodes", "2", "--gpus", "4"]

# Path in the manifest -> type, or the value it must have. After the CRD of JobSet and the Job and
# Pod of Kubernetes: names that are wrong here are refused there.
JOBSET = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata.name": str,
    "metadata.labels": dict,
    "metadata.annotations": dict,
    "spec.failurePolicy.maxRestarts": int,
    "spec.replicatedJobs.0.name": str,
    "spec.replicatedJobs.0.replicas": int,
    "spec.replicatedJobs.0.template.spec.parallelism": int,
    "spec.replicatedJobs.0.template.spec.completions": int,
    "spec.replicatedJobs.0.template.spec.completionMode": "Indexed",
    "spec.replicatedJobs.0.template.spec.backoffLimit": 0,
}
POD = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": int,
    "nodeSelector.cloud.google.com/gke-tpu-accelerator": str,
    "nodeSelector.cloud.google.com/gke-tpu-topology": str,
    "containers.0.name": str,
    "containers.0.image": str,
    "containers.0.command": list,
    "containers.0.resources.requests.google.com/tpu": int,
    "containers.0.resources.limits.google.com/tpu": int,
    "containers.0.volumeMounts.0.name": str,
    "containers.0.volumeMounts.0.mountPath": "/shared",
    "volumes.0.name": str,
    "volumes.0.persistentVolumeClaim.claimName": str,
}
SKY_TASK = {
    "name": str,
    "num_nodes": int,
    "workdir": str,
    "envs": dict,
    "file_mounts": dict,
    "setup": str,
    "run": str,
}


def _script(name, *arguments, check=True):
    done = subprocess.run(
        [LAUNCH / name, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def _dry(name, *arguments):
    return _script(name, "--dry-run", *arguments).stdout


def _leaves(node, prefix=()):
    """Every (path, value): lists by number, and what is empty or a list of words as it is."""
    if isinstance(node, dict) and node:
        for key, child in node.items():
            yield from _leaves(child, (*prefix, str(key)))
    elif isinstance(node, list) and any(isinstance(x, dict) for x in node):
        for number, child in enumerate(node):
            yield from _leaves(child, (*prefix, str(number)))
    else:
        yield ".".join(prefix), node


def _check(found, schema):
    """Nothing is missing, nothing is of another type or value, and nothing else is there."""
    for path, wanted in schema.items():
        here = found
        rest = path
        while rest:  # keys may have dots of their own
            keys = [str(i) for i in range(len(here))] if isinstance(here, list) else list(here)
            key = next((k for k in keys if rest == k or rest.startswith(f"{k}.")), None)
            assert key is not None, f"{path} is missing"
            here = here[int(key)] if isinstance(here, list) else here[key]
            rest = rest[len(key) + 1 :]
        if isinstance(wanted, type):
            assert isinstance(here, wanted) and not isinstance(here, bool), f"{path}: {here!r}"
        else:
            assert here == wanted, f"{path}: {here!r}"
    for path, _ in _leaves(found):
        assert any(path == p or path.startswith(f"{p}.") for p in schema), f"{path} is unknown"


@COMMANDS
def test_a_job_set(command):
    manifest = yaml.safe_load(_dry("gke.sh", *V5E, "--slices", "2", "--", *command))
    jobs = manifest["spec"]["replicatedJobs"]
    pod = jobs[0]["template"]["spec"].pop("template")["spec"]
    _check(manifest, JOBSET)
    _check(pod, POD)
    assert pod["containers"][0]["command"] == command, "word for word"
    assert (jobs[0]["replicas"], jobs[0]["template"]["spec"]["parallelism"]) == (2, 8)
    assert jobs[0]["template"]["spec"]["completions"] == 8, "4 x 8 chips, 4 a host"
    assert pod["containers"][0]["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]
    assert manifest["metadata"] == {
        "name": "mine",
        "labels": {},
        "annotations": {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        },
    }


def test_a_queue_and_hosts_of_another_size():
    more = ["--queue", "tpus", "--claim", "lustre", "--chips", "8", "--restarts", "3"]
    v6e = [*GKE, "--accelerator", "tpu-v6e-slice", "--topology", "2x4"]
    manifest = yaml.safe_load(_dry("gke.sh", *v6e, *more, "--", "x"))
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "tpus"}
    assert manifest["spec"]["failurePolicy"] == {"maxRestarts": 3} and job["parallelism"] == 1
    assert "@" not in json.dumps(manifest["spec"]), "every placeholder is filled in"


@COMMANDS
def test_xpk(command):
    arguments = [*GKE, "--accelerator", "v5p-32", "--slices", "2", "--xpk", "pods", "--", *command]
    line = shlex.split(_dry("gke.sh", *arguments))
    assert line[:-1] == shlex.split(
        "xpk workload create --cluster pods --workload mine --tpu-type v5p-32 --num-slices 2 "
        "--docker-image registry/genret:1 --max-restarts 100 --command"
    )
    assert shlex.split(line[-1]) == ["exec", *command]


@COMMANDS
@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-32", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_queued_resources(kind, runtime, command):
    arguments = [*QUEUED, "--type", kind, "--spot", "--setup", "mount -a", "--", *command]
    create, setup, train = map(shlex.split, _dry("queued.sh", *arguments).splitlines())
    assert create == shlex.split(
        "gcloud compute tpus queued-resources create mine --zone us-west4-a --node-id mine "
        f"--accelerator-type {kind} --runtime-version {runtime} --spot"
    )
    ssh = "gcloud compute tpus tpu-vm ssh mine --zone us-west4-a --worker all --command"
    assert setup[:-1] == train[:-1] == shlex.split(ssh)
    assert setup[-1].startswith("mount -a && ") and "jax[tpu]" in setup[-1]
    head, _, tail = train[-1].partition("exec ")
    assert "export JAX_NUM_PROCESSES=auto" in head and shlex.split(tail) == command


@COMMANDS
def test_sky(command):
    line = shlex.split(_dry("sky.sh", *SKY, "--nodes", "2", "--", *command))
    options = shlex.split(
        "sky jobs launch --yes --name mine --num-nodes 2 --gpus H100:8 --use-spot --env"
    )
    assert line[: len(options)] == options
    sent, *rest = line[len(options) :]
    assert shlex.split(sent.removeprefix("COMMAND=")) == command
    assert rest[:2] == ["--env", "BUCKET=gs://mine"] and Path(rest[2]) == LAUNCH / "sky.yaml"
    assert "--no-use-spot" in _dry("sky.sh", *SKY, "--on-demand", "--", "x")


def test_the_sky_task():
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    _check(task, SKY_TASK)
    assert task["file_mounts"] == {"/shared": {"source": "${BUCKET}", "mode": "MOUNT"}}
    assert set(task["envs"]) == {"COMMAND", "BUCKET", "PORT"}


@pytest.mark.parametrize("gpus", [8, 0])
def test_what_a_sky_node_runs(gpus, tmp_path):
    """The task's own script, with a command that prints what it was told."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    show = """python3 -c 'import os; print([os.environ.get(n) for n in (
"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")])'"""
    environment = {
        "PATH": "/usr/bin:/bin:/usr/local/bin",
        "COMMAND": show,
        "PORT": "12355",
        "SKYPILOT_NUM_GPUS_PER_NODE": str(gpus),
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    run = yaml.safe_load((LAUNCH / "sky.yaml").read_text())["run"]
    done = subprocess.run(
        ["bash", "-c", run], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    expected = ["10.0.0.1:12355", "2", "1"] if gpus else [None, "auto", None]
    assert done.stdout.strip() == str(expected), done.stderr


@COMMANDS
def test_slurm(command):
    text = _dry("slurm.sh", *SLURM, "--partition", "gpu", "--", *command)
    lines = text.splitlines()
    options = dict(line[8:].split("=", 1) for line in lines if "=" in line[8:] and "#SB" in line)
    assert options == {
        "--job-name": "mine",
        "--nodes": "2",
        "--ntasks-per-node": "4",
        "--gpus-per-node": "4",
        "--cpus-per-task": "8",
        "--time": "24:00:00",
        "--signal": "TERM@180",
        "--open-mode": "append",
        "--output": "mine-%j.log",
        "--partition": "gpu",
    }
    assert lines[0] == "#!/usr/bin/env bash" and "#SBATCH --requeue" in lines
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (143, True), (1, False)])
def test_a_slurm_job_that_was_stopped_is_queued_again(code, requeued, tmp_path):
    for name, body in (
        ("srun", f'printf "%s\\n" "$@"; exit {code}'),
        ("scontrol", 'echo "$@" > requeued'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", _dry("slurm.sh", *SLURM, "--", *GENRET)],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert done.stdout.splitlines() == ["--kill-on-bad-exit=1", *GENRET]
    assert (tmp_path / "requeued").exists() == requeued
    assert not requeued or (tmp_path / "requeued").read_text() == "requeue 7\n"


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("gke.sh", V5E, "no command"),
        ("gke.sh", [*GKE, "--", "x"], "--accelerator are needed"),
        ("gke.sh", [*V5E, "--topology", "4*8", "--", "x"], "is not like 4x4"),
        ("gke.sh", [*V5E, "--topology", "3x3", "--", "x"], "no hosts of 4"),
        ("gke.sh", [*V5E, "--slices", "two", "--", "x"], "not a whole number"),
        ("gke.sh", ["--color", "red", "--", "x"], "unknown option --color"),
        ("queued.sh", [*QUEUED, "--type", "v3-8", "--", "x"], "is not v4-N"),
        ("queued.sh", ["--name"], "--name needs a value"),
        ("sky.sh", [*SKY, "--nodes", "0", "--", "x"], "above 0"),
        ("slurm.sh", ["--name", "a", "--nodes", "2", "--", "x"], "not a whole number"),
        ("local.sh", [], "usage"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(script, arguments, message):
    done = _script(script, *arguments, check=False)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not done.stdout
