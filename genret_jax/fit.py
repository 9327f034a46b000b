"""The main job: corpus -> index -> stage 1 -> stage 2 -> retriever folder.

RUN/
  index/       vocabulary, docids, trie, documents
  training/    stage 1: checkpoints, metrics.jsonl, curves.png, TensorBoard events
  ranking/     stage 2, where the method has one: the same, and the negatives
  curves.png   the picture of the last stage, where a person looks first
  profile/     traces for xprof, where they were asked for
  retriever/   the result, complete in itself; the others can be deleted once it is there

A run that begins with stage 1 of another run has neither index/ nor training/ of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax

from genret_jax.corpus import Corpus, read_corpus
from genret_jax.docids.build import check_kind
from genret_jax.errors import UserError
from genret_jax.indexing import Index, build_index, documents_digest, vocabulary_identity
from genret_jax.modeling.model import Params
from genret_jax.pseudo_queries import read_pseudo_queries
from genret_jax.ranking import forget_programs
from genret_jax.recipe import Recipe
from genret_jax.retriever import Retriever, find_retriever, write_retriever
from genret_jax.splitting import Split, split_corpus
from genret_jax.stages.common import DEV_BEAM, Materials
from genret_jax.stages.first import take_docids, train_docids
from genret_jax.stages.margin import train_margin
from genret_jax.stages.second import SecondStage, take_ranking, train_ranking
from genret_jax.t5x import checkpoint
from genret_jax.training import processes
from genret_jax.training.budget import Clock, check_minutes
from genret_jax.training.claims import claimed
from genret_jax.training.profiling import Measuring
from genret_jax.training.trainer import TrainResult

log = logging.getLogger(__name__)
_RESERVE_SECONDS = 5.0  # for writing the retriever
STAGES = (1, 2)


def fit(
    corpus: str | Path | Corpus,
    *,
    recipe: Recipe,
    out: str | Path,
    minutes: float | None = None,
    started: float | None = None,
    stage: int | None = None,
    stage_one: str | Path | None = None,
    from_t5x: str | Path | None = None,
    profile: bool = False,
    peak_flops: float | None = None,
    pseudo_queries: str | Path | None = None,
) -> Retriever:
    """Trains a retriever over a corpus, or goes on where an interrupted run stopped.

    Args:
      corpus: a BEIR folder, a corpus.jsonl, or a Corpus. Without train queries the model learns
        from the documents alone.
      recipe: what to do, from `load_recipe`.
      out: the run's folder.
      minutes: everything, compiling included, ends within this; the recipe's steps without it.
      started: `time.monotonic()` when the budget began; now by default.
      stage: 1 stops after stage 1, with a retriever that ranks by generation alone; 2 goes on
        from there. By default all stages of the method.
      stage_one: folder of another run whose retriever is of stage 1: its index and parameters are
        taken, and only stage 2 is trained here. Its recipe may differ in ContrastiveConfig alone;
        its time counts as this run's.
      from_t5x: MODEL_DIR of T5X, or a checkpoint in it: the stage's parameters are taken from
        there instead of trained. The recipe must be that of T5X's gin files.
      profile: writes a trace of a few steps of every stage to profile/, for xprof.
      peak_flops: FLOP/s of one device, by which the utilisation in metrics.jsonl is measured; by
        default what is known of its kind.
      pseudo_queries: file of `genret pseudo-queries`, learned from beside the train queries.

    Several processes that joined (`genret_jax.training.processes.start`) train together when each
    of them makes the same call; `out` is on a file system that all see, and the first one writes.

    Returns:
      The retriever with the parameters that were best on dev.

    Raises:
      UserError: for a mistake in the corpus or the recipe, or a folder of another run, or one in
        which another process trains.
      Interrupted: after SIGTERM or Ctrl-C, once a checkpoint is written.
    """
    _check(recipe, minutes, stage, from_t5x, peak_flops)
    if stage_one:
        _check_stage_one(Path(stage_one), recipe, stage)
    out, home, given = Path(out), Path(stage_one or out), corpus
    clock = Clock(minutes * 60 if minutes else None, started=started, reserve=_RESERVE_SECONDS)
    if minutes:
        forget_programs()  # else what another fit has compiled would leave this one more steps
    path, corpus = processes.everywhere(lambda: read_given(given))
    split = split_corpus(corpus, recipe.data, seed=recipe.train.seed)
    if pseudo_queries:
        split = dataclasses.replace(split, pseudo=read_pseudo_queries(pseudo_queries, corpus))
    begun = _stage_one(home, recipe, corpus, split) if stage_one else None
    with claimed(out, recipe, _identity_of_run(recipe, corpus, split, begun)):
        last = stage or (2 if recipe.contrastive.wanted else 1)
        there = _stage_of(out)
        if there >= last:
            _check_origin(out, from_t5x)
            log.info("%s: already fitted", out)
            return Retriever.load(out)
        if stage == 2 and there < 1 and not begun:
            raise UserError(
                f"{out}: stage 1 is not done here; run `genret fit` with --stage 1 first"
            )
        if there == 1 and not begun and not (out / "training" / "checkpoints").is_dir():
            begun = _stage_one(out, recipe, corpus, split)  # trained elsewhere, or tidied up
        measuring = Measuring(out / "profile" if profile else None, peak_flops)
        materials = _materials(corpus, split, recipe, home / "index", measuring)
        taken = _of_t5x(materials, from_t5x) if from_t5x else None
        with clock.without(recipe.contrastive.share if last == 2 and stage is None else 0.0):
            first = _first_stage(materials, out, clock, begun, taken if last == 1 else None)
        second = None
        if last == 2:
            if stage == 2 and not stage_one:  # the budget is this stage's alone
                clock.resume(0.0)
            second = _second_stage(materials, first.params, out, clock, taken)
        about = _about(materials, corpus, path, first, second)
        about["training"]["seconds"] = round(clock.elapsed, 1)
        if from_t5x:
            about["training"]["t5x"] = str(checkpoint.latest(from_t5x))
        processes.on_first(lambda: _write(out, home / "index", about, first, second))
        processes.see(out / "retriever" / "retriever.json")
        return Retriever.load(find_retriever(out))


def _first_stage(
    materials: Materials,
    out: Path,
    clock: Clock,
    begun: _StageOne | None,
    taken: tuple[Params, int] | None,
) -> TrainResult:
    """Another run's, a checkpoint's of T5X, or trained."""
    if begun:
        clock.resume(begun.seconds)
        return begun.result
    if taken:
        return take_docids(materials, *taken)
    return train_docids(materials, out / "training", clock)


def _second_stage(
    materials: Materials,
    params: Params,
    out: Path,
    clock: Clock,
    taken: tuple[Params, int] | None,
) -> SecondStage:
    if clock.seconds:
        elapsed = processes.broadcast(clock.elapsed)  # so that all processes go the same way
        clock.check_left("stage 2, which --stage 2 trains alone", elapsed=elapsed)
    if taken:
        return take_ranking(materials, *taken)
    train_second = train_margin if materials.recipe.contrastive.rank else train_ranking
    return train_second(materials, params, out / "ranking", clock)


def _write(
    out: Path, index: Path, about: dict[str, Any], first: TrainResult, second: SecondStage | None
) -> None:
    write_retriever(
        (second.result if second else first).params,
        about,
        index_folder=index,
        folder=out / "retriever",
        vectors=second.vectors if second else None,
    )
    curves = out / ("ranking" if second else "training") / "curves.png"
    if curves.exists():
        shutil.copyfile(curves, out / "curves.png")


def _check_origin(out: Path, from_t5x: str | Path | None) -> None:
    """UserError where the retriever that is there is not of this checkpoint of T5X."""
    if not from_t5x:
        return
    about = json.loads((out / "retriever" / "retriever.json").read_text(encoding="utf-8"))
    found, wanted = about["training"].get("t5x"), str(checkpoint.latest(from_t5x))
    if found != wanted:
        raise UserError(
            f"{out}: holds a retriever of {found or 'a training of its own'}, not of {wanted}; "
            f"delete {out / 'retriever'} (and take stage 1 again), or choose another --out"
        )


def _of_t5x(materials: Materials, folder: str | Path) -> tuple[Params, int]:
    """Parameters of a checkpoint of T5X, and its step."""
    found = checkpoint.latest(folder)
    like = jax.eval_shape(lambda rng: materials.model.init(rng)[0], jax.random.key(0))
    return checkpoint.load_params(found, like), checkpoint.step_of(found)


def _check(
    recipe: Recipe,
    minutes: float | None,
    stage: int | None,
    from_t5x: str | Path | None,
    peak_flops: float | None,
) -> None:
    check_minutes(minutes)
    if from_t5x and stage is None:
        raise UserError("--from-t5x takes one stage; give --stage 1 or --stage 2")
    if from_t5x and stage == 2 and recipe.contrastive.rank:
        raise UserError("--from-t5x takes a contrastive stage 2; ContrastiveConfig.rank has none")
    if peak_flops is not None and not 0 < peak_flops < float("inf"):
        raise UserError(f"peak_flops must be a number above 0, such as 197e12, found {peak_flops}")
    if recipe.searcher.module:
        raise UserError(
            f"method {recipe.method} makes no generative retriever; use `genret fit`, or "
            "genret_jax.searchers.fit_method"
        )
    check_kind(recipe.docids.kind)
    second = recipe.contrastive
    if second.rank and (second.prefix or second.retrieval):
        raise UserError(
            "ContrastiveConfig.rank goes with neither prefix nor retrieval; leave one kind at 0"
        )
    if stage is not None and stage not in STAGES:
        raise UserError(f"stage must be 1 or 2, found {stage}")
    if stage == 2 and not recipe.contrastive.wanted:
        raise UserError(
            f"method {recipe.method} has one stage; choose dogr, or give "
            "ContrastiveConfig.retrieval a weight above 0"
        )
    if processes.count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"{processes.count()} processes see one another's devices but have not joined; start "
            "each with --processes auto, or call jax.distributed.initialize() first"
        )


def _stage_of(out: Path) -> int:
    """The last stage of the retriever in a run; 0 where there is none."""
    about = out / "retriever" / "retriever.json"
    if not about.is_file():
        return 0
    return 2 if "second_stage" in json.loads(about.read_text(encoding="utf-8")) else 1


def read_given(corpus: str | Path | Corpus) -> tuple[str, Corpus]:
    """Where a corpus is ("" for one in memory), and what is there; its warnings are logged."""
    if isinstance(corpus, Corpus):
        return "", corpus
    read = read_corpus(corpus)
    for warning in read.warnings:
        log.warning("%s", warning)
    return str(Path(corpus).resolve()), read


@dataclasses.dataclass(frozen=True)
class _StageOne:
    """Stage 1 of another run.

    Attributes:
      result: its parameters, on the host, and where they are from.
      seconds: it took, the index included.
      digest: of its weights.
    """

    result: TrainResult
    seconds: float
    digest: str


def _stage_one(folder: Path, recipe: Recipe, corpus: Corpus, split: Split) -> _StageOne:
    """Opens stage 1 of another run.

    Args:
      folder: of a run that `_check_stage_one` has found good.
      recipe, corpus, split: of this run.

    Raises:
      UserError: it is not what stage 1 of this run would be.
    """
    retriever = Retriever.load(folder)
    about, mark = retriever.about, json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if mark.get("run") != _identity(about["recipe"], corpus, split):
        raise UserError(f"{folder}: stage 1 of another corpus; train it on this one")
    ours, theirs = recipe.to_dict(), about["recipe"]
    parts = [part for part in ours if part not in ("method", "contrastive")]
    other = [part for part in parts if json.dumps(ours[part]) != json.dumps(theirs.get(part))]
    if about["network"].get("learned_temperature", False) != recipe.contrastive.learned_temperature:
        other.append("contrastive.learned_temperature")
    if other:
        raise UserError(
            f"{folder}: stage 1 of another recipe (its {other[0]} differs); train it with this one"
        )
    training = about["training"]
    with open(retriever.folder / "model.safetensors", "rb") as weights:
        digest = hashlib.file_digest(weights, "sha256").hexdigest()
    params = jax.device_get(retriever.params)
    result = TrainResult(params, training["best_step"], about["dev"], training["steps"])
    return _StageOne(result, float(training["seconds"]), digest)


def _check_stage_one(folder: Path, recipe: Recipe, stage: int | None) -> None:
    """UserError where no stage 2 is wanted, or the folder is no run of stage 1."""
    if stage == 1 or not recipe.contrastive.wanted:
        raise UserError("stage 1 of another run is given, but no stage 2 is wanted; leave it out")
    there = _stage_of(folder) if (folder / "run.json").is_file() else 0
    if there != 1:
        found = "no retriever of a run" if there == 0 else "a retriever of stage 2"
        raise UserError(f"{folder}: holds {found}; give a run made with --stage 1")


def _identity(recipe: dict[str, Any], corpus: Corpus, split: Split, *more: str) -> str:
    recipe = {**recipe, "vocabulary": vocabulary_identity(recipe["vocabulary"])}
    content = [recipe, documents_digest(corpus.documents), split.pairs, split.dev_qrels, *more]
    content += [split.dev_queries]
    content += [list(split.pseudo)] if split.pseudo else []
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _identity_of_run(recipe: Recipe, corpus: Corpus, split: Split, begun: _StageOne | None) -> str:
    """Of a run's recipe and corpus, which all processes must have been given alike."""
    digest = _identity(recipe.to_dict(), corpus, split, *([begun.digest] if begun else []))
    if len(set(processes.gather(digest))) > 1:
        raise UserError(
            "the processes were given different recipes or corpora; start all with one command"
        )
    return digest


