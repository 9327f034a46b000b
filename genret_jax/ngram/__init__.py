"""Method `ngram`: every n-gram of a document identifies it (SEAL), in several views (MINDER).

Where ContrastiveConfig.rank is above 0, a second stage learns to rank (LTRGR).

A T5 writes text pieces inside a trie of all n-grams of the corpus. All prefixes that its beam holds
are n-grams; their log p and frequency give them weights, and documents are ranked by the weights
of the n-grams that stand in them (Bevilacqua et al., NeurIPS 2022; Li et al., ACL 2023).

retriever/ holds spiece.model, vocabulary.json, model.safetensors, ids.json, ngram.json and a folder
of n-grams a view, besides what `genret_jax.searchers` writes.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax

from genret_jax.configs import DataConfig
from genret_jax.corpus import Corpus
from genret_jax.documents import descending
from genret_jax.errors import UserError
from genret_jax.indexing import NO_DOCIDS
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.model import RetrievalModel
from genret_jax.ngram.index import NgramIndex
from genret_jax.ngram.scoring import Weighting
from genret_jax.ngram.searcher import NgramRanker, NgramSearcher
from genret_jax.ngram.settings import RANKING, NgramSettings
from genret_jax.vocabularies import DocidSpace, Vocabulary
from genret_jax.weights import load_weights, save_weights

GROUP, PSEUDO_QUERIES = "generative", True
_ABOUT, _IDS = "ngram.json", "ids.json"


def fit(corpus: Corpus, folder: Path, work: Any) -> dict[str, Any]:
    """Trains the model and writes it with the n-grams; see `genret_jax.searchers`."""
    from genret_jax.stages.ngram import NgramTraining  # brings SeqIO
    from genret_jax.stages.ngram_margin import check_ranking, learn_to_rank

    settings = NgramSettings(**work.settings)
    _check(work.recipe, settings)
    split = work.split
    training = NgramTraining.of(corpus, split, work.recipe, settings, work.run / "index")
    second, ranking, before = work.recipe.contrastive, {}, 0
    if second.rank:
        check_ranking(training)
    with work.clock.without(second.share if second.rank else 0.0):
        result = training.train(work.run / "training", work.clock)
    if second.rank:
        work.clock.check_left("learning to rank")
        before = result.steps
        ranking["first_stage"] = {"steps": result.steps, "dev": result.dev}
        result, about = learn_to_rank(training, result.params, work.run / "ranking", work.clock)
        ranking["second_stage"] = about
    curves = work.run / ("ranking" if ranking else "training") / "curves.png"
    if curves.exists():
        shutil.copyfile(curves, work.run / "curves.png")
    for name in ("spiece.model", "vocabulary.json"):
        shutil.copyfile(work.run / "index" / name, folder / name)
    save_weights(result.params, folder / "model.safetensors")
    ranker, ids = training.ranker, training.materials.document_ids
    for view, index in ranker.views.items():
        (folder / view).mkdir()
        index.save(folder / view)
    (folder / _IDS).write_text(json.dumps(ids, ensure_ascii=False), "utf-8")
    about = {
        "network": dataclasses.asdict(ranker.model.config),
        "input_length": ranker.input_length,
        "beam": ranker.beam,
        "unigrams": ranker.unigrams,
        "weighting": dataclasses.asdict(ranker.weighting),
        "views": list(ranker.views),
    }
    (folder / _ABOUT).write_text(json.dumps(about, indent=1))
    return {
        "dev": result.dev,
        "parameters": sum(int(x.size) for x in jax.tree.leaves(result.params)),
        "training": {
            "pairs": len(split.pairs),
            "pseudo_queries": len(split.pseudo),
            "dev_queries": len(split.dev_queries),
            "steps": before + result.steps,
            "best_step": result.best_step,
        },
        "ngrams": {view: index.report() for view, index in ranker.views.items()},
        **ranking,
    }


def load(folder: Path) -> NgramSearcher:
    """Opens what `fit` left.

    Raises:
      UserError: it is not whole.
    """
    try:
        about = json.loads((folder / _ABOUT).read_text("utf-8"))
        ids = json.loads((folder / _IDS).read_text("utf-8"))
        config = T5Config(**about["network"])
        weighting = Weighting(**about["weighting"])
        beam, unigrams = int(about["beam"]), int(about["unigrams"])
        length = int(about["input_length"])
        views = {view: folder / view for view in about["views"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no whole ngram retriever here ({error!r}); fit again") from None
    vocabulary = Vocabulary.load(folder)
    ranker = NgramRanker(
        model=RetrievalModel(config, DocidSpace(2, vocabulary.text_size)),
        vocabulary=vocabulary,
        views={view: NgramIndex.load(path) for view, path in views.items()},
        weighting=weighting,
        beam=beam,
        input_length=length,
        unigrams=unigrams,
    )
    params = jax.tree.map(jax.numpy.asarray, load_weights(folder / "model.safetensors"))
    return NgramSearcher(ranker, params, ids, descending(ids))


def _check(recipe: Any, settings: NgramSettings) -> None:
    """That the recipe says nothing of parts that this method does not have."""
    for name, found, wanted in (
        ("DocidConfig.kind", recipe.docids.kind, NO_DOCIDS),
        ("DataConfig.frame_share", recipe.data.frame_share, 0),
        ("DataConfig.pseudo_share", recipe.data.pseudo_share, DataConfig().pseudo_share),
        ("ContrastiveConfig.prefix", recipe.contrastive.prefix, 0),
        ("ContrastiveConfig.retrieval", recipe.contrastive.retrieval, 0),
        ("ContrastiveConfig.refresh_every", recipe.contrastive.refresh_every, 0),
        ("ContrastiveConfig.learned_temperature", recipe.contrastive.learned_temperature, False),
        ("ContrastiveConfig.source", recipe.contrastive.source, "model"),
    ):
        if found != wanted:
            raise UserError(
                f"method {recipe.method} writes n-grams: {name} is {found!r}, but must "
                f"be {wanted!r}; leave out what sets it"
            )
    for name in RANKING:
        found, default = getattr(settings, name), getattr(NgramSettings(), name)
        if found != default and not recipe.contrastive.rank:
            raise UserError(
                f"SearcherConfig.settings: {name} is {found}, but without ContrastiveConfig.rank "
                "nothing is ranked in training; leave it out"
            )
