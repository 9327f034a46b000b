"""The main job: corpus -> index -> training -> retriever folder.

RUN/
  index/       vocabulary, docids, trie, documents
  training/    checkpoints, metrics.jsonl, curves.png, TensorBoard events
  curves.png   the same picture, where a person looks first
  retriever/   the result, complete in itself; training/ can be deleted once it is there
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
import numpy as np

from genret_jax.corpus import Corpus, read_corpus
from genret_jax.data.batches import Batches, length_buckets, materialise
from genret_jax.data.examples import TrainingExamples, make_examples
from genret_jax.data.tasks import register
from genret_jax.data.vocabulary import SeqioVocabulary
from genret_jax.errors import UserError
from genret_jax.evaluation import evaluate
from genret_jax.files import replace_on_success
from genret_jax.indexing import Index, build_index, documents_digest
from genret_jax.modeling.model import Params, RetrievalModel
from genret_jax.ranking import Ranker
from genret_jax.recipe import Recipe
from genret_jax.retriever import Retriever, find_retriever, write_retriever
from genret_jax.splitting import Split, split_corpus
from genret_jax.training.budget import Clock
from genret_jax.training.trainer import Evaluate, TrainResult, train

log = logging.getLogger(__name__)
DEV_BEAM = 10
_DEV_METRICS = ("hits@1", "hits@10", "mrr@10")
_RESERVE_SECONDS = 5.0  # for writing the retriever
_MOST_PIECES = 400_000  # of documents, read before training begins: two minutes of a CPU
_TASKS = "genret"


def fit(
    corpus: str | Path | Corpus,
    *,
    recipe: Recipe,
    out: str | Path,
    minutes: float | None = None,
    started: float | None = None,
) -> Retriever:
    """Trains a retriever over a corpus, or goes on where an interrupted run stopped.

    Args:
      corpus: a BEIR folder, a corpus.jsonl, or a Corpus. Without train queries the model learns
        from the documents alone.
      recipe: what to do, from `load_recipe`.
      out: the run's folder.
      minutes: everything, compiling included, ends within this; the recipe's steps without it.
      started: `time.monotonic()` when the budget began; now by default.

    Returns:
      The retriever with the parameters that were best on dev.

    Raises:
      UserError: for a mistake in the corpus or the recipe, or a folder of another run.
      Interrupted: after SIGTERM or Ctrl-C, once a checkpoint is written.
    """
    if minutes is not None and minutes <= 0:
        raise UserError(f"minutes must be above 0, found {minutes}")
    if jax.process_count() > 1:
        raise UserError(
            f"{jax.process_count()} processes were started, but `genret fit` runs in one; "
            "start it once, with all devices of the machine"
        )
    clock = Clock(minutes * 60 if minutes else None, started=started, reserve=_RESERVE_SECONDS)
    out = Path(out)
    path, corpus = _read(corpus)
    split = split_corpus(corpus, recipe.data, seed=recipe.train.seed)
    _claim(out, recipe, corpus, split)
    if (out / "retriever" / "retriever.json").is_file():
        log.info("%s: already fitted", out)
        return Retriever.load(out)
    log.info("indexing %d documents as %s docids", len(corpus.documents), recipe.docids.kind)
    index = build_index(
        corpus,
        out / "index",
        docids=recipe.docids,
        vocabulary=recipe.vocabulary,
        pairs=split.pairs,
        seed=recipe.train.seed,
    )
    examples = make_examples(corpus.documents, split.pairs, index.vocabulary, index.table)
    length = recipe.data.input_length or examples.input_length()
    model = RetrievalModel(
        recipe.network.t5(index.vocabulary.size),
        index.vocabulary.docids,
        **dataclasses.asdict(recipe.loss),
    )
    ranker = Ranker(
        model=model,
        vocabulary=index.vocabulary,
        trie=index.trie,
        document_id=lambda position: corpus.documents[position].id,
        input_length=length,
    )
    result = train(
        model,
        _batches(examples, index, recipe, length),
        config=recipe.train,
        folder=out / "training",
        evaluate=_dev_evaluation(ranker, split, recipe.train.metric),
        clock=clock,
    )
    about = _about(recipe, corpus, path, index, model, split, result, length)
    about["training"]["seconds"] = round(clock.elapsed, 1)
    write_retriever(result.params, about, index_folder=out / "index", folder=out / "retriever")
    if (out / "training" / "curves.png").exists():
        shutil.copyfile(out / "training" / "curves.png", out / "curves.png")
    return Retriever.load(find_retriever(out))


def _batches(examples: TrainingExamples, index: Index, recipe: Recipe, length: int) -> Batches:
    data, train_config = recipe.data, recipe.train
    documents = len(examples.document_rows)
    share = examples.indexing_share(data.indexing_share)
    log.info("%d train pairs; %.0f %% indexing examples", len(examples.queries), 100 * share)
    register(
        _TASKS,
        examples,
        SeqioVocabulary(index.vocabulary),
        indexing_share=share,
        title_share=data.title_share,
        word_dropout=data.word_dropout,
    )
    pools = materialise(
        _TASKS,
        lengths={"inputs": length, "targets": index.trie.max_length},
        passes={
            "indexing": max(1, min(data.indexing_passes, _MOST_PIECES // documents)),
            "retrieval": 4 if data.word_dropout else 1,
        },
        seed=train_config.seed,
    )
    used = np.concatenate([(p.arrays["encoder_input_tokens"] > 0).sum(1) for p in pools])
    return Batches(
        pools,
        batch_size=train_config.batch_size,
        seed=train_config.seed,
        buckets=length_buckets(used, length),
        shard=(jax.process_index(), jax.process_count()),
    )


def _dev_evaluation(ranker: Ranker, split: Split, metric: str) -> Evaluate | None:
    if not split.dev_queries:
        return None
    names, texts = list(split.dev_queries), list(split.dev_queries.values())
    metrics = tuple(dict.fromkeys((*_DEV_METRICS, metric)))

    def run(params: Params) -> dict[str, float]:
        ranked = ranker.rank(params, texts, k=10, beam=DEV_BEAM)
        scores = {
            name: {ranker.document_id(r.position): r.score for r in hits}
            for name, hits in zip(names, ranked, strict=True)
        }
        return evaluate(scores, split.dev_qrels, metrics)

    return run


def _read(corpus: str | Path | Corpus) -> tuple[str, Corpus]:
    if isinstance(corpus, Corpus):
        return "", corpus
    read = read_corpus(corpus)
    for warning in read.warnings:
        log.warning("%s", warning)
    return str(Path(corpus).resolve()), read


def _claim(out: Path, recipe: Recipe, corpus: Corpus, split: Split) -> None:
    """Marks the folder as this run's, or finds that it is.

    A time budget is not part of a run's identity: it may be raised when it goes on.
    """
    content = [recipe.to_dict(), documents_digest(corpus.documents), split.pairs, split.dev_qrels]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    mark = out / "run.json"
    begun = any((out / name).exists() for name in ("index", "training", "retriever"))
    if mark.is_file() and begun:
        if json.loads(mark.read_text()).get("run") != digest:
            raise UserError(
                f"{out}: holds a run of another recipe or corpus; choose another --out, "
                "or delete the folder"
            )
        return
    if out.is_dir() and not begun and any(p != mark for p in out.iterdir()):
        raise UserError(f"{out}: exists and is not a run of genret_jax; choose another --out")
    with replace_on_success(mark) as temporary:
        temporary.write_text(json.dumps({"run": digest, "recipe": recipe.to_dict()}, indent=1))


def _about(
    recipe: Recipe,
    corpus: Corpus,
    path: str,
    index: Index,
    model: RetrievalModel,
    split: Split,
    result: TrainResult,
    length: int,
) -> dict[str, Any]:
    """What retriever.json says of the run."""
    return {
        "method": recipe.method,
        "network": dataclasses.asdict(model.config),
        "input_length": length,
        "docids": index.about["docids"],
        "corpus": {"name": corpus.name, "path": path, "documents": len(corpus.documents)},
        "parameters": sum(int(x.size) for x in jax.tree.leaves(result.params)),
        "dev": result.dev,
        "training": {
            "pairs": len(split.pairs),
            "dev_queries": len(split.dev_queries),
            "dev_beam": DEV_BEAM,
            "steps": result.steps,
            "best_step": result.best_step,
        },
        "recipe": recipe.to_dict(),
    }
