"""The tasks of a corpus with the recipe of the gin configuration: what gin files of T5X name.

    from tasks import recipe
    MIXTURE_OR_TASK_NAME = @recipe.docid_mixture()

`Place.corpus` and `Place.run` say where. A run's index is made where it is missing; negatives
likewise. Everything is opened and registered once, so that gin may ask as often as it likes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path

import gin
import numpy as np

from genret_jax.corpus import read_corpus
from genret_jax.data.query_tasks import register_queries
from genret_jax.errors import UserError
from genret_jax.indexing import Index, build_index
from genret_jax.modeling.model import Params
from genret_jax.negatives import Negatives
from genret_jax.pseudo_queries import read_pseudo_queries
from genret_jax.recipe import configured
from genret_jax.splitting import split_corpus
from genret_jax.stages.common import Materials
from genret_jax.stages.first import starting
from genret_jax.stages.second import negatives_an_example
from genret_jax.training import processes
from tasks.folder import (
    Registered,
    mined,
    register_contrastive_materials,
    register_materials,
)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Place:
    """Attributes:
    corpus: BEIR folder.
    run: folder of the run; gets index/, and for stage 2 negatives/.
    pseudo_queries: file of generated queries to learn from, too; "" for none.
    """

    corpus: str = ""
    run: str = ""
    pseudo_queries: str = ""


_place = gin.external_configurable(Place, name="Place")


def materials() -> Materials:
    """The corpus, made ready, with the run's index."""
    return _materials(_key())


def index() -> Index:
    """Vocabulary, docids and trie of the run."""
    return materials().index


def docid_mixture() -> str:
    """Stage 1: train queries and pieces of documents -> docids. Name of the mixture."""
    return _docid(_key()).mixture


def docid_lengths() -> dict[str, int]:
    """The lengths of its features."""
    return dict(_docid(_key()).lengths)


def ranking_mixture() -> str:
    """Stage 2: the same with documents and negatives beside them. Name of the mixture."""
    return _ranking(_key()).mixture


def ranking_lengths() -> dict[str, int]:
    """The lengths of its features."""
    return dict(_ranking(_key()).lengths)


def prefix_negatives() -> int:
    """How many of an example's negatives share a docid prefix with its document."""
    return _negatives(_key())[1][0]


def queries(split: str = "dev") -> str:
    """The queries of a split, for evaluation and inference. Name of the task.

    Args:
      split: "dev" is what training evaluates on, held-out train queries where the corpus has no
        dev split.
    """
    made = materials()
    texts, qrels = made.split.dev_queries, made.split.dev_qrels
    if split != "dev":
        read = read_corpus(_place().corpus)
        texts, qrels = read.split_queries(split), read.qrels.get(split, {})
    if not texts:
        raise UserError(
            f"split {split!r} has no queries; choose another, or train without evaluation "
            "(--gin.train_script.train.infer_eval_dataset_cfg=None)"
        )
    name = f"{_name(_key())}_{split}"
    return register_queries(name, texts, qrels, made.index, made.document_ids, split=split)


def start() -> Callable[[Params], Params]:
    """What TrainConfig.start says: fresh parameters -> those to begin stage 1 with."""
    return starting(materials()) or (lambda fresh: fresh)


# What opens and registers is remembered by everything that it depends on, as text.
def _key() -> str:
    place, recipe = _place(), configured()
    if not place.corpus or not place.run:
        raise UserError("Place.corpus and Place.run are not set; give --gin.CORPUS and --gin.RUN")
    return json.dumps([*dataclasses.astuple(place), recipe.to_dict()], sort_keys=True)


@functools.cache
def _materials(key: str) -> Materials:
    del key
    place, recipe = _place(), configured()
    read = read_corpus(place.corpus)
    for warning in read.warnings:
        log.warning("%s", warning)
    split = split_corpus(read, recipe.data, seed=recipe.train.seed)
    if place.pseudo_queries:
        pseudo = read_pseudo_queries(place.pseudo_queries, read)
        split = dataclasses.replace(split, pseudo=pseudo)

    def made() -> Index:
        return build_index(
            read,
            Path(place.run) / "index",
            docids=recipe.docids,
            vocabulary=recipe.vocabulary,
            pairs=split.pairs,
            seed=recipe.train.seed,
        )

    return Materials(
        read.documents,
        split,
        processes.first_then_others(made, sees=Path(place.run) / "index" / "index.json"),
        recipe,
    )


@functools.cache
def _docid(key: str) -> Registered:
    return register_materials(_materials(key), name=f"{_name(key)}_docids")


@functools.cache
def _negatives(key: str) -> tuple[Negatives, tuple[int, int]]:
    """Those of step 0, and how many of each kind an example gets."""
    made = _materials(key)
    found = mined(made, Path(_place().run))
    some_share = bool((np.asarray(found.prefix) >= 0).any())
    return found, negatives_an_example(made.recipe.contrastive, some_share)


@functools.cache
def _ranking(key: str) -> Registered:
    found, counts = _negatives(key)
    return register_contrastive_materials(
        _materials(key), found, name=f"{_name(key)}_ranking", counts=counts
    )


def _name(key: str) -> str:
    """A name that SeqIO takes."""
    folder = Path(json.loads(key)[0]).name
    return "".join(c if c.isalnum() else "_" for c in folder) or "corpus"
