"""The T5X runner with T5X: both stages trained, searched with, and compared to the native one."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import FAST, tiny_corpus

from genret_jax.corpus import write_corpus
from genret_jax.fit import fit
from genret_jax.indexing import FORMAT, build_index
from genret_jax.recipe import load_recipe
from genret_jax.retriever import Retriever
from genret_jax.splitting import split_corpus
from genret_jax.stages.common import Materials
from genret_jax.t5x import checkpoint
from genret_jax.training.trainer import train
from genret_jax.weights import save_weights

ROOT = Path(__file__).resolve().parent.parent
STEPS = 50
BINDINGS = (
    *FAST,
    "NetworkConfig.dropout_rate = 0.0",
    "TrainConfig.start = 'random'",
    f"TrainConfig.steps = {STEPS}",
    "TrainConfig.log_every = 1",
    "TrainConfig.batch_size = 16",
    "DocidConfig.kind = 'hierarchical'",
)

pytestmark = [
    pytest.mark.t5x,
    pytest.mark.skipif(
        importlib.util.find_spec("t5x") is None,
        reason="T5X IS NOT INSTALLED, SO NOTHING OF IT WAS TESTED HERE: see README, 'T5X'",
    ),
]


def run_t5x(
    program: str, folder: Path, recipe: str, *lines: str, devices: int = 1, **macros: object
) -> str:
    """`python -m t5x.PROGRAM` with a recipe, further lines of gin, and macros; its output."""
    gin = folder / f"{program}-{recipe}.gin"
    imports = ["from __gin__ import dynamic_registration", f"import __main__ as {program}_script"]
    imports += ["from genret_jax.t5x import data", "from genret_jax.t5x import start"]
    imports += ["from t5x import partitioning", "from tasks import recipe"]
    gin.write_text("\n".join([*imports, f"include 'gin_configs/recipes/{recipe}.gin'", *lines]))
    plain = folder / "tiny.gin"
    plain.write_text("\n".join(BINDINGS))
    command = [sys.executable, "-m", f"t5x.{program}", f"--gin_file={gin}", f"--gin_file={plain}"]
    command += [f"--gin.{name}={value!r}" for name, value in macros.items()]
    command += ["--alsologtostderr"]
    count = f"--xla_force_host_platform_device_count={devices}"
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", count, os.environ["XLA_FLAGS"])
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert "Traceback" not in done.stderr, done.stderr[-5000:]  # T5X only logs some failures
    return done.stderr


@dataclasses.dataclass(frozen=True)
class Place:
    folder: Path
    corpus: str
    run: str
    materials: Materials
    native: list[float]
    params: object


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A corpus, its index, starting parameters, and a native stage 1 from there."""
    folder = tmp_path_factory.mktemp("t5x")
    corpus, recipe = tiny_corpus(), load_recipe("dogr", bindings=BINDINGS)
    write_corpus(corpus, folder / "tiny")
    run = folder / "run"
    split = split_corpus(corpus, recipe.data, seed=0)
    index = build_index(
        corpus,
        run / "index",
        docids=recipe.docids,
        vocabulary=recipe.vocabulary,
        pairs=split.pairs,
    )
    materials = Materials(corpus.documents, split, index, recipe)
    start = jax.device_get(materials.model.init(jax.random.key(7))[0])
    begun = folder / "start" / "retriever"
    begun.mkdir(parents=True)
    save_weights(start, begun / "model.safetensors")
    (begun / "retriever.json").write_text(json.dumps({"format": FORMAT}))
    result = train(
        materials.model,
        materials.batches(materials.pools, batch_size=recipe.train.batch_size),
        config=recipe.train,
        folder=folder / "native",
        start=lambda _: start,
    )
    lines = (folder / "native" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line) for line in lines]
    native = [line["loss"] for line in losses if "loss" in line]
    return Place(folder, str(folder / "tiny"), str(run), materials, native, result.params)