def _materials(
    corpus: Corpus, split: Split, recipe: Recipe, folder: Path, measuring: Measuring
) -> Materials:
    def build() -> Index:
        return build_index(
            corpus,
            folder,
            docids=recipe.docids,
            vocabulary=recipe.vocabulary,
            pairs=split.pairs,
            seed=recipe.train.seed,
        )

    index = processes.first_then_others(build, sees=folder / "index.json")
    return Materials(corpus.documents, split, index, recipe, measuring)


def _about(
    materials: Materials,
    corpus: Corpus,
    path: str,
    first: TrainResult,
    second: SecondStage | None,
) -> dict[str, Any]:
    """What retriever.json says of the run."""
    recipe, split = materials.recipe, materials.split
    result = second.result if second else first
    about = {
        "method": recipe.method,
        "network": dataclasses.asdict(materials.model.config),
        "input_length": materials.input_length,
        "docids": materials.index.about["docids"],
        "corpus": {"name": corpus.name, "path": path, "documents": len(corpus.documents)},
        "parameters": sum(int(x.size) for x in jax.tree.leaves(result.params)),
        "dev": result.dev,
        "training": {
            "pairs": len(split.pairs),
            "pseudo_queries": len(split.pseudo),
            "dev_queries": len(split.dev_queries),
            **({"dev_queries_unseen": len(split.unseen)} if split.unseen else {}),
            "dev_beam": DEV_BEAM,
            "steps": first.steps + (second.result.steps if second else 0),
            "best_step": result.best_step,
        },
        "recipe": recipe.to_dict(),
    }
    if second:
        about["second_stage"] = {"steps": second.result.steps, **second.report}
    if second and second.fusion:
        about["fusion"] = second.fusion.to_dict()
        about["second_stage"] |= {
            "vector": recipe.contrastive.vector,
            "similarity": recipe.contrastive.similarity,
        }
    return about
