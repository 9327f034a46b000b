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
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from genret_jax.corpus import Corpus, Qrels, read_corpus
from genret_jax.data.batches import Batches, length_buckets, materialise
from genret_jax.data.examples import TrainingExamples, make_examples
from genret_jax.data.tasks import register
from genret_jax.data.vocabulary import SeqioVocabulary
from genret_jax.errors import UserError
from genret_jax.evaluation import evaluate
from genret_jax.files import replace_on_success
from genret_jax.indexing import Index, build_index
from genret_jax.modeling.model import Params, RetrievalModel
from genret_jax.ranking import Ranker
from genret_jax.recipe import DataConfig, Recipe
from genret_jax.retriever import Retriever, find_retriever, write_retriever
from genret_jax.training.budget import Clock
from genret_jax.training.trainer import Evaluate, TrainResult, train

log = logging.getLogger(__name__)
DEV_BEAM = 10
_DEV_METRICS = ("hits@1", "hits@10", "mrr@10")
_RESERVE_SECONDS = 5.0  # for writing the retriever
_TASKS = "genret"


@dataclasses.dataclass(frozen=True)
class Split:
    """What is trained on and what chooses the best parameters.

    Attributes:
      pairs: train (query, position of a relevant document).
      dev_queries: id -> text; dev_qrels: their judgements. Empty where a corpus has no queries.
    """

    pairs: list[tuple[str, int]]
    dev_queries: dict[str, str]
    dev_qrels: Qrels


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
    began = time.monotonic()
    clock = Clock(minutes * 60 if minutes else None, started=started, reserve=_RESERVE_SECONDS)
    out = Path(out)
    path, corpus = _read(corpus)
    _claim(out, recipe, corpus)
    if (out / "retriever" / "retriever.json").is_file():
        log.info("%s: already fitted", out)
        return Retriever.load(out)
    split = split_corpus(corpus, recipe.data, seed=recipe.train.seed)
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
        evaluate=_dev_evaluation(ranker, split),
        clock=clock,
    )
    about = _about(recipe, corpus, path, index, model, split, result, length)
    about["training"]["seconds"] = round(time.monotonic() - began, 1)
    write_retriever(result.params, about, index_folder=out / "index", folder=out / "retriever")
    if (out / "training" / "curves.png").exists():
        shutil.copyfile(out / "training" / "curves.png", out / "curves.png")
    return Retriever.load(find_retriever(out))


def split_corpus(corpus: Corpus, config: DataConfig, *, seed: int) -> Split:
    """The train pairs, and a dev set: the corpus's own, or train queries held out of training."""
    train = corpus.pairs("train") if "train" in corpus.splits else []
    if not train:
        log.warning("%s has no train queries: learning from the documents alone", corpus.name)
    rng = np.random.default_rng([seed, 11])
    if "dev" in corpus.splits:
        queries = corpus.split_queries("dev")
        chosen = _sample(list(queries), config.dev_queries, rng)
        qrels = corpus.qrels["dev"]
        return Split(train, {q: queries[q] for q in chosen}, {q: qrels[q] for q in chosen})
    if not train or not config.held_out:
        return Split(train, {}, {})
    queries = corpus.split_queries("train")
    count = min(config.dev_queries, max(1, int(len(queries) * config.held_out)))
    chosen = _sample(list(queries), count, rng)
    held = {queries[q] for q in chosen}  # by text, so that no copy of a question stays in train
    log.info("no dev split: %d of %d train queries are held out", len(chosen), len(queries))
    return Split(
        [(query, position) for query, position in train if query not in held],
        {q: queries[q] for q in chosen},
        {q: corpus.qrels["train"][q] for q in chosen},
    )


def _sample(names: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    if len(names) <= count:
        return list(names)
    return [names[i] for i in sorted(rng.choice(len(names), count, replace=False))]


def _batches(examples: TrainingExamples, index: Index, recipe: Recipe, length: int) -> Batches:
    data, train_config = recipe.data, recipe.train
    register(
        _TASKS,
        examples,
        SeqioVocabulary(index.vocabulary),
        indexing_share=data.indexing_share,
        title_share=data.title_share,
        word_dropout=data.word_dropout,
    )
    pools = materialise(
        _TASKS,
        lengths={"inputs": length, "targets": index.trie.max_length},
        passes={"indexing": data.indexing_passes, "retrieval": 4 if data.word_dropout else 1},
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


def _dev_evaluation(ranker: Ranker, split: Split) -> Evaluate | None:
    if not split.dev_queries:
        return None
    names, texts = list(split.dev_queries), list(split.dev_queries.values())

    def run(params: Params) -> dict[str, float]:
        ranked = ranker.rank(params, texts, k=10, beam=DEV_BEAM)
        scores = {
            name: {ranker.document_id(r.position): r.score for r in hits}
            for name, hits in zip(names, ranked, strict=True)
        }
        return evaluate(scores, split.dev_qrels, _DEV_METRICS)

    return run


def _read(corpus: str | Path | Corpus) -> tuple[str, Corpus]:
    if isinstance(corpus, Corpus):
        return "", corpus
    read = read_corpus(corpus)
    for warning in read.warnings:
        log.warning("%s", warning)
    return str(Path(corpus).resolve()), read


def _claim(out: Path, recipe: Recipe, corpus: Corpus) -> None:
    """Marks the folder as this run's, or finds that it is.

    A time budget is not part of a run's identity: it may be raised when it goes on.
    """
    identity = json.dumps([recipe.to_dict(), corpus.name, len(corpus.documents)], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()
    mark = out / "run.json"
    if mark.is_file():
        if json.loads(mark.read_text()).get("run") != digest:
            raise UserError(
                f"{out}: holds a run of another recipe or corpus; choose another --out, "
                "or delete the folder"
            )
        return
    if out.exists() and any(out.iterdir()) and not (out / "index").exists():
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
