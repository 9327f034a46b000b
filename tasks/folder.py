"""Tasks over any BEIR folder and the run that `genret index` or `genret fit` made of it.

    from tasks.folder import register_folder
    made = register_folder("my_corpus", "runs/mine")
    seqio.get_dataset(made.mixture, made.lengths, seqio.EncDecFeatureConverter(pack=False))

The same tasks that the native trainer reads, for everything that takes a SeqIO mixture by name.
`register_folder_contrastive` has those of the second stage. `tasks.recipe` has both for gin files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from pathlib import Path

import numpy as np
import seqio

from genret_jax.corpus import read_corpus
from genret_jax.data.contrastive import DocumentSide, Questions
from genret_jax.data.contrastive_tasks import document_lengths, register_contrastive
from genret_jax.data.tasks import register
from genret_jax.data.vocabulary import SeqioVocabulary
from genret_jax.errors import UserError
from genret_jax.indexing import Index
from genret_jax.negatives import Negatives, known_positives
from genret_jax.pseudo_queries import read_pseudo_queries
from genret_jax.recipe import Recipe, load_recipe
from genret_jax.splitting import split_corpus
from genret_jax.stages.common import Materials
from genret_jax.stages.second import Miner
from genret_jax.weights import load_weights

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Registered:
    """Attributes:
    mixture: name of the mixture; NAME_retrieval, NAME_indexing and, with pseudo-queries,
      NAME_pseudo are its tasks.
    lengths: {"inputs", "targets"}: what `task_feature_lengths` should be.
    """

    mixture: str
    lengths: dict[str, int]


def register_folder(
    corpus: str,
    run: str,
    *,
    name: str = "folder",
    recipe: Recipe | None = None,
    pseudo_queries: str | None = None,
) -> Registered:
    """Registers retrieval, indexing and their mixture for a corpus and its index.

    Args:
      corpus: BEIR folder.
      run: folder with the index of that corpus.
      name: of the mixture.
      recipe: of the run, for rates and lengths; method dogr's by default.
      pseudo_queries: file of generated queries to learn from, too.
    """
    return register_materials(_open(corpus, run, recipe, pseudo_queries), name=name)


def register_folder_contrastive(
    corpus: str,
    run: str,
    *,
    name: str = "folder_contrastive",
    recipe: Recipe | None = None,
    step: int = 0,
    pseudo_queries: str | None = None,
) -> Registered:
    """Registers the tasks of the second stage, to be read with `ContrastiveFeatureConverter`.

    Args:
      corpus, run, name, recipe, pseudo_queries: see `register_folder`.
      step: of the second stage at which the negatives were mined.

    Raises:
      UserError: see `register_contrastive_materials`.
    """
    materials = _open(corpus, run, recipe, pseudo_queries)
    config, folder = materials.recipe.contrastive, Path(run) / "ranking" / "negatives" / str(step)
    negatives = Negatives.load(folder) if folder.is_dir() else mined(materials, Path(run))
    prefix = config.prefix_negatives if (np.asarray(negatives.prefix) >= 0).any() else 0
    counts = prefix, config.retrieved_negatives
    return register_contrastive_materials(materials, negatives, name=name, counts=counts)


def register_materials(materials: Materials, *, name: str) -> Registered:
    """Registers stage 1 over materials that are open already."""
    register(
        name,
        materials.examples,
        SeqioVocabulary(materials.index.vocabulary),
        **materials.task_settings,
    )
    return Registered(name, _lengths(materials))


def register_contrastive_materials(
    materials: Materials, negatives: Negatives, *, name: str, counts: tuple[int, int]
) -> Registered:
    """Registers stage 2 over materials that are open already.

    Args:
      materials: the corpus, made ready.
      negatives: of its documents and train queries.
      name: of the mixture.
      counts: prefix and retrieved negatives of an example.

    Raises:
      UserError: the negatives are of another corpus, or of other train queries.
    """
    config = materials.recipe.contrastive
    positives = known_positives(materials.split.all_pairs)
    questions = Questions.of(positives, materials.documents)
    docids = materials.index.vocabulary.docids
    side = DocumentSide.of(materials.examples, positives, docids, config)
    rows = len(negatives.prefix), len(negatives.retrieved)
    if rows != (len(materials.documents), len(questions.texts)):
        raise UserError(
            f"negatives of {rows[0]} documents and {rows[1]} questions, but here are "
            f"{len(materials.documents)} and {len(questions.texts)}; give the corpus and the seed "
            "of the fit"
        )
    register_contrastive(
        name,
        materials.examples,
        SeqioVocabulary(materials.index.vocabulary),
        side,
        questions,
        positives,
        negatives,
        prefix=counts[0],
        retrieved=counts[1],
        **materials.task_settings,
    )
    lengths = document_lengths(side, questions, negatives=sum(counts))
    return Registered(name, {**_lengths(materials), **lengths})


def _open(corpus: str, run: str, recipe: Recipe | None, pseudo_queries: str | None) -> Materials:
    recipe = recipe or load_recipe("dogr")
    read = read_corpus(corpus)
    split = split_corpus(read, recipe.data, seed=recipe.train.seed)
    if pseudo_queries:
        split = dataclasses.replace(split, pseudo=read_pseudo_queries(pseudo_queries, read))
    return Materials(read.documents, split, Index.load(Path(run) / "index"), recipe)


def _lengths(materials: Materials) -> dict[str, int]:
    return {"inputs": materials.input_length, "targets": materials.target_length}


def mined(materials: Materials, run: Path) -> Negatives:
    """Negatives to train with from the beginning: those of RUN/negatives where nothing has changed.

    The model is RUN's retriever, where there is one and the recipe says so; else BM25 searches.
    """
    weights = run / "retriever" / "model.safetensors"
    params, origin = None, "bm25"
    if materials.recipe.contrastive.source == "model":
        if weights.is_file():
            params = load_weights(weights)
            with open(weights, "rb") as file:
                origin = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            log.info("%s: no retriever there; negatives are mined with BM25", run)
            config = dataclasses.replace(materials.recipe.contrastive, source="bm25")
            recipe = dataclasses.replace(materials.recipe, contrastive=config)
            materials = dataclasses.replace(materials, recipe=recipe)
    miner = Miner(materials, run / "negatives", origin=origin)
    return miner.negatives(0, params)


def vocabulary(run: str) -> seqio.Vocabulary:
    """The vocabulary of a run, for gin files."""
    return SeqioVocabulary.load(Path(run) / "index")