@pytest.fixture(scope="module")
def stage_one(place):
    """Stage 1 under T5X, over the same batches: MODEL_DIR."""
    model_dir = place.folder / "stage1"
    run_t5x(
        "train",
        place.folder,
        "dogr_stage1",
        "train_script.train.get_dataset_fn = @data.native_batches()",
        "data.native_batches.materials = @recipe.materials()",
        "train_script.train.stats_period = 1",
        "partitioning.PjitPartitioner.num_partitions = None",  # on eight simulated devices, 4 x 2
        "partitioning.PjitPartitioner.model_parallel_submesh = (1, 2)",
        "start.StartingState.start = @start.from_retriever()",
        f"start.from_retriever.run = {str(place.folder / 'start')!r}",
        CORPUS=place.corpus,
        RUN=place.run,
        MODEL_DIR=str(model_dir),
        TRAIN_STEPS=STEPS,
        EVAL_PERIOD=STEPS // 2,
        BATCH_SIZE=16,
        devices=8,
    )
    return model_dir


def _losses(model_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    events = EventAccumulator(str(model_dir / "train"), size_guidance={"tensors": 0})
    events.Reload()
    return [float(tensor_util.make_ndarray(e.tensor_proto)) for e in events.Tensors("loss")]


def test_the_first_losses_of_both_runners_are_equal(place, stage_one):
    theirs = _losses(stage_one)
    assert len(theirs) == len(place.native) == STEPS
    np.testing.assert_allclose(theirs, place.native, atol=1e-4)
    assert place.native[-1] < place.native[0] - 0.3, "there was something to learn"


def test_its_checkpoint_has_the_parameters_of_the_native_runner(place, stage_one):
    found = checkpoint.latest(stage_one)
    assert checkpoint.step_of(found) == STEPS
    params = checkpoint.load_params(found, place.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), params, place.params)


@pytest.fixture(scope="module")
def retriever(place, stage_one):
    recipe = load_recipe("dogr", bindings=BINDINGS)
    return fit(place.corpus, recipe=recipe, out=place.run, stage=1, from_t5x=stage_one)


def test_evaluation_during_training_is_that_of_the_retriever(stage_one, retriever):
    lines = (stage_one / "inference_eval" / "tiny_dev-metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last.pop("step") == STEPS
    assert last == pytest.approx({k: retriever.about["dev"][k] for k in last})


def test_infer_finds_what_the_retriever_finds(place, stage_one, retriever):
    out = place.folder / "infer"
    run_t5x(
        "infer",
        place.folder,
        "dogr_search",
        CORPUS=place.corpus,
        RUN=place.run,
        CHECKPOINT_PATH=str(checkpoint.latest(stage_one)),
        INFER_OUTPUT_DIR=str(out),
        BEAM=8,
    )
    (file,) = out.glob("*.jsonl-00000-of-00001")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 8
    trie, documents = retriever.index.trie, place.materials.document_ids
    for line in lines:
        hits = retriever.search(line["inputs"]["inputs_pretokenized"], k=8, beam=8)
        rows, scores = line["aux"]["row"][::-1], line["aux"]["scores"][::-1]
        found = [documents[p] for row in rows for p in sorted(trie.documents(int(row)).tolist())]
        assert [hit.document for hit in hits] == found
        np.testing.assert_allclose([hit.score for hit in hits], scores, atol=1e-5)


def test_stage_two_trains_from_that_retriever_and_comes_back(place, stage_one, retriever):
    assert "fusion" not in retriever.about
    model_dir = place.folder / "stage2"
    run_t5x(
        "train",
        place.folder,
        "dogr_stage2",
        CORPUS=place.corpus,
        RUN=place.run,
        MODEL_DIR=str(model_dir),
        TRAIN_STEPS=4,
        EVAL_PERIOD=2,
        BATCH_SIZE=16,
    )
    assert (Path(place.run) / "negatives" / "0" / "negatives.json").is_file()
    recipe = load_recipe("dogr", bindings=BINDINGS)
    both = fit(place.corpus, recipe=recipe, out=place.run, stage=2, from_t5x=model_dir)
    assert both.about["second_stage"]["steps"] == 4 and "fusion" in both.about
    before = Retriever.load(place.run).params
    changed = jax.tree.map(
        lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), before, place.params
    )
    assert any(jax.tree.leaves(changed))
    hit = both.search("bread", k=1)[0]
    assert hit.score == hit.fused and hit.semantic is not None


def test_eval_measures_a_split(place, stage_one, retriever):
    log = run_t5x(
        "eval",
        place.folder,
        "dogr_evaluate",
        CORPUS=place.corpus,
        RUN=place.run,
        CHECKPOINT_PATH=str(checkpoint.latest(stage_one)),
        EVAL_OUTPUT_DIR=str(place.folder / "eval"),
        BEAM=8,
    )
    assert "tiny_test/hits@1" in log
