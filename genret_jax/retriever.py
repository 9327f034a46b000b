"""One folder on disk = one retriever: search, save, load. Never imports TensorFlow.

retriever/
  retriever.json      what it is: method, network, recipe, corpus, dev metrics
  index.json, spiece.model, vocabulary.json, docids/, trie/, documents.*   the index
  model.safetensors   weights
  vectors.*           semantic vectors of the documents, where the method has a second stage
  metrics.json        dev metrics, and those of every split, and search, that was evaluated
  README.md           model card
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import jax
import numpy as np

from genret_jax.baselines.protocol import Hit
from genret_jax.documents import DOCUMENT_FILES
from genret_jax.errors import UserError
from genret_jax.files import replace_on_success
from genret_jax.indexing import FORMAT, Index, read_json
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.model import VECTORS, Params, RetrievalModel
from genret_jax.precision import PRECISIONS, reduced
from genret_jax.ranking import LookAhead, Ranked, Ranker
from genret_jax.scoring import SCORINGS, Fusion
from genret_jax.vectors import DocumentVectors
from genret_jax.weights import load_weights, save_weights

if TYPE_CHECKING:
    from genret_jax.corpus import Corpus

DEFAULT_BEAM = 100


@dataclasses.dataclass(frozen=True)
class RetrievedDocument(Hit):
    """A hit with what a person wants to see of it.

    Attributes:
      title: of the document.
      docid: its identifier as text.
      generation: log p(docid | query), in nats.
      semantic: similarity of query and document; None where the retriever has no vectors.
      fused: see `genret_jax.scoring.Fusion`; None where it has none.
      unseen: whether no train query names the document, which then has weights of its own; None
        where that is not told apart.
    """

    title: str
    docid: str
    generation: float
    semantic: float | None = None
    fused: float | None = None
    unseen: bool | None = None


@dataclasses.dataclass(frozen=True)
class Retriever:
    """A trained model over an index.

    Attributes:
      index: vocabulary, docids, trie, documents.
      params: weights, on the device.
      vectors: of the documents, memory-mapped; None for a retriever without a second stage.
      precision: of the weights; see `with_weights`.
      about: what retriever.json says.
      folder: where it was loaded from or saved to.

    Example:
      >>> retriever = Retriever.load("runs/onet")  # doctest: +SKIP
      >>> retriever.search("who fixes lifts?", k=3)  # doctest: +SKIP
    """

    index: Index
    params: Params
    about: dict[str, Any]
    folder: Path
    vectors: DocumentVectors | None = None
    precision: str = "float32"

    @property
    def name(self) -> str:
        return str(self.about["method"])

    @property
    def documents_digest(self) -> str:
        """Of the documents that it was made from; see `genret_jax.indexing.documents_digest`."""
        return str(self.index.about["documents_digest"])

    @classmethod
    def fit(
        cls,
        corpus: str | Path | Corpus,
        *,
        out: str | Path,
        method: str = "dogr",
        minutes: float | None = None,
        pseudo_queries: str | Path | None = None,
        **recipe: Any,
    ) -> Retriever:
        """Trains a retriever: `genret fit` from Python.

        Args:
          corpus: a BEIR folder, a corpus.jsonl, or a Corpus.
          out: folder of the run; a run that was interrupted goes on from its checkpoint.
          method: name of a method.
          minutes: time budget for everything; the recipe's steps without it.
          pseudo_queries: file of `genret pseudo-queries` to learn from, too.
          **recipe: `size`, `init` (a pretrained T5), `gin_files`, `bindings` of
            `genret_jax.recipe.load_recipe`.
        """
        from genret_jax.fit import fit
        from genret_jax.recipe import load_recipe

        return fit(
            corpus,
            recipe=load_recipe(method, **recipe),
            out=out,
            minutes=minutes,
            pseudo_queries=pseudo_queries,
        )

    @functools.cached_property
    def ranker(self) -> Ranker:
        stage = self.about.get("second_stage", {})
        network = dict(self.about["network"])
        if self.precision == "bfloat16":
            network["dtype"] = "bfloat16"
        normaliser = self.about.get("recipe", {}).get("loss", {}).get("normaliser", "vocabulary")
        model = RetrievalModel(
            T5Config(**network),
            self.index.vocabulary.docids,
            vector=stage.get("vector", VECTORS[0]),
            normaliser=self.index.normaliser(normaliser),
        )
        return Ranker(
            model=model,
            vocabulary=self.index.vocabulary,
            trie=self.index.trie,
            order=self.index.documents.order,
            input_length=int(self.about["input_length"]),
            similarity=stage.get("similarity", "cosine"),
            fusion=Fusion(**self.about.get("fusion", {})),
            unseen=self.vectors.unseen if self.vectors else None,
        )

    def with_weights(self, precision: str) -> Retriever:
        """The same retriever with weights of fewer bytes on the device, for searching.

        Args:
          precision: "float32"; "bfloat16", half the bytes, and activations of that type, too; or
            "int8", about a quarter. Scores move a little: measure with `genret evaluate --weights`.

        Raises:
          UserError: for another precision, or a retriever that was reduced before.
        """
        if precision not in PRECISIONS:
            raise UserError(
                f"weights {precision!r} are not known; choose one of {', '.join(PRECISIONS)}"
            )
        if precision == self.precision:
            return self
        if self.precision != "float32":
            raise UserError(f"the weights are {self.precision} already; load the retriever again")
        params = reduced(self.params, precision)
        return dataclasses.replace(self, params=params, precision=precision)

    @overload
    def search(  # type: ignore[overload-overlap]
        self,
        queries: str,
        *,
        k: int = ...,
        beam: int = ...,
        scoring: str | None = ...,
        only: Collection[str] | None = ...,
        without: Collection[str] = ...,
        look_ahead: float = ...,
    ) -> list[RetrievedDocument]: ...
    @overload
    def search(
        self,
        queries: Sequence[str],
        *,
        k: int = ...,
        beam: int = ...,
        scoring: str | None = ...,
        only: Collection[str] | None = ...,
        without: Collection[str] = ...,
        look_ahead: float = ...,
    ) -> list[list[RetrievedDocument]]: ...

    def search(
        self,
        queries: Any,
        *,
        k: int = 10,
        beam: int = DEFAULT_BEAM,
        scoring: str | None = None,
        only: Collection[str] | None = None,
        without: Collection[str] = (),
        look_ahead: float = 0.0,
    ) -> Any:
        """The best documents of a query, or of each of several queries.

        Args:
          queries: one query, or a sequence of them.
          k: documents at most; a beam smaller than k is widened to it.
          beam: hypotheses kept in decoding: more find more and take longer.
          scoring: "generation": log p(docid | query), in nats; "semantic": similarity of query
            and document, among the documents that the beam reached; "fused": both, with the
            weights that were best on dev. By default fused, where the retriever has vectors.
          only: ids of the documents among which to search; by default all.
          without: ids of documents that are not to be found. The beam runs on the identifiers of
            the documents that remain, none of its places goes to others, and scores are what they
            are without a filter.
          look_ahead: weight in nats of the best similarity under a prefix, which is added to the
            prefix' log p while the beam chooses, so that a document with an improbable beginning is
            not lost early; the scores of what is found stay the same. 0: log p alone.

        Returns:
          Hits, best first: a list for one query, a list of lists for several. Documents of equal
          score, such as those that share a docid when generation alone is asked for, stand in
          descending order of id.

        Raises:
          UserError: for k or beam below 1, a scoring that is unknown, a scoring or look_ahead that
            needs vectors that are not there, an id that no document has, a query that is no UTF-8,
            or a single query that is empty; among several queries an empty one has no hits.
        """
        scoring = self._scoring(scoring)
        if isinstance(queries, str):
            if not queries.strip():
                raise UserError("the query is empty; write some words")
            return self.search(
                [queries],
                k=k,
                beam=beam,
                scoring=scoring,
                only=only,
                without=without,
                look_ahead=look_ahead,
            )[0]
        if k < 1 or beam < 1:
            raise UserError(f"k and beam must be at least 1, found k={k} and beam={beam}")
        for query in queries:
            try:
                query.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"the query {query!r} is not UTF-8 ({error.reason})") from None
        # A query without words has no answer, as with BM25; the others are asked together.
        asked = [query for query in queries if query.strip()]
        beam = min(max(beam, k), len(self.index.trie.rows))
        similarities = self.vectors.of_several if self.vectors else None
        found = self.ranker.rank(
            self.params,
            asked,
            k=k,
            beam=beam,
            similarities=similarities,
            scoring=scoring,
            allowed=self._allowed(only, without),
            look_ahead=self._look_ahead(look_ahead),
        )
        ranked = iter(found)
        return [
            [self._hit(r, rank) for rank, r in enumerate(next(ranked), 1)] if query.strip() else []
            for query in queries
        ]

    def _allowed(self, only: Collection[str] | None, without: Collection[str]) -> Any:
        """bool[documents], or None for all."""
        if isinstance(only, str) or isinstance(without, str):
            raise UserError('only and without are lists of ids, such as ["d1"], not one text')
        if only is None and not without:
            return None
        documents = self.index.documents
        allowed = np.full(len(documents), only is None)
        allowed[documents.positions(only or ())] = True
        allowed[documents.positions(without)] = False
        return allowed

    def _look_ahead(self, weight: float) -> LookAhead | None:
        if not (weight >= 0 and math.isfinite(weight)):
            raise UserError(f"look-ahead must be a number from 0 on, found {weight}")
        if not weight:
            return None
        if not self.vectors:
            raise UserError(
                f"look-ahead needs document vectors, which {self.folder} has none of; fit with "
                "--method dogr, or leave it out"
            )
        return LookAhead(weight, self.vectors.of_all)

    def _scoring(self, asked: str | None) -> str:
        if asked is None:
            return "fused" if self.vectors else "generation"
        if asked not in SCORINGS:
            raise UserError(f"scoring {asked!r} is not known; choose one of {', '.join(SCORINGS)}")
        if asked != "generation" and not self.vectors:
            raise UserError(
                f"scoring {asked!r} needs document vectors, which {self.folder} has none of; fit "
                "with --method dogr, or use generation"
            )
        return asked

    def _hit(self, ranked: Ranked, rank: int) -> RetrievedDocument:
        document = self.index.documents[ranked.position]
        labels = self.index.table.labels
        tokens = [int(t) for t in self.index.trie.rows[ranked.row] if t > 1]
        return RetrievedDocument(
            document=document.id,
            score=ranked.score,
            rank=rank,
            title=document.title,
            docid=" · ".join(labels[t] for t in tokens),
            generation=ranked.generation,
            semantic=ranked.semantic,
            fused=ranked.fused,
            unseen=ranked.unseen,
        )

    def save(self, folder: str | Path) -> None:
        """Writes the whole retriever to a folder, beside it first and then renamed.

        Raises:
          UserError: when its weights are not those of float32 that it was loaded with.
        """
        if self.precision != "float32":
            raise UserError(f"weights of {self.precision} are for searching; save the loaded ones")
        write_retriever(
            self.params,
            self.about,
            index_folder=self.folder,
            folder=folder,
            vectors=self.vectors,
        )

    @classmethod
    def load(cls, folder: str | Path) -> Retriever:
        """Opens a retriever: its own folder, or the run folder that `genret fit` made.

        Raises:
          UserError: when there is none, or an unfinished or foreign one.
        """
        folder = find_retriever(Path(folder))
        about = read_json(folder / "retriever.json", what="retriever")
        if about.get("searcher"):
            raise UserError(
                f"{folder}: is of method {about.get('method')}, which does not generate; open it "
                "with genret_jax.searchers.open_searcher"
            )
        index = Index.load(folder)
        try:
            T5Config(**about["network"])
            _ = int(about["input_length"]), about["method"], about["corpus"]["path"]
            _ = Fusion(**about.get("fusion", {})), about.get("second_stage", {}).get("vector")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{folder / 'retriever.json'}: damaged, or of another version ({error!r}); "
                "run `genret fit` again"
            ) from None
        params = jax.tree.map(jax.numpy.asarray, load_weights(folder / "model.safetensors"))
        vectors = None
        if "fusion" in about:
            vectors = DocumentVectors.load(
                folder, documents=len(index.documents), width=int(about["network"]["embed_dim"])
            )
            if vectors.unseen is None and "unseen_weight" in about["fusion"]:
                raise UserError(
                    f"{folder}: which documents no train query names is not here, and has a "
                    "weight; run `genret fit` again"
                )
        return cls(index=index, params=params, about=about, folder=folder, vectors=vectors)


def find_retriever(folder: Path) -> Path:
    """The retriever folder at or in `folder`.

    Raises:
      UserError: saying what is there instead.
    """
    if (folder / "retriever.json").is_file():
        return folder
    if (folder / "retriever" / "retriever.json").is_file():
        return folder / "retriever"
    if not folder.exists():
        raise UserError(f"{folder}: no such folder; train a retriever with `genret fit CORPUS`")
    if (folder / "training").is_dir():
        raise UserError(
            f"{folder}: its training has not ended; run the same `genret fit` again to go on"
        )
    if (folder / "index" / "index.json").is_file() or (folder / "index.json").is_file():
        raise UserError(f"{folder}: an index without a model; train one with `genret fit`")
    raise UserError(f"{folder}: not a retriever of genret_jax; give the --out folder of a fit")


def write_retriever(
    params: Params,
    about: dict[str, Any],
    *,
    index_folder: Path,
    folder: str | Path,
    vectors: DocumentVectors | None = None,
) -> None:
    """Puts index, weights and metadata together in `folder`, whole or not at all.

    Args:
      params: weights.
      about: for retriever.json.
      index_folder: an index, or another retriever; its files are linked where the file system
        can, and copied where not.
      folder: of the retriever.
      vectors: of the documents, where there was a second stage.
    """
    with replace_on_success(folder) as temporary:
        temporary.mkdir()
        for name in ("index.json", "spiece.model", "vocabulary.json"):
            _link(index_folder / name, temporary / name)
        for name in DOCUMENT_FILES:
            _link(index_folder / name, temporary / name)
        for name in ("docids", "trie"):
            shutil.copytree(index_folder / name, temporary / name, copy_function=_link)
        save_weights(params, temporary / "model.safetensors")
        if vectors:
            vectors.save(temporary)
        about = {"format": FORMAT, **about}
        (temporary / "retriever.json").write_text(json.dumps(about, indent=1))
        (temporary / "metrics.json").write_text(json.dumps({"dev": about["dev"]}, indent=1))
        (temporary / "README.md").write_text(model_card(about))


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def model_card(about: dict[str, Any]) -> str:
    """A retriever's README: what it is, what it was trained on, how well it does on dev."""
    corpus, training = about["corpus"], about["training"]
    init = about.get("recipe", {}).get("train", {}).get("init")
    began = f"\n- it began as the pretrained T5 {init}" if init else ""
    dev = "\n".join(f"| {name} | {value:.3f} |" for name, value in about["dev"].items())
    return f"""# {about["method"]} over {corpus["name"]}

A generative retriever made by genret_jax: a T5-style encoder-decoder that writes the identifier
of the document that answers a query, inside a trie of the identifiers that exist.

- documents: {corpus["documents"]}; train pairs: {training["pairs"]}
- dev queries: {training["dev_queries"]}
- identifiers: {about["docids"]["kind"]} {json.dumps(about["docids"]["settings"])}
- parameters: {about["parameters"]:,}{began}
- training: {training["steps"]} steps, {training["seconds"] / 60:.1f} minutes
- the parameters are those of step {training["best_step"]}, the best on dev

| dev metric | beam {training["dev_beam"]} |
|---|---|
{dev}

It knows the documents of its corpus and no others, and its scores do not compare between
queries. Search it with `genret search FOLDER "query"`.
"""
